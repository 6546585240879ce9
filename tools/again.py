"""Starts a run again from its logs: the script and the settings are in them.

    python -m tools.again logs/first.txt              # with the same settings, as RUN_ID=first-again
    python -m tools.again logs/first.txt --dry-run    # prints the command, and writes only the script
    DEVICE=cpu python -m tools.again logs/first.txt   # settings in the environment take the place of the log's

The script is written to LOG_DIR/RUN_ID-again.py and started with as many processes as the run had.
With MAX_WALLCLOCK_SECONDS=0 in the log, the same machine trains the same model: on CPUs bit for
bit, on one GPU with DETERMINISTIC=1.
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

from tools.command import UserError
from tools.summary import SEPARATOR, last_run


def read_script(path: Path) -> bytes:
    """Of the last run in a text log: it begins with the docstring that every version has."""
    text = path.read_bytes()
    script, found, _ = text.rpartition(SEPARATOR.encode())
    if not found:
        raise UserError(f"{path} is not a run's text log: no line of 100 = ends the script in it")
    return script[max(0, script.rfind(b'\n"""Parameter Golf') + 1) :]


def read_command(
    path: Path, environment: dict[str, str], script: Path
) -> tuple[dict[str, str], list[str]]:
    """Settings as environment variables, and what starts them."""
    records = path.with_suffix(".jsonl")
    try:
        started = last_run(records)["settings"]
        settings, ranks = started["settings"], int(started["machine"]["hardware"].split(" × ")[0])
        settings = {
            name.upper(): str(int(v)) if isinstance(v, bool) else str(v)
            for name, v in settings.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{records} is not a run's .jsonl log") from None
    settings["RUN_ID"] += "-again"
    settings |= {name: environment[name] for name in settings if name in environment}
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    return settings, [sys.executable, *launcher, str(script)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="LOG_DIR/RUN_ID.txt, with RUN_ID.jsonl beside it")
    parser.add_argument("--dry-run", action="store_true", help="start nothing")
    given = parser.parse_args()
    path = given.log.with_suffix(".txt")
    script = path.with_name(path.stem + "-again.py")
    try:
        settings, command = read_command(path, dict(os.environ), script)
        script.write_bytes(read_script(path))
    except UserError as error:
        print(f"again.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"again.py: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(
        " ".join(
            [
                *(f"{name}={shlex.quote(value)}" for name, value in settings.items()),
                shlex.join(command),
            ]
        )
    )
    return 0 if given.dry_run else subprocess.run(command, env=os.environ | settings).returncode


if __name__ == "__main__":
    sys.exit(main())
