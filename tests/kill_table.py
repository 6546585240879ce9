"""Ends runs in each of their phases by each signal, with one rank and two, and starts the same
command again: the table of what was lost.

    python -m tests.kill_table [--only PHASE …] [--ranks 1 2] [--out FILE] [--jobs 1]

A cell is two runs. The first (held_run.py: the script, held in a phase) is a process, or torchrun
and its ranks, and gets the signal; what it says, leaves behind and has lost is noted. The second is
the plain script with the same settings, and must end with the artifact and the score of a run that
nothing disturbed, byte for byte. Processes are forked from one that has imported torch, which saves
most of the time, except where a signal comes while Python imports, or a compiler works. What a cell
shows that it may not is its faults; the exit status is 1 if there are any. Of two ranks, SIGINT
goes to torchrun's process group, as Ctrl-C does, SIGTERM to torchrun, and SIGKILL to rank 1 alone.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m tests.kill_table", file=sys.stderr
    )
    sys.exit(2)

import train_gpt as t
from tests import forked
from tests.support import free_port, process_environment, run_environment, torchrun, write_data
from tools.command import need_place, run_command, write_whole

ARTIFACT = "a.int6.lzma"
HELD_RUN = Path(__file__).with_name("held_run.py")
PATIENCE = 900.0  # seconds until a phase is reached, or a process ends
SETTLED_SECONDS = 0.3  # from the beginning of a phase to the signal
FINISHED = "RUN_ID=a is finished"  # what the script says of a run that has its score
SLOWEST_END = 60.0  # seconds from a signal to the end, on a busy machine

# Twenty steps, late QAT in the last ones, a checkpoint every half second; no clock, so that two
# runs end with the same bits.
SETTINGS = {
    "iterations": 20,
    "max_wallclock_seconds": 0.0,
    "warmup_steps": 1,
    "train_log_every": 1,
    "checkpoint_every": 0.5,
    "eval_mode": "plain",
    "ttt_enabled": False,
    "late_qat_threshold": 0.5,
    "sdclip_k": 0.0,
    "calibration_tokens": 128,
}
# What a phase needs beside: the evaluation that is to be interrupted, a prompt, ...
EVALUATIONS = {
    "evaluation, plain": {},
    "evaluation, sliding": {"eval_mode": "sliding"},
    "evaluation, stateful": {"eval_mode": "stateful"},
    "evaluation, plain, adapting": {"ttt_enabled": True},
    "evaluation, sliding, adapting": {"eval_mode": "sliding", "ttt_enabled": True},
    "evaluation, stateful, adapting": {"eval_mode": "stateful", "ttt_enabled": True},
    "evaluation, documents, adapting": {"eval_mode": "documents", "ttt_enabled": True},
}
ALONE = "EVAL_ONLY=1, "
PHASES = {
    "start": {},
    "data": {},
    "warm-up": {},
    "training": {},
    "checkpoint": {},
    "validation": {"val_loss_every": 8},
    "QAT": {},
    "score before": {},
    "calibration": {},
    "GPTQ": {},
    "packing": {},
    "artifact": {},
    "score after": {"eval_mode": "sliding"},  # else it is the evaluation itself
    "sample": {"sample_prompt": "The", "sample_tokens": 8},
    **EVALUATIONS,
    f"{ALONE}evaluation, plain": {},
    f"{ALONE}evaluation, sliding, adapting": {"eval_mode": "sliding", "ttt_enabled": True},
    f"{ALONE}evaluation, documents, adapting": {"eval_mode": "documents", "ttt_enabled": True},
    "after the score": {"eval_nll_path": "a.npy"},
    # A small model: on a CPU, a compiler writes out every chunk of the scan.
    "compile": {"compile": "on", "num_layers": 2, "mamba_layers": "0", "late_qat_threshold": 0.0},
}
UNTRAINED = ("start", "data", "compile", "warm-up")  # phases before the first step
SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")


@dataclasses.dataclass
class Cell:
    """What became of one run."""

    phase: str
    ranks: int
    signal: str
    status: int = 0  # negative: ended by that signal
    seconds: float = 0.0  # from the signal to the end of all its processes
    last_line: str = ""
    left: str = ""  # files but for the logs
    steps_lost: int = 0  # made again
    seconds_lost: float = 0.0  # between the last checkpoint and the signal
    resumed: str = ""  # from where the second run went on
    faults: list[str] = dataclasses.field(default_factory=list)


# ---- Processes -----------------------------------------------------------------------------------


def environment(phase: str, data: Path, folder: Path, cache: Path) -> dict[str, str]:
    """Of a run in this folder, as it is to be interrupted; what it compiles goes to the cache."""
    changes = SETTINGS | PHASES[phase]
    if "eval_nll_path" in changes:
        changes["eval_nll_path"] = str(folder / changes["eval_nll_path"])
    if phase.startswith(ALONE):
        changes["eval_only"] = True
    variables = process_environment(run_environment(data, folder, **changes))
    return variables | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}


def held_command(ranks: int, *arguments: str) -> list[str]:
    """Starts held_run.py on this many ranks."""
    launcher = torchrun(f"--nproc_per_node={ranks}") if ranks > 1 else [sys.executable]
    return [*launcher, str(HELD_RUN), *arguments]


def run_plain(ranks: int, variables: dict[str, str], output: Path) -> tuple[int, str]:
    """Status, 0 or the first other one of a rank's, and output of the script's own command."""
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    processes = []
    with output.open("ab") as file:
        for rank in range(ranks):
            place = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            options = {"stdout": file, "stderr": subprocess.STDOUT}
            command = [sys.executable, t.__file__]
            processes.append(forked.Popen(command, env=variables | place, **options))
    deadline = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"again: not done in {PATIENCE:g} s") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    statuses = [process.returncode for process in processes if process.returncode]
    return (statuses or [0])[0], output.read_text(errors="replace")


def alive(process: int) -> bool:
    """Whether a process runs: a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(ready, what: str, process: subprocess.Popen | None = None) -> None:
    """RuntimeError if a condition does not come true in time, or a process has ended before."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if process is not None and process.poll() is not None and not ready():
            raise RuntimeError(f"ended with status {process.returncode} before {what}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"not in {PATIENCE:g} s: {what}")
        time.sleep(0.01)


def rank_processes(folder: Path) -> list[int]:
    """Process ids of the ranks, in order."""
    return [int(path.read_text()) for path in sorted(folder.glob("*.started"))]


def send(cell: Cell, launched: subprocess.Popen, ranks: list[int]) -> None:
    """The cell's signal, to whom it goes."""
    number = getattr(signal, cell.signal)
    if cell.signal == "SIGKILL":
        os.kill(ranks[-1], number)
    elif cell.signal == "SIGINT":
        os.killpg(launched.pid, number)
    else:
        launched.send_signal(number)


