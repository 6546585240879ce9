"""Where a score's nats are, from a run's log: by document, by place, chunk by chunk.

The records after_quantization_profile and final_profile contain tables whose columns are sums over
the targets of a row; bits per byte are computed here. The first three tables have a row for each
count of a number's binary digits: row 0 has 0, 1 has 1, 2 has 2 and 3, 3 has 4 to 7, and the last
one everything beyond. Place 0 of a document is the mark of its beginning, which stands for no text:
its nats are not among these bits. Chunks are those of test-time training, TTT_CHUNK_TOKENS targets
each, even if the model does not adapt.
"""

import math
import sys
from typing import NamedTuple

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.report", file=sys.stderr)
    sys.exit(2)

from tools.runs import Run

PROFILES = {  # tables: title, and what a row's number is
    "document_length": ("By length of the document", "tokens of the document"),
    "document_position": ("By place in the document", "place in the document, token"),
    "window_position": ("By place in a plain window", "place in the window, token"),
}
ROWS = 16  # of a table, at most
SCORES = ("final", "after_quantization")  # whose profile is shown: the first that has the table


class Row(NamedTuple):
    """What the targets of a row of a table come to."""

    place: int  # in the table
    bytes: float
    bits_per_byte: float


def table_of(run: Run, name: str) -> dict[str, list[float]] | None:
    """A table, of the final score if that has it."""
    found = [run.events.get(f"{score}_profile", {}).get(name) for score in SCORES]
    return next(filter(None, found), None)


def rows_of(run: Run, name: str) -> list[Row]:
    """A table's rows that have bytes of text; none where the log lacks it."""
    table = table_of(run, name)
    if table is None:
        return []
    rows = []
    for place, (size, nats) in enumerate(zip(table["bytes"], table["nats"], strict=True)):
        if size:
            rows.append(Row(place, size, nats / size / math.log(2)))
    return rows


def row_name(place: int) -> str:
    """The numbers that belong to a row, from where to where."""
    least = 2 ** (place - 1)
    if place < 2:
        return str(place)
    return f"{least:,} to {2 * least - 1:,}" if place < ROWS - 1 else f"{least:,} and more"


def short_name(place: int) -> str:
    """The smallest number of a row, for an axis."""
    return str(2**place // 2)


class Chunks(NamedTuple):
    """One score's chunks, a number of each in every list."""

    nats: list[float]  # a target, as scored
    learnt: list[float | None]  # by which its last epoch begins lower than its first
    epochs: list[float]
    score_seconds: list[float]
    adapt_seconds: list[float]


def chunks_of(run: Run, score: str) -> Chunks | None:
    """The chunks of a score, one of SCORES; None where the log lacks them.

    The lists but the first are empty if the model did not adapt.
    """
    table = run.events.get(f"{score}_profile", {}).get("chunks")
    if table is None:
        return None
    counts = table["targets"]
    nats = [total / count for total, count in zip(table["nats"], counts, strict=True)]
    if "epochs" not in table:
        return Chunks(nats, [], [], [], [])
    learnt = []
    begun = zip(table["first_epoch"], table["last_epoch"], counts, table["epochs"], strict=True)
    for first, last, count, epochs in begun:
        learnt.append((first - last) / count if epochs > 1 else None)
    columns = (table[name] for name in ("epochs", "score_seconds", "adapt_seconds"))
    return Chunks(nats, learnt, *columns)
