"""What train_gpt.py --dry-run and --rehearse start: a tool, for the script that was asked.

    python tools/hand_over.py --dry-run packed/train_gpt.py --k 8     # as the script itself does

Tools import train_gpt. Here that is the file which is given, of whatever name, in whatever folder,
packed or not: its own bytes count. The current folder stays the user's, as relative paths need it.
"""

import importlib
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    if sys.argv[1:2] not in (["--dry-run"], ["--rehearse"]) or len(sys.argv) < 3:
        print("error: start it as python train_gpt.py --dry-run, or --rehearse", file=sys.stderr)
        sys.exit(2)
    _, command, script, *arguments = sys.argv
    sys.argv[1:] = arguments
    # In place of this file's folder, which Python puts first unless it is told not to.
    here = Path(__file__).resolve().parent
    sys.path = [path for path in sys.path if Path(path).resolve() != here]
    sys.path.insert(0, str(Path(script).parent))
    sys.modules["train_gpt"] = importlib.import_module(Path(script).stem)
    sys.path.insert(0, str(here.parent))
    tool = command.strip("-").replace("-", "_")
    runpy.run_module(f"tools.{tool}", run_name="__main__", alter_sys=True)
