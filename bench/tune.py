"""Measures launch configurations of the fused scan's kernels on this GPU.

    python -m bench.tune [state size]

Runs the operator forward and backward (131,072 tokens, 16 heads of 64) as train_gpt.py launches it,
then with other numbers of warps and registers (0: no limit), takes each kernel's time from the
profiler, and prints a table.
"""

import collections
import contextlib
import sys

import torch

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m bench.tune", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from tools.command import tolerate_consoles

KERNELS = (
    "tokens_forward",
    "sum_turns",
    "rotate_features",
    "scan_forward",
    "scan_backward",
    "features_backward",
    "tokens_backward",
)
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


def main() -> None:
    """Prints the times of each configuration, and the best of each kernel."""
    state = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    t.prepare_torch()
    device = torch.device("cuda")
    projected, parameters, sizes = random_layer(state, device)
    inputs = learned(projected, parameters)
    grad = torch.randn(*projected.shape[:2], 1024, device=device).bfloat16()

    def run():
        y, mean_square, _ = t.mamba_scan(projected, parameters, sizes, None, None, "triton", 64)
        torch.autograd.grad((y, mean_square), inputs, (grad, mean_square.detach()))

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
        shown = ", ".join(f"{name} {measured[name]:.3f}" for name in KERNELS)
        ours, every = sum(measured[name] for name in KERNELS), sum(measured.values())
        print(f"{configuration}: {shown}; these {ours:.3f}, all kernels {every:.3f} ms", flush=True)
    best = {name: min(options, key=options.get) for name, options in times.items()}
    total = sum(times[name][best[name]] for name in best)
    print(f"best on {torch.cuda.get_device_name()}: {total:.3f} ms with {best}")


if __name__ == "__main__":
    tolerate_consoles()
    main()
