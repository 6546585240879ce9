"""Idea: late QAT together with what it is refused with. An --idea of `python -m tools.explore`.

LATE_QAT_THRESHOLD needs uniform grids and an embedding that shares nothing by spelling. Here, once
the rates have fallen to BELOW of their peak, each step's gradients are taken at the nearest points
of the grids that GPTQ will use, with row steps by what errors cost on one batch of that moment. The
embedding stays as it is, and points are integers, though export's trellis also has halves.
"""

from contextlib import contextmanager

import torch

BELOW = 0.15
K = 15.0  # of the grids, near what export will find


@torch.no_grad()
def find_grids(script, trainer, tokens) -> list[tuple]:
    """Matrices, their row steps (rows, 1) by what errors cost on tokens (B, T), and limits."""
    model = trainer.model
    s = trainer.settings
    parts = tokens.split(trainer.calibration_rows)
    hessians, energies = script.collect_costs(model, parts, trainer.ranks, s.shares_bits)
    solvers = script.factor_hessians(hessians, s.gptq_damp, trainer.ranks)
    model.row_costs = script.find_row_costs(solvers, energies)
    model.grid_factors = script.find_grid_factors(model, s)
    own = dict(model.named_parameters())  # without an embedding that shares by spelling
    matrices = {name: limits for name, limits in trainer.limits.items() if name in own}
    found = script.grids(model, s, matrices, K)
    grids = [(own[name], rows, limits) for name, _, limits, rows, _ in found]
    model.row_costs = {}
    model.grid_factors = {}
    trainer.log(f"{len(grids)} matrices on their grids from step {trainer.steps_done}")
    return grids


def install(script) -> None:
    """Changes train_gpt.py's schedule and Trainer."""
    usual_schedule = script.schedule_at

    def schedule_at(settings, step: int, seconds: float):
        """As the script's, quantized from BELOW on."""
        now = usual_schedule(settings, step, seconds)
        return now._replace(quantized=now.lr_factor < BELOW and now.progress > 0.1)

    class Trainer(script.Trainer):
        """Puts its matrices on grids late."""

        grids = None  # find_grids()'s

        def warm_up(self):
            """As the script's, which would look for LATE_QAT_THRESHOLD's grids."""
            super().warm_up()
            self.qat_k = K

        def accumulate_gradients(self, kind, tokens, targets):
            """As the script's; the first that are to be quantized find the grids."""
            if kind[1] and self.grids is None:
                self.grids = find_grids(script, self, tokens)
            return super().accumulate_gradients(kind, tokens, targets)

        def weights_of(self, quantized: bool):
            """Where gradients are computed."""
            return self.on_grids() if quantized else super().weights_of(False)

        @contextmanager
        def on_grids(self):
            """Inside, weights are the nearest points."""
            weights = [weight.detach() for weight, *_ in self.grids]
            kept = [weight.clone() for weight in weights]
            for weight, (_, rows, limits) in zip(weights, self.grids, strict=True):
                weight.copy_(script.round_to_grid(weight, rows, limits) * rows)
            try:
                yield
            finally:
                torch._foreach_copy_(weights, kept)

    script.schedule_at = schedule_at
    script.Trainer = Trainer
