"""Measures launch configurations of the fused scan's kernels on this GPU.

    python -m bench.tune [STATE] [--idea FILE]

Runs the operator forward and backward (131,072 tokens, 16 heads of 64) as train_gpt.py launches it,
then with other numbers of warps and registers (0: no limit), takes each kernel's time from the
profiler, and prints a table. With --idea, a file of tools/ideas with kernels of its own, it only
runs the operator as it is launched, without and with the idea in turn.
"""

import collections
import contextlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m bench.tune", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from tools.command import Parser, need, run_command
from tools.explore import install_idea

KERNELS = (
    "tokens_forward",
    "sum_turns",
    "rotate_features",
    "scan_forward",
    "scan_backward",
    "features_backward",
    "tokens_backward",
)
TURNS = 5  # of a script without and with an idea
CONFIGURATIONS = ((1, 0), (2, 0), (4, 0), (4, 128), (4, 168), (8, 0), (8, 128))  # warps, registers


def random_layer(
    state: int, device: torch.device, batch: int = 32, length: int = 4096
) -> tuple[torch.Tensor, t.MambaParameters, t.MambaSizes]:
    """in_proj's output (batch, length, columns), a layer's parameters, and its sizes.

    The sizes are those of the default model but for the state's.
    """
    sizes = t.MambaSizes(16, 64, state, state // 4, 3)
    projected = torch.randn(batch, length, sum(sizes.columns().values()), device=device).bfloat16()
    shapes = (16,), (16,), (16, state), (16, state), (state,), (state,)
    tensors = [1 + 0.1 * torch.randn(shape, device=device) for shape in shapes]
    tensors[0] = tensors[0] - 4  # step sizes about softplus(-3) = 0.05
    return (
        projected.requires_grad_(),
        t.MambaParameters(*(x.requires_grad_() for x in tensors)),
        sizes,
    )


def learned(projected: torch.Tensor, parameters: t.MambaParameters) -> list[torch.Tensor]:
    """What the operator has gradients of."""
    return [projected, *(x for x in parameters if isinstance(x, torch.Tensor))]


def kernel_times(run, repeats: int = 4) -> dict[str, float]:
    """Milliseconds of GPU time for each kernel that run() launches, the mean of repeats."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return {
        e.key: e.device_time_total / 1000 / repeats
        for e in trace.key_averages()
        if e.device_time_total
    }


@contextlib.contextmanager
def launched_with(warps: int, registers: int | None):
    """All kernels of the script with these numbers in place of its own.

    registers: the most of a thread, None: no limit. Fewer registers let more warps run at once, and
    make some values wait in memory.
    """
    launch = t.launch

    def replacement(kernel, grid, named, **_):
        launch(kernel, grid, named, warps=warps, registers=registers)

    t.launch = replacement
    try:
        yield
    finally:
        t.launch = launch


def shown(measured: dict[str, float]) -> str:
    """Each kernel's milliseconds, their sum, and that of all kernels, torch's too."""
    ours = ", ".join(f"{name} {measured[name]:.3f}" for name in KERNELS)
    total = sum(measured[name] for name in KERNELS)
    return f"{ours}; these {total:.3f}, all kernels {sum(measured.values()):.3f} ms"


def try_configurations(run: Callable) -> None:
    """Prints the times of each configuration, and the best of each kernel."""
    times: dict[str, dict[tuple[int, int] | str, float]] = collections.defaultdict(dict)
    for configuration in ("as launched", *CONFIGURATIONS):
        changed = contextlib.nullcontext()
        if configuration != "as launched":
            warps, registers = configuration
            changed = launched_with(warps, registers or None)
        try:
            with changed:
                measured = kernel_times(run)
        except Exception as error:  # a configuration that does not fit is one that is not taken
            print(f"{configuration}: {type(error).__name__} {str(error)[:100]}", flush=True)
            continue
        for name in KERNELS:
            times[name][configuration] = measured[name]
        print(f"{configuration}: {shown(measured)}", flush=True)
    best = {name: min(options, key=options.get) for name, options in times.items()}
    total = sum(times[name][best[name]] for name in best)
    print(f"best on {torch.cuda.get_device_name()}: {total:.3f} ms with {best}")


def time_in_turn(run: Callable, idea: Path) -> None:
    """Prints the times without and with an idea, TURNS times each, then their medians.

    The script finds its kernels by name each time, so that names decide which ones run.
    """
    variants = {"without": dict(vars(t))}
    install_idea(idea)
    variants[idea.stem] = dict(vars(t))
    times: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(TURNS):
        for name, functions in variants.items():
            vars(t).update(functions)
            times[name].append(kernel_times(run))
            print(f"{name}: {shown(times[name][-1])}", flush=True)
    for name, turns in times.items():
        kernels = dict.fromkeys(kernel for measured in turns for kernel in measured)
        medians = {
            kernel: statistics.median(measured.get(kernel, 0.0) for measured in turns)
            for kernel in kernels
        }
        print(f"{name}, medians: {shown(medians)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Tries configurations or an idea; returns the exit status, 2 for a user's mistake."""

    def command() -> int:
        parser = Parser(description=(__doc__ or "").split("\n")[0])
        parser.add_argument("state", nargs="?", type=int, default=64, help="state size, usually 64")
        parser.add_argument("--idea", type=Path, metavar="FILE", help="time it beside the script")
        given = parser.parse_args(arguments)
        need(not given.idea or given.idea.is_file(), f"--idea {given.idea}: no such file")
        need(torch.cuda.is_available(), "needs an NVIDIA GPU, and torch sees none here")
        t.prepare_torch()
        device = torch.device("cuda")
        projected, parameters, sizes = random_layer(given.state, device)
        inputs = learned(projected, parameters)
        grad = torch.randn(*projected.shape[:2], 1024, device=device).bfloat16()

        def run():
            y, square, _ = t.mamba_scan(projected, parameters, sizes, None, None, "triton", 64)
            torch.autograd.grad((y, square), inputs, (grad, square.detach()))

        if given.idea:
            time_in_turn(run, given.idea)
        else:
            try_configurations(run)
        return 0

    return run_command("tune.py", command, t.UserError)


if __name__ == "__main__":
    sys.exit(main())
