"""Idea: what an artifact stores beside its integers is trained once more. For --idea of explore.

Once GPTQ has fixed the integers Q, the grid steps of rows (and columns) and the vectors still are
numbers that the model's own loss can move: a few steps on the training text that comes next, by the
training step that is compiled already. It needs no gradient through the grid. With the gradient G
of a matrix

    W[i, j] = Q[i, j] · row_step[i] · column_step[j]

that of the logarithm of row_step[i] is sum_j G[i, j] W[i, j], and likewise for a column. Adam moves
logarithms and vectors; matrices are then written anew. The model that trained keeps its shared
spelling, at zero and with the sums in the rows, or it would compile again: a copy is quantized.

The gradient of one batch is mostly the batch's own noise, of which the model before quantization
has nearly the same. Tuning.relative takes that one's gradient off (a control variate, as in SVRG,
Johnson and Zhang 2013): its mean is about zero, as training ended there. That costs a second
backward pass a step, at the same compiled code.

GPTQ_DAMP names the variant, so that --requantize compares them on the same weights and the same
calibration: 0.0101 is the first of VARIANTS, 0.0102 the second, and so on; all are quantized with
0.01. Other values quantize as the script does, 0.01 among them: the control.

    python -m tools.explore --export --idea tools/ideas/tune_after_quantization.py "it:" \\
        --requantize "nothing: GPTQ_DAMP=0.01" --requantize "vectors: GPTQ_DAMP=0.0102"

Tuned steps of rows are stored to STEP_BITS leading bits, the script's to four: k is fitted for what
that takes, and for the steps of columns, which the script has none of.
"""

import contextlib
import copy
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

FIRST_MARK = 0.01  # GPTQ_DAMP of variant 0, which is none
MARKS = 10_000  # to the unit
STEP_BITS = 6  # leading ones of a tuned step: within 1.6 %
STEP_BYTES = {"rows": 0.4, "columns": 1.0}  # that a tuned step takes more than the script's


class Tuning(NamedTuple):
    """A stage of tuning; a rate of 0 leaves those numbers as they are."""

    steps: int = 40
    rows: float = 1e-3  # Adam's rate of the logarithms of row steps
    columns: float = 0.0  # likewise; each column's step then takes two bytes of the artifact
    vectors: float = 0.1  # of SCALAR_LR
    relative: bool = False  # less the gradient before quantization
    late: float = 2.0  # matrices from this depth() on are rounded after this stage, and
    floats: float = 1e-3  # move freely in it, at this part of their root mean square
    momentum: float = 0.9  # Adam's first beta
    beta2: float = 0.99  # and its second


ROWS = Tuning(steps=8, rows=3e-3, relative=True)
VECTORS = ROWS._replace(rows=0.0)
LATE = ROWS._replace(steps=20, late=0.5, floats=5e-3)
VARIANTS = {
    1: [ROWS],
    2: [VECTORS],
    3: [ROWS._replace(steps=24)],
    4: [ROWS._replace(steps=24, columns=3e-3)],
    5: [Tuning(steps=40)],
    6: [LATE, ROWS],
}


def chosen_stages(settings) -> list[Tuning]:
    """The variant that GPTQ_DAMP names."""
    return VARIANTS.get(round((settings.gptq_damp - FIRST_MARK) * MARKS), [])


