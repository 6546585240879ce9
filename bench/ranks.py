"""Measures whether the host keeps up with the GPUs of several ranks, at equal tokens for each rank.

    python -m bench.ranks --ranks 2 [--steps 30] [--out FILE.json]

Trains PRESET=short, or what the environment's settings say, with TRAIN_BATCH_TOKENS for each rank:
with one rank as a run does, with one rank whose kernels are launched one by one, and with N ranks,
for which torchrun starts a process on each GPU. Tokens are random.

step_ms is the median time of a step on the GPU. host_ms is the time that the host needs to launch
one step if the GPU is idle when it begins: if that is less, the host keeps up. The other figures
are of a step, from torch's profiler: busy_share, the part of the time in which any kernel runs;
idle_ms, the rest of the time, in gaps, with the longest gap; collective_ms, the time in NCCL's
kernels, waiting for other ranks included; exposed_ms, the part of that in which nothing is computed
meanwhile.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m bench.ranks", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from bench import bench
from tools.command import Parser, UserError, need_place, run_command, write_whole

DEFAULTS = {"PRESET": "short"}
DISCARDED = 6  # steps: the first five are logged, for which the host waits
PROFILED = 10
HOST_STEPS = 5  # each behind an idle GPU
SHORT_GAP = 2.0  # microseconds: one kernel ends and the next begins


# ============
# What a timeline says


def union(intervals: list[tuple[float, float]]) -> tuple[float, list[float]]:
    """How much of a line intervals (start, end) cover, and the gaps between them."""
    covered = 0.0
    gaps = []
    end = None
    for start, stop in sorted(intervals):
        if end is None or start > end:
            if end is not None:
                gaps.append(start - end)
            covered += stop - start
            end = stop
        elif stop > end:
            covered += stop - end
            end = stop
    return covered, gaps


def timeline(kernels: list[tuple[str, float, float]], steps: int) -> dict:
    """A step's figures, from the kernels (name, start, end), in microseconds, of so many steps."""
    if not kernels:
        return {}
    collectives, others = [], []
    for name, start, end in kernels:
        kind = collectives if bench.kernel_kind(name) == "communication" else others
        kind.append((start, end))
    busy, gaps = union(collectives + others)
    computing, _ = union(others)
    communicating, _ = union(collectives)
    idle = sum(gaps)
    each = 1e3 * steps  # microseconds of all steps to milliseconds of one
    row = {"launches": len(kernels) // steps, "busy_share": busy / (busy + idle)}
    row["idle_ms"] = idle / each
    row["gaps"] = sum(gap > SHORT_GAP for gap in gaps) // steps
    row["longest_gap_ms"] = max(gaps, default=0.0) / 1e3
    row["collective_ms"] = communicating / each
    # What of it has no computation beside it: a step would be shorter without.
    row["exposed_ms"] = (busy - computing) / each
    return row


# ============
# One rank


class ProfiledBatches(bench.RandomBatches):
    """Random tokens; PROFILED steps are profiled, from call number `profiled` on."""

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (sequences, TRAIN_SEQ_LEN)."""
        batch = super().next()
        if len(self.marks) == self.profiled + PROFILED:
            torch.cuda.synchronize()
            self.profiler.stop()
        return batch

    def kernels(self) -> list[tuple[str, float, float]]:
        """(name, start, end) of all that ran on this GPU, microseconds."""
        return [
            (event.name, event.time_range.start, event.time_range.end)
            for event in self.profiler.events()
            if bench.ran_on_gpu(event)
        ]


class TimedLaunches:
    """Stands in for a trainer's GraphedSteps; of its last calls, those behind so many, it notes how
    many milliseconds the host took, and has each begin with an idle GPU.
    """

    def __init__(self, graphed_steps: t.GraphedSteps, untimed: int):
        self.graphed_steps = graphed_steps
        self.release = graphed_steps.release
        self.untimed = untimed
        self.milliseconds: list[float] = []

    def __call__(self, *arguments) -> torch.Tensor:
        """One step, as GraphedSteps makes it; its loss."""
        self.untimed -= 1
        if self.untimed >= 0:
            return self.graphed_steps(*arguments)
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = self.graphed_steps(*arguments)
        self.milliseconds.append(1e3 * (time.perf_counter() - started))
        return loss


def measure(settings: t.Settings, ranks: t.Ranks, steps: int, graphed: bool) -> dict:
    """A row of this rank; settings are those of all ranks together."""
    # One step more than is profiled: the profiler stops when the next one asks for its batch.
    before = DISCARDED + steps + PROFILED + 1
    trainer, _ = bench.make_trainer(settings, ranks, before + HOST_STEPS)
    trainer.graphed_steps.enabled &= graphed
    row = {"graphed": trainer.graphed_steps.enabled}
    trainer.graphed_steps = launches = TimedLaunches(trainer.graphed_steps, before)
    trainer.warm_up()
    batches = ProfiledBatches(settings, ranks, DISCARDED + steps + 1)
    trainer.run(batches, None)
    torch.cuda.synchronize()
    times = bench.between(batches.marks[DISCARDED : DISCARDED + steps + 1])
    row |= {"step_ms": statistics.median(times), "fastest_ms": min(times)}
    row["host_ms"] = statistics.median(launches.milliseconds)
    return row | timeline(batches.kernels(), PROFILED)


def work(options: argparse.Namespace) -> int:
    """What torchrun starts on each GPU: measures, and writes a row into the folder."""
    world_size = int(os.environ["WORLD_SIZE"])
    settings = bench.read_settings(DEFAULTS)
    whole = settings.train_batch_tokens * world_size
    settings = dataclasses.replace(settings, train_batch_tokens=whole)
    t.validate_settings(settings, world_size)
    t.prepare_torch()
    ranks = t.start_ranks(settings)
    row = measure(settings, ranks, options.steps, not options.eager)
    row = {"tokens": whole // world_size, **row, "machine": t.describe_machine(ranks)}
    Path(options.worker, f"{ranks.rank}.json").write_text(json.dumps(row), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


# ============
# The command


def run_ranks(ranks: int, steps: int, eager: bool) -> list[dict]:
    """The rows of so many ranks. Raises UserError with the last line of what one of them said."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={ranks}", "-m", "bench.ranks", "--worker", folder]
        command += ["--steps", str(steps), *(["--eager"] if eager else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        files = sorted(Path(folder).glob("*.json"), key=lambda file: int(file.stem))
        if done.returncode or len(files) < ranks:
            sys.stderr.write(done.stderr)
            raise UserError(f"{ranks} ranks ended with status {done.returncode}: see above")
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def show_row(name: str, row: dict):
    """One rank's figures in a line."""
    figures = [f"{key} {bench.show(value)}" for key, value in row.items() if key != "machine"]
    print(f"{name}: {', '.join(figures)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Measures one rank, one without a graph, and several; the exit status."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=summary, epilog=details, formatter_class=formatter)
    add = parser.add_argument
    add("--ranks", type=int, default=2, metavar="N", help="ranks, each on a GPU (default 2)")
    add("--steps", type=int, default=30, metavar="N", help="steps to time (default 30)")
    add("--out", default="", metavar="FILE", help="save the results as JSON")
    add("--worker", default="", help=argparse.SUPPRESS)  # a folder, in what torchrun starts
    add("--eager", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.ranks < 1 or options.steps < 1:
        parser.error("--ranks and --steps must be at least 1")
    if options.worker:
        return work(options)
    if options.out:
        need_place(Path(options.out))
    if torch.cuda.device_count() < options.ranks:
        raise UserError(
            f"{options.ranks} ranks need as many GPUs: {torch.cuda.device_count()} here"
        )
    results: dict[str, list[dict]] = {}
    cases = [(1, False), (1, True), (options.ranks, False), (options.ranks, True)]
    for ranks, eager in dict.fromkeys(cases):
        name = f"{ranks} rank{'s' if ranks > 1 else ''}{', without graphs' if eager else ''}"
        graphed = results.get(f"{ranks} ranks", [{"graphed": True}])[0]["graphed"]
        if eager and not graphed:
            continue  # as it was measured already
        results[name] = run_ranks(ranks, options.steps, eager)
        for rank, row in enumerate(results[name]):
            show_row(f"{name}, rank {rank}", row)
        if options.out:
            write_whole(Path(options.out), json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("bench.ranks", main, t.UserError))