def in_phase(cell: Cell, folder: Path, cache: Path) -> bool:
    """Whether the first run has come to its phase."""
    if cell.phase == "compile":  # a kernel is being made
        return any(cache.rglob("*.cpp"))
    alone = cell.phase in ("packing", "checkpoint", "artifact", "after the score")
    wanted = 1 if alone else cell.ranks
    return len(list(folder.glob("*.held"))) >= wanted


# ---- What a run leaves ---------------------------------------------------------------------------


def records(folder: Path, event: str) -> list[dict]:
    """Of the runs' logs, evaluations of their own included."""
    lines = []
    for path in sorted(folder.glob("a*.jsonl")):
        lines += path.read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [record for record in found if record["event"] == event]


def files_left(folder: Path) -> set[str]:
    """Names of all but the logs."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    return {name for name in names if not name.endswith((".txt", ".jsonl"))}


def saved_step(folder: Path, begun: float = 0.0) -> tuple[int, float]:
    """Step of the newest checkpoint, and when it was written; without one 0 and the beginning."""
    for name in ("a.checkpoint", "a.checkpoint-before"):
        path = folder / name
        if path.is_file():
            header = path.read_bytes()[len(t.CHECKPOINT_MAGIC) :].partition(b"\n")[0]
            return json.loads(header)["steps"], path.stat().st_mtime
    return 0, begun


def result_of(folder: Path) -> tuple[str, float]:
    """SHA-256 of the artifact, and the score."""
    data = (folder / ARTIFACT).read_bytes()
    return hashlib.sha256(data).hexdigest(), records(folder, "final")[-1]["val_bpb"]


def last_line(output: str) -> str:
    """What the script said last: its one line if there is one, else the last of all."""
    lines = [line for line in output.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("train_gpt.py: error: ")]
    return (told or lines or [""])[-1].strip()


# ---- Cells ---------------------------------------------------------------------------------------


def interrupt(cell: Cell, variables: dict[str, str], folder: Path) -> str:
    """The first run, until its signal has ended it; notes what it shows, and returns its output."""
    inside = folder / "inside"
    inside.mkdir()
    cache = inside / "cache"  # empty: all has to be compiled
    variables = variables | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    path = inside / "output"
    begun = time.time()
    with path.open("wb") as output:
        imports = cell.phase in ("start", "compile")
        launched = (subprocess.Popen if imports else forked.Popen)(
            held_command(cell.ranks, cell.phase, str(inside)),
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    ranks = []
    try:
        wait_until(lambda: in_phase(cell, inside, cache), f"the phase {cell.phase}", launched)
        time.sleep(SETTLED_SECONDS)
        ranks = rank_processes(inside)
        sent = time.time()
        send(cell, launched, ranks)
        everyone = [launched.pid, *ranks]
        wait_until(lambda: launched.poll() is not None and not any(map(alive, everyone)), "the end")
        cell.seconds = time.time() - sent
    finally:
        for process in {launched.pid, *ranks}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launched.wait()
    cell.status = launched.returncode
    said = path.read_text(errors="replace")
    cell.last_line = last_line(said)
    cell.left = ", ".join(sorted(files_left(folder)))
    step, written = saved_step(folder, begun)
    made = [int(number) for number in re.findall(r"^step:(\d+)/.*train_loss", said, re.M)]
    trains = cell.phase not in UNTRAINED and not cell.phase.startswith(ALONE)
    if trains and not records(folder, "final"):  # or there is nothing left to lose
        cell.steps_lost = max(0, max(made, default=0) - step)
        cell.seconds_lost = max(0.0, sent - written)
    return said


def judge_end(cell: Cell, said: str) -> Iterable[str]:
    """What is wrong with how the first run ended."""
    if cell.phase == "start":  # Python still imports torch: the script's handlers are not there
        return
    asked = cell.signal != "SIGKILL"
    if re.search(r"train_gpt\.py\", line \d+", said):
        yield "a traceback of the script"
    if cell.ranks == 1 and cell.status != (2 if asked else -signal.SIGKILL):
        yield f"status {cell.status}"
    if cell.ranks > 1 and cell.status == 0:
        yield "status 0"
    if asked and not cell.last_line.startswith("train_gpt.py: error: "):
        yield "no line that says why"
    if asked and ".part" in cell.left:
        yield "a half file"
    if asked and cell.steps_lost:
        yield f"{cell.steps_lost} steps lost"
    if cell.seconds > SLOWEST_END:
        yield f"took {cell.seconds:.0f} s to end"


def judge_second(
    cell: Cell, variables: dict[str, str], folder: Path, wanted: tuple[str, float]
) -> Iterable[str]:
    """Starts the same command again; says what is wrong with how it goes on and ends."""
    step = saved_step(folder)[0]
    had_artifact = (folder / ARTIFACT).is_file()
    before = len(records(folder, "resumed"))
    status, said = run_plain(cell.ranks, variables, folder / "inside" / "again")
    if records(folder, "final") and status == 2 and FINISHED in said:
        cell.resumed = "is finished"
        if result_of(folder) != wanted:
            yield f"another result, {result_of(folder)}, not {wanted}"
        return
    if status:
        yield f"again: status {status}, {last_line(said)}"
        return
    resumed = [record["step"] for record in records(folder, "resumed")[before:]]
    trained = "train_loss:" in said
    cell.resumed = f"step {resumed[0]}" if resumed else "the start" if trained else "the artifact"
    if result_of(folder) != wanted:
        yield f"again: another result, {result_of(folder)}, not {wanted}"
    if resumed and resumed[0] != step:
        yield f"again: from step {resumed[0]} instead of {step}"
    if had_artifact and trained:
        yield "again: trains, though there is an artifact"
    if step and not resumed and trained:
        yield "again: the checkpoint was not taken up"
    if "warning" in said:
        yield f"again: {next(line for line in said.splitlines() if 'warning' in line)}"
    others = files_left(folder) - {ARTIFACT, "a.npy"}
    if others:
        yield f"again: leaves {', '.join(sorted(others))}"


class Table:
    """Fills cells in, each in a folder of its own below this one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = folder / "data"
        if not self.data.is_dir():
            write_data(self.data)
        self.undisturbed: dict[tuple, Future] = {}  # by ranks and settings
        self.lock = threading.Lock()

    def cache(self, phase: str, ranks: int) -> Path:
        """Where an undisturbed run, and those that go on, find what was compiled."""
        return self.folder / f"compiled-{phase}-{ranks}"

    def wanted(self, phase: str, ranks: int) -> tuple[str, float]:
        """The result of a run with this phase's settings that nothing ends before its time."""
        key = ranks, json.dumps(PHASES[phase])
        with self.lock:
            mine = key not in self.undisturbed
            result = self.undisturbed.setdefault(key, Future())
            number = len(self.undisturbed)
        if mine:
            try:
                folder = self.folder / f"undisturbed-{number}"
                folder.mkdir(parents=True)
                self.train(phase, ranks, folder)
                result.set_result(result_of(folder))
            except (RuntimeError, OSError) as error:
                result.set_exception(error)
        return result.result()

    def train(self, phase: str, ranks: int, folder: Path) -> None:
        """Makes an artifact, and its score, with a phase's settings; RuntimeError if it fails."""
        kind = phase.removeprefix(ALONE)
        variables = environment(kind, self.data, folder, self.cache(kind, ranks))
        status, said = run_plain(ranks, variables, folder / "trained.txt")
        if status:
            raise RuntimeError(f"undisturbed: status {status}, {last_line(said)}")

    def fill(self, cell: Cell) -> Cell:
        """Interrupts a run and starts it again; says it on standard error."""
        folder = self.folder / "-".join((cell.phase, str(cell.ranks), cell.signal)).replace(" ", "")
        folder.mkdir()
        variables = environment(cell.phase, self.data, folder, self.cache(cell.phase, cell.ranks))
        try:
            wanted = self.wanted(cell.phase, cell.ranks)
            if cell.phase.startswith(ALONE):
                self.train(cell.phase, cell.ranks, folder)
            said = interrupt(cell, variables, folder)
            cell.faults += judge_end(cell, said)
            cell.faults += judge_second(cell, variables, folder, wanted)
        except (RuntimeError, OSError) as error:
            cell.faults.append(str(error))
        print(row(cell), file=sys.stderr, flush=True)
        if not cell.faults:
            shutil.rmtree(folder)
        return cell


