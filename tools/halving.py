"""Successive halving: how to spend a budget of GPU-seconds when only a few variants are good.

All variants train to a first rung, a part of their run. The better half of them goes on to the next
rung, which is twice as far, and so on; the rest trains to the end and is scored. The rungs of
two halvings are a quarter and a half of the run. The base, with which the table compares, goes on
whatever its loss. (Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and
Hyperparameter Optimization", 2016.)

Variants are compared at the same part of their own training clocks: by the mean training loss over
the last quarter of the way to the rung, averaged over their seeds. A whole variant stops, never one
of its seeds: means over the luckier seeds would compare nothing.
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.ablate", file=sys.stderr)
    sys.exit(2)

from tools.command import UserError

WINDOW = 0.25  # the part of the way to a rung over which losses are averaged


@dataclass(frozen=True)
class Rung:
    """What was found at a rung, and decided."""

    place: float  # the part of the run
    losses: dict[str, float | None]  # by variant, nats per token; None: no run has one so far
    stopped: list[str]  # variants
    worst_kept: str  # of the others, but for the base

    def reason(self, variant: str) -> str:
        """Why the variant was stopped, for the table."""
        mine = self.losses[variant]
        last = self.losses[self.worst_kept]
        if mine is None:
            return f"stopped at {self.place:.1%}: no run came so far with a finite loss"
        other = f"{self.worst_kept}, the last to go on, had {last:.4f}"
        return f"stopped at {self.place:.1%} of its run: training loss {mine:.4f}; {other}"

    def record(self) -> dict:
        """The rung as results.json holds it."""
        return asdict(self)


def rungs_of(halvings: int) -> list[float]:
    """Where variants are compared: parts of the run, each twice the one before, the last 1/2."""
    return [2.0 ** (place - halvings) for place in range(halvings)]


def kept_after(others: int, halvings: int) -> int:
    """How many of the variants beside the base are left: half of them each time, rounded up."""
    return math.ceil(others / 2**halvings)


def most_halvings(others: int) -> int:
    """The number of halvings after which one variant is left beside the base."""
    return math.ceil(math.log2(max(others, 1)))


def choose_halvings(others: int, budget: float, cost: Callable[[int], float]) -> int:
    """The fewest halvings whose cost, in GPU-seconds, is within the budget.

    Fewer halvings stop variants later, when their curves say more. UserError if even the most cost
    too much.
    """
    most = most_halvings(others)
    for halvings in range(most + 1):
        if cost(halvings) <= budget:
            return halvings
    least = math.ceil(min(cost(halvings) for halvings in range(most + 1)))
    remedy = "fewer seeds or variants, or a shorter clock, cost less"
    raise UserError(f"--budget {budget:g}: these runs may take {least} GPU-seconds; {remedy}")


def loss_at(curve: list[dict], place: float) -> float | None:
    """Mean training loss over the last quarter of the way to the place, a part of the run.

    curve holds a log's records of training. Where none is in that quarter, the last one before it
    counts; None without one. A loss that is not finite, of a step that was skipped, is neither high
    nor low, and left out.
    """
    finite = [record for record in curve if math.isfinite(record["train_loss"])]
    before = [record for record in finite if record["progress"] <= place]
    near = [record for record in before if record["progress"] > (1 - WINDOW) * place]
    losses = [record["train_loss"] for record in near or before[-1:]]
    return statistics.fmean(losses) if losses else None


def judge(place: float, losses: dict[str, float | None], base: str, kept: int) -> Rung:
    """Keeps the base and, of the others, as many of the least loss; of equals, the first."""
    reached = [name for name in losses if name != base and losses[name] is not None]
    ranked = sorted(reached, key=losses.__getitem__)
    chosen = ranked[:kept]
    stopped = [name for name in losses if name not in (base, *chosen)]
    return Rung(place, losses, stopped, chosen[-1] if chosen else base)
