"""Processes of Python, forked from one that has imported torch and the script.

Before the script begins, a process spends four seconds on imports, a torchrun of two ranks twelve,
and two more in the first step. Popen() and run() here are as subprocess' own, with the process ids,
signals, pipes and statuses of real processes, but what nearly all of them import is there already;
so it is in the ranks that torchrun starts. Where a test is about the very start (closed consoles,
variables that torch or Python read but once), it starts a subprocess, and one test starts each
command for real.

They differ from real processes in three ways. All have the server's seed of hashes, so that ranks
agree on the order of sets, which real ones do not. torchrun's ranks end at once, without atexit's
functions and without taking torch down. And /proc shows the server's command and variables.

The variables should be a process_environment(): the server has read OMP_NUM_THREADS, as torch does
but once.
"""

import atexit
import contextlib
import functools
import gc
import inspect
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import train_gpt
from tests.support import SCRIPT, process_environment

LONGEST = 1 << 17  # bytes of a request
OPEN_FILES = 4096  # no descriptor of ours is beyond
# As subprocess names the two ends of each pipe.
STREAMS = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
LIBRARY = [path for path in sys.path if path not in ("", str(SCRIPT.parent))]


# ---- For tests -----------------------------------------------------------------------------------


class Popen(subprocess.Popen):
    """A process that the server forks: its parent waits for it there, and tells the status here."""

    def _execute_child(self, *values):
        names = list(inspect.signature(subprocess.Popen._execute_child).parameters)[1:]
        given = dict(zip(names, values, strict=True))
        args, env = given["args"], given["env"]
        assert args[0] == sys.executable
        others = [given[name] for name in ("executable", "preexec_fn", "pass_fds", "shell")]
        assert not any(others), "nothing here does that"
        streams = [given[name] for name in STREAMS]
        theirs = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self._told, tell = os.pipe()
        request = {"command": [os.fspath(part) for part in args[1:]]}
        request |= {"variables": dict(os.environ) if env is None else env}
        request["folder"] = os.fspath(given["cwd"] or os.getcwd())
        request["session"] = bool(given["start_new_session"])
        descriptors = [number if end == -1 else end for number, end in enumerate(theirs)]
        socket.send_fds(server(), [json.dumps(request).encode()], [*descriptors, tell])
        os.close(tell)
        self._close_pipe_fds(*streams)
        self.pid = int(self._next_line())
        self._child_created = True

    def _next_line(self) -> str:
        """The line that comes next from the server."""
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._told, 1)
            if not byte:
                raise RuntimeError("the process that forks others has ended")
            line += byte
        return line.decode()

    def _try_wait(self, wait_flags):
        timeout = 0 if wait_flags & os.WNOHANG else None
        if not select.select([self._told], [], [], timeout)[0]:
            return 0, 0
        status = int(self._next_line())
        os.close(self._told)
        return self.pid, status

    def _internal_poll(self, *_, **__):
        if self.returncode is None and self._child_created:
            ended, status = self._try_wait(os.WNOHANG)
            if ended:
                self._handle_exitstatus(status)
        return self.returncode


if sys.platform != "linux":  # elsewhere what torch has started may not outlive a fork
    Popen = subprocess.Popen


def run(command, timeout: float, capture_output: bool = False, **options):
    """As subprocess.run()."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)


@functools.cache
def server() -> socket.socket:
    """Where the server of this process takes requests; it ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
        env=process_environment({}),
        cwd=SCRIPT.parent,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()

    def end():
        ours.shutdown(socket.SHUT_RDWR)  # though a process that a test forked may hold it, too
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# ---- The server ----------------------------------------------------------------------------------


