"""Plots scores against training time, from the logs of finished runs.

    python -m tools.plot_scores logs/*.jsonl --out docs/scores.png \\
        --mark 1.3103 "published entry, 180 s"

Every run is drawn at its training clock (or, if ITERATIONS ended it earlier, at the time it took),
with its name and two scores: BPB before quantization and in the end. Runs whose settings differ
only in SEED and names are one point, their mean, with the sample standard deviation. A line joins
points that differ only in the clock: same script, same other settings. The title says which text
was scored, if the logs do; --title says it for older ones. --mark draws a score that was measured
elsewhere as a horizontal line. Needs matplotlib (requirements-dev.txt).
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m tools.plot_scores", file=sys.stderr
    )
    sys.exit(2)

from tools import known
from tools.command import Parser, UserError, need, need_place, run_command, write_picture
from tools.logs import ended_by_steps, last_run, logs_of_training, number_in, split_text, spread

NAMES = {"run_id", "seed", "log_dir", "artifact", "overwrite"}  # no part of what was measured
CLOCK = "max_wallclock_seconds"
KINDS = {"before quantization": "trained", "final": "final"}  # and the event that holds the score
UNTOLD = "the logs do not say which text was scored"


class Point(NamedTuple):
    """Runs that differ in seed and names only."""

    seconds: float  # of the training clock
    series: str  # what points that a line may join have in common: script and other settings
    text: str  # that was scored
    names: list[str]
    seeds: list[int | None]  # None of older scripts
    scores: dict[str, list[float]]  # BPB of each run, by kind


def same_but_seed(settings: dict, without: set[str]) -> str:
    """What runs have in common that differ in seed, names and the settings left out."""
    kept = {name: v for name, v in settings.items() if name not in NAMES | without}
    return repr(sorted(kept.items(), key=str))


def script_of(path: Path, settings_record: dict) -> str:
    """What names the script of a run: its sum, by the record or the text log; else the log."""
    if "script_sha256" in settings_record:
        return str(settings_record["script_sha256"])
    try:
        source, _ = split_text(path, path.with_suffix(".txt").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError):
        return str(path)
    return hashlib.sha256((source + "\n").encode()).hexdigest()


def text_of(counts: dict | None) -> str:
    """Which text a run was scored on, by its log's counts."""
    return UNTOLD if counts is None else known.compare(counts).name or "not FineWeb"


def read_points(paths: list[Path]) -> list[Point]:
    """The points by rising seconds of the training clock, those of equal ones as their files.

    Raises UserError for a file that is not a finished run's.
    """
    points: dict[tuple, Point] = {}
    for path in logs_of_training(paths):
        events = last_run(path)
        try:
            settings = events["settings"]["settings"]
            scores = {kind: number_in(events[event], "val_bpb") for kind, event in KINDS.items()}
            clock = settings[CLOCK]
            took = number_in(events["trained"], "train_clock_seconds")
            seconds = took if ended_by_steps(events) and took is not None else clock
            series = script_of(path, events["settings"]) + same_but_seed(settings, {CLOCK})
            name = str(settings["run_id"])
            text = text_of(events.get("validation_data"))
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is not the .jsonl log of a finished run") from None
        need(None not in scores.values(), f"{path} has no score: its val_bpb is no number")
        new = Point(seconds, series, text, [], [], {kind: [] for kind in KINDS})
        point = points.setdefault((clock, text, same_but_seed(settings, set())), new)
        # One log twice would have no spread, and pass for two seeds.
        seed = settings.get("seed")
        again = seed in point.seeds
        need(not again, f"{path} has SEED={seed}, as another run of the same settings has")
        point.seeds.append(seed)
        point.names.append(name)
        for kind, score in scores.items():
            point.scores[kind].append(score)
    return sorted(points.values(), key=lambda point: point.seconds)


def name_of(point: Point) -> str:
    """The name of a point's run, or what the names of its runs begin with and their number."""
    if len(point.names) == 1:
        return point.names[0]
    common = os.path.commonprefix(point.names).rstrip("-_. ")
    return f"{common}, {len(point.names)} seeds".lstrip(", ")


def highest(point: Point) -> float:
    """The larger of its scores' means."""
    return max(spread(scores).mean for scores in point.scores.values())


def plot(points: list[Point], marks: list[tuple[float, str]], title: str, out: Path) -> None:
    """Writes the plot as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for kind, colour in zip(KINDS, ("C0", "C1"), strict=True):
        label = kind
        for series in dict.fromkeys(point.series for point in points):
            alike = [point for point in points if point.series == series]
            spreads = [spread(point.scores[kind]) for point in alike]
            # A single seed has no deviation, and its point no bar.
            bars = [one.std or 0 for one in spreads]
            means = [one.mean for one in spreads]
            seconds = [point.seconds for point in alike]
            style = {"marker": "o", "capsize": 3, "color": colour, "label": label}
            axes.errorbar(seconds, means, bars, **style)
            label = None  # once in the legend
    for seconds in {point.seconds for point in points}:
        # Points of one clock may stand close to each other: their names, in their order, over all.
        ranked = sorted((p for p in points if p.seconds == seconds), key=highest, reverse=True)
        names = "\n".join(map(name_of, ranked))
        place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(names, (seconds, highest(ranked[0])), **place)
    for number, (score, text) in enumerate(marks):
        style = ("--", ":", "-.")[number % 3]
        axes.axhline(score, color="gray", linestyle=style, label=text)
    axes.set(xlabel="training clock, seconds", ylabel="bits per byte")
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.15, y=0.12)  # room for the names
    axes.grid(alpha=0.3)
    axes.legend()
    write_picture(out, figure)


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
    parser.add_argument("--title", help="the text that was scored, instead of what the logs say")
    options = parser.parse_args()
    need_place(options.out, *options.logs, ending=".png")
    points = read_points(options.logs)
    title = options.title or "; ".join(dict.fromkeys(point.text for point in points))
    plot(points, read_marks(options.mark), title, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("plot_scores.py", main))
