"""The MLP's products in 8-bit floats: interpreted in float32, beside formulas with rounding and
without.

    python -m tests.test_eight_bit_mlp [NAME ...]

prints what the kernels need on an H100, for these TILES or all.
"""

import os
import sys
from types import SimpleNamespace

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported
    from tests import compile_kernels

import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from tests.support import CPU, interpreted, random_model, tiny
from tools.ideas import eight_bit_mlp as idea

ALL = "forward,down,backward,input,slope"
SMALL_TILES = {"tall": (16, 128, 16, 2, 4, 1, None), "flat": (16, 256, 16, 2, 4, 1, None)}


def random_case(rows: int, width: int, hidden: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Rows of several sizes, both matrices (float32) and a gradient of the result."""
    torch.manual_seed(rows)
    x, d_y = torch.randn(2, rows, width) * torch.rand(2, rows, 1).exp()
    up, down = torch.randn(hidden, width) / 30, torch.randn(width, hidden) / 50
    return [x.to(dtype), up, down, (1e-5 * d_y).to(dtype)]


def formula(x, up, down):
    """The MLP of a layer whose inputs are halved."""
    return F.leaky_relu(0.5 * t.norm(x) @ up.mT, 0.5).square() @ down.mT


def by_kernels(parts: str):
    def result(x, up, down):
        x8, factor = idea.rounded_norm(x)
        return idea.eight_mlp(x, x8, 0.5 * factor, up, down, 0.5, parts)[0]

    return result


def outcomes(function, case: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradients of x and of both matrices."""
    leaves = [x.detach().requires_grad_() for x in case[:3]]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, case[3].to(y.dtype))]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of few rows and short sums, so that small tensors have several."""
    monkeypatch.setattr(idea, "TILES", SMALL_TILES)
    monkeypatch.setenv("IDEA_EIGHT_TILES", "tall,flat")
    monkeypatch.setattr(t, "MLP_TILES", dict.fromkeys(t.MLP_TILES, (16, 256, 16, 2)))


@interpreted
@pytest.mark.parametrize(
    ("parts", "tiles", "sizes"),
    [
        (ALL, "flat,tall", (32, 32, 256)),
        ("forward,down,backward,input", "tall,flat", (45, 40, 512)),  # rests of rows and of sums
        ("forward", "flat,tall", (20, 16, 256)),
        ("forward,backward", "tall,tall", (20, 16, 256)),
        ("backward,input", "tall,flat", (20, 16, 256)),
    ],
)
def test_unrounded_the_kernels_compute_the_formula(monkeypatch, small_tiles, parts, tiles, sizes):
    """In float32 nothing is rounded: all factors that scale and unscale are right."""
    monkeypatch.setenv("IDEA_EIGHT_TILES", tiles)
    case = random_case(*sizes)
    function = torch.compile(by_kernels(parts), fullgraph=True, backend="aot_eager")
    for x, y in zip(outcomes(formula, case), outcomes(function, case), strict=True):
        assert relative_error(y, x) < 1e-5


def formula_with_rounding(case: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return idea.eight_mlp_by_formula(*case, 0.5)


def true_parts(case: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What eight_mlp_by_formula() approximates, but for scales of 8-bit numbers."""
    x, up, down, d_y = (a.float() for a in case)
    scaled = 0.5 * t.norm(x)
    v = scaled @ up.mT
    active = F.leaky_relu(v, 0.5).square()
    d_v = d_y @ down * torch.where(v < 0, v / 2, 2 * v) * (scaled[:, :1] / x[:, :1])
    return {"y": active @ down.mT, "d_v": d_v, "d_x": d_v @ up}


def test_the_reference_without_rounding_is_the_formula():
    case = random_case(64, 48, 256)
    found = formula_with_rounding(case)
    for name, wanted in true_parts(case).items():
        assert relative_error(found[name], wanted) < 1e-5


def test_rounding_costs_some_percent_and_saturates_nothing():
    """Of random numbers, as much as one rounds relatively: 2 to 3 % for each factor."""
    case = random_case(256, 512, 512, torch.bfloat16)
    found = formula_with_rounding(case)
    for name, wanted in true_parts(case).items():
        assert 0.01 < relative_error(found[name], wanted) < 0.07, name
    eight = found["active8"]
    assert eight.dtype == torch.float8_e4m3fn
    assert eight.float().max() < 100
    assert 0.1 < eight.float().square().mean().sqrt() < 1


