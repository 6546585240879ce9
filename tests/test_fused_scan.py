"""The fused scan's kernels in Triton's interpreter, on the CPU: float32 against the equation in a
loop, in float64.

The interpreter takes a second for each few programs, so the shapes are small. gpu_checks.py checks
the compiled kernels.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as t
from reference.scan_cases import ScanCase, columns, errors, in_two_calls, random_case, results
from tests.support import (
    PATIENCE,
    interpreted,
    random_model,
    random_tokens,
    relative,
    tiny,
    tiny_environment,
)

CHUNK = 16
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow"),  # of decays that lie ahead, which a mask removes
    pytest.mark.filterwarnings("ignore:Conversion of an array"),  # the interpreter's own
]


def sequential(case: ScanCase) -> dict[str, torch.Tensor]:
    """The reference."""
    return results(
        functools.partial(t.mamba_scan, backend="sequential", chunk_size=CHUNK), case, torch.float64
    )


def fused_scan(projected, parameters, sizes, document_start, state, chunk_size: int = CHUNK):
    return t.mamba_scan(projected, parameters, sizes, document_start, state, "triton", chunk_size)


def assert_all_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    off = errors(found, expected)
    assert {name: error for name, error in off.items() if not error <= tolerance} == {}


CASES = {  # chunk and case; a start is a position in the last sequence
    "two tokens": (16, random_case(2, 2, 1, 16, 16, carried=True)),
    "shorter than a chunk": (16, random_case(1, 9, 3, 16, 16)),
    "turned in the scan": (32, random_case(2, 70, 2, 16, 32, carried=True)),
    "more heads than are multiplied at once": (16, random_case(1, 9, 18, 8, 8)),
    "more heads than are summed at once": (16, random_case(1, 9, 18, 8, 32)),
    "exactly two chunks": (16, random_case(1, 32, 1, 16, 16, carried=True)),
    "one token more than a chunk": (16, random_case(2, 17, 3, 16, 16, carried=True)),
    "everything rotates": (16, random_case(1, 20, 3, 16, 32, rope_fraction=1.0, carried=True)),
    "narrow heads": (8, random_case(1, 17, 3, 8, 16)),
    "wide heads": (16, random_case(2, 20, 1, 32, 8)),
    "heads of 64, state 64": (64, random_case(1, 65, 2, 64, 64, carried=True)),
    "heads of 64, state 128": (64, random_case(1, 65, 1, 64, 128, rope_fraction=1.0)),
    "documents": (16, random_case(2, 40, 1, 16, 16, starts=(0, 16, 20, 21), carried=True)),
    "documents, turned in the scan": (
        16,
        random_case(2, 40, 1, 16, 32, starts=(0, 16, 20, 21), carried=True),
    ),
    "documents at both ends": (16, random_case(1, 33, 1, 16, 16, starts=(0, 15, 31, 32))),
}


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_every_gradient(name):
    chunk, case = CASES[name]
    expected = sequential(case)
    silent = {name for name, x in expected.items() if x.numel() and not x.any()}
    assert not silent, "without influence the comparison is empty"
    # Sums of logarithms that hold a document start's lose digits.
    tolerance = 1e-5 if case.document_start is None else 5e-4
    assert_all_close(
        results(functools.partial(fused_scan, chunk_size=chunk), case, torch.float32),
        expected,
        tolerance,
    )


@interpreted
@pytest.mark.parametrize(
    "name",
    ["wide heads", "documents, turned in the scan"],
)
def test_tiles_by_pointers_give_what_tensor_descriptors_do(name, monkeypatch):
    """As on GPUs without instructions for tiles; the bits differ by no sum's order."""
    chunk, case = CASES[name]
    scan = functools.partial(fused_scan, chunk_size=chunk)
    described = results(scan, case, torch.float32)
    monkeypatch.setattr(t, "kernel_limits", lambda device: (89, 101_376))
    monkeypatch.setattr(t, "TensorDescriptor", None)  # none is made
    pointed = results(scan, case, torch.float32)
    assert [name for name in described if not torch.equal(described[name], pointed[name])] == []


