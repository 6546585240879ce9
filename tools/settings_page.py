"""Writes docs/settings.md from train_gpt.py: every setting, every preset, and the contest's names.

    python -m tools.settings_page            # writes the page
    python -m tools.settings_page --check    # says whether it is up to date, and writes nothing

A test runs the check, which keeps the page from saying what the script does not do.
"""

import argparse
import csv
import dataclasses
import sys
from pathlib import Path

if not __package__:  # started by its path
    hint = "start it in the repository's folder as python -m tools.settings_page"
    print(f"error: {hint}", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from tools.command import Parser, environment_value, run_command, table_cell, write_whole

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "settings.md"
CHOICES_MADE = ROOT / "docs" / "choices.csv"
CONTEST = ROOT / "tests" / "data" / "contest_names.txt"

INTRODUCTION = """\
# Settings

Made from `train_gpt.py` by `python -m tools.settings_page`; a test keeps it true.

A setting is an environment variable, read once when a run starts. `PRESET` chooses a set of
defaults, and every other variable overrides it:

    PRESET=short SEED=42 MATRIX_LR=0.03 torchrun --standalone --nproc_per_node=1 train_gpt.py

A value outside its bounds ends the run with one line, and so does a name that is one letter off a
setting's or begins as only settings do. Other variables are ignored, and so are most settings that
have no effect because of others; a run's log begins with those given. A default that cannot go with
a given setting yields to it, as `TRELLIS_STATES` to `QUANTIZER=round` or `EVAL_MODE` to `TTT_LR`,
and the log says so; two given ones that contradict each other end the run. Lists of layers are
`all`, `none` or such as `0,2-4`. `python train_gpt.py --help` says the same as this page.
"""

GROUPS = {
    "run": "The run",
    "data": "Data",
    "model": "Model",
    "recurrence": "Depth recurrence",
    "schedule": "Schedule and clock",
    "optimizer": "Optimizers and averages",
    "export": "Quantization and artifact",
    "evaluation": "Evaluation and test-time training",
    "sample": "A sample of what it writes",
}

CHOICES = """\
## Why these

Chosen on 219 M tokens of web-like English, 180 s on one GPU or as many steps as 60 s have; a name
such as `b10-02` is a row of [experiments.csv](experiments.csv). Nothing was tried on FineWeb or on
eight GPUs, for which the default keeps the same choices.
"""

PRESETS = """\
## Presets

What each changes of the defaults above.
"""

NAMES = """\
## Names of the contest's scripts

Four published scripts read {count} variables. Each of their names is a setting of this script, is
another name for one, which the log says, or is refused with what holds instead: {settings} are
settings, {aliases} other names, {refused} refused. A value that says what holds anyway may be
given.
"""

OTHERS = """\
## Names that people reach for
"""


def code(text: str) -> str:
    """A text as code inside a table; nothing if it is empty."""
    # Empty backticks would show as backticks.
    return f"`{table_cell(text)}`" if text else ""


def setting_rows() -> list[str]:
    """A table for each group of settings.

    Settings stand in the order of the class, in which each group is together: the first of a group
    names it.
    """
    lines = []
    for field in dataclasses.fields(t.Settings):
        group = field.metadata["group"]
        if group:
            lines += ["", f"## {GROUPS[group]}", "", "| variable | default | values | |"]
            lines.append("| --- | --- | --- | --- |")
        default = code(environment_value(field.default))
        values = table_cell(t.describe_values(**field.metadata))
        about = table_cell(field.metadata["help"])
        lines.append(f"| `{field.name.upper()}` | {default} | {values} | {about} |")
    return lines


def read_reasons() -> dict[str, str]:
    """Why the default, and short, have what they have, by the setting's variable."""
    with CHOICES_MADE.open(encoding="utf-8", newline="") as file:
        return {row["setting"]: row["why"] for row in csv.DictReader(file)}


def reason_rows() -> list[str]:
    """A table of read_reasons(), in the order of docs/choices.csv.

    Its column of reasons may name rows of docs/experiments.csv, which a test looks up.
    """
    lines = ["| variable | why |", "| --- | --- |"]
    return lines + [f"| `{name}` | {table_cell(why)} |" for name, why in read_reasons().items()]


def preset_rows() -> list[str]:
    """A table of presets and what each sets, as one would give it in the environment.

    The first one is the defaults themselves, and sets nothing.
    What each is for, `train_gpt.py --presets` says.
    """
    lines = ["| `PRESET` | sets |", "| --- | --- |"]
    for name, values in t.PRESETS.items():
        changes = [f"`{key.upper()}={environment_value(value)}`" for key, value in values.items()]
        lines.append(f"| `{name}` | {' '.join(changes) or 'nothing: the defaults'} |")
    return lines


def name_row(name: str, refused: dict[str, tuple[str, str]]) -> str:
    """What becomes of a name, and why.

    A refused name may have one value that says what holds anyway; an alias may convert its value.
    """
    if name in refused:
        value, reason = refused[name]
        fate = f"refused, but {code(value)}" if value else "refused"
        return f"| `{name}` | {fate} | {table_cell(reason)} |"
    if name in t.ALIASES:
        ours, convert = t.ALIASES[name]
        about = (convert.__doc__ or "").partition("\n")[0] if convert else "the same value"
        return f"| `{name}` | sets `{ours}` | {table_cell(about.strip())} |"
    field = t.Settings.__dataclass_fields__[name.lower()]
    return f"| `{name}` | setting | {table_cell(field.metadata['help'])} |"


def settings_page() -> str:
    """The whole page: settings, presets, the contest's names, and other programs' names."""
    contest = CONTEST.read_text(encoding="utf-8").split()
    refused = t.REFUSED
    counts = {
        "count": len(contest),
        "aliases": sum(name in t.ALIASES for name in contest),
        "refused": sum(name in refused for name in contest),
    }
    # What is neither is a setting itself.
    counts["settings"] = len(contest) - counts["aliases"] - counts["refused"]
    # What the script knows besides is listed behind, by the alphabet.
    others = [name for name in (*t.ALIASES, *refused) if name not in contest]
    table = ["| name | here | |", "| --- | --- | --- |"]
    lines = [INTRODUCTION.rstrip("\n"), *setting_rows()]
    lines += ["", CHOICES, *reason_rows()]
    lines += ["", PRESETS, *preset_rows()]
    lines += ["", NAMES.format(**counts), *table, *(name_row(name, refused) for name in contest)]
    lines += ["", OTHERS, *table, *(name_row(name, refused) for name in sorted(others))]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes the page, or compares it with the script.

    Returns the exit status: 1 if the page is out of date.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    page = settings_page()
    if not check:
        write_whole(PAGE, page)
        return 0
    if PAGE.read_text(encoding="utf-8") == page:
        return 0
    print(f"{PAGE} is out of date: python -m tools.settings_page", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(run_command("settings_page.py", main))
