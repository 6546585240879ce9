"""Whether a score is better than a baseline's, by the two tests that the contest's rules name.

Both are Welch's one-sided t-test, since groups of few runs may differ in variance. A record must
beat the one before by more than 0.005 nats at p < 0.01. For an entry that is compared with the best
one of the day, the organizers asked for p < 0.25 that it is better at all.
"""

import statistics
import sys
from typing import NamedTuple

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.package", file=sys.stderr)
    sys.exit(2)

from tools.command import UserError


class Test(NamedTuple):
    """A claim, and the p at which it counts as shown."""

    claim: str
    gain: float  # nats per token
    most_p: float


RECORD = Test("a gain of more than 0.005 nats", 0.005, 0.01)
FRONTIER = Test("a gain at all", 0.0, 0.25)


def welch(ours: list[float], baseline: list[float], gain: float) -> tuple[float, float]:
    """t and p of Welch's one-sided test that our mean lies more than gain below the baseline's."""
    try:
        from scipy.stats import ttest_ind  # only needed with a baseline
    except ImportError:
        raise UserError("--baseline needs SciPy: pip install scipy") from None
    shifted = [loss - gain for loss in baseline]
    result = ttest_ind(ours, shifted, equal_var=False, alternative="less")
    return float(result.statistic), float(result.pvalue)


def gain_text(ours: list[float], baseline: list[float]) -> str:
    """What the tests say, in sentences that hold all that is needed to repeat them."""
    mean = statistics.fmean(ours)
    baseline_mean = statistics.fmean(baseline)
    runs = ", ".join(f"{loss:.5f}" for loss in baseline)
    means = f"mean val_loss {mean:.5f} (n={len(ours)}), "
    means += f"the baseline's {baseline_mean:.5f} (n={len(baseline)}: {runs}), "
    means += f"difference {mean - baseline_mean:+.5f} nats"
    untested = f"{means}. Whether this is a gain cannot be tested:"
    if min(len(ours), len(baseline)) < 2:
        return f"{untested} that takes two runs or more on each side."
    verdicts = [verdict(test, ours, baseline) for test in (RECORD, FRONTIER)]
    return f"{means}. Welch's one-sided test: {'; '.join(verdicts)}."


def verdict(test: Test, ours: list[float], baseline: list[float]) -> str:
    """What one of the tests says."""
    t, p = welch(ours, baseline, test.gain)
    holds = "holds" if p < test.most_p else "does NOT hold"
    return f"{test.claim} {holds} at p < {test.most_p:g} (t = {t:.3f}, p = {p:.3g})"