@interpreted
@pytest.mark.parametrize("place", [1, 16, 21])
def test_a_sequence_in_two_calls_equals_one_call(place):
    """Gradients too, which flow through the state between the calls."""
    case = random_case(2, 24, 1, 16, 16, starts=(20, 21), carried=True)
    assert_all_close(
        results(in_two_calls(fused_scan, place), case, torch.float32), sequential(case), 5e-4
    )


@interpreted
def test_document_starts_may_be_a_slice():
    case = random_case(2, 24, 1, 16, 16, starts=(3, 20))
    wider = torch.ones(2, 30, dtype=torch.bool)
    wider[:, :24] = case.document_start
    found = results(fused_scan, case._replace(document_start=wider[:, :24]), torch.float32)
    assert_all_close(found, sequential(case), 1e-4)


@interpreted
def test_outputs_do_not_depend_on_later_tokens_by_a_single_bit():
    case = random_case(1, 40, 1, 16, 16)
    parameters = t.MambaParameters(
        *(x.float() if isinstance(x, torch.Tensor) else x for x in case.parameters)
    )
    projected, other = (
        case.projected.float(),
        random_case(1, 40, 1, 16, 16, seed=2).projected.float(),
    )
    y, *_ = fused_scan(projected, parameters, case.sizes, None, None)
    for position in (6, 15, 16, 31, 38):
        changed = torch.cat([projected[:, : position + 1], 10 * other[:, position + 1 :]], dim=1)
        z, *_ = fused_scan(changed, parameters, case.sizes, None, None)
        assert torch.equal(y[:, : position + 1], z[:, : position + 1])
        assert not torch.equal(y, z)


@interpreted
@pytest.mark.parametrize("chunks", [1, 4, 7])
@pytest.mark.parametrize("back", [False, True])
def test_turns_before_and_after_chunks_are_those_of_cumsum(chunks, back):
    """Of more chunks than are summed at once, in parts, and of angles that fill no block."""
    turns, start = torch.randn(2, chunks, 4, 3, 7), torch.randn(2, 3, 7)
    around, end = t.launch_sum_turns(turns, start, back, at_once=4)
    made = turns.double().sum(2)
    along = made.flip(1).cumsum(1).flip(1) if back else made.cumsum(1)
    whole = start + made.sum(1)
    torch.testing.assert_close(around, (start.unsqueeze(1) + along - made).float())
    torch.testing.assert_close(end, (whole if back else whole % 1.0).float())


tl, softplus_tile = t.tl, t.softplus_tile


@t.jit
def softplus_kernel(x, y):
    """y = softplus(x), of 512 numbers."""
    i = tl.arange(0, 512)
    tl.store(y + i, softplus_tile(tl.load(x + i)))


@interpreted
def test_softplus_keeps_its_digits_where_it_is_small():
    """log(1 + exp(x)) is exp(x) there, of which 1 + exp(x) has few digits or none."""
    x = torch.cat([torch.linspace(-60, 60, 510), torch.tensor([0.0, 1e4])])
    y = torch.empty_like(x)
    softplus_kernel[(1,)](x, y)
    expected = torch.nn.functional.softplus(x.double(), threshold=100)
    off = ((y.double() - expected) / expected).abs()
    # exp(x) is as far off as its exponent's last bit, which is 2^-24 of it.
    assert (off < 3e-7 + 2**-24 * x.abs().clamp(max=60)).all(), off.max()


@interpreted
def test_two_runs_give_the_same_bits():
    case = random_case(2, 17, 1, 16, 16, starts=(3,), carried=True)
    first, second = (results(fused_scan, case, torch.float32) for _ in range(2))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def with_columns(case: ScanCase, **values: torch.Tensor | float) -> ScanCase:
    """The case with other numbers in these groups of columns of projected: gate, step, ..."""
    projected = case.projected.clone()
    group = columns(projected, case.sizes)
    for name, value in values.items():
        group[name].copy_(torch.as_tensor(value, dtype=torch.float64).expand_as(group[name]))
    return case._replace(projected=projected)


@interpreted
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_gate_of_exactly_zero(share):
    """The backward finds what was gated in y / gate."""
    case = random_case(1, 20, 2, 16, 16)
    gate = columns(case.projected, case.sizes)["gate"]
    zeros = torch.rand(gate.shape, generator=torch.Generator().manual_seed(3)) < share
    case = with_columns(case, gate=gate.masked_fill(zeros, 0.0))
    found, expected = results(fused_scan, case, torch.float32), sequential(case)
    assert found["y"][zeros].abs().max() < 1e-15
    if share == 1.0:  # then nothing but the gate gets a gradient from y
        assert relative(found["d gate"], expected["d gate"]) < 1e-5
    else:
        assert_all_close(found, expected, 1e-5)