# ---- The table -----------------------------------------------------------------------------------


COLUMNS = (
    "| phase | ranks | signal | status | last line | left behind | lost | goes on from | faults |"
)


def row(cell: Cell) -> str:
    """Of the table, in Markdown."""
    said = cell.last_line.removeprefix("train_gpt.py: error: ")
    lost = f"{cell.steps_lost} steps, {cell.seconds_lost:.1f} s"
    faults = "; ".join(cell.faults) or "none"
    cells = (cell.phase, cell.ranks, cell.signal, cell.status, said[:120], cell.left or "nothing")
    cells = (*cells, lost, cell.resumed, faults)
    return f"| {' | '.join(str(text).replace('|', ' ') for text in cells)} |"


def table(cells: list[Cell]) -> str:
    """All cells, and how many have faults."""
    rule = "|" + " --- |" * (COLUMNS.count("|") - 1)
    faulty = sum(bool(cell.faults) for cell in cells)
    ending = f"{len(cells)} runs were ended, {faulty} of them with faults."
    return "\n".join([COLUMNS, rule, *map(row, cells), "", ending])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=PHASES, metavar="PHASE", default=list(PHASES))
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where runs are made; those with faults stay")
    parser.add_argument("--out", type=Path, help="a file for the table")
    given = parser.parse_args()
    if given.out:
        need_place(given.out)
    cells = [
        Cell(phase, ranks, name)
        for phase in given.only
        for ranks in given.ranks
        for name in SIGNALS
    ]
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with ThreadPoolExecutor(given.jobs) as pool:
            text = table(list(pool.map(Table(folder).fill, cells)))
    print(text)
    if given.out:
        write_whole(given.out, f"{text}\n")
    return int(any(cell.faults for cell in cells))


if __name__ == "__main__":
    sys.exit(run_command("kill_table.py", main))
