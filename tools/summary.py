"""Prints what a run achieved, from its log.

    python -m tools.summary logs/demo.jsonl

These are the scores and the amount of text that they are of, the time of a step, the bytes of code
and model, and the text that the model wrote if the run was asked for a sample. If the file has
several runs, the last one counts.
"""

import argparse
import shlex
import sys
import textwrap
from pathlib import Path

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.summary", file=sys.stderr)
    sys.exit(2)

from tools import known
from tools.again import given_settings
from tools.command import Parser, run_command
from tools.contradictions import CAP_BYTES
from tools.logs import finished_run, not_a_log

WIDTH = 100


def wrapped(text: str) -> list[str]:
    """A text's paragraphs as indented lines."""
    lines = []
    for paragraph in text.splitlines():
        # An empty paragraph is a line too.
        lines += textwrap.wrap(
            paragraph, WIDTH - 2, initial_indent="  ", subsequent_indent="  "
        ) or [""]
    return lines


def adapts(settings: dict) -> bool:
    """Whether the final score is of a model that learns from what it has scored.

    Not by settings that a log lacks: a package may be of another script.
    """
    epochs = settings.get("eval_mode") == "documents" or settings.get("ttt_epochs", 0) > 0
    return bool(settings.get("ttt_enabled") and epochs)


def way_of_scoring(settings: dict) -> str:
    """How the final score is taken, in words."""
    windows = f"{settings['eval_mode']} windows"
    if settings["eval_mode"] == "documents":
        windows = "documents by themselves"
    if settings["eval_mode"] == "sliding":
        windows += f", stride {settings['eval_stride']}"
    return windows + (", adapting as it goes" if adapts(settings) else ", weights frozen")


def score_lines(events: dict[str, dict]) -> list[str]:
    """The model's scores at the three moments at which they are taken."""
    settings = events["settings"]["settings"]
    # The first two are of the same text in the same windows, so that they can be compared.
    before = events["trained"]["val_bpb"]
    after = events["after_quantization"]["val_bpb"]
    final = events["final"]["val_bpb"]
    return [
        f"  before quantization   {before:.4f}   (plain windows)",
        f"  after quantization    {after:.4f}   (plain windows)",
        f"  final                 {final:.4f}   ({way_of_scoring(settings)})",
    ]


def scored_text(counts: dict | None) -> str:
    """How much text the scores are of, and whether that is the contest's.

    Older logs do not say it.
    """
    if counts is None:
        return "The log does not say how much text was scored."
    tokens, size = f"{counts['scored_tokens']:,} tokens", f"{counts['bytes']:,} bytes"
    found = known.compare(counts).name or "not FineWeb's validation text"
    return f"Scored: {tokens}, {size} of {counts['documents']:,} documents, {found}"


def longer_command(started: dict) -> str:
    """What trains the same model for ten minutes, with the settings that the run was given."""
    settings = given_settings(started)
    own = ("EVAL_ONLY", "ARTIFACT", "EVAL_NLL_PATH", "OVERWRITE", "RESUME", "ITERATIONS")
    for name in own:  # of that run
        settings.pop(name, None)
    settings["RUN_ID"] += "-longer"
    settings["MAX_WALLCLOCK_SECONDS"] = "600"
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    python = sys.executable.replace(f"{Path.cwd()}/", "")
    return " ".join([*words, python, "train_gpt.py"])


def summary(events: dict[str, dict]) -> list[str]:
    """The lines to print of a finished run."""
    settings = events["settings"]["settings"]
    hardware = events["settings"]["machine"]["hardware"]
    trained = events["trained"]
    steps = f"{trained['steps']} steps of {trained['step_avg_ms']:.0f} ms on {hardware}"
    total = trained["bytes_total"]
    code = trained["bytes_code"]
    size = f"{total:,} of {CAP_BYTES:,} bytes ({code:,} code + {total - code:,} model)"
    lines = [f"Run {settings['run_id']}: {steps}", ""]
    # The contest's two figures: bits per byte, and bytes.
    lines += ["Bits per byte of the validation text:", *score_lines(events)]
    lines += ["", scored_text(events.get("validation_data")), "", f"Size: {size}"]
    if "sample" in events:
        lines += ["", "What it writes, before it adapts:", *wrapped(events["sample"]["sample"])]
    # The demo trains for two minutes; its next step is the same model with more time, where its
    # text is: with what lies in data/tiny nothing can be trained.
    trained = any(Path(settings["data_path"]).glob("*_train_*.bin"))
    if settings["preset"] == "tiny" and trained:
        command = longer_command(events["settings"])
        lines += ["", "Next, the same model for ten minutes:", f"  {command}"]
    return lines


def main() -> int:
    """Prints the summary of the last run in a log."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="LOG_DIR/RUN_ID.jsonl")
    path = parser.parse_args().log
    events = finished_run(path)
    try:
        lines = summary(events)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise not_a_log(path) from None
    ruler = "=" * WIDTH
    print(f"\n{ruler}", *lines, ruler, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("summary.py", main))