EXTREMES = {
    "steps too small to matter": {"step": -60.0},
    "steps of zero": {"step": -200.0},
    "long steps": {"step": 30.0},
    "long steps, fast decay": {"step": 30.0, "decay": 30.0},
    "no decay": {"decay": -60.0},
    "only the last token": {"trapezoid": -60.0},
    "only the current token": {"trapezoid": 60.0},
    "closed gates": {"gate": -200.0},
    "open gates": {"gate": 200.0},
    "gates of almost nothing": {"gate": 1e-30},
    "keys of zero": {"key": 0.0, "query": 0.0},
}


@interpreted
@pytest.mark.parametrize("extreme", [*EXTREMES, "all at random", "denormal gates"])
def test_extreme_inputs_leave_numbers(extreme):
    case = random_case(1, 20, 1, 16, 16, carried=True)
    if extreme == "all at random":
        generator = torch.Generator().manual_seed(4)

        def pick():
            return torch.tensor([-100.0, -20.0, 0.0, 20.0])[
                torch.randint(0, 4, (1, 20, 1), generator=generator)
            ]

        case = with_columns(case, step=pick(), decay=pick(), trapezoid=pick())
    else:
        case = with_columns(case, **EXTREMES.get(extreme, {"gate": 1e-39}))
    found, expected = results(fused_scan, case, torch.float32), sequential(case)
    assert [name for name, x in found.items() if not x.isfinite().all()] == []
    # What cancels leaves some: a last digit of q·dq, times the decay rate of all tokens before. Of
    # eight seeds the worst left 8e-5.
    noise = 2e-4 * max(x.norm() for x in expected.values())
    off = {name: float((found[name] - x).norm()) for name, x in expected.items()}
    assert {
        name: error
        for name, error in off.items()
        if error > max(noise, 1e-3 * expected[name].norm())
    } == {}


# ---- The operators, the model, and machines without triton ---------------------------------------


class GolfCalls(TorchDispatchMode):
    """Notes the calls of this project's operators."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == t.OPERATORS:
            self.calls.append((function, arguments))
        return function(*arguments, **(options or {}))


@interpreted
@pytest.mark.parametrize("documents", [False, True])
def test_the_operators_keep_what_they_promise_to_the_compiler(documents):
    case = random_case(1, 17, 2, 16, 16, starts=(3,) if documents else (), carried=documents)
    with GolfCalls() as noted:
        results(fused_scan, case, torch.float32)
    assert len(noted.calls) >= 2  # forward and backward
    for operator, arguments in noted.calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@interpreted
@pytest.mark.parametrize("changes", [{}, {"document_reset": True}], ids=str)
def test_the_model_is_that_of_the_chunked_scan(changes):
    tokens = random_tokens(1, 33, seed=5)
    tokens[0, 13] = t.BOS_ID
    losses, gradients = [], []
    for backend in ("chunked", "triton"):
        model = random_model(tiny(scan_backend=backend, mamba_chunk_size=16, **changes))
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], model.order(True))
        loss.backward()
        losses.append(loss)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert relative(losses[1], losses[0]) < 1e-6
    assert_all_close(gradients[1], gradients[0], 2e-4)


def test_without_triton_a_run_on_a_cpu_ends_as_usual(shards, tmp_path):
    paths = {"data_path": shards, "tokenizer_path": shards / "tokenizer.model", "log_dir": tmp_path}
    settings = {
        "iterations": 1,
        "max_wallclock_seconds": 0.0,
        "eval_mode": "plain",
        "ttt_enabled": False,
    }
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ
    }
    environment = (
        kept
        | {"OMP_NUM_THREADS": "1"}
        | tiny_environment(**paths, **settings, device="cpu", run_id="a")
    )
    script = str(Path(t.__file__).resolve())
    hide = "import runpy, sys; sys.modules['triton'] = None; "
    hide += f"runpy.run_path({script!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", hide],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "val_bpb" in done.stdout.splitlines()[-1]
