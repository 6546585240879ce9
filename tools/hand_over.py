"""Starts a tool for train_gpt.py --dry-run or --rehearse, with the script that was started so.

    python tools/hand_over.py --dry-run packed/train_gpt.py --k 8     # as the script itself does

Tools import train_gpt. Here that is the given file, whatever its name and folder, packed or not:
its own bytes count. The current folder stays the user's, since relative paths depend on it.
"""

import importlib.util
import runpy
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path


def fail(message: str):
    """Ends with the one line that a mistake of the user is worth."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def load(script: Path) -> None:
    """Makes a file the module train_gpt, by its path alone: its folder is not looked through.

    There, a name such as copy.py would stand for Python's own, and train_gpt.py for train_gpt.txt.
    """
    if not script.is_file():
        fail(f"there is no file {script}")
    loader = SourceFileLoader("train_gpt", str(script))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("train_gpt", loader))
    sys.modules["train_gpt"] = module
    try:
        loader.exec_module(module)
    except (SyntaxError, ImportError, ValueError, OSError) as error:
        fail(f"{script} cannot be read as a train_gpt.py: {error}")
    if not hasattr(module, "read_settings"):
        fail(f"{script} is no train_gpt.py: it reads no settings")


if __name__ == "__main__":
    if sys.argv[1:2] not in (["--dry-run"], ["--rehearse"]) or len(sys.argv) < 3:
        fail("start it as python train_gpt.py --dry-run, or --rehearse")
    _, command, script, *arguments = sys.argv
    sys.argv[1:] = arguments
    # In place of this file's folder, which Python puts first unless it is told not to.
    here = Path(__file__).resolve().parent
    sys.path = [path for path in sys.path if Path(path).resolve() != here]
    load(Path(script))
    sys.path.insert(0, str(here.parent))
    tool = command.strip("-").replace("-", "_")
    runpy.run_module(f"tools.{tool}", run_name="__main__", alter_sys=True)
