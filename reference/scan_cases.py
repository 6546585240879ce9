"""Random Mamba layers and all that a scan makes of them, by name: for test_fused_scan.py and
gpu_checks.py.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import train_gpt as t
from tests.support import relative


def columns(projected: Tensor, sizes: t.MambaSizes) -> dict[str, Tensor]:
    """The groups of in_proj's outputs, or of their gradients, by name."""
    widths = sizes.columns()
    return dict(zip(widths, projected.split(list(widths.values()), dim=-1), strict=True))


class ScanCase(NamedTuple):
    """What mamba_scan() reads, in float64, but for backend and chunk."""

    projected: Tensor  # (B, L, columns)
    parameters: t.MambaParameters
    sizes: t.MambaSizes
    document_start: Tensor | None  # (B, L)
    state: t.ScanState | None


def random_case(
    batch: int,
    length: int,
    heads: int,
    channels: int,
    state: int,
    rope_fraction: float = 0.5,
    starts: Sequence[int] = (),
    carried: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ScanCase:
    """A layer with random inputs, exact in bfloat16; starts are document starts, in the last
    sequence only.
    """
    # Drawn on the CPU, so that a GPU gets the same case.
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    angles = int(state * rope_fraction) // 2
    sizes = t.MambaSizes(heads, channels, state, angles, 3)
    projected = normal(batch, length, sum(sizes.columns().values())).bfloat16().double()
    step_bias, skip = normal(heads) - 3, normal(heads)
    # Near what they are at first: ones.
    biases, norms = (1 + 0.1 * normal(2, *shape) for shape in ((heads, state), (state,)))
    parameters = t.MambaParameters(step_bias, skip, *biases, *norms)
    document_start = None
    if starts:
        document_start = torch.zeros(batch, length, dtype=torch.bool, device=device)
        last = document_start[-1]
        last[list(starts)] = True
    shapes = ((heads, angles), (heads, channels, state), (heads, state), (heads, channels))
    carried_state = None
    if carried:
        carried_state = t.ScanState(*(normal(batch, *shape) for shape in shapes))
    return ScanCase(projected, parameters, sizes, document_start, carried_state)


def results(
    scan: Callable,
    case: ScanCase,
    dtype: torch.dtype,
    wide: torch.dtype | None = None,
    from_state: bool = True,
) -> dict[str, Tensor]:
    """Outputs, final state and every gradient of a random weighting of both, or of the outputs
    alone; of projected's gradient each group of columns. projected is in dtype, the rest in wide
    (None: the same).
    """
    wide = wide or dtype

    def leaf(x, dtype: torch.dtype):
        return x.to(dtype).clone().requires_grad_() if isinstance(x, Tensor) else x

    # Leaves of their own, so that a case can be used again.
    projected = leaf(case.projected, dtype)
    parameters = t.MambaParameters(*(leaf(x, wide) for x in case.parameters))
    state = case.state
    if state is not None:
        state = t.ScanState(*(leaf(x, wide) for x in state))
    y, mean_square, final = scan(projected, parameters, case.sizes, case.document_start, state)
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    weighted = (y, mean_square, *final) if from_state else (y, mean_square)
    # Random weights, so that no two errors cancel in every gradient.
    for x in weighted:
        weight = torch.randn(x.shape, generator=generator).bfloat16().to(x)
        loss = loss + (x * weight).double().sum()
    learned = {f"d {name}": x for name, x in parameters._asdict().items() if isinstance(x, Tensor)}
    if state is not None:
        learned |= {f"d state.{name}": x for name, x in state._asdict().items()}
    d_projected, *gradients = torch.autograd.grad(loss, [projected, *learned.values()])
    outcome = {"y": y, "mean square": mean_square}
    outcome |= {f"final {name}": x for name, x in final._asdict().items()}
    # A point on the circle: angles that differ by whole turns are the same.
    outcome["final angle"] = torch.stack([final.angle.cos(), final.angle.sin()])
    # One tensor holds what in_proj makes for different parts of the scan: judge them apart.
    for name, x in columns(d_projected, case.sizes).items():
        outcome[f"d {name}"] = x
    outcome |= dict(zip(learned, gradients, strict=True))
    return {name: x.detach() for name, x in outcome.items()}


def in_two_calls(scan: Callable, place: int) -> Callable:
    """The scan, of the tokens before place and then, from its state, of the others."""

    def run(projected, parameters, sizes, document_start, state):
        outputs = []
        for part in (slice(place), slice(place, None)):
            start = None if document_start is None else document_start[:, part].contiguous()
            *own, state = scan(projected[:, part], parameters, sizes, start, state)
            outputs.append(own)
        return *(torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True)), state

    return run


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm-relative errors by name, of all that is not empty."""
    # A gradient that is missing is an error too.
    assert found.keys() == expected.keys()
    some = [name for name, x in expected.items() if x.numel()]
    return {name: relative(found[name], expected[name]) for name in some}