def open_streams(encoding: str | None, unbuffered: bool) -> None:
    """Standard streams as Python opens them: those of this process are of the server's files."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode = "w" if number else "r"
        errors = "backslashreplace" if name == "stderr" else "strict"
        names = encoding or getattr(sys, name).encoding
        stream = open(number, mode, encoding=names, errors=errors, closefd=False)  # noqa: SIM115
        if number and unbuffered:
            raw = stream.detach().detach()
            stream = io.TextIOWrapper(raw, names, errors, write_through=True)
        elif name == "stderr":
            stream.reconfigure(line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def find_modules(command: list[str], variables: dict[str, str], isolated: bool) -> None:
    """Has modules be looked for where Python would, by its arguments and PYTHONPATH.

    isolated: as by -I, neither in the script's folder nor in those of PYTHONPATH.
    """
    first = os.path.dirname(os.path.realpath(command[0]))
    first = {"-c": "", "-m": os.getcwd()}.get(command[0], first)
    named = variables.get("PYTHONPATH", "").split(os.pathsep)
    own = [] if isolated else [first, *filter(None, named)]
    sys.path[:] = [*own, *LIBRARY]


def become(command: list[str], variables: dict[str, str]) -> int | str | None:
    """Runs in this process what Python would by these arguments; returns what it exits with."""
    os.environ.clear()
    os.environ.update(variables)
    flag = command[0] if command[0] in ("-u", "-I") else ""
    command = command[1:] if flag else command
    open_streams(variables.get("PYTHONIOENCODING"), flag == "-u")  # as of torchrun's ranks
    find_modules(command, variables, flag == "-I")
    # As an audit's cell is entered, and as --dry-run goes on: Python becomes Python.
    os.execv = os.execvp = lambda _, line: sys.exit(become(line[1:], dict(os.environ)))
    try:
        if command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(command[1], {"__name__": "__main__"})
        elif command[0] == "-m":
            sys.argv = command[1:]
            if command[1] == "torch.distributed.run":  # which is imported
                return sys.modules[command[1]].main()
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            if os.path.realpath(command[0]) == str(SCRIPT):  # its last line, without compiling it
                return train_gpt.run()
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


def mind(request: dict, descriptors: list[int]) -> bool:
    """In a process of the server's: starts another one, waits for it, and tells its id and status.

    Returns twice: in that other one, which is to become what was asked for, True.
    """
    *streams, tell = descriptors
    process = os.fork()
    if process:
        for descriptor in streams:  # or who reads them would wait for this one, too
            os.close(descriptor)
        for number in (0, 1, 2):
            os.close(number)
        _, status = os.waitpid(process, 0)
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            os.write(tell, b"%d\n" % status)
        return False
    if request["session"]:
        os.setsid()
    os.write(tell, b"%d\n" % os.getpid())  # now that a signal to its group would reach it
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    os.closerange(3, OPEN_FILES)
    os.chdir(request["folder"])
    return True


class Rank:
    """What torchrun asks of a rank's subprocess.Popen, of one that it forked."""

    def __init__(self, process: int):
        self.pid = process
        self.returncode = None

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (3600.0 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)
        return self.returncode


def fork_rank(handler, command: tuple, variables: dict[str, str]) -> Rank:
    """Stands for SubprocessHandler._popen: the child is the agent's, in a session of its own."""
    # On a machine with GPUs, torch may put numactl before Python.
    arguments = command[command.index(sys.executable) + 1 :]
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return Rank(process)
    gc.freeze()  # what was the agent's is never taken apart here
    os.setsid()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in ((1, handler._stdout), (2, handler._stderr)):
        if stream:
            os.dup2(stream.fileno(), number)
    os.closerange(3, OPEN_FILES)
    status = 1
    try:
        status = become(list(arguments), variables)
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
        threading._shutdown()
        sys.stdout.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(status or 0)  # nor are its frames returned to


def serve(channel: socket.socket) -> dict | None:
    """Forks for each request; returns in those forked, with the request, and None in the end."""
    while True:
        data, descriptors, *_ = socket.recv_fds(channel, LONGEST, 4)
        if not data:
            return None
        if os.fork() == 0:
            channel.close()  # or requests would go unanswered, not fail, once the server has ended
            request = json.loads(data)
            if mind(request, descriptors):
                return request
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def main() -> int | str | None:
    import torch._dynamo  # which a step of an optimizer imports
    import torch.distributed.run  # noqa: F401
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = fork_rank
    # torchrun's agent has threads: Python 3.12 says so on the standard error of a test.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    gc.collect()
    gc.freeze()
    channel = socket.socket(fileno=int(sys.argv[1]))
    request = serve(channel)
    return become(request["command"], request["variables"]) if request else 0


if __name__ == "__main__":
    sys.exit(main())