def rounded_steps(script, steps: Tensor) -> Tensor:
    """The nearest numbers of STEP_BITS leading bits, float32."""
    numbers = script.exact_steps(steps).half().view(torch.int16)
    place = 1 << (11 - STEP_BITS)  # of the last bit that stays
    return ((numbers + place // 2) & -place).view(torch.float16).float()


def depth(name: str, layers: int) -> float:
    """Where in the model a matrix stands: layers from 0 on, token tables that are tied at 1."""
    if name in ("embedding.weight", "output_embedding.weight"):
        return 1.0
    return int(name.split(".")[1]) / layers if name.startswith("blocks.") else 0.0


def trained_parameters(model) -> dict[str, Tensor]:
    """Parameters of a model in training by their names in an artifact, without shared spelling."""
    found = {}
    for name, p in model.named_parameters():
        if not name.endswith(".shared"):
            found[name.replace("parametrizations.weight.original", "weight")] = p
    return found


def folded_copy(script, model, ranks):
    """A model of its own as fold_spelling() leaves one, which would take the weight's property
    off the class of the embedding, and so off a deep copy's original.
    """
    weights = dict(trained_parameters(model)) | {"embedding.weight": model.embedding.weight}
    folded = script.build_model(model.settings, ranks)
    folded.load_state_dict(weights)
    return folded


@contextlib.contextmanager
def training_weights_kept(model):
    """Inside, a model's spelling is folded, its shared part of zeros; then it is as it was."""
    parameters = [p.detach() for p in model.parameters()]
    kept = [p.clone() for p in parameters]
    table = model.embedding.weight.detach().clone()
    for name, p in model.embedding.named_parameters():
        p.detach().copy_(torch.zeros_like(p) if name.endswith(".shared") else table)
    try:
        yield
    finally:
        torch._foreach_copy_(parameters, kept)


class Descent:
    """Adam, each number of which has its own tensor's rate."""

    def __init__(self, rates: list[tuple[Tensor, float]], tuning: Tuning):
        """rates: what is moved, and at which rate."""
        self.tensors = [tensor for tensor, _ in rates]
        self.rates = [rate for _, rate in rates]
        self.tuning = tuning
        self.means = [torch.zeros_like(x) for x in self.tensors]
        self.squares = [torch.zeros_like(x) for x in self.tensors]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: list[Tensor], factor: float):
        """A step at this part of all rates."""
        beta = self.tuning.momentum
        beta2 = self.tuning.beta2
        self.steps += 1
        torch._foreach_lerp_(self.means, gradients, 1 - beta)
        squares = torch._foreach_mul(gradients, gradients)
        torch._foreach_lerp_(self.squares, squares, 1 - beta2)
        of_mean = 1 - beta**self.steps
        of_square = 1 - beta2**self.steps
        moves = zip(self.tensors, self.means, self.squares, self.rates, strict=True)
        for tensor, mean, square, rate in moves:
            usual = (square / of_square).sqrt() + 1e-12
            tensor.sub_(mean / usual, alpha=factor * rate / of_mean)


class Tuner:
    """One stage: trains on, by a trainer's compiled loss, what is stored beside integers.

    trainer.model is the one that trained, which takes the weights of each step; stored is what the
    artifact has of the matrices that are rounded, others' weights are in model. run() moves them,
    write_back() puts them there.
    """

    def __init__(self, script, trainer, model, stored: dict[str, Tensor], tuning: Tuning):
        self.script = script
        self.trainer = trainer
        self.tuning = tuning
        self.model = model
        self.stored = stored
        self.parameters = trained_parameters(trainer.model)
        self.floats = [p.detach().clone() for p in self.parameters.values()]
        limits = script.grid_limits(model)
        self.rounded = [name for name in limits if f"{name} integers" in stored]
        self.free = [name for name in limits if f"{name} integers" not in stored]
        self.vectors = [name for name in self.parameters if name not in limits]
        with torch.no_grad():
            for name in self.free + self.vectors:
                self.parameters[name].copy_(model.get_parameter(name))
        self.grids = {name: self._dequantized(name) for name in self.rounded}
        self.row_logs = self._zeros(0) if tuning.rows else {}
        self.column_logs = self._zeros(1) if tuning.columns else {}
        self.descent = Descent(self._rates(), tuning)
        self.write_matrices()

    @torch.no_grad()
    def _dequantized(self, name: str) -> Tensor:
        """A matrix as its artifact has it, float32."""
        rows, columns = self.stored[name].float().split(self.parameters[name].shape)
        points = self.stored[f"{name} integers"]
        if states := self.trainer.settings.trellis_states:
            points = self.script.trellis_points(points.int().cpu(), states).to(rows.device)
        return points * rows[:, None] * columns

    def _zeros(self, side: int) -> dict[str, Tensor]:
        """Changes of the logarithms of grid steps, by matrix; side 0: of rows, 1: of columns."""
        shapes = {name: self.parameters[name].shape[side] for name in self.rounded}
        device = self.trainer.ranks.device
        return {name: torch.zeros(n, device=device) for name, n in shapes.items()}

    @torch.no_grad()
    def _rates(self) -> list[tuple[Tensor, float]]:
        """What is moved, in the order of _moved_gradients(), and the rate of each."""
        tuning = self.tuning
        found = [(log, tuning.rows) for log in self.row_logs.values()]
        found += [(log, tuning.columns) for log in self.column_logs.values()]
        rate = tuning.vectors * self.trainer.settings.scalar_lr
        found += [(self.parameters[name].detach(), rate) for name in self.vectors if rate]
        for name in self.free:
            p = self.parameters[name].detach()
            found.append((p, tuning.floats * float(p.square().mean().sqrt())))
        return found

    @torch.no_grad()
    def write_matrices(self):
        """Puts the rounded matrices, with the grid steps as they are now, into the model."""
        for name, weight in self.grids.items():
            if self.row_logs:
                weight = weight * self.row_logs[name].exp()[:, None]
            if self.column_logs:
                weight = weight * self.column_logs[name].exp()
            self.parameters[name].copy_(weight)

    def gradients(self, tokens: Tensor, targets: Tensor) -> tuple[list, Tensor]:
        """Those of all parameters at the model's weights, and the loss; none stay behind."""
        with torch.enable_grad():
            order = self.trainer.model.full_order
            loss = self.trainer.accumulate_gradients(tokens, targets, order)
        found = []
        for p in self.parameters.values():  # copies: several ranks write each into the last one
            found.append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
        for p in self.trainer.model.parameters():
            p.grad = None
        scale = self.trainer.optimizers.loss_scale()
        if scale is not None:
            torch._foreach_div_(found, scale)
        return found, loss

    @torch.no_grad()
    def step(self, tokens: Tensor, targets: Tensor, rate: float) -> Tensor:
        """A step at this part of all rates; returns the loss, ()."""
        found, loss = self.gradients(tokens, targets)
        moved = self._moved_gradients(found)
        if self.tuning.relative:
            parameters = [p.detach() for p in self.parameters.values()]
            now = [p.clone() for p in parameters]
            torch._foreach_copy_(parameters, self.floats)
            found, before = self.gradients(tokens, targets)
            torch._foreach_copy_(parameters, now)
            moved = torch._foreach_sub(moved, self._moved_gradients(found))
            loss = loss - before
        self.descent.step(moved, rate)
        self.write_matrices()
        return loss

    def _moved_gradients(self, found: list[Tensor]) -> list[Tensor]:
        """The gradients of what is moved, from those of the model's parameters."""
        gradients = dict(zip(self.parameters, found, strict=True))
        products = {name: gradients[name] * self.parameters[name] for name in self.rounded}
        moved = [products[name].sum(1) for name in self.row_logs]
        moved += [products[name].sum(0) for name in self.column_logs]
        others = self.vectors if self.tuning.vectors else []
        return moved + [gradients[name] for name in [*others, *self.free]]

    def run(self, batches) -> list[float]:
        """Tunes on the next batches; returns the losses, less those before if Tuning.relative."""
        losses = []
        for step in range(self.tuning.steps):
            rate = 0.5 + 0.5 * math.cos(math.pi * step / self.tuning.steps)
            losses.append(self.step(*batches.next(), rate))
        return torch.stack(losses).tolist()

    @torch.no_grad()
    def write_back(self):
        """Changes stored's grid steps and model's vectors and matrices that are not rounded."""
        for name in self.rounded:
            rows, columns = self.stored[name].float().split(self.parameters[name].shape)
            if self.row_logs:
                rows = rounded_steps(self.script, rows * self.row_logs[name].exp())
            if self.column_logs:
                columns = self.script.exact_steps(columns * self.column_logs[name].exp())
            self.stored[name] = torch.cat([rows, columns]).half()
        for name in self.free + self.vectors:
            self.model.get_parameter(name).copy_(self.parameters[name])


def tune(script, trainer, batches, model, stored: dict[str, Tensor], tuning: Tuning):
    """One stage: changes stored and model as Tuner.write_back() does. trainer.model stays."""
    started = script.synchronized_time()
    with training_weights_kept(trainer.model):
        tuner = Tuner(script, trainer, model, stored, tuning)
        losses = tuner.run(batches)
        tuner.write_back()
    seconds = script.synchronized_time() - started
    part = max(1, len(losses) // 4)
    first = sum(losses[:part]) / part
    last = sum(losses[-part:]) / part
    text = f"tuned by {tuning}: loss {first:.5f}, then {last:.5f}; {seconds:.2f}s"
    trainer.log(text, "tuned", seconds=seconds, losses=losses, **tuning._asdict())


def only(chosen: dict[str, Tensor], model) -> dict[str, Tensor]:
    """In grid_limits()'s place: those of some of a model's matrices."""
    return chosen


def quantize_in_stages(script, quantize, model, stages: list[Tuning], tune_stage) -> dict:
    """What quantize(model) returns, but each stage is tuned before what is late is rounded.

    tune_stage(stored, tuning) tunes, stored being what is rounded so far.
    """
    whole = script.grid_limits
    limits = whole(model)
    depths = {name: depth(name, len(model.blocks)) for name in limits}
    stored = {}
    try:
        for tuning in [*stages, None]:
            end = tuning.late if tuning else math.inf
            due = {
                n: limits[n] for n in limits if depths[n] < end and f"{n} integers" not in stored
            }
            script.grid_limits = functools.partial(only, due)
            found = quantize(model)
            script.grid_limits = whole
            for name in due:
                stored[name] = found[name]
                stored[f"{name} integers"] = found[f"{name} integers"]
            if tuning:
                tune_stage(stored, tuning)
    finally:
        script.grid_limits = whole
    stored = found | stored
    order = [name for name, _ in model.named_parameters()]
    return {name: stored[name] for name in [*order, *(f"{name} integers" for name in limits)]}


def with_room(script, predict_bytes, stages: list[Tuning]):
    """predict_bytes(), with room for what tuned steps take more than the script's."""

    def predict_more(model, settings, k: float, solvers=None) -> float:
        shapes = [model.get_parameter(name).shape for name in script.grid_limits(model)]
        more = 0.0
        for side, kind in enumerate(("rows", "columns")):
            if any(getattr(tuning, kind) for tuning in stages):
                more += STEP_BYTES[kind] * sum(shape[side] for shape in shapes)
        return predict_bytes(model, settings, k, solvers) + more

    return predict_more


def staged_quantization(script, trainer, batches, quantize, stages: list[Tuning]):
    """quantize_model() in stages, which tune trainer.trained_model."""

    def quantize_model(model, *others):
        untuned = copy.deepcopy(model.state_dict())
        trainer.model = trainer.trained_model
        tune_stage = functools.partial(tune, script, trainer, batches, model)

        def quantize_some(model):
            return quantize(model, *others)

        try:
            return quantize_in_stages(script, quantize_some, model, stages, tune_stage)
        finally:
            trainer.model = model
            model.load_state_dict(untuned)  # for another k

    return quantize_model


def tuning_export(script, export):
    """The script's export(), whose quantize_model() is in the stages that settings choose."""

    @functools.wraps(export)
    def tuned_export(trainer, batches):
        trained = trainer.__dict__.setdefault("trained_model", trainer.model)
        trainer.model = folded_copy(script, trained, trainer.ranks)
        stages = chosen_stages(trainer.settings)
        if not stages:
            return export(trainer, batches)
        given = trainer.settings
        trainer.settings = script.replace(given, gptq_damp=FIRST_MARK)
        seams = script.quantize_model, script.predict_bytes
        quantize, predict = seams
        script.quantize_model = staged_quantization(script, trainer, batches, quantize, stages)
        script.predict_bytes = with_room(script, predict, stages)
        try:
            return export(trainer, batches)
        finally:
            script.quantize_model, script.predict_bytes = seams
            trainer.settings = given

    return tuned_export


def install(script):
    """Changes train_gpt.py's export."""
    script.export = tuning_export(script, script.export)
