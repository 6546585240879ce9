"""Makes docs/experiments-tables.md from docs/experiments.csv.

    python -m tools.experiments            # writes the tables
    python -m tools.experiments --check    # says whether they are up to date; 1 if not

A row of the data is one run or a few seeds of it: what was changed, what was predicted before it
ran, what was found, and the log that shows it. The column found has "name: value" pairs, separated
by ";". Rows are added at the end and keep their id for good, so that a text can cite them.
"""

import argparse
import csv
import sys
from itertools import groupby
from pathlib import Path

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m tools.experiments", file=sys.stderr
    )
    sys.exit(2)

from tools.command import Parser, need, run_command, table_cell, write_whole

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "experiments.csv"
TABLES = ROOT / "docs" / "experiments-tables.md"
COLUMNS = (
    "id",
    "date",
    "script",
    "corpus",
    "split",
    "hardware",
    "topic",
    "what",
    "clock",
    "seeds",
    "predicted",
    "found",
    "verdict",
    "log",
)
# What a table says above its rows where it holds for all of them, and else in columns: two rows
# of other hardware are not compared as two of the same are.
CIRCUMSTANCES = (("date", "script"), ("corpus", "split", "hardware"))
CLOSED = "reviews and books"  # a corpus that is no longer used

HEAD = """# Experiments: every row

Made from experiments.csv by `python -m tools.experiments`; [experiments.md](experiments.md) says
what follows from it. Scores on different corpora are never set side by side, and none of these
is FineWeb.
"""
CLOSED_HEAD = """
# The closed block: 194 MB of film reviews and public-domain books

Runs read this text up to five times. Nothing that was chosen on it is taken over unchecked. Rows
of a table belong together, the first often being the others' base. Scripts are those of the
day; settings are named as in their time. The words around these tables, with predictions, stand
in the history: `git show b6028ee:docs/experiments.md`.
"""


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of the data, by column. Raises UserError for a file of another form.

    An id is what texts cite a row by, so there is one of each; a log that is named is there.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        need(tuple(reader.fieldnames or ()) == COLUMNS, f"{path} has other columns than {COLUMNS}")
        rows = list(reader)
    names = [row["id"] for row in rows]
    for row in rows:
        need(None not in row and None not in row.values(), f"{path}: {row['id']} has other columns")
        need(names.count(row["id"]) == 1, f"{path}: {row['id']} stands there twice")
        log = row["log"]
        need(
            not log or (ROOT / log).is_file(),
            f"{path}: {row['id']} cites {log}, which is not there",
        )
    return rows


def measures(row: dict[str, str]) -> dict[str, str]:
    """What a row found, by name; a value without a name has an empty one.

    A name may hold a colon, a value cannot: the last one parts them.
    """
    found = {}
    for part in row["found"].split("; "):
        name, colon, value = part.rpartition(": ")
        found[name if colon else ""] = value
    return found


def shared(rows: list[dict[str, str]]) -> set[str]:
    """The circumstances, by their columns' names, that are the same in all of some rows."""
    names = (name for part in CIRCUMSTANCES for name in part)
    return {name for name in names if len({row[name] for row in rows}) == 1}


def circumstances(rows: list[dict[str, str]]) -> str:
    """What is the same in all of some rows, in a sentence."""
    words = {
        **rows[0],
        "script": f"script {rows[0]['script']}",
        "split": f"{rows[0]['split']} split",
    }
    same = shared(rows)
    parts = (", ".join(words[name] for name in part if name in same) for part in CIRCUMSTANCES)
    return "; ".join(filter(None, parts)) + "."


def table(rows: list[dict[str, str]]) -> list[str]:
    """One topic's rows as a table, with a column for each name that any of them found.

    Circumstances in which rows differ have a column each.
    """
    found = [measures(row) for row in rows]
    # In the order in which they first appear.
    names = list(dict.fromkeys(name for one in found for name in one))
    # Columns that are empty throughout are left out.
    beside = [
        name
        for name in ("clock", "seeds", "predicted", "verdict", "log")
        if any(r[name] for r in rows)
    ]
    same = shared(rows)
    beside += [name for part in CIRCUMSTANCES for name in part if name not in same]
    header = ["id", "what", *names, *beside]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row, one in zip(rows, found, strict=True):
        values = [row["id"], row["what"]]
        values += [one.get(name, "") for name in names]
        values += [row[name] for name in beside]
        lines.append("| " + " | ".join(map(table_cell, values)) + " |")
    return lines


def block(rows: list[dict[str, str]], level: str) -> list[str]:
    """The tables of some rows, one for each run of equal topics."""

    def number_and_topic(row: dict[str, str]) -> tuple[str, str]:
        return row["id"].split("-")[0], row["topic"]

    lines = []
    # groupby() puts neighbours together, so rows of the file are never moved.
    for (_, topic), group in groupby(rows, key=number_and_topic):
        same = list(group)
        lines += ["", f"{level} {topic}", ""]
        lines += [circumstances(same), ""]
        lines += table(same)
    return lines


def render(rows: list[dict[str, str]]) -> str:
    """The whole page: the open corpus first, the closed one behind."""
    lines = block([row for row in rows if row["corpus"] != CLOSED], "##")
    closed = block([row for row in rows if row["corpus"] == CLOSED], "##")
    return HEAD + "\n".join(lines) + "\n" + CLOSED_HEAD + "\n".join(closed) + "\n"


def main() -> int:
    """Writes the tables, or checks them; 1 if they are out of date."""
    # A test calls the check, so that the page never says what the data do not.
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    text = render(read_rows(DATA))
    if not check:
        write_whole(TABLES, text)
        return 0
    same = TABLES.is_file() and TABLES.read_text(encoding="utf-8") == text
    print(
        "up to date" if same else "docs/experiments-tables.md is not: python -m tools.experiments"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(run_command("experiments.py", main))
