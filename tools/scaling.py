"""Does a lead last? Fits BPB against training seconds for two kinds of runs and looks ahead.

    python -m tools.scaling --ours logs/h*.jsonl --twin logs/t*.jsonl --training-tokens 219000000 \\
        --to 4800 --out docs/lead.png

Logs are of finished runs that differ in MAX_WALLCLOCK_SECONDS and SEED. A run's seconds are those
of all its GPUs together, without EXPORT_RESERVE_SECONDS, and its score is BPB before quantization:

    bpb(seconds) = floor + scale · seconds^(-power)

by least squares with a floor of at least 0, at least three different clocks. A run that read its
training text more than 1.2 times learns from repetition, which unlimited text would not give: it is
drawn, and not fitted. Intervals hold 90 of 100 refits, each of the fitted curve with noise of the
size that the runs show around it; three runs show none, and have no interval. First the curve is
tested: it is fitted without the longest clock and foretells that one. Then the table says BPB of
both kinds and the lead, at the clocks measured and at those ahead. Needs matplotlib
(requirements-dev.txt).
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.scaling", file=sys.stderr)
    sys.exit(2)

from tools.command import Parser, UserError, need, need_place, run_command, write_picture
from tools.logs import last_run, rank_count

MOST_PASSES = 1.2  # over the training text, of a run that is fitted
REFITS = 400
INTERVAL = (5, 95)  # percentiles of the refits
POWERS = np.linspace(0.05, 2.0, 196)  # which are tried
CAPTION = "unlimited fresh text, this batch"


class Run(NamedTuple):
    """A finished run."""

    seconds: float  # of all GPUs, without the time for export
    bpb: float  # before quantization
    passes: float  # over the training text


class Curve(NamedTuple):
    """floor + scale · seconds^(-power), and refits of it, float64 (REFITS, 3)."""

    parameters: np.ndarray
    refits: np.ndarray

    def at(self, seconds: float) -> float:
        """BPB that it foretells."""
        return float(values(self.parameters, seconds))

    def samples(self, seconds: float) -> np.ndarray:
        """BPB by each refit, (REFITS,)."""
        return values(self.refits, seconds)


def values(parameters: np.ndarray, seconds) -> np.ndarray:
    """floor + scale · seconds^(-power) of parameters (..., 3)."""
    floor, scale, power = np.moveaxis(parameters, -1, 0)
    return floor + scale * seconds**-power


def read_run(path: Path, training_tokens: int) -> Run:
    """What a log says. Raises UserError if it is not a finished run's."""
    events = last_run(path)
    try:
        settings, trained = events["settings"]["settings"], events["trained"]
        gpus = rank_count(events["settings"]["machine"])
        clock = settings["max_wallclock_seconds"] - settings["export_reserve_seconds"]
        tokens = trained["steps"] * settings["train_batch_tokens"]
        run = Run(gpus * clock, trained["val_bpb"], tokens / training_tokens)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not the .jsonl log of a finished run") from None
    need(run.seconds > 0, f"{path} was not trained by the clock, MAX_WALLCLOCK_SECONDS")
    return run


