"""Idea: gradients of the MLP's weights in 8 bits, too. An --idea of `python -m tools.explore` and
`python -m bench.steps`.

FLOAT8_PRODUCTS=auto computes the MLP's products up to its input's gradient in 8 bits. The script's
section on them says how weights' gradients can follow: FLOAT8_PRODUCTS=mlp,in_proj,gradients. Here
auto does, where it runs at all, so that it stands beside itself without.
"""


def install(script) -> None:
    """Changes what train_gpt.py's FLOAT8_PRODUCTS=auto means."""
    usual = script.choose_float8

    def choose_float8(*given) -> str:
        """The usual products and, with the MLP's, the gradients of its weights."""
        products = usual(*given)
        if "mlp" in products and "gradients" not in products:
            products += ",gradients"
        return products

    script.choose_float8 = choose_float8
    script.EVERY_FLOAT8 += ",gradients"  # as a run's log says
