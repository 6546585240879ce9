"""Idea: rounding looks at what errors cost in each row and column, and in each row of a table.

Rounding weight (i, j) of a matrix with step s costs about c_i s² / U[j, j]², c_i by gradients of
output i and U of the script's gptq(). Three parts, each of which may act alone:

    weigh      a trellis's path errs least in the sum of errors²; here each row's are multiplied by
               its c_i. Without it a path favours rows of large steps: those that cost the least.
    tables     steps of embeddings follow costs, too, which the script does for linear layers alone.
               An error in row i of a table comes back where it is looked up: c_i is the sum of g²
               there, g the gradient of what the table gave; and, of the output matrix, as usual
               by the gradients of its logits. A part of log f_i is taken, as by SDCLIP_BY_ROW.
    columns    column j of a matrix has steps that are U[j, j] as large, to a power of this part.
               Errors at its turn then cost the same in each column, which at a given number of
               bits is the least (reverse water-filling); the artifact has room for such steps.

GPTQ_DAMP names the variant for --requantize: VARIANTS of ten thousand times that, all of which are
quantized with 0.01. Other values quantize as the script does.

    python -m tools.explore --export --idea tools/ideas/rounding_by_cost.py "it:" \\
        --requantize "weighed: GPTQ_DAMP=0.0121" \\
        --requantize "all: GPTQ_DAMP=0.0124 SDCLIP_BY_ROW=0.75"
"""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

USUAL_DAMP = 0.01


class Variant(NamedTuple):
    """What is done; by default what the script does."""

    weigh: bool = False
    tables: float | None = None
    columns: float = 0.0


VARIANTS = {
    121: Variant(weigh=True),
    122: Variant(tables=0.5),
    123: Variant(weigh=True, tables=0.5),
    124: Variant(weigh=True, tables=0.75, columns=1.0),
    125: Variant(columns=1.0),
}


def chosen_variant(settings) -> Variant | None:
    """The one that GPTQ_DAMP names, if it names one."""
    return VARIANTS.get(round(1e4 * settings.gptq_damp))


# ---- What errors cost ----------------------------------------------------------------------------


def embeddings_of(model) -> dict[str, torch.nn.Embedding]:
    """The tables of a model, by the names of their weights."""
    modules = model.named_modules()
    return {f"{n}.weight": m for n, m in modules if isinstance(m, torch.nn.Embedding)}


@torch.no_grad()
def squared_logit_gradients(model, hidden: Tensor, targets: Tensor, tokens: Tensor) -> Tensor:
    """The sum over all tokens of g² (V,), g the gradient of a token's nats by a logit.

    hidden (B, T, width); targets and the tokens before them (B, T).
    """
    logits = model.logits(hidden, tokens).flatten(0, 1)
    slope = 1 - (logits / model.settings.logit_softcap).square()
    gradients = logits.softmax(-1)
    chosen = targets.flatten().unsqueeze(1)
    gradients.scatter_add_(1, chosen, torch.full_like(gradients[:, :1], -1.0))
    return (gradients * slope).square().sum(0)


def table_costs(model, batches: list[Tensor], ranks) -> dict[str, dict[str, Tensor]]:
    """Of each table float32 (rows,), "lookups": twice the sum of g² over its lookups, in the mean
    over columns; "outputs": of the output matrix, the mean over tokens of squared_logit_gradients.
    """
    lookups = {name: torch.zeros_like(m.weight[:, 0]) for name, m in embeddings_of(model).items()}
    outputs = torch.zeros_like(model.output_matrix[:, 0])
    seen: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str, layer, positional: tuple, output: Tensor):
        seen.append((name, positional[0], output))

    with contextlib.ExitStack() as undo, torch.enable_grad():
        for name, layer in embeddings_of(model).items():
            undo.callback(layer.register_forward_hook(functools.partial(hook, name)).remove)
        for batch in batches:
            hidden = model(batch, model.full_order)[:, :-1]
            before, targets = batch[:, :-1], batch[:, 1:]
            outputs += squared_logit_gradients(model, hidden.detach(), targets, before)
            nats = model.nats(hidden, targets, before).sum()
            gradients = torch.autograd.grad(nats, [output for *_, output in seen])
            for (name, indices, _), gradient in zip(seen, gradients, strict=True):
                squares = 2 * gradient.float().square().mean(-1).flatten()
                lookups[name].index_add_(0, indices.flatten(), squares.to(lookups[name].dtype))
            seen.clear()
    tokens = sum(batch.numel() for batch in batches) * ranks.world_size
    found = {name: {"lookups": ranks.sum_(x.detach())} for name, x in lookups.items()}
    found.setdefault(model.output_name, {})["outputs"] = ranks.sum_(outputs.detach()) / tokens
    return found


