"""Plots scores against training time, from the logs of finished runs.

    python -m tools.plot_scores logs/*.jsonl --out docs/scores.png \\
        --mark 1.3103 "published entry, 180 s"

Every run is a point at its training clock: BPB before quantization and the final one. Runs whose
settings differ in SEED and names only are one point, their mean, with the sample standard
deviation. A line joins the points of one kind. --mark draws a score that was measured elsewhere as
a horizontal line. Needs matplotlib (requirements-dev.txt).
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m tools.plot_scores", file=sys.stderr
    )
    sys.exit(2)

from tools.command import Parser, UserError, run_command
from tools.logs import last_run, spread

NAMES = {"run_id", "seed", "log_dir", "artifact", "overwrite"}  # no part of what was measured
KINDS = {"before quantization": "trained", "final": "final"}  # and the event that holds the score
Points = dict[str, list[tuple[float, list[float]]]]  # of a kind: seconds, BPB of each seed


def same_but_seed(settings: dict) -> tuple:
    """What runs that are one point have in common."""
    return tuple(sorted((name, repr(v)) for name, v in settings.items() if name not in NAMES))


def read_points(paths: list[Path]) -> Points:
    """The points of each kind, by rising seconds of the training clock.

    Raises UserError for a file that is not a finished run's.
    """
    groups: dict[tuple, dict[str, list[float]]] = {}
    for path in paths:
        events = last_run(path)
        try:
            settings = events["settings"]["settings"]
            scores = {kind: events[event]["val_bpb"] for kind, event in KINDS.items()}
            key = (settings["max_wallclock_seconds"], same_but_seed(settings))
        except (KeyError, TypeError):
            raise UserError(f"{path} is not the .jsonl log of a finished run") from None
        group = groups.setdefault(key, {kind: [] for kind in KINDS})
        for kind, score in scores.items():
            group[kind].append(score)
    # Groups of equal seconds stay in the order of their files.
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    points: Points = {kind: [] for kind in KINDS}
    for (seconds, _), group in ordered:
        for kind in KINDS:
            points[kind].append((seconds, group[kind]))
    return points


def plot(points: Points, marks: list[tuple[float, str]], out: Path) -> None:
    """Writes the plot as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for kind, of_kind in points.items():
        seconds = [clock for clock, _ in of_kind]
        spreads = [spread(scores) for _, scores in of_kind]
        means = [one.mean for one in spreads]
        # A single seed has no deviation, and its point no bar.
        bars = [one.std or 0 for one in spreads]
        axes.errorbar(seconds, means, bars, marker="o", capsize=3, label=kind)
    for number, (score, text) in enumerate(marks):
        style = ("--", ":", "-.")[number % 3]
        axes.axhline(score, color="gray", linestyle=style, label=text)
    axes.set(xlabel="training clock, seconds", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)


def read_marks(given: list[list[str]]) -> list[tuple[float, str]]:
    """The --mark options: a score and its name. Raises UserError for what is no number."""
    try:
        return [(float(score), text) for score, text in given]
    except ValueError as error:
        raise UserError(f"--mark BPB TEXT: {error}") from None


def main() -> int:
    """Reads the logs and writes the plot."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="a run's .jsonl")
    parser.add_argument("--out", required=True, type=Path, metavar="PNG")
    parser.add_argument("--mark", nargs=2, action="append", default=[], metavar=("BPB", "TEXT"))
    options = parser.parse_args()
    plot(read_points(options.logs), read_marks(options.mark), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("plot_scores.py", main))
