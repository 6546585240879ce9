"""Does a lead last? Fits BPB against training seconds for two kinds of runs and looks ahead.

    python -m tools.scaling --ours logs/h-*.jsonl --twin logs/t-*.jsonl --to 4800 --out lead.png

Logs are of finished runs. Runs of a kind may differ only in MAX_WALLCLOCK_SECONDS and SEED, and
runs of both kinds must have the same text, tokenizer and GPUs, by what the logs say: others are
refused. A run's seconds are those of all its GPUs together, without EXPORT_RESERVE_SECONDS, and its
score is BPB before quantization:

    bpb(seconds) = floor + scale · seconds^(-power)

This is fitted by least squares with a floor of at least 0, to at least three different clocks. A
run that read its training text more than 1.2 times learns from repetition, which unlimited text
would not give: it is drawn but not fitted. Intervals contain 90 of 100 refits, each to the fitted
curve with noise of the size that the runs show around it; three runs show none, and have no
interval. First the curve is tested: it is fitted without the longest clock and predicts that one. A
kind fails if its interval does not contain what was measured there; then its predictions cannot be
believed, and the table and the picture say so. Then the table has the BPB of both kinds and the
lead, at the clocks measured and at --to. Beyond the clocks measured, the picture's curves are
broken lines. Needs matplotlib (requirements-dev.txt).
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
from tools.logs import (
    Kind,
    ended_by_steps,
    kind_of,
    last_run,
    logs_of_training,
    number_in,
    rank_count,
    refuse_other_data,
    refuse_other_runs,
)

MOST_PASSES = 1.2  # over the training text, of a run that is fitted
REFITS = 400
INTERVAL = (5, 95)  # percentiles of the refits
POWERS = np.linspace(0.05, 2.0, 196)  # which are tried
LAST_DIGIT = 5e-5  # BPB: half of what a table shows
FARTHEST = 1e9  # seconds: a GPU's thirty years


class Run(NamedTuple):
    """A finished run."""

    seconds: float  # of all GPUs, without the time for export
    bpb: float  # before quantization
    passes: float  # over the training text
    kind: Kind  # what it must have in common with others
    hardware: str  # the GPUs' name


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


def read_run(path: Path) -> Run:
    """What a log says. Raises UserError if it is not a finished run's, or an older script's."""
    events = last_run(path)
    try:
        settings, trained = events["settings"]["settings"], events["trained"]
        machine = events["settings"]["machine"]
        gpus, hardware = rank_count(machine), machine["hardware"].partition(" × ")[2]
        clock = settings["max_wallclock_seconds"] - settings["export_reserve_seconds"]
        read = trained["steps"] * settings["train_batch_tokens"]
        bpb = number_in(trained, "val_bpb")
        told = "training_data" in events and "hashes" in events
        need(told, f"{path} does not say which text was read: its script is older")
        passes = read / events["training_data"]["tokens"]
        run = Run(gpus * clock, bpb, passes, kind_of(path, events), hardware)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise UserError(f"{path} is not the .jsonl log of a finished run") from None
    need(bpb is not None and bpb > 0, f"{path} has no score: its val_bpb is no number above 0")
    by_clock = run.seconds > 0 and math.isfinite(run.seconds) and not ended_by_steps(events)
    need(by_clock, f"{path} was not trained to the end of its clock, MAX_WALLCLOCK_SECONDS")
    return run


def read_kinds(ours: list[Path], twin: list[Path]) -> dict[str, list[Run]]:
    """The runs of both kinds. Raises UserError unless each is one kind, and all had the same."""
    given = {"ours": logs_of_training(ours), "twin": logs_of_training(twin)}
    kinds = {name: [read_run(path) for path in paths] for name, paths in given.items()}
    every = [run for runs in kinds.values() for run in runs]
    refuse_other_data([run.kind for run in every])
    for run in every:
        ran = f"{run.kind.log} ran on {run.hardware}, but {every[0].kind.log} on"
        need(run.hardware == every[0].hardware, f"{ran} {every[0].hardware}")
    for runs in kinds.values():
        refuse_other_runs([run.kind for run in runs])
    return kinds


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


def fitted(runs: list[Run]) -> list[Run]:
    """The runs that did not learn from repetition."""
    return [run for run in runs if run.passes <= MOST_PASSES]


def fit(runs: list[Run], random: np.random.Generator) -> Curve:
    """The curve through some runs, with refits. Raises UserError for fewer than three clocks."""
    seconds = np.array([run.seconds for run in runs])
    scores = np.array([run.bpb for run in runs])
    need_clocks("these runs", runs)
    parameters = least_squares(seconds, scores)
    around = scores - values(parameters, seconds)
    # Three parameters take three degrees of freedom.
    free = len(runs) - 3
    noise = np.sqrt((around**2).sum() / free) if free else math.nan
    noisy = values(parameters, seconds) + noise * random.standard_normal((REFITS, len(runs)))
    return Curve(parameters, least_squares(seconds, noisy))


def need_clocks(name: str, runs: list[Run]) -> None:
    """Raises UserError for a kind of runs that no curve of three parameters can be fitted to."""
    fresh = fitted(runs)
    clocks = len({run.seconds for run in fresh})
    repeated = len(runs) - len(fresh)
    few = f"{name}: {clocks} different clocks are too few for a curve of three parameters"
    few += f"; {repeated} runs are of over {MOST_PASSES} passes" if repeated else ""
    need(clocks >= 3, few)


def interval(samples: np.ndarray) -> str:
    """The interval of samples, as a table shows it; unknown if the runs show no noise."""
    if np.isnan(samples).any():
        return "unknown"
    low, high = np.percentile(samples, INTERVAL)
    return f"{low:.4f} to {high:.4f}"


class Forecast(NamedTuple):
    """The longest clock as the shorter ones foretell it, and as it was measured."""

    line: str
    failed: bool  # the interval does not hold what was measured


def foretold(name: str, runs: list[Run], random: np.random.Generator) -> Forecast:
    """The test of a kind's curve, by runs of at least one clock."""
    longest = max(run.seconds for run in runs)
    shorter = [run for run in runs if run.seconds < longest]
    if len({run.seconds for run in shorter}) < 3:
        line = f"{name}: too few clocks to foretell the longest one from the others"
        return Forecast(line, failed=False)
    curve = fit(shorter, random)
    measured = np.mean([run.bpb for run in runs if run.seconds == longest])
    samples = curve.samples(longest)
    line = f"{name}: {longest:.0f} s foretold {curve.at(longest):.4f} ({interval(samples)}), "
    line += f"measured {measured:.4f}"
    low, high = np.percentile(samples, INTERVAL)  # NaN where there is none
    failed = bool(measured < low - LAST_DIGIT or measured > high + LAST_DIGIT)
    if failed:
        line += (
            f": outside the interval, so that {name} beyond {longest:.0f} s is not to be believed"
        )
    return Forecast(line, failed)


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


