"""Idea: GPTQ's row steps are trained once more. An --idea of `python -m tools.explore`.

GPTQ rounds layer by layer. A gain g for each row could repair part of what all errors together do
to the text, at no cost in bytes: the model has (1 + g) W instead of the integers' points W, and the
row's step is stored as (1 + g) times its own. Here 32 steps of Adam on training text learn all
rows' g, with a rate that falls from RATE to 0.

The float weights are trained by the same steps, too, and may gain as much: then it is not the
quantization that costs less. So each export logs the mean nats of training text that no step read,
for both, before and after. With GPTQ_BLOCK_SIZE=32 the artifact has the trained steps; with 128,
which changes no more than float32's rounding, it is as before:

    --export "as it is:" --requantize "steps trained again: GPTQ_BLOCK_SIZE=32"
"""

import torch

STEPS = 32
HELD = 4  # batches that no step reads
RATE = 0.001
TRAINED_BLOCKS = 32


def loss_of(model, batch, rows: int) -> torch.Tensor:
    """Mean nats of a batch, (), with gradients added to those of the parameters if wanted."""
    parts = list(zip(*(x.split(rows) for x in batch), strict=True))
    total = 0.0
    for tokens, targets in parts:
        loss = model.loss(tokens, targets, model.full_order) / len(parts)
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def held_loss(model, weights: dict, batches: list, rows: int) -> float:
    """Mean nats of batches with these weights in the place of the parameters of their names."""
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)
    return float(sum(loss_of(model, batch, rows) for batch in batches) / len(batches))


@torch.enable_grad()
def train_gains(model, weights: dict, batches: list, rows: int) -> dict[str, torch.Tensor]:
    """Each matrix's g (rows, 1), from a step on each batch; weights are theirs with g = 0."""
    gains = {name: torch.zeros_like(weight[:, :1]) for name, weight in weights.items()}
    optimizer = torch.optim.Adam(list(gains.values()), betas=(0.9, 0.95))
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / len(batches))
        with torch.no_grad():
            for name, weight in weights.items():
                model.get_parameter(name).copy_(weight * (1 + gains[name]))
        model.zero_grad()
        loss_of(model, batch, rows)
        for name, weight in weights.items():
            gains[name].grad = (model.get_parameter(name).grad * weight).sum(1, keepdim=True)
        optimizer.step()
    model.zero_grad()
    return gains


def points_of(script, stored: dict, name: str, states: int) -> tuple[torch.Tensor, ...]:
    """A matrix as the artifact holds it (rows, columns), and its steps of rows and of columns."""
    integers = stored[f"{name} integers"]
    rows, columns = stored[name].float().split(list(integers.shape))
    points = script.trellis_points(integers, states) if states else integers.float()
    return points * rows[:, None] * columns, rows, columns


def install(script) -> None:
    """Changes train_gpt.py's calibrate() and quantize_model()."""
    usual_calibrate = script.calibrate
    usual_quantize = script.quantize_model
    taken = {}

    def calibrate(trainer, batches):
        """As the script's, which then takes batches for the gains."""
        found = usual_calibrate(trainer, batches)
        later = [batches.next() for _ in range(STEPS + HELD)]
        taken.update(trainer=trainer, batches=later[HELD:], held=later[:HELD])
        return found

    def quantize_model(model, settings, ranks, solvers, k, track=iter):
        """As the script's; gains are trained, told, and stored if asked for."""
        stored = usual_quantize(model, settings, ranks, solvers, k, track)
        trainer, held = taken["trainer"], taken["held"]
        rows = trainer.calibration_rows
        names = list(script.grid_limits(model))
        floats = {name: model.get_parameter(name).detach().clone() for name in names}
        parts = {name: points_of(script, stored, name, settings.trellis_states) for name in names}
        told = {}
        for what, weights in (
            ("quantized", {name: points for name, (points, *_) in parts.items()}),
            ("floats", floats),
        ):
            told[what] = held_loss(model, weights, held, rows)
            gains = train_gains(model, weights, taken["batches"], rows)
            again = {name: weight * (1 + gains[name]) for name, weight in weights.items()}
            told[f"{what} again"] = held_loss(model, again, held, rows)
            if what == "quantized" and settings.gptq_block_size == TRAINED_BLOCKS:
                for name, (_, steps, columns) in parts.items():
                    trained = steps * (1 + gains[name].squeeze(1))
                    stored[name] = torch.cat([trained, columns]).half()
        with torch.no_grad():
            for name, weight in floats.items():
                model.get_parameter(name).copy_(weight)
        trainer.log(", ".join(f"{what} {nats:.5f}" for what, nats in told.items()))
        return stored

    script.calibrate = calibrate
    script.quantize_model = quantize_model