class Costs:
    """What a variant knows of one calibration."""

    def __init__(self, script, variant: Variant):
        self.script = script
        self.variant = variant
        self.tables: dict[str, dict[str, Tensor]] = {}
        self.columns: dict[str, Tensor] = {}  # steps, by the matrix's name
        self.rows: dict[str, Tensor] = {}  # c_i: (rows, 1)

    def left(self, name: str, solvers: dict) -> Tensor:
        """What GPTQ leaves of a squared error, in the mean over columns with their steps."""
        order, upper, _ = solvers[name]
        steps = 1.0
        if name in self.columns:
            steps = self.columns[name][order.squeeze(0)]
        return (steps / upper.diagonal()).square().mean()

    def find_columns(self, solvers: dict):
        """Steps of columns, of the mean logarithm 0."""
        for name, (order, upper, _) in solvers.items():
            log = upper.diagonal().log()
            log = self.variant.columns * (log - log.mean())
            steps = torch.empty_like(log)
            steps[order.squeeze(0)] = log.exp()
            self.columns[name] = self.script.coarse_steps(steps)

    def find_rows(self, energies: dict, solvers: dict):
        """c_i of linear layers, and of tables."""
        least = self.script.LEAST_ENERGY
        for name, energy in energies.items():
            energy = energy.clamp(min=least * energy.mean() + 1e-12)
            self.rows[name] = (self.left(name, solvers) * energy).unsqueeze(1)
        for name, parts in self.tables.items():
            cost = parts.get("lookups", torch.zeros(()))
            if "outputs" in parts:
                cost = cost + self.left(name, solvers) * parts["outputs"]
            self.rows[name] = cost.clamp(min=least * cost.mean() + 1e-12).unsqueeze(1)

    def grid_factors(self, model, settings) -> dict[str, Tensor]:
        """As the script's find_grid_factors(), with tables."""
        limits = self.script.grid_limits(model)
        logs = {}
        total = numbers = 0
        for name, cost in self.rows.items():
            by_row = settings.sdclip_by_row
            if name in self.tables:
                by_row = self.variant.tables
                if by_row is None:
                    continue
            weight = model.get_parameter(name)
            usual = self.script.SDCLIP_USUAL
            steps, _ = self.script.grid_steps(weight, limits[name], settings, usual)
            ratio = -cost.log() / 2 - steps.log()
            log = by_row * (ratio - ratio.mean())
            common = -(cost * (log.exp() * steps).square()).mean().log() / 2
            logs[name] = log + settings.sdclip_by_matrix * common
            total += logs[name].mean() * weight.numel()
            numbers += weight.numel()
        return {name: (log - total / numbers).exp() for name, log in logs.items()}


# ---- In the script's places ----------------------------------------------------------------------


def collecting(costs: Costs, collect_costs):
    """collect_costs(), which also fills costs.tables."""

    def collect(model, batches, ranks, with_energies: bool = False):
        batches = list(batches)
        costs.tables = table_costs(model, batches, ranks)
        return collect_costs(model, batches, ranks, with_energies)

    return collect


def finding(costs: Costs):
    """find_grid_factors(), by costs. Hands gptq() the costs of rows as a part of solvers."""

    @torch.no_grad()
    def find_grid_factors(model, settings, solvers: dict, energies: dict) -> dict[str, Tensor]:
        if costs.variant.columns:
            costs.find_columns(solvers)
        costs.find_rows(energies, solvers)
        return costs.grid_factors(model, settings)

    return find_grid_factors


def with_own_limits(costs: Costs, grid_limits):
    """grid_limits(), which treats tables as all other matrices where they share the bits."""

    def limits_of(model) -> dict[str, Tensor]:
        limits = grid_limits(model)
        if costs.variant.tables is not None:
            for name in embeddings_of(model):
                limits[name] = torch.full_like(limits[name], costs.script.INT6_MAX)
        return limits

    return limits_of


def with_columns(costs: Costs, grids):
    """grids(), with steps of columns."""

    def own_grids(model, settings, matrices, k):
        for name, weight, limits, rows, columns in grids(model, settings, matrices, k):
            if name in costs.columns:
                limits = torch.full_like(limits, costs.script.INT8_MAX)
                columns = costs.columns[name]
            yield name, weight, limits, rows, columns

    return own_grids


def quantizing(costs: Costs, quantize_model):
    """quantize_model(), whose gptq() gets the square roots of costs of rows."""

    def quantize(model, settings, ranks, solvers: dict, *others):
        weighed = dict(solvers)
        for name in costs.script.grid_limits(model):
            weight = model.get_parameter(name)
            if name not in weighed:  # the nearest integers
                weighed[name] = costs.script.factor_hessian(torch.eye(weight.shape[1]).to(weight))
            cost = costs.rows.get(name, torch.ones_like(weight[:, :1]))
            weighed[name] = *weighed[name], (cost / cost.mean()).sqrt()
        return quantize_model(model, settings, ranks, weighed, *others)

    return quantize


def weighing(costs: Costs, gptq):
    """gptq(), with one more argument: what each row's errors are multiplied by, (..., rows, 1)."""
    script = costs.script
    rounding = script.round_by_trellis

    def weighed(weight, scale, limits, order, upper, unused, weights, *others):
        def by_weight(column, step, limits, states):
            return rounding(column * weights, step * weights, limits, states)

        with replaced(script, round_by_trellis=by_weight if costs.variant.weigh else rounding):
            return gptq(weight, scale, limits, order, upper, unused, *others)

    return weighed


@contextlib.contextmanager
def replaced(script, **others):
    """Inside, the script's functions of these names are others."""
    before = {name: getattr(script, name) for name in others}
    for name, other in others.items():
        setattr(script, name, other)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(script, name, function)


def exporting(script, export):
    """The script's export(), by the variant that settings choose."""

    @functools.wraps(export)
    def export_variant(trainer, batches):
        variant = chosen_variant(trainer.settings)
        if variant is None:
            return export(trainer, batches)
        given = trainer.settings
        trainer.settings = script.replace(given, gptq_damp=USUAL_DAMP)
        costs = Costs(script, variant)
        own = {
            "collect_costs": collecting(costs, script.collect_costs),
            "find_grid_factors": finding(costs),
            "grid_limits": with_own_limits(costs, script.grid_limits),
            "grids": with_columns(costs, script.grids),
            "quantize_model": quantizing(costs, script.quantize_model),
            "gptq": weighing(costs, script.gptq),
        }
        try:
            with replaced(script, **own):
                return export(trainer, batches)
        finally:
            trainer.settings = given

    return export_variant


def install(script):
    """Changes train_gpt.py's export."""
    script.export = exporting(script, script.export)
