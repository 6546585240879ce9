"""A table of runs, the best first, from their logs.

    python -m tools.runs logs/                           # every run in a folder and those below it
    python -m tools.runs logs/lr-*.jsonl --plot curves.png --csv runs.csv

A row is the last run in a log: its name, its steps and the time of one, BPB before quantization,
after it and in the end, bytes of code and model, how far the run came, and the settings in which
the runs differ. Each text that was scored has a table of its own. --sort orders by another column.
--plot draws the training losses by step, by second of training and by token (needs
requirements-dev.txt). --csv writes all runs in one table for programs, with all digits.
"""

import argparse
import csv
import io
import math
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.runs", file=sys.stderr)
    sys.exit(2)

from tools.command import (
    Parser,
    UserError,
    need,
    need_place,
    run_command,
    write_picture,
    write_whole,
)
from tools.logs import number_in, read_records, runs_in, starts_of

# Of a run's settings, what only names its files, and what the column "run" says.
NAMES = {"run_id", "log_dir", "artifact", "resume", "overwrite", "eval_only"}
FIGURES = ("steps", "ms", "before", "after", "final", "bytes")  # columns of numbers
MOST_COLUMNS = 4  # of settings
WIDEST = 40  # characters of a setting, or of the state
STROKES = ("-", "--", ":", "-.")  # of --plot
DRAWN = ("step", "train_ms", "train_loss")  # of a record of training
REACH = 4  # training losses on either side that a point of --plot is the mean of
MOST_NAMES = 20  # runs that --plot names: more names would cover the curves
FEW = 20  # a run with fewer training losses is drawn as it is: means would leave a straight line


class Run(NamedTuple):
    """The last run in a log."""

    name: str
    settings: dict[str, object]
    figures: dict[str, float]  # those of FIGURES that it came to
    state: str  # "final", or how far it came
    losses: list[dict]  # records of training, of all parts of a run that was taken up again
    records: list[dict]  # all of the last part
    events: dict[str, dict]  # the last record of each event, of these


def read_run(path: Path) -> Run:
    """What a log says of its last run. Raises UserError if it is not a run's log."""
    parts = runs_in(path)
    need(parts, f"{path} is empty: the run has not begun")
    records = parts[-1]
    events = {record["event"]: record for record in records}
    need("settings" in events, f"{path} is not a run's .jsonl log")
    try:
        settings = events["settings"]["settings"]
        name = str(settings["run_id"])
        if settings["eval_only"]:
            name += " (scored again)"
        chosen = {key: value for key, value in settings.items() if key not in NAMES}
        losses = read_losses(starts_of(parts))
        figures = read_figures(events)
        return Run(name, chosen, figures, state_of(records), losses, records, events)
    except (KeyError, TypeError):
        raise UserError(f"{path} is not a run's .jsonl log") from None


def is_number(value) -> bool:
    """Whether a value is a number as a run writes it; NaN and infinity, if it diverged, are too."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def read_losses(starts: list[list[dict]]) -> list[dict]:
    """The records of training of all starts of a run, without the steps that were made again.

    Raises KeyError or TypeError for those that no run writes.
    """
    losses = []
    for record in (record for start in starts for record in start):
        if record["event"] == "resumed":
            losses = [loss for loss in losses if loss["step"] <= record["step"]]
        elif record["event"] == "train":
            if not all(is_number(record.get(name, 0.0)) for name in DRAWN):
                raise TypeError("a loss that is no number")
            losses.append(record)
    return losses


def read_figures(events: dict[str, dict]) -> dict[str, float]:
    """The numbers that a run came to, by the column's name."""
    places = {  # of each figure: event and key, the first that is there
        "steps": [("trained", "steps"), ("train", "step")],
        "ms": [("trained", "step_avg_ms"), ("train", "step_avg_ms")],
        "before": [("trained", "val_bpb"), ("validation", "val_bpb")],
        "after": [("after_quantization", "val_bpb")],
        "final": [("final", "val_bpb")],
        "bytes": [("trained", "bytes_total")],
    }
    found = {}
    for figure, candidates in places.items():
        for event, key in reversed(candidates):
            value = events.get(event, {}).get(key)
            if is_number(value):
                found[figure] = value
    return found


