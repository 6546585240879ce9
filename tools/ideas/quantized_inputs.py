"""Idea: rounding for inputs by quantized layers. An --idea of `python -m tools.explore`.

GPTQ takes a layer's inputs X from the float model. In the artifact they are X', which earlier
layers' errors have changed, and the layer should still give W X. So layers are rounded in the
order in which they run, each for the X' that those before it make:

    |W X - V X'|² = |(W* - V) X'|² + what no V can change,
    W* = (2 W X X'^T + d W) (2 X' X'^T + d I)^-1.

That is gptq() of W* with the Hessian 2 X' X'^T, and d its damping: W* undoes of earlier errors what
X' foretells of them. Embeddings are rounded first, as before. A matrix keeps its grid.

Where a layer's outputs are added to the residual stream S, it can also make up for what the stream
itself is off by then: it should give W X + S - S', and 2 (S - S') X'^T is added to 2 W X X'^T.

To compare all on the same weights, this is done only if GPTQ_BLOCK_SIZE is 64, or with the stream
32: --requantize "quantized inputs: GPTQ_BLOCK_SIZE=64". Source: asymmetric calibration, as in
GPTAQ, arXiv 2504.02692, here by least squares.
"""

import torch

QUANTIZED_BLOCKS = 64
STREAM_BLOCKS = 32
ADDING = ("out", "out_proj", "down")  # layers whose outputs are added to the stream


def run_order(model, tokens: torch.Tensor) -> list[list[str]]:
    """Names of linear layers' weights, as they first run on tokens (B, T); a list shares its X."""
    order: list[list[str]] = []
    seen = []  # the inputs of each list

    def hook(name: str):
        def note(layer, positional, output):
            if any(name in names for names in order):
                return
            if not seen or seen[-1] is not positional[0]:
                order.append([])
                seen.append(positional[0])
            order[-1].append(name)

        return note

    layers = model.linear_layers().items()
    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers]
    model(tokens, model.full_order)
    for handle in hooks:
        handle.remove()
    return order


def read_layer(model, name: str, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """X (n, columns) of a layer on tokens (B, T), and S (n, rows) or None, float32.

    Both in the order in which the layer runs. S: the stream that its outputs are added to.
    """
    inputs = []
    streams = []

    def keep_inputs(layer, positional, named, output):
        inputs.append(layer.effective_input(*positional, **named))

    def keep_mixed(block, positional):
        x, embedded, *_ = positional
        keep, mix = block.residual_mix.to(x.dtype)
        streams.append(keep * x + mix * embedded)

    def keep_stream(mlp, positional):
        streams.append(positional[0])

    layer = model.linear_layers()[name]
    hooks = [layer.register_forward_hook(keep_inputs, with_kwargs=True)]
    kind = name.split(".")  # as blocks.0.mixer.out_proj.weight
    if kind[-2] in ADDING:
        block = model.blocks[int(kind[1])]
        if kind[2] == "mlp":
            hooks.append(block.mlp.register_forward_pre_hook(keep_stream))
        else:
            hooks.append(block.register_forward_pre_hook(keep_mixed))
    model(tokens, model.full_order)
    for handle in hooks:
        handle.remove()
    x, s = (
        torch.cat(parts).float().flatten(0, -2) if parts else None for parts in (inputs, streams)
    )
    return x, s


def collect(model, name: str, parts, floats: dict, rounded: dict) -> list[torch.Tensor]:
    """Of a layer: 2 X' X'^T, 2 X X'^T (columns, columns), 2 (S - S') X'^T (rows, columns).

    floats and rounded: the weights that make X and X'. The model is left with floats.
    """
    sums = [0.0, 0.0, torch.zeros_like(floats[name])]
    for tokens in parts:
        model.load_state_dict(rounded, strict=False)
        changed, stream_now = read_layer(model, name, tokens)
        model.load_state_dict(floats, strict=False)
        usual, stream = read_layer(model, name, tokens)
        sums[0] += 2 * changed.mT @ changed
        sums[1] += 2 * usual.mT @ changed
        if stream is not None:
            sums[2] += 2 * (stream - stream_now).mT @ changed
    return sums


def best_weight(weight, hessian, cross, lost, damp: float) -> torch.Tensor:
    """W* (rows, columns) of a weight, by what collect() returns and GPTQ_DAMP."""
    h, c = hessian.double(), cross.double()
    damping = damp * h.diagonal().mean().clamp(min=1e-9) * torch.eye(len(h), device=h.device)
    wanted = weight.double() @ (c + damping) + lost.double()
    return torch.linalg.solve(h + damping, wanted.mT).mT.float()


def install(script) -> None:
    """Changes train_gpt.py's calibrate(), calibration_sequences() and quantize_model()."""
    # Only here: an idea is loaded by its path, and has a package's others once it is at work.
    from tools.ideas.steps_trained_again import points_of

    usual_calibrate = script.calibrate
    usual_sequences = script.calibration_sequences
    usual_quantize = script.quantize_model
    taken = {}

    def calibration_sequences(*arguments):
        """As the script's, which are read again for each layer."""
        taken["sequences"] = usual_sequences(*arguments)
        return taken["sequences"]

    def calibrate(trainer, batches):
        """As the script's."""
        taken["rows"] = trainer.calibration_rows
        return usual_calibrate(trainer, batches)

    @torch.no_grad()
    def quantize_model(model, settings, ranks, solvers, k, track=iter):
        """As the script's; then linear layers are rounded anew, one after the other."""
        stored = usual_quantize(model, settings, ranks, solvers, k, track)
        if settings.gptq_block_size not in (QUANTIZED_BLOCKS, STREAM_BLOCKS):
            return stored
        parts = taken["sequences"].split(taken["rows"])
        states = settings.trellis_states
        limits = script.grid_limits(model)
        grids = {name: grid for name, *grid in script.grids(model, settings, limits, k)}
        floats = {name: weight.clone() for name, (weight, *_) in grids.items()}
        rounded = floats | {
            name: points_of(script, stored, name, states)[0]
            for name in grids.keys() - model.linear_layers().keys()
        }
        for names in track(run_order(model, parts[0])):
            found = collect(model, names[0], parts, floats, rounded)
            hessian, cross, lost = map(ranks.sum_, found)
            if settings.gptq_block_size == QUANTIZED_BLOCKS or len(names) > 1:
                lost = lost.new_zeros(1)  # layers that share inputs add nothing to the stream
            solver = script.factor_hessian(hessian, settings.gptq_damp)
            for name in names:
                _, most, rows, columns = grids[name]
                target = best_weight(floats[name], hessian, cross, lost, settings.gptq_damp)
                costs = model.row_costs.get(name, torch.ones_like(rows))
                weights = (costs / costs.mean()).sqrt()
                scale = rows * columns
                points = script.gptq(target, scale, most, *solver, weights, 128, states)
                stored[f"{name} integers"].copy_(points.floor())
                rounded[name] = points * scale
        return stored

    script.calibration_sequences = calibration_sequences
    script.calibrate = calibrate
    script.quantize_model = quantize_model
