"""Prints what a run achieved, from its logs: python -m tools.summary logs/demo.jsonl"""

import json
import statistics
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

CAP = 16_000_000
SEPARATOR = "\n" + "=" * 100 + "\n"  # between the script and the messages of a text log


def last_run(path: Path) -> dict[str, dict]:
    """The last record of each event, of the last run in the file (logs append, and a run begins
    with its settings).
    """
    events = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["event"] == "settings":
            events = {}
        events[record["event"]] = record
    return events


class Spread(NamedTuple):
    """Mean and sample standard deviation; None where there are too few values."""

    mean: float | None
    std: float | None


def spread(values: list[float]) -> Spread:
    return Spread(
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def wrapped(text: str) -> list[str]:
    """Its paragraphs in indented lines."""
    indent = {"initial_indent": "  ", "subsequent_indent": "  "}
    paragraphs = (textwrap.wrap(paragraph, 98, **indent) for paragraph in text.splitlines())
    return [line for lines in paragraphs for line in lines or [""]]


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    try:
        events = last_run(path)
    except OSError as error:
        print(f"summary.py: error: {path}: {error.strerror}", file=sys.stderr)
        return 1
    except (ValueError, KeyError, TypeError):
        print(f"summary.py: error: {path} is not a run's .jsonl log", file=sys.stderr)
        return 1
    wanted = ("settings", "trained", "after_quantization", "final")
    if missing := [name for name in wanted if name not in events]:
        print(
            f"summary.py: error: {path} is of a run that has not finished: no {missing[0]!r} yet",
            file=sys.stderr,
        )
        return 1
    settings, trained, quantized, final = (events[name] for name in wanted)
    machine, settings = settings["machine"], settings["settings"]
    total, code = trained["bytes_total"], trained["bytes_code"]
    windows = f"{settings['eval_mode']} windows"
    if settings["eval_mode"] == "sliding":
        windows += f", stride {settings['eval_stride']}"
    adapted = settings["ttt_enabled"] and settings["ttt_epochs"] > 0
    windows += ", adapting as it goes" if adapted else ", weights frozen"
    run_id = settings["run_id"]
    lines = [
        f"Run {run_id}: {trained['steps']} steps of {trained['step_avg_ms']:.0f} ms on {machine['hardware']}",
        "",
        "Bits per byte of the validation text:",
        f"  before quantization   {trained['val_bpb']:.4f}   (plain windows)",
        f"  after quantization    {quantized['val_bpb']:.4f}   (plain windows)",
        f"  {'after adaptation' if adapted else 'final':20}  {final['val_bpb']:.4f}   ({windows})",
        "",
        f"Size: {total:,} of {CAP:,} bytes ({code:,} code + {total - code:,} model)",
    ]
    if "sample" in events:
        lines += ["", "What it writes, before it adapts:", *wrapped(events["sample"]["sample"])]
    if settings["preset"] == "tiny":
        command = (
            f"PRESET=tiny RUN_ID=longer MAX_WALLCLOCK_SECONDS=600 {sys.executable} train_gpt.py"
        )
        lines += [
            "",
            "Next, the same model for ten minutes:",
            "  " + command.replace(f"{Path.cwd()}/", ""),
        ]
    width = 100
    print("\n" + "=" * width, *lines, "=" * width, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
