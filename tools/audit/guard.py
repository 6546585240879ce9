"""Runs a script under a hook that Python calls before it opens a file, starts a program or uses the
network. record.jsonl lists each of these events, and all are allowed except the network.

    python guard.py SCRIPT

The hook shares the script's process, so it proves something only for a script that leaves it alone,
and it does not see what native code does. tools/audit/case.py starts it in a cell, where the kernel
already refuses the network and other files.
"""

import json
import os
import runpy
import sys
import time

RECORD = "record.jsonl"
DRIVER_SEARCH = "/sbin/ldconfig", ["/sbin/ldconfig", "-p"]  # triton's
HARMLESS = ("socket.__new__", "socket.gethostname")
PROGRAMS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec")


class Guard:
    """The hook, and the file that it writes to."""

    def __init__(self, path: str):
        self.file = open(path, "w", buffering=1)  # noqa: SIM115, open as long as the process

    def note(self, kind: str, what: str) -> None:
        """Writes down what happened, and when."""
        self.file.write(json.dumps([time.perf_counter(), kind, what]) + "\n")

    def watch(self, event: str, arguments: tuple) -> None:
        """Python's hook. Raises PermissionError for the network."""
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            self.note("open", os.fsdecode(arguments[0]))
        elif event in PROGRAMS and arguments[:2] != DRIVER_SEARCH:
            self.note("program", repr(arguments[0]))
        elif event.startswith("socket.") and event not in HARMLESS:
            socket_file = isinstance(arguments[-1], (str, bytes))
            if not socket_file or event.startswith("socket.get"):
                told = [one for one in arguments if isinstance(one, (str, tuple))]
                self.note("network", f"{event} {told}")
                raise PermissionError("the network is closed")


def main() -> None:
    """Runs the script of the command line as if it were started by itself."""
    guard = Guard(RECORD)
    sys.addaudithook(guard.watch)
    sys.argv = sys.argv[1:]
    guard.note("start", "")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        guard.note("end", "")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("error: no command by itself; start python -m tools.audit", file=sys.stderr)
        sys.exit(2)
    main()
