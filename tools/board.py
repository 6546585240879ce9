"""Runs' logs in TensorBoard, or in Weights & Biases.

    python -m tools.board logs/*.jsonl && tensorboard --logdir board
    python -m tools.board logs/*.jsonl --follow          # as the runs go on, until they have ended
    python -m tools.board logs/*.jsonl --wandb PROJECT   # to Weights & Biases instead

Every number in a run's records becomes a curve over the run's steps. Each run is shown under its
RUN_ID, with its settings as a table. Logs are only read, so runs and their clocks are not affected.
Needs tensorboard (requirements-dev.txt) or wandb, which has its own login; WANDB_MODE=offline keeps
everything on this machine.
"""

import argparse
import sys
import time
from pathlib import Path

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.board", file=sys.stderr)
    sys.exit(2)

from tools.command import Parser, encoded, need, run_command
from tools.logs import not_a_log, parse_records

PAUSE = 2.0  # seconds between looks at the logs
ENDS = {"final", "final_profile", "error"}  # events behind which a run tells no more
NO_CURVES = {"event", "seconds", "step", "steps"}  # keys of a record that are no figure of it


class Reader:
    """What is new in a log since it was last read."""

    def __init__(self, path: Path):
        self.path = path
        self.place = 0
        self.ended = False

    def new_records(self) -> list[dict]:
        """Records of the lines that have been finished. Raises UserError if it is not a log."""
        with self.path.open("rb") as file:
            file.seek(self.place)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.place += len(whole)
        records = parse_records(whole, self.path)
        if records:  # a run that is taken up again begins with its settings
            self.ended = records[-1]["event"] in ENDS
        return records


def readable(name: str) -> str:
    """A name as text; bytes of a file's name that are none are escaped."""
    return encoded(name).decode()


def figures(record: dict) -> dict[str, float]:
    """The curves that a record has a point of, by "event/name"."""
    found = {}
    for name, value in record.items():
        if isinstance(value, (bool, int, float)) and name not in NO_CURVES:
            found[f"{record['event']}/{name}"] = float(value)
    return found


class TensorBoard:
    """Writes one run's curves into a folder of its own."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.folder = str(options.out / name)
        self.writer = None
        self.begin(0)  # or points of an earlier call would stand beside the same ones

    def begin(self, step: int) -> None:
        """What follows takes the place of all points from this step on."""
        from torch.utils.tensorboard import SummaryWriter

        if self.writer:
            self.writer.close()
        self.writer = SummaryWriter(self.folder, purge_step=step)

    def settings(self, settings: dict) -> None:
        """Shows the settings as a table."""
        rows = [f"| {name} | {readable(str(value))} |" for name, value in settings.items()]
        self.writer.add_text("settings", "\n".join(["| setting | value |", "| --- | --- |", *rows]))

    def points(self, values: dict[str, float], step: int) -> None:
        """Adds a point to each curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Shows what there is."""
        self.writer.flush()

    def close(self) -> None:
        """Ends the run."""
        self.writer.close()


class WeightsAndBiases:
    """Sends one run's curves to Weights & Biases."""

    def __init__(self, name: str, options: argparse.Namespace):
        import wandb

        self.run = wandb.init(project=options.wandb, name=name, reinit="create_new")

    def begin(self, step: int) -> None:
        """Nothing: it keeps the points of steps that are made again."""

    def settings(self, settings: dict) -> None:
        """The run's configuration."""
        self.run.config.update(settings, allow_val_change=True)

    def points(self, values: dict[str, float], step: int) -> None:
        """Adds a point to each curve."""
        self.run.log(values, step=step)

    def flush(self) -> None:
        """Nothing: it sends by itself."""

    def close(self) -> None:
        """Ends the run and waits until all is sent."""
        self.run.finish()


class Board:
    """One run's log and where its curves go."""

    def __init__(self, path: Path, options: argparse.Namespace):
        kind = WeightsAndBiases if options.wandb else TensorBoard
        self.reader = Reader(path)
        records = self.reader.new_records()
        self.sink = kind(readable(path.stem), options)
        self.step = 0
        self.add(records)

    def add(self, records: list[dict]) -> None:
        """Adds points of records. Raises UserError for what no run writes."""
        try:
            for record in records:
                self.add_one(record)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise not_a_log(self.reader.path) from None
        self.sink.flush()

    def add_one(self, record: dict) -> None:
        """Adds a record's points; without a step, they belong to the last one."""
        if record["event"] == "settings":
            self.sink.settings(record["settings"])
        step = int(record.get("step", record.get("steps", self.step)))
        first = step + (record["event"] == "resumed")  # that is made again, or anew
        if record["event"] in ("train", "resumed") and first <= self.step:
            self.sink.begin(first)
        self.step = step
        values = figures(record)
        if values:
            self.sink.points(values, self.step)

    def look(self) -> None:
        """Adds what is new in the log."""
        self.add(self.reader.new_records())


def follow(boards: list[Board]) -> None:
    """Goes on until every run has ended, or Ctrl-C."""
    try:
        while not all(board.reader.ended for board in boards):
            time.sleep(PAUSE)
            for board in boards:
                board.look()
    except KeyboardInterrupt:
        print("stopped; the runs go on", file=sys.stderr)


def main() -> int:
    """Reads the logs and writes their curves."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help="runs' .jsonl")
    add("--out", type=Path, default=Path("board"), metavar="FOLDER", help="TensorBoard's (board)")
    add("--follow", action="store_true", help="go on until the runs have ended, or Ctrl-C")
    add("--wandb", metavar="PROJECT", help="to Weights & Biases instead")
    options = parser.parse_args()
    names = [path.stem for path in options.logs]
    twice = sorted({name for name in names if names.count(name) > 1})
    need(not twice, f"two logs are named {', '.join(twice)}: give one of them at a time")
    boards = [Board(path, options) for path in options.logs]
    if options.follow:
        follow(boards)
    for board in boards:
        board.sink.close()
    if not options.wandb:
        print(f"{len(boards)} runs; now: tensorboard --logdir {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("board.py", main))