def least_squares(seconds: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """floor, scale and power of the curve nearest to scores (..., runs), float64 (..., 3).

    For a given power the curve is a straight line in seconds^(-power), so that each power's best
    floor and scale have a formula, and the best of a grid of powers is taken. Nothing scores below
    0: where the best floor is, 0 and the scale that is then best stand for it.
    """
    best = np.full(scores.shape[:-1], np.inf)
    found = np.full((*scores.shape[:-1], 3), np.nan)
    for power in POWERS:
        x = seconds**-power
        centered = x - x.mean()
        scale = scores @ centered / (centered @ centered)
        floor = scores.mean(-1) - scale * x.mean()
        scale = np.where(floor < 0, scores @ x / (x @ x), scale)
        floor = floor.clip(min=0)
        off = ((scores - floor[..., None] - scale[..., None] * x) ** 2).sum(-1)
        better = off < best
        best = np.where(better, off, best)
        one = np.stack([floor, scale, np.full_like(floor, power)], -1)
        found = np.where(better[..., None], one, found)
    return found


def fit(runs: list[Run], random: np.random.Generator) -> Curve:
    """The curve through some runs, with refits. Raises UserError for fewer than three clocks."""
    seconds = np.array([run.seconds for run in runs])
    scores = np.array([run.bpb for run in runs])
    clocks = len(set(seconds))
    need(clocks >= 3, f"{clocks} different clocks are too few for a curve of three parameters")
    parameters = least_squares(seconds, scores)
    around = scores - values(parameters, seconds)
    # Three parameters take three degrees of freedom.
    free = len(runs) - 3
    noise = np.sqrt((around**2).sum() / free) if free else math.nan
    noisy = values(parameters, seconds) + noise * random.standard_normal((REFITS, len(runs)))
    return Curve(parameters, least_squares(seconds, noisy))


def interval(samples: np.ndarray) -> str:
    """As a table shows it; unknown if the runs show no noise."""
    if np.isnan(samples).any():
        return "unknown"
    low, high = np.percentile(samples, INTERVAL)
    return f"{low:.4f} to {high:.4f}"


def foretold(name: str, runs: list[Run], random: np.random.Generator) -> str:
    """A line: the longest clock as the shorter ones foretell it, and as it was measured."""
    longest = max(run.seconds for run in runs)
    shorter = [run for run in runs if run.seconds < longest]
    if len({run.seconds for run in shorter}) < 3:
        return f"{name}: too few clocks to foretell the longest one from the others"
    curve = fit(shorter, random)
    measured = np.mean([run.bpb for run in runs if run.seconds == longest])
    return (
        f"{name}: {longest:.0f} s foretold {curve.at(longest):.4f} "
        f"({interval(curve.samples(longest))}), measured {measured:.4f}"
    )


def table(curves: dict[str, Curve], clocks: list[float]) -> list[str]:
    """BPB of both kinds and the lead of the first at some seconds, with intervals, as Markdown."""
    ours, twin = curves.values()
    names = " | ".join(f"{name} | interval" for name in curves)
    lines = [f"| seconds | {names} | lead | interval |", "| --- " * 7 + "|"]
    for clock in clocks:
        cells = [f"{clock:.0f}"]
        for curve in (ours, twin):
            cells += [f"{curve.at(clock):.4f}", interval(curve.samples(clock))]
        lead = twin.at(clock) - ours.at(clock)
        cells += [f"{lead:.4f}", interval(twin.samples(clock) - ours.samples(clock))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(kinds: dict[str, list[Run]], curves: dict[str, Curve], ahead: float, out: Path) -> None:
    """Runs, curves and intervals over the logarithm of the seconds, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, runs) in enumerate(kinds.items()):
        color = f"C{number}"
        line = np.geomspace(min(run.seconds for run in runs), ahead, 100)
        refits = np.stack([curves[name].samples(x) for x in line])
        low, high = np.percentile(refits, INTERVAL, axis=1)
        axes.plot(line, values(curves[name].parameters, line), color=color, label=name)
        axes.fill_between(line, low, high, color=color, alpha=0.2, linewidth=0)
        for run in runs:
            fresh = run.passes <= MOST_PASSES
            face = color if fresh else "none"
            axes.plot(run.seconds, run.bpb, "o", color=color, markerfacecolor=face)
    axes.set(xscale="log", xlabel="GPU-seconds of training", ylabel="BPB before quantization")
    axes.set_title(f"{CAPTION}; hollow: over {MOST_PASSES} passes, not fitted", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    write_picture(out, figure)


def main() -> int:
    """Reads the logs, prints forecasts and the table, draws the plot."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ours", nargs="+", type=Path, required=True, metavar="LOG", help="runs' .jsonl")
    add("--twin", nargs="+", type=Path, required=True, metavar="LOG", help="runs to compare with")
    add("--training-tokens", type=int, required=True, metavar="N", help="in the training shards")
    add("--to", type=float, default=4800, metavar="SECONDS", help="of all GPUs together (4800)")
    add("--seed", type=int, default=0, help="of the refits' noise (0)")
    add("--out", type=Path, required=True, metavar="PNG")
    given = parser.parse_args()
    need_place(given.out, *given.ours, *given.twin, ending=".png")
    need(given.training_tokens > 0, f"--training-tokens {given.training_tokens} should be above 0")
    need(given.to > 0, f"--to {given.to} should be above 0")
    random = np.random.default_rng(given.seed)
    kinds = {
        name: [read_run(path, given.training_tokens) for path in paths]
        for name, paths in (("ours", given.ours), ("twin", given.twin))
    }
    fresh = {
        name: [run for run in runs if run.passes <= MOST_PASSES] for name, runs in kinds.items()
    }
    curves = {name: fit(runs, random) for name, runs in fresh.items()}
    plot(kinds, curves, given.to, given.out)
    for name, runs in fresh.items():
        print(foretold(name, runs, random))
        left_out = len(kinds[name]) - len(runs)
        if left_out:
            print(f"{name}: {left_out} runs of over {MOST_PASSES} passes are not fitted")
    measured = {run.seconds for runs in fresh.values() for run in runs}
    print(f"\n{CAPTION}:\n")
    print("\n".join(table(curves, sorted(measured | {given.to}))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("scaling.py", main))
