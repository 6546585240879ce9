"""Starts a run again from its logs, which contain the script and the settings.

    python -m tools.again logs/first.txt              # same settings, as RUN_ID=first-again
    python -m tools.again logs/first.txt --dry-run    # prints the command; writes nothing
    DEVICE=cpu python -m tools.again logs/first.txt   # the environment overrides the log's settings

The script is written beside the log, as RUN_ID-again.py, and started with as many processes as the
run had. The new run writes its files there, too, wherever the old run wrote, unless LOG_DIR is set.
With MAX_WALLCLOCK_SECONDS=0 in the log, the same machine trains the same model bit for bit: on
CPUs, and on one GPU with DETERMINISTIC=1.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.again", file=sys.stderr)
    sys.exit(2)

from tools.command import Parser, environment_value, need, run_command
from tools.logs import FIRST_LINE, SEPARATOR, last_run, not_a_log, rank_count


def read_script(path: Path) -> bytes:
    """The script of the last run in a text log: it begins with the docstring of every version."""
    # As bytes, since a script may have been written with any line ends.
    text = path.read_bytes()
    script, found, _ = text.rpartition(SEPARATOR.encode())
    need(found, f"{path} is not a run's text log: no line of 100 = ends the script in it")
    # The messages of earlier runs may stand before it.
    return script[max(0, script.rfind(FIRST_LINE.encode()) + 1) :]


def given_settings(started: dict) -> dict[str, str]:
    """The settings that a run was given, as environment variables, from its record of settings.

    Older logs do not say which were given; their scripts take all. Another script's name, which no
    record keeps the value of, may have taken EVAL_MODE along.
    """
    every = started["settings"]
    given = {*started.get("given", every), "run_id", "log_dir"}
    given |= {"eval_mode"} if given - every.keys() else set()
    return {name.upper(): environment_value(every[name]) for name in every if name in given}


def find_artifact(folder: Path, every: dict) -> str:
    """The artifact of a run: beside its log, or else where the run wrote it."""
    name = f"{every['run_id']}.int6.lzma"
    beside = folder / name
    return str(beside if beside.exists() else Path(every["log_dir"], name))


def read_command(
    path: Path, environment: dict[str, str], script: Path
) -> tuple[dict[str, str], list[str]]:
    """Settings as environment variables, and what starts them.

    They are those that the run was given: the script of the log has the same defaults for the
    others, and may refuse one that another setting makes meaningless.
    """
    records = path.with_suffix(".jsonl")
    try:
        started = last_run(records)["settings"]
        every = started["settings"]
        settings = given_settings(started)
        settings["RUN_ID"] += "-again"
        ranks = rank_count(started["machine"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise not_a_log(records) from None
    # What is only scored keeps the artifact of the run that trained; its log gets another name.
    if every.get("eval_only") and not every.get("artifact"):
        settings["ARTIFACT"] = find_artifact(path.parent, every)
    elif not every.get("eval_only"):
        settings.pop("ARTIFACT", None)  # the first run's, which stays; this one writes its own
    settings.pop("OVERWRITE", None)  # it was said of the run's name, not of this one
    # The folder that the log names may be another machine's.
    settings["LOG_DIR"] = str(path.parent)
    for name in map(str.upper, every):
        if name in environment:
            settings[name] = environment[name]
    if settings.get("EVAL_NLL_PATH") and "EVAL_NLL_PATH" not in environment:
        scores = Path(settings["EVAL_NLL_PATH"])  # the first run's, which stay, too
        beside = Path(settings["LOG_DIR"], f"{scores.stem}-again{scores.suffix}")
        settings["EVAL_NLL_PATH"] = str(beside)
    launcher = []
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return settings, [sys.executable, *launcher, str(script)]


def main() -> int:
    """Prints the command and starts it; returns the run's own exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="LOG_DIR/RUN_ID.txt, with RUN_ID.jsonl beside it")
    parser.add_argument("--dry-run", action="store_true", help="start and write nothing")
    given = parser.parse_args()
    path = given.log.with_suffix(".txt")
    script = path.with_name(path.stem + "-again.py")
    settings, command = read_command(path, dict(os.environ), script)
    text = read_script(path)
    # The printed line can be pasted into a shell.
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    print(*words, shlex.join(command), flush=True)
    if given.dry_run:
        print(f"again.py: nothing is written; a start would first write {script}", file=sys.stderr)
        return 0
    script.write_bytes(text)
    return subprocess.run(command, env=os.environ | settings).returncode


if __name__ == "__main__":
    sys.exit(run_command("again.py", main))