def state_of(records: list[dict]) -> str:
    """How far a run came: "final", what ended it, or the last thing it told."""
    last = records[-1]
    if any(record["event"] == "final" for record in records):
        return "final"
    if last["event"] == "error":  # the first rank's that failed: others then miss it
        first = next(record for record in records if record["event"] == "error")
        rank = f"rank {first['rank']}: " if first.get("rank") else ""
        return rank + str(first.get("error", "error"))
    step = f" of step {last['step']}" if "step" in last else ""
    return f"no score; last told: {last['event'].replace('_', ' ')}{step}"


def differing(runs: list[Run]) -> list[str]:
    """The settings in which some runs differ, in the script's order.

    One that a log lacks, since its script had no such setting, is as good as any value.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)

    def values(name: str) -> set[str]:
        return {repr(run.settings[name]) for run in runs if name in run.settings}

    return [name for name in names if len(values(name)) > 1]


def text_of(value) -> str:
    """A setting or figure as the table shows it."""
    if isinstance(value, bool):
        return str(int(value))
    return "" if value is None else str(value)


def shown(name: str, value: float | None) -> str:
    """A figure in the digits that count."""
    if value is None:
        return ""
    if name in ("before", "after", "final"):
        return f"{value:.4f}"
    return f"{value:.1f}" if name == "ms" else f"{value:,.0f}"


def sorted_runs(runs: list[Run], column: str) -> list[Run]:
    """The runs sorted by a column, those without a finite value in it last; equal ones by name."""

    def key(run: Run) -> tuple:
        value = run.figures.get(column, run.settings.get(column))
        as_text = "" if isinstance(value, (int, float)) else text_of(value)
        number = value if isinstance(value, (int, float)) else 0
        if not math.isfinite(number):  # nan is neither above nor below any other
            return True, 0, "", run.name
        return value is None, number, as_text, run.name

    return sorted(runs, key=key)


def scored_text(run: Run) -> str:
    """The text that a run's scores are of: by its counts, or else by where it lay."""
    counts = run.events.get("validation_data", {})
    told = [number_in(counts, name) for name in ("scored_tokens", "bytes")]
    if None not in told:
        return "{:,.0f} tokens, {:,.0f} bytes".format(*told)
    return f"DATA_PATH={run.settings.get('data_path', '')}, not counted in the log"