@pytest.mark.parametrize("width", [32, 512, 768, 1024])
def test_no_row_saturates(width):
    """Not even one whose length is that of a single number; and a NaN is not hidden."""
    rows = torch.zeros(3, width, dtype=torch.bfloat16)
    rows[0, 3] = rows[2, 0] = 1e-6
    rows[2, 1] = float("nan")
    rounded, size = idea.rounded_rows(rows)
    assert 224 * 0.7 < rounded.float()[0, 3] <= 448
    back = rounded.float() * size.unsqueeze(1)
    assert abs(back[0, 3] / 1e-6 - 1) < 0.08
    assert not back[1].any()
    assert back[2].isnan().any()


@interpreted
def test_weights_are_scaled_by_their_root_mean_squares_and_transposed():
    first, second = torch.randn(96, 40) / 7, torch.zeros(40, 96)
    scalars, *found = idea.weights_in_eight(first, second, torch.float32, 0.5)
    for matrix, plain, turned in ((first, *found[:2]), (second, *found[2:])):
        wanted, back = idea.rounded_weight(matrix, torch.float32)
        torch.testing.assert_close(plain, wanted)
        assert torch.equal(turned, plain.mT)
    torch.testing.assert_close(scalars[int(idea.DOWN)], back)  # of zeros, too, it is finite


@interpreted
def test_in_projs_product_and_its_gradients():
    x, weight = torch.randn(20, 32), torch.randn(48, 32)

    def product(x, weight):
        x8 = idea.to_eight(x.detach() * idea.row_scale(32) / 0.5, x.dtype)
        return idea.eight_linear(x, x8, weight, 0.5)

    def found(function) -> list[torch.Tensor]:
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    for wanted, y in zip(found(F.linear), found(compiled), strict=True):
        assert relative_error(y, wanted) < 1e-5


@pytest.mark.parametrize("parts", ["down", "forward,input", "forward,backward,slope", "up"])
def test_parts_that_miss_others_are_refused(monkeypatch, parts):
    monkeypatch.setenv("IDEA_EIGHT_PARTS", parts)
    with pytest.raises(t.UserError, match="IDEA_EIGHT_PARTS"):
        idea.install(SimpleNamespace())


@interpreted
def test_a_model_with_the_idea_computes_the_same(monkeypatch, small_tiles):
    """Loss and every gradient, deeper layers' smaller inputs included; by whole graphs."""
    settings = tiny(mlp_mult=8, ln_scale=True, mamba_d_state=16, scan_backend="chunked")
    model = random_model(settings)
    tokens, targets = torch.randint(0, settings.vocab_size, (2, 2, settings.train_seq_len))

    def found(model) -> list[torch.Tensor]:
        parameters = list(model.parameters())
        loss = model.nats(compiled(model)(tokens, model.order(False)), targets).mean()
        return [loss, *torch.autograd.grad(loss, parameters)]

    def compiled(model):
        return torch.compile(model, fullgraph=True, backend="aot_eager")

    plain = found(model)
    for name in ("MLP", "Block"):
        monkeypatch.setattr(t, name, getattr(t, name))  # which is undone
    monkeypatch.setattr(idea, "has_eight_bits", lambda device: True)
    idea.install(t)
    monkeypatch.setattr(t.MLP, "forward", t.MLP.fused)
    other = t.Model(settings, CPU, model.blocks[0].mixer.backend)
    other.load_state_dict(model.state_dict())
    assert type(other.blocks[0].mixer.in_proj) is not t.Linear
    for x, y in zip(plain, found(other), strict=True):
        assert (x - y).norm() <= 1e-4 * x.norm() + 1e-9


def main() -> None:
    """Compiles the kernels for compute capability 9.0, as PRESET=short has their sizes."""
    compiler = compile_kernels.Compiler(90)
    compiler.kernels += ("sum_squares", "round_weights", "eight_forward", "eight_backward")
    idea.scaled_product = lambda a8, b8, *scales: torch.empty(len(a8), len(b8)).bfloat16()
    for name in sys.argv[1:] or idea.TILES:
        os.environ["IDEA_EIGHT_TILES"] = f"{name},{name}"
        for parts in (ALL, idea.DEFAULT_PARTS, "forward,backward"):
            compiler.built.clear()
            case = random_case(256, 512, 2048, torch.bfloat16)
            outcomes(by_kernels(parts), case)
            for kernel, built in compiler.built.items():
                print(f"{name} {parts} {kernel}: {compile_kernels.usage(built)}", flush=True)


if __name__ == "__main__":
    main()
