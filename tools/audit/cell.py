"""Cells: processes that see nothing but named files, and no network.

The audit runs a program that somebody else wrote. It runs in a process of its own, in a folder
of its own; tools/audit/enter.py starts it. Levels of isolation are tried in order. A probe attempts
what must be refused, and the first level that refuses all of it is used:

    bubblewrap  the program bwrap, where it is installed
    namespaces  the same by system calls: as root or in a user namespace
    landlock    the kernel refuses other files and TCP (not UDP); needs none of these
    none        not isolated: nothing is refused, and the audit says so
"""

import json
import os
import re
import shutil
import signal
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.audit", file=sys.stderr)
    sys.exit(2)

from tools.command import need

LEVELS = ("bubblewrap", "namespaces", "landlock", "none")
ENTER = Path(__file__).with_name("enter.py")

# Of the system, what Python, torch and CUDA's libraries need.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/sys", "/etc/alternatives")
SYSTEM += ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/nsswitch.conf")
SYSTEM += ("/etc/passwd", "/etc/group", "/etc/localtime", "/etc/nvidia")
DEVICES = ("null", "zero", "full", "random", "urandom")
CUDA_DEVICES = ("nvidia*", "dri")

# Variables that go through, beside the settings of an evaluation: what finds programs and GPUs, and
# how threads share the cores.
PASSED = re.compile(r"PATH|LD_LIBRARY_PATH|CUDA_[A-Z_]+|NVIDIA_[A-Z_]+|OMP_[A-Z_]+")


def passed_variables(environment: dict[str, str]) -> dict[str, str]:
    """What of an environment a cell may know."""
    return {name: value for name, value in environment.items() if PASSED.fullmatch(name)}


def python_folders() -> list[str]:
    """Folders of this Python and its packages, by their real paths too.

    A virtual environment's Python is a link to another one's, which needs its own folders.
    """
    folders = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    folders.append(str(Path(sys.executable).parent))
    folders += [os.path.realpath(path) for path in folders]
    there = [path for path in dict.fromkeys(folders) if os.path.isdir(path)]
    # One that lies in another is seen with it.
    return [path for path in there if not any(is_in(path, other) for other in there)]


def is_in(path: str, folder: str) -> bool:
    """Whether a path lies in a folder, which is not itself."""
    return path != folder and Path(path).is_relative_to(folder)


def devices() -> list[str]:
    """Device files that a cell sees: what every program has, and GPUs."""
    named = [Path("/dev", name) for name in DEVICES]
    for pattern in CUDA_DEVICES:
        named += sorted(Path("/dev").glob(pattern))
    return [str(path) for path in named if path.exists()]


@dataclass(frozen=True)
class Cell:
    """A folder with what a command is given, to be read, and one in which it works."""

    given: Path
    work: Path
    root: Path  # empty: where a level may mount what is seen

    def readable(self) -> list[str]:
        """All that the command may read."""
        system = [path for path in SYSTEM if os.path.lexists(path)]
        folders = [path for path in python_folders() if not any(is_in(path, s) for s in system)]
        return [*system, *folders, str(self.given)]


@contextmanager
def open_cell() -> Iterator[Cell]:
    """An empty cell, which goes when the command has ended.

    What the command has left there must be read before.
    """
    with tempfile.TemporaryDirectory(prefix="audit-") as name:
        base = Path(name).resolve()
        cell = Cell(base / "given", base / "work", base / "root")
        for folder in (cell.given, cell.work, cell.root):
            folder.mkdir()
        yield cell


@dataclass(frozen=True)
class Isolation:
    """The level that cells have here, and what its probe showed."""

    level: str
    evidence: str

    @property
    def is_isolated(self) -> bool:
        """Whether the kernel refuses anything at all."""
        return self.level != "none"


def start_line(level: str, cell: Cell, command: list[str]) -> list[str]:
    """The command line that runs a command in a cell.

    Two of the levels are entered by a file of ours, which reads what it needs from a request beside
    the cell's folders, where the command cannot reach it.
    """
    if level == "bubblewrap":
        return [*bubblewrap_line(cell), *command]
    request = {
        "command": command,
        "folder": str(cell.work),
        "readable": cell.readable(),
        "devices": devices(),
        "root": str(cell.root),
    }
    path = cell.given.parent / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    return [sys.executable, "-I", str(ENTER), level, str(path)]


def bubblewrap_line(cell: Cell) -> list[str]:
    """bwrap's part of a command line. It turns loopback on by itself.

    --unshare-all leaves nothing shared; --cap-drop matters where root starts it.
    """
    line = ["bwrap", "--die-with-parent", "--new-session", "--unshare-all", "--cap-drop", "ALL"]
    line += ["--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev"]
    for path in cell.readable():
        if os.path.islink(path):
            line += ["--symlink", os.readlink(path), path]
        else:
            line += ["--ro-bind", path, path]
    for path in devices():
        if "nvidia" in path or path.endswith("/dri"):
            line += ["--dev-bind", path, path]
    return [*line, "--bind", str(cell.work), str(cell.work), "--chdir", str(cell.work), "--"]