def by_text(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of each text, in the order in which they come."""
    groups = {}
    for run in runs:
        groups.setdefault(scored_text(run), []).append(run)
    return groups


def cut(text: str, most: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def table(runs: list[Run], settings: list[str]) -> list[list[str]]:
    """The table's rows, its header first: what runs came to, then the settings.

    Those beyond MOST_COLUMNS share the last column, with their names, as far as it reaches.
    """
    own, others = settings[:MOST_COLUMNS], settings[MOST_COLUMNS:]
    rows = [["run", *FIGURES, "state", *(name.upper() for name in own)]]
    rows[0] += ["others"] if others else []
    for run in runs:
        figures = [shown(name, run.figures.get(name)) for name in FIGURES]
        chosen = [cut(text_of(run.settings.get(name)), WIDEST) for name in own]
        pairs = [f"{name.upper()}={text_of(run.settings.get(name))}" for name in others]
        told = [cut(" ".join(pairs), WIDEST)] if others else []
        rows.append([run.name, *figures, cut(run.state, WIDEST), *chosen, *told])
    return rows


def print_groups(runs: list[Run]) -> None:
    """A table for each text, under a line that names it where there are several."""
    groups = by_text(runs)
    if len(groups) > 1:
        print("Scores of different texts cannot be compared: a table for each.")
    for text, group in groups.items():
        if len(groups) > 1:
            print(f"\nScored text: {text}")
        print_table(table(group, differing(group)))


def print_table(rows: list[list[str]]) -> None:
    """Columns side by side, as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def write_csv(runs: list[Run], settings: list[str], out: Path) -> None:
    """The same table in full digits."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["run", *settings, *FIGURES, "state"])
    for run in runs:
        chosen = [text_of(run.settings.get(name)) for name in settings]
        figures = [text_of(run.figures.get(name)) for name in FIGURES]
        writer.writerow([run.name, *chosen, *figures, run.state])
    write_whole(out, file.getvalue())


def smoothed(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours, REACH on each side.

    Near an end fewer, but as many on either side: a mean of one side alone would lag behind.
    Fewer than FEW values stay as they are.
    """
    if len(values) < FEW:
        return values
    means = []
    for place in range(len(values)):
        reach = min(REACH, place, len(values) - 1 - place)
        window = values[place - reach : place + reach + 1]
        means.append(sum(window) / len(window))
    return means


def finite_losses(run: Run) -> list[float]:
    """A run's training losses, without those of skipped steps, as where it diverged."""
    losses = [number_in(record, "train_loss") for record in run.losses]
    return [loss for loss in losses if loss is not None]


def plot(runs: list[Run], out: Path) -> None:
    """Training losses by step, by second on the training clock and by token, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    drawn = [run for run in runs if finite_losses(run)]
    need(drawn, "no run has a training loss to draw")
    for number, run in enumerate(drawn):
        # There are ten colours; each ten runs have a stroke of their own.
        style = {"color": f"C{number % 10}", "linestyle": STROKES[number // 10 % len(STROKES)]}
        steps = [record["step"] for record in run.losses]
        seconds = [record["train_ms"] / 1000 for record in run.losses]
        tokens = [step * run.settings["train_batch_tokens"] / 1e6 for step in steps]
        losses = smoothed([record["train_loss"] for record in run.losses])
        for one, x in zip(axes, (steps, seconds, tokens), strict=True):
            one.plot(x, losses, label=run.name, linewidth=1, **style)
    lowest = min(min(finite_losses(run)) for run in drawn)
    for one, label in zip(axes, ("step", "second of training", "million tokens"), strict=True):
        one.set(xlabel=label, ylim=(lowest - 0.1, lowest + 1.5))
        one.grid(alpha=0.3)
    longest = max(len(run.losses) for run in drawn)
    means = f"\nmean of {2 * REACH + 1} lines where a run has {FEW}" if longest >= FEW else ""
    axes[0].set_ylabel(f"training loss, nats{means}")
    if len(drawn) <= MOST_NAMES:
        axes[0].legend(fontsize=8)
    else:
        figure.suptitle(f"{len(drawn)} runs; up to {MOST_NAMES} would be named", fontsize=9)
    write_picture(out, figure)


def find_logs(paths: list[Path]) -> list[Path]:
    """The .jsonl files named, and those in the folders named and below. UserError if none."""
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        # A folder may hold other JSON lines; a run's begin with its settings.
        files = sorted(path.rglob("*.jsonl"))
        found += [file for file in files if read_first(file) == "settings"]
    need(found, f"no run's .jsonl log in {', '.join(map(str, paths))}")
    return found


def read_first(path: Path) -> str:
    """The event of a file's first record; empty if it is no log."""
    try:
        records = read_records(path)
    except UserError:
        return ""
    return records[0]["event"] if records else ""


def main() -> int:
    """Reads the logs, prints the table, and writes what is asked for."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help="runs' .jsonl, or folders of them")
    add("--sort", default="final", metavar="COLUMN", help="a column or setting (final)")
    add("--plot", type=Path, metavar="PNG", help="training losses")
    add("--csv", type=Path, metavar="FILE", help="the table in full digits")
    given = parser.parse_args()
    logs = find_logs(given.logs)
    if given.csv:
        need_place(given.csv, *logs)
    if given.plot:
        need_place(given.plot, *logs, ending=".png")
    runs = [read_run(path) for path in logs]
    column = given.sort.lower()
    known = {*FIGURES, *(name for run in runs for name in run.settings)}
    need(column in known, f"--sort {given.sort}: neither a setting nor {', '.join(FIGURES)}")
    runs = sorted_runs(runs, column)
    print_groups(runs)
    if given.csv:
        write_csv(runs, differing(runs), given.csv)
    if given.plot:
        plot(runs, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("runs.py", main))
