"""Times the training step without and with ideas, in turn on one GPU, and compares gradients.

    python -m bench.steps --idea tools/ideas/my_idea.py [--idea FILE ...] [--out FILE.json]

An idea is a file for --idea of tools.explore. Its install(script) changes train_gpt.py's module, so
each variant is a process of its own. All compile at once; then each waits for its turn at the GPU.
Steps are those of a run (on a GPU, a CUDA graph), with random tokens and weights.

Gradients are compared with those of the unchanged model in float32, on --batches batches, each with
other weights. The error of a kind of parameter is the root of its squares, summed over batches. The
ratio is the idea's error divided by the error without it; its standard error comes from leaving out
each batch in turn. A ratio counts as above or below 1.2 if it is so by two standard errors.

Settings are environment variables. They override SHAPE's or, if PRESET is given, that preset's.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m bench.steps", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from bench import bench
from tools.command import (
    Parser,
    UserError,
    environment_value,
    need,
    need_place,
    run_command,
    write_whole,
)
from tools.explore import install_idea

# What the script of commit b6028ee trained, but for MLPs of four times the width. PLAIN has what is
# newer off, or as it was: PRESET=short may have it on.
SHAPE = {name.upper(): environment_value(value) for name, value in t.PLAIN.items()} | {
    "PRESET": "short",
    "NUM_LAYERS": "9",
    "MAMBA_LAYERS": "0,1,3-5,7,8",
    "MLP_MULT": "4",
    "MAMBA_EXPAND": "2",
    "BIGRAM_VOCAB_SIZE": "4096",
    "VOCAB_SIZE": "8192",
    "TRAIN_BATCH_TOKENS": "65536",
    "TRAIN_SEQ_LEN": "2048",
}
PLAIN = "without"  # the name of the variant that no idea changes
MOST_RATIO = 1.2  # of a gradient's error, with the idea over without
MANY = 512  # numbers: a parameter of fewer is judged together with its like in other layers


# ============
# A variant, in its own process
#
# The command asks through a pipe and waits for the answer before it asks another variant, so that
# one alone uses the GPU. Each keeps its model and its graph, whose memory is not shared. Weights
# and batches follow from a seed; gradients in float32 go through a file, for they are as large as
# the model, and are computed by the variant that no idea has changed.


class Variant:
    """A compiled trainer; what the command asks for, by a method's name, it does and answers."""

    def __init__(self, idea: Path | None):
        if idea is not None:
            install_idea(idea)
        t.prepare_torch()
        self.settings = bench.read_settings(SHAPE)
        self.ranks = t.start_ranks(self.settings)
        need(self.ranks.world_size == 1, "bench.steps: one process, not torchrun")
        self.trainer, _ = bench.make_trainer(self.settings, self.ranks, 10_000)
        self.first = [p.detach().clone() for p in self.trainer.model.parameters()]
        self.reference = None
        self.set_weights(0)
        self.trainer.warm_up()

    def set_weights(self, seed: int) -> None:
        """Weights as in training, where none is zero."""
        generator = torch.Generator(self.ranks.device).manual_seed(seed)
        with torch.no_grad():
            for p, first in zip(self.trainer.model.parameters(), self.first, strict=True):
                noise = torch.randn(p.shape, device=p.device, generator=generator)
                size = 0.5 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.05
                p.copy_(first + size * noise)

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """Random tokens and targets of a whole batch."""
        s = self.settings
        generator = torch.Generator(self.ranks.device).manual_seed(seed)
        shape = s.train_batch_tokens // s.train_seq_len, s.train_seq_len + 1
        device = self.ranks.device
        tokens = torch.randint(0, s.vocab_size, shape, device=device, generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        """A step of rate 0 as a run makes it, the weight average included."""
        kind = self.trainer.model.order(True), False
        self.trainer.graphed_steps(kind, *batch, 0.0, 0.95, 1.0)

    def time_step(self, steps: int) -> float:
        """Median milliseconds of so many steps, behind some that are not counted."""
        batch = self.batch(0)
        for _ in range(8 if self.ranks.gpu else 1):
            self.step(batch)
        if not self.ranks.gpu:
            return statistics.median(self.wall_clock(batch) for _ in range(steps))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self.step(batch)
            mark.record()
        torch.cuda.synchronize()
        return statistics.median(bench.between(marks))

    def wall_clock(self, batch: tuple[Tensor, Tensor]) -> float:
        """Milliseconds of a step on a CPU, which is done when it returns."""
        started = time.perf_counter()
        self.step(batch)
        return 1e3 * (time.perf_counter() - started)

    def profile(self, title: str) -> tuple[dict[str, float], str]:
        """GPU milliseconds of a step by kind, and a table with its longest kernels.

        A CPU has no such kernels: nothing.
        """
        if not self.ranks.gpu:
            return {}, ""
        batch = self.batch(0)
        self.step(batch)
        t.synchronized_time()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            self.step(batch)
            t.synchronized_time()
        self.trainer.graphed_steps.release()  # gradients need its memory
        kernels = bench.gpu_time_by_kernel(profiler.key_averages())
        kinds = {kind: round(row["ms"], 3) for kind, row in bench.time_by_kind(kernels).items()}
        return kinds, bench.profile_table(title, kernels, 80)

    def write_truth(self, seed: int, parts: int, file: Path) -> dict[str, float]:
        """Writes weights of this seed, and their gradients in float32, in so many parts.

        Returns the summed squares of those by kind.
        """
        self.set_weights(seed)
        model = self.float32_model()
        model.zero_grad(set_to_none=True)
        batch = self.batch(seed)
        order = model.order(True)
        for tokens, targets in zip(*(x.chunk(parts) for x in batch), strict=True):
            logits = model.logits(model(tokens, order).flatten(0, 1), tokens.flatten())
            nats = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
            (nats / batch[0].numel()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        torch.save({"weights": model.state_dict(), "gradients": gradients}, file)
        return sum_by_kind(gradients)

    def float32_model(self) -> t.Model:
        """The trainer's weights in a model without kernels that is not compiled."""
        if self.reference is None:  # made once: it is large, and its weights are copied
            plain = {"scan_backend": "chunked", "attention_backend": "math"}
            settings = dataclasses.replace(self.settings, **plain)
            self.reference = t.build_model(settings, self.ranks)
            self.reference.compute_dtype = torch.float32
        self.reference.load_state_dict(self.trainer.model.state_dict())
        return self.reference

    def gradient_errors(self, seed: int, file: Path) -> dict[str, float]:
        """The summed squares of the gradients' errors by kind, with what write_truth() wrote."""
        true = torch.load(file, map_location=self.ranks.device)
        model = self.trainer.model
        missing, unexpected = model.load_state_dict(true["weights"], strict=False)
        other = missing + unexpected
        need(not other, f"gradients cannot be compared: other parameters: {other[:3]}")
        model.zero_grad(set_to_none=True)
        self.trainer.accumulate_gradients((model.order(True), False), *self.batch(seed))
        found = {name: p.grad for name, p in model.named_parameters()}
        return sum_by_kind({name: found[name] - true["gradients"][name] for name in found})


def kind_of(name: str, p: Tensor) -> str:
    """A large parameter by itself; a small one with those of the same name in other layers."""
    if p.numel() >= MANY:
        return name
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def sum_by_kind(tensors: dict[str, Tensor]) -> dict[str, float]:
    """The summed squares of parameters' tensors by kind."""
    sums: dict[str, float] = defaultdict(float)
    for name, x in tensors.items():
        sums[kind_of(name, x)] += float(x.double().square().sum())
    return dict(sums)


def serve(pipe, idea: Path | None) -> None:
    """A child: answers ("" or what went wrong, the result) for each (method, arguments)."""
    try:
        variant = Variant(idea)
        pipe.send(("", None))
        while True:
            method, arguments = pipe.recv()
            pipe.send(("", getattr(variant, method)(*arguments)))
    except EOFError:  # the command has ended
        return
    except (UserError, t.UserError) as error:  # a line of the command's says it
        pipe.send((str(error), None))
    except Exception as error:
        pipe.send((f"{type(error).__name__}: {error}", None))
        raise


class Child:
    """A variant in a process, as the command sees it."""

    def __init__(self, name: str, idea: Path | None):
        self.name = name
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, idea), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process ends the pipe

    def answer(self):
        """Waits for what the last question found."""
        try:
            problem, result = self.pipe.recv()
        except EOFError:
            raise UserError(f"{self.name}: its process died") from None
        need(not problem, f"{self.name}: {problem}")
        return result

    def ask(self, method: str, *arguments):
        """The result of a Variant's method."""
        self.pipe.send((method, arguments))
        return self.answer()


# ============
# What the figures mean
#
# Rounding errors scatter: on two batches, one matrix had a ratio of 1.21, and of 1.05 in a variant
# that had the same change and one more behind it. So a ratio comes with its own error, and what
# that leaves open is said to be open.


def standard_error(values: list[float]) -> float:
    """The standard error of the mean of independent values; infinite for one."""
    if len(values) < 2:
        return float("inf")
    return statistics.stdev(values) / len(values) ** 0.5


def ratio_with_error(new: list[float], old: list[float]) -> tuple[float, float]:
    """The root of sum(new) / sum(old), of squared errors by batch, and its standard error.

    By the jackknife: sqrt((n - 1) / n · sum of squares of the n ratios without a batch around their
    mean). Equal errors, 0 among them, have a ratio of 1.
    """
    count = len(new)

    def ratio(left_out: int | None) -> float:
        sums = [sum(x for i, x in enumerate(xs) if i != left_out) for xs in (new, old)]
        return 1.0 if sums[0] == sums[1] else (sums[0] / max(sums[1], 1e-60)) ** 0.5

    if count < 2:  # one batch cannot say how batches differ
        return ratio(None), float("inf")
    parts = [ratio(i) for i in range(count)]
    mean = statistics.mean(parts)
    squares = sum((part - mean) ** 2 for part in parts)
    return ratio(None), ((count - 1) / count * squares) ** 0.5


def compare_gradients(truth: list[dict], errors: dict[str, list[dict]]) -> dict[str, dict]:
    """For each kind of parameter the relative error of each variant, and each idea's ratio.

    truth: by batch the gradient's squares by kind; errors: by variant, the errors' alike.
    """
    rows = {}
    for kind in truth[0]:
        size = max(sum(batch[kind] for batch in truth), 1e-60)
        old = [batch[kind] for batch in errors[PLAIN]]
        rows[kind] = row = {PLAIN: (sum(old) / size) ** 0.5}
        for name, batches in errors.items():
            new = [batch[kind] for batch in batches]
            if name != PLAIN:
                row[name] = (sum(new) / size) ** 0.5
                row[f"{name}: ratio, its error"] = ratio_with_error(new, old)
    return rows


def judge(name: str, times: dict[str, list[float]], gradients: dict[str, dict]) -> list[str]:
    """What the figures mean for an idea, in lines; the last one is the verdict."""
    gains = [old - new for old, new in zip(times[PLAIN], times[name], strict=True)]
    gain, error = statistics.mean(gains), standard_error(gains)
    old = statistics.mean(times[PLAIN])
    ratios = {kind: row[f"{name}: ratio, its error"] for kind, row in gradients.items()}
    worse = [kind for kind, (r, e) in ratios.items() if r - 2 * e > MOST_RATIO]
    fine = [kind for kind, (r, e) in ratios.items() if r + 2 * e <= MOST_RATIO]
    unsure = [kind for kind in ratios if kind not in worse + fine]
    # What is certain comes first: more measuring cannot mend it.
    if worse or gain + 2 * error <= 0:
        verdict = "leave it"
    elif unsure:
        verdict = "undecided: give it more --batches"
    elif gain - 2 * error <= 0:
        verdict = "undecided: give it more --rounds"
    else:
        verdict = "faster, and its gradients are as good: train seeds with it"
    lines = [f"{name}: {gain:.2f} ± {error:.2f} ms less of {old:.2f} ({gain / old:.1%}), by rounds"]
    counts = f"{len(worse)} above, {len(fine)} below, {len(unsure)} not known"
    lines.append(
        f"  gradients' errors, ratios beside {MOST_RATIO}: {counts}, of {len(ratios)} kinds"
    )
    for kind in sorted(worse + unsure, key=lambda kind: -ratios[kind][0])[:10]:
        ratio, its_error = ratios[kind]
        lines.append(f"    {kind}: {ratio:.2f} ± {its_error:.2f}")
    return [*lines, f"  verdict: {verdict}"]


# ============
# The command


class Report:
    """What was found so far, told and saved as soon as it is known."""

    def __init__(self, file: Path | None):
        self.file = file
        self.started = time.perf_counter()
        self.found: dict = {}

    def tell(self, name: str, value, shown: str = "") -> None:
        """Keeps a value under its name; prints it, or what is shown in its place."""
        self.found[name] = value
        seconds = time.perf_counter() - self.started
        print(f"[{seconds:5.1f} s] {name}: {shown or json.dumps(value)}", flush=True)
        if self.file is not None:
            write_whole(self.file, json.dumps(self.found, indent=1) + "\n")


def time_rounds(children: dict[str, Child], rounds: int, steps: int) -> dict[str, list[float]]:
    """Median milliseconds of a step, by variant, a number for each round; every other backwards."""
    found: dict[str, list[float]] = {name: [] for name in children}
    for number in range(rounds):
        turns = list(children) if number % 2 == 0 else list(reversed(children))
        for name in turns:
            found[name].append(children[name].ask("time_step", steps))
    return found


def measure_errors(children: dict[str, Child], batches: int, parts: int) -> tuple[list, dict]:
    """What compare_gradients() takes."""
    truth: list[dict] = []
    errors: dict[str, list[dict]] = {name: [] for name in children}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "truth.pt")
        for seed in range(batches):
            truth.append(children[PLAIN].ask("write_truth", seed, parts, file))
            for name, child in children.items():
                errors[name].append(child.ask("gradient_errors", seed, file))
    return truth, errors


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; UserError if it makes no sense."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    idea = "a file that changes the script; may be repeated"
    add("--idea", type=Path, action="append", required=True, metavar="FILE", help=idea)
    add("--rounds", type=int, default=3, help="rounds in which each variant has its turn (3)")
    add("--steps", type=int, default=30, help="steps to time in each turn (30)")
    add("--batches", type=int, default=8, help="batches on which gradients are compared (8)")
    parts = "parts of a batch in float32, since memory is short (16)"
    add("--parts", type=int, default=16, help=parts)
    add("--out", type=Path, metavar="FILE.json", help="save figures; tables beside it, as .txt")
    given = parser.parse_args(arguments)
    for name in ("rounds", "steps", "batches", "parts"):
        need(getattr(given, name) > 0, f"--{name} should be above 0")
    names = [idea.stem for idea in given.idea]
    need(len({PLAIN, *names}) == len(names) + 1, "ideas should have names of their own")
    for idea in given.idea:
        need(idea.is_file(), f"--idea {idea}: no such file")
    if given.out:
        need_place(given.out, *given.idea, ending=".json")
        need_place(given.out.with_suffix(".txt"), *given.idea)
    return given


def main(arguments: list[str] | None = None) -> int:
    """Compiles, times, profiles, compares; the last lines say what it means."""
    given = parse_arguments(arguments)
    report = Report(given.out)
    children = {PLAIN: Child(PLAIN, None)}
    children |= {idea.stem: Child(idea.stem, idea) for idea in given.idea}
    for name, child in children.items():
        child.answer()
        report.tell(f"{name} is ready", True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report.tell("device", device)
    report.tell("torch", torch.__version__)
    times = time_rounds(children, given.rounds, given.steps)
    report.tell("step, ms", times)
    tables = []
    for name, child in children.items():
        kinds, table = child.ask("profile", name)
        report.tell(f"profile of {name}, ms", kinds)
        tables.append(table)
    if given.out is not None:
        write_whole(given.out.with_suffix(".txt"), "\n".join(tables))
    truth, errors = measure_errors(children, given.batches, given.parts)
    gradients = compare_gradients(truth, errors)
    report.tell("gradients", gradients, f"{len(gradients)} kinds, {given.batches} batches")
    for idea in given.idea:
        lines = judge(idea.stem, times, gradients)
        report.tell(f"verdict on {idea.stem}", lines, "\n" + "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("bench.steps", main, t.UserError))