# Tries what a cell must not do; says in one line what it could do all the same.
PROBE = """
import json, socket, sys

def could(function):
    try:
        return bool(function()) or True
    except OSError:
        return False

secret, given, port = sys.argv[1:]
done = {
    "read another file": could(lambda: open(secret).read()),
    "write what it was given": could(lambda: open(given, "a")),
    "reach the network": could(lambda: socket.create_connection(("127.0.0.1", int(port)), 5)),
}
assert open(given).read() == "given" and open("work", "w").write("x")
print(json.dumps(done))
"""


def probe(level: str) -> str:
    """Why a level is not to be had here; "" if it refuses what it must.

    A kernel, a container or its seccomp filter may refuse a level, or half of it: so it is tried.
    """
    if level == "bubblewrap" and not shutil.which("bwrap"):
        return "bwrap is not installed"
    with open_cell() as cell, tempfile.NamedTemporaryFile("w") as secret, listening() as port:
        secret.write("secret")
        secret.flush()
        given = cell.given / "file"
        given.write_text("given", encoding="utf-8")
        command = [sys.executable, "-I", "-c", PROBE, secret.name, str(given), str(port)]
        done = subprocess.run(
            start_line(level, cell, command),
            env=passed_variables(dict(os.environ)),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
        )
    try:
        could = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return said[-1]
    return ", ".join(f"it could {what}" for what, was_done in could.items() if was_done)


@contextmanager
def listening() -> Iterator[int]:
    """A port of this machine's own, at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def choose_isolation(forced: str | None = None, try_level: Callable = probe) -> Isolation:
    """The first level that holds, or the one that is asked for.

    Raises UserError if that cannot be had here.
    """
    if forced == "none":
        return Isolation("none", "not isolated, as was asked")
    refused = []
    for level in (forced,) if forced else LEVELS[:-1]:
        why_not = try_level(level)
        if not why_not:
            tried = "a probe could not read another file, write what it was given, or use TCP"
            return Isolation(level, "; ".join([f"{level}: {tried}", *refused]))
        need(not forced, f"--isolation {forced} cannot be had here: {why_not}")
        refused.append(f"no {level}: {why_not}")
    return Isolation("none", "; ".join(["NOT ISOLATED", *refused]))


# ---- Files that were opened --------------------------------------------------------------------

TRACED = "open,openat,openat2,execve,connect"
ASKED = re.compile(r'^(\d+) +(open|openat|openat2|execve)\((?:AT_FDCWD[^,]*, )?"((?:[^"\\]|\\.)*)"')
RESUMED = re.compile(r"^(\d+) +<\.\.\. (?:open|openat|openat2|execve) resumed>")
RESULT = re.compile(r"= (-?\d+)")
INTERNET = re.compile(r"connect\(.*sa_family=AF_INET6?,.*")


def find_strace() -> str:
    """Where strace is that may trace here; "" without one.

    Some containers have it and refuse what it needs.
    """
    found = shutil.which("strace")
    if not found:
        return ""
    done = subprocess.run([found, "-f", "-o", os.devnull, "true"], capture_output=True)
    return "" if done.returncode else found


@dataclass(frozen=True)
class Trace:
    """What strace saw from outside.

    The traced process has no hand in it, as it has in what a hook within it writes down.
    """

    opened: list[str]  # paths as they were asked for, of files that were opened
    programs: list[str]
    network: list[str]


def read_trace(path: Path, command: str) -> Trace:
    """A file that strace wrote: a call a line, or two where another process came between.

    It counts from the start of a command, whose line holds this; before, the cell was set up.
    """
    started = False
    opened = {}
    programs = {}
    network = {}
    begun = {}  # by process: what it asked for, while strace has not seen the answer
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            started |= f'execve("{sys.executable}"' in line and command in line
            if not started:
                continue
            if asked := ASKED.match(line):
                begun[asked[1]] = asked
            elif resumed := RESUMED.match(line):
                asked = begun.get(resumed[1])
            elif address := INTERNET.search(line):
                network[address[0][:100]] = None
            results = RESULT.findall(line)
            if asked and results and int(results[-1]) >= 0:
                kind = programs if asked[2] == "execve" else opened
                kind[asked[3]] = None
    return Trace(list(opened), list(programs), list(network))


def run_in_cell(
    isolation: Isolation,
    cell: Cell,
    command: list[str],
    settings: dict[str, str],
    say: Callable[[str], None],
    trace: Path | None = None,
) -> tuple[int, str]:
    """Runs a command in a cell; its exit status, and the last line that it said.

    settings: variables that it gets beside PATH and CUDA's. say hears of its lines. trace: where
    strace writes what it sees, if it is to be used.
    """
    own = {"HOME": str(cell.work), "TMPDIR": str(cell.work), "PYTHONDONTWRITEBYTECODE": "1"}
    if isolation.level == "landlock":  # without /dev/shm, torch's compilers cannot share locks
        own["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    line = start_line(isolation.level, cell, command)
    if trace is not None:
        options = f"-f -qq -s 256 -e trace={TRACED}".split()
        line = ["strace", *options, "-o", str(trace), *line]
    last = ""
    process = subprocess.Popen(
        line,
        cwd=cell.work,
        env=passed_variables(dict(os.environ)) | own | settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, which ends as a whole
    )
    try:
        for text in process.stdout:
            if text.strip():
                last = "".join(x if x.isprintable() else " " for x in text.strip())[:300]
                say(last)
        status = process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
    return status, last