def plot(kinds: dict[str, list[Run]], fits: dict[str, Curve], to: float, failed: set[str]):
    """A figure: runs, curves and intervals over the logarithm of the seconds.

    Lines are broken beyond the clocks measured; the names of the kinds that failed say so.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, runs) in enumerate(kinds.items()):
        color = f"C{number}"
        clocks = [run.seconds for run in fitted(runs)]
        label = f"{name}: failed its test, foretells nothing" if name in failed else name
        parts = [(min(clocks), max(clocks), "-", label), (max(clocks), to, "--", None)]
        for first, last, style, text in parts:
            line = np.geomspace(first, max(first, last), 100)
            refits = np.stack([fits[name].samples(x) for x in line])
            low, high = np.percentile(refits, INTERVAL, axis=1)
            shape = {"color": color, "linestyle": style, "label": text}
            axes.plot(line, values(fits[name].parameters, line), **shape)
            axes.fill_between(line, low, high, color=color, alpha=0.2, linewidth=0)
        for run in runs:
            face = color if run.passes <= MOST_PASSES else "none"
            axes.plot(run.seconds, run.bpb, "o", color=color, markerfacecolor=face)
    axes.set(xscale="log", xlabel="GPU-seconds of training", ylabel="BPB before quantization")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=8)
    title = "broken lines: foretold, if text of this kind did not end, at this batch\n"
    axes.set_title(f"{title}hollow: over {MOST_PASSES} passes, not fitted", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def caption(longest: float, failed: set[str]) -> str:
    """What stands above the table."""
    text = f"Rows beyond {longest:.0f} s: if text of this kind did not end, at this batch"
    names = " and ".join(sorted(failed))
    return text + (f"; but {names} failed the test, believe none of them" if failed else "")


def read_arguments() -> argparse.Namespace:
    """The command line; UserError if it makes no sense."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ours", nargs="+", type=Path, required=True, metavar="LOG", help="runs' .jsonl")
    add("--twin", nargs="+", type=Path, required=True, metavar="LOG", help="runs to compare with")
    seconds = "how far to look ahead, in seconds of all GPUs together (4800)"
    add("--to", type=float, default=4800, metavar="SECONDS", help=seconds)
    add("--seed", type=int, default=0, help="seed of the refits' noise (0)")
    add("--out", type=Path, required=True, metavar="PNG")
    given = parser.parse_args()
    need(0 < given.to <= FARTHEST, f"--to {given.to} should be above 0, at most {FARTHEST:g}")
    need(given.seed >= 0, f"--seed {given.seed} should be at least 0")
    need_place(given.out, *given.ours, *given.twin, ending=".png")
    return given


def main() -> int:
    """Reads the logs, draws the plot, prints forecasts and the table."""
    given = read_arguments()
    random = np.random.default_rng(given.seed)
    kinds = read_kinds(given.ours, given.twin)
    for name, runs in kinds.items():
        need_clocks(name, runs)
    fresh = {name: fitted(runs) for name, runs in kinds.items()}
    curves = {name: fit(runs, random) for name, runs in fresh.items()}
    tests = {name: foretold(name, runs, random) for name, runs in fresh.items()}
    failed = {name for name, test in tests.items() if test.failed}
    write_picture(given.out, plot(kinds, curves, given.to, failed))
    for name, runs in fresh.items():
        print(tests[name].line)
        left_out = len(kinds[name]) - len(runs)
        if left_out:
            print(f"{name}: {left_out} runs of over {MOST_PASSES} passes are not fitted")
    measured = {run.seconds for runs in fresh.values() for run in runs}
    print(f"\n{caption(max(measured), failed)}:\n")
    print("\n".join(table(curves, sorted(measured | {given.to}))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("scaling.py", main))
