"""Writes docs/settings.md from train_gpt.py: every setting, every preset, and the contest's names.

python -m tools.settings_page            # writes the page
python -m tools.settings_page --check    # says whether it is up to date, and writes nothing
"""

import argparse
import dataclasses
import sys
from pathlib import Path

if not __package__:  # started by its path
    hint = "start it in the repository's folder as python -m tools.settings_page"
    print(f"error: {hint}", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from tools.command import Parser, environment_value, run_command

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "settings.md"
CONTEST = ROOT / "tests" / "data" / "contest_names.txt"

INTRODUCTION = """\
# Settings

Made from `train_gpt.py` by `python -m tools.settings_page`; a test keeps it true.

A setting is an environment variable, read once when a run starts. `PRESET` chooses a set of
defaults, and every other variable goes before it:

    PRESET=short SEED=42 MATRIX_LR=0.03 torchrun --standalone --nproc_per_node=1 train_gpt.py

A value outside its bounds ends the run with one line, and so does a name that is one letter off a
setting's or begins as only settings do. Other variables are let be, and most settings that others
leave without effect; a run's log begins with those given. Lists of layers are `all`, `none` or such
as `0,2-4`. `python train_gpt.py --help` says the same as this page.
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

REASONS = {  # of the default, and of short
    "num_layers": (
        "a tenth does not fit beside MLPs of four times the width (`b02-05`), seven of 576 "
        "lose (`b12-06`)"
    ),
    "mamba_layers": "a third attention layer loses (`b10-04`)",
    "mamba_d_state": (
        "32 loses at no shorter a step (`b15-02`), 128 gains less than its time is worth (`b12-12`)"
    ),
    "mlp_mult": "more weights on a coarser grid, as the records have it; 36.9 M are 3.4 bits each",
    "rope_fraction": "a quarter of each head turns; none at all loses (`b12-08`)",
    "qk_gain_init": (
        "4 is the start of the search (`b01`); 5 was tried with other changes, and lost (`b10-03`)"
    ),
    "document_reset": "gains 0.0031 at no time (`b06-05`)",
    "spelling_features": "gains 0.005 to 0.007 at no bytes (`b07-01`, `b09-02`)",
    "mask_impossible_pairs": "gains 0.0023 (`b10-02`)",
    "logit_softcap": "gains 0.0013 over 30 (`b10-10`)",
    "muon_beta2": "rows of even length gain 0.0011 (`b10-05`)",
    "matrix_lr": "rate × WEIGHT_DECAY × steps is 5.5 in a run of 180 s; 15.6 lost 0.015 (`b09-01`)",
    "mamba_matrix_lr": "three quarters of MATRIX_LR",
    "weight_decay": "as for MATRIX_LR; half loses 0.0047 in 60 s (`b02-04`)",
    "warmdown_fraction": "0.9 loses 0.0025 in 60 s (`b02-03`)",
    "average_horizon": "a fifth of it gains only in short runs (`b10-12`, `b11-01`)",
    "trellis_states": (
        "gains 0.0012 of 0.0054 that quantization costs; 8 states 0.0010 (`b16-03`, `b16-05`)"
    ),
    "sdclip_by_matrix": "with SDCLIP_BY_ROW gains 0.0009, alone 0.0004 (`b16-01`, `b16-06`)",
    "sdclip_by_row": "alone 0.0005 (`b16-08`)",
    "sdclip_most": "steps by errors' costs want a larger k for the same bytes (`b16`)",
    "eval_stride": "64 gains 0.0002 for twice the seconds (`b03-05`)",
    "ttt_enabled": "gains nothing here (`b01-01`, `b03-03`); kept for the contest's longer text",
    "export_reserve_seconds": (
        "short: calibration, GPTQ and a second GPTQ if the file is too large (`b18-01`)"
    ),
}

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


def cell(text: str) -> str:
    """A text inside a Markdown table, where a bar would end the cell."""
    return text.replace("|", "\\|")


def code(text: str) -> str:
    """A text as code inside a table; nothing if it is empty."""
    # Empty backticks would show as backticks.
    return f"`{cell(text)}`" if text else ""


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
        values = cell(t.describe_values(**field.metadata))
        about = cell(field.metadata["help"])
        lines.append(f"| `{field.name.upper()}` | {default} | {values} | {about} |")
    return lines


def reason_rows() -> list[str]:
    """A table of REASONS."""
    lines = ["| variable | why |", "| --- | --- |"]
    return lines + [f"| `{name.upper()}` | {cell(why)} |" for name, why in REASONS.items()]


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
        return f"| `{name}` | {fate} | {cell(reason)} |"
    if name in t.ALIASES:
        ours, convert = t.ALIASES[name]
        about = (convert.__doc__ or "").partition("\n")[0] if convert else "the same value"
        return f"| `{name}` | sets `{ours}` | {cell(about.strip())} |"
    field = t.Settings.__dataclass_fields__[name.lower()]
    return f"| `{name}` | setting | {cell(field.metadata['help'])} |"


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
    """Writes or checks the page; 1 if it is out of date.

    The check is for a test, which keeps the page from saying what the script does not do.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    page = settings_page()
    if not check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page:
        return 0
    print(f"{PAGE} is out of date: python -m tools.settings_page", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(run_command("settings_page.py", main))
