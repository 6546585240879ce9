"""Scans: the two PyTorch backends against each other and against equations written anew here. All
in float64.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from tests.support import relative

HEADS, CHANNELS, STATE, ANGLES = 3, 4, 8, 2
DIFFERENTIABLE = [f for f in t.ScanInputs._fields if f != "document_start"]


def make_inputs(length: int, batch: int = 2, seed: int = 0, starts=(), **changes) -> t.ScanInputs:
    """Random inputs with every feature on; starts are positions of document starts, in the first
    sequence only.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    step_size = F.softplus(normal(batch, length, HEADS))
    document_start = torch.zeros(batch, length, dtype=torch.bool)
    document_start[0, list(starts)] = True
    inputs = t.ScanInputs(
        value=normal(batch, length, HEADS, CHANNELS),
        key=normal(batch, length, STATE),
        query=normal(batch, length, STATE),
        step_size=step_size,
        log_decay=-0.5 * step_size * F.softplus(normal(batch, length, HEADS)),
        key_bias=1 + normal(HEADS, STATE),
        query_bias=1 + normal(HEADS, STATE),
        skip=normal(HEADS),
        trapezoid=normal(batch, length, HEADS),
        angle_rate=normal(batch, length, ANGLES),
        gate=normal(batch, length, HEADS, CHANNELS),
        document_start=document_start if starts else None,
    )
    return inputs._replace(**changes)


def make_state(batch: int = 2, seed: int = 9) -> t.ScanState:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, ANGLES), (HEADS, CHANNELS, STATE), (HEADS, STATE), (HEADS, CHANNELS))
    return t.ScanState(
        *(torch.randn(batch, *s, generator=generator, dtype=torch.float64) for s in shapes)
    )


def cut(inputs: t.ScanInputs, first: int, last: int) -> t.ScanInputs:
    """Positions first to last - 1."""
    shared = ("key_bias", "query_bias", "skip")
    return t.ScanInputs(
        *(
            x if x is None or f in shared else x[:, first:last]
            for f, x in zip(inputs._fields, inputs, strict=True)
        )
    )


def assert_close(result, reference, tolerance: float = 1e-10) -> None:
    """Tensors, or states field by field; angles are compared as points on the circle."""
    if isinstance(result, t.ScanState):
        result = (result.angle.cos(), result.angle.sin(), *result[1:])
        reference = (reference.angle.cos(), reference.angle.sin(), *reference[1:])
        for a, b in zip(result, reference, strict=True):
            assert_close(a, b, tolerance)
        return
    assert result.shape == reference.shape
    assert relative(result, reference) < tolerance


SWITCHES = {
    "Mamba-3": {},
    "without trapezoid": {"trapezoid": None},
    "without rotation": {"angle_rate": None},
    "Mamba-2": {"trapezoid": None, "angle_rate": None},
}
SCANS = {
    "sequential": t.sequential_scan,
    "chunked": lambda inputs, state: t.chunked_scan(inputs, state, 8),
}
each_scan = pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)


# ---- The backends against each other -------------------------------------------------------------


@pytest.mark.parametrize("carried", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("chunk_size", [8, 16, 64])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 31, 50])
def test_chunked_equals_sequential(length, chunk_size, carried):
    inputs = make_inputs(length, starts=[length // 3] if length % 2 else ())
    state = make_state() if carried else None
    y, final = t.chunked_scan(inputs, state, chunk_size)
    expected_y, expected_final = t.sequential_scan(inputs, state)
    assert_close(y, expected_y)
    assert_close(final, expected_final)


@pytest.mark.parametrize("switch", SWITCHES)
def test_chunked_equals_sequential_with_parts_switched_off(switch):
    inputs = make_inputs(21, starts=[5, 8, 16], **SWITCHES[switch])
    for state in (None, make_state()):
        y, final = t.chunked_scan(inputs, state, 8)
        expected_y, expected_final = t.sequential_scan(inputs, state)
        assert_close(y, expected_y)
        assert_close(final, expected_final)


def gradients(scan, inputs: t.ScanInputs, state: t.ScanState) -> dict[str, torch.Tensor]:
    """Of a random weighting of outputs and final state, with respect to every input and the
    state.
    """
    leaves = {
        f: getattr(inputs, f).clone().requires_grad_()
        for f in DIFFERENTIABLE
        if getattr(inputs, f) is not None
    }
    carried = t.ScanState(*(x.clone().requires_grad_() for x in state))
    y, final = scan(inputs._replace(**leaves), carried)
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (y, *final)
    )
    loss.backward()
    found = leaves | {f"state.{f}": x for f, x in zip(carried._fields, carried, strict=True)}
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in found.items()}


@pytest.mark.parametrize("starts", [(), (0,), (4, 8, 13)], ids=str)
@pytest.mark.parametrize("switch", ["Mamba-3", "Mamba-2"])
def test_gradients_of_every_input_and_of_the_state_agree(switch, starts):
    inputs = make_inputs(19, starts=starts, **SWITCHES[switch])
    expected = gradients(t.sequential_scan, inputs, make_state())
    for name, gradient in gradients(SCANS["chunked"], inputs, make_state()).items():
        assert_close(gradient, expected[name])
        if switch == "Mamba-3" and not starts:
            assert expected[name].norm() > 0, f"{name} has no influence: the comparison is empty"


def test_strong_decay_neither_overflows_nor_spoils_gradients():
    """exp() of what lies ahead would overflow; inf × 0 in backward would turn every gradient to
    NaN.
    """
    inputs = make_inputs(64, log_decay=torch.full((2, 64, HEADS), -40.0, dtype=torch.float64))
    single = t.ScanInputs(*(x if x is None or x.dtype == torch.bool else x.float() for x in inputs))
    state = t.ScanState(*(x.float() for x in make_state()))
    for name, gradient in gradients(lambda i, s: t.chunked_scan(i, s, 64), single, state).items():
        assert gradient.isfinite().all(), name
    assert relative(t.chunked_scan(single, None, 64)[0], t.sequential_scan(inputs, None)[0]) < 1e-5


# ---- State and documents -------------------------------------------------------------------------


@each_scan
@pytest.mark.parametrize("places", [(1,), (8,), (13,), (20,), (5, 6), (8, 16), (3, 14)], ids=str)
def test_a_sequence_in_several_calls_equals_one_call(scan, places):
    inputs = make_inputs(21, starts=[4, 13])
    expected_y, expected_final = scan(inputs, make_state())
    state, outputs = make_state(), []
    for first, last in zip((0, *places), (*places, 21), strict=True):
        y, state = scan(cut(inputs, first, last), state)
        outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), expected_y)
    assert_close(state, expected_final)


@each_scan
@pytest.mark.parametrize("starts", [(0, 5), (0, 1, 2), (0, 8), (0, 7, 16, 17), (0, 20)], ids=str)
@pytest.mark.parametrize("switch", ["Mamba-3", "Mamba-2"])
def test_packed_documents_equal_each_document_alone(scan, switch, starts):
    """A start also hides the state from before the call. The angle runs on, so that only S is
    compared up to its turn.
    """
    inputs = make_inputs(21, batch=1, starts=starts, **SWITCHES[switch])
    y, final = scan(inputs, make_state(batch=1))
    for first, last in zip(starts, (*starts[1:], 21), strict=True):
        alone, alone_final = scan(cut(inputs, first, last)._replace(document_start=None), None)
        assert_close(y[:, first:last], alone)
    assert_close(final.value, alone_final.value)
    assert_close(final.ssm.norm(), alone_final.ssm.norm())


@each_scan
def test_a_document_start_hides_the_trapezoids_previous_token(scan):
    """Zero decay must also take away (1 - lambda) dt v k of the token before, within a call and
    between calls.
    """
    inputs = make_inputs(2, batch=1, starts=[1])
    second = cut(inputs, 1, 2)
    key = (
        second.key[0, 0] + second.key_bias
    )  # the rotation is the same for key and query: it cancels
    query = second.query[0, 0] + second.query_bias
    weight = torch.sigmoid(second.trapezoid[0, 0]) * second.step_size[0, 0] * (key * query).sum(-1)
    expected = (weight + second.skip).unsqueeze(-1) * second.value[0, 0] * F.silu(second.gate[0, 0])
    assert_close(scan(inputs, None)[0][0, 1], expected)
    assert_close(scan(second, make_state(batch=1))[0][0, 0], expected)


# ---- Equations written anew ----------------------------------------------------------------------


def complex_mamba3(inputs: t.ScanInputs, state: t.ScanState | None = None) -> np.ndarray:
    """Mamba-3 from its paper's complex form, one number at a time: pairs of the state are complex
    numbers that turn back by each token's own angle, so that keys and queries need no rotation at
    all.
    """
    x = {f: None if a is None else a.numpy() for f, a in zip(inputs._fields, inputs, strict=True)}
    batch, length = x["value"].shape[:2]
    out = np.zeros_like(x["value"])

    def pairs(vector: np.ndarray) -> np.ndarray:
        """Rotating pairs as complex numbers; what does not rotate as complex numbers that never
        turn.
        """
        return np.concatenate(
            [vector[: 2 * ANGLES : 2] + 1j * vector[1 : 2 * ANGLES : 2], vector[2 * ANGLES :]]
        )

    for b in range(batch):
        for h in range(HEADS):
            memory = np.zeros((CHANNELS, STATE - ANGLES), dtype=complex)
            k_before, v_before = np.zeros(STATE - ANGLES, dtype=complex), np.zeros(CHANNELS)
            if state is not None:  # into the frame of the last position: turned back by its angle
                back = np.exp(
                    -1j * np.concatenate([state.angle[b, h].numpy(), np.zeros(STATE - 2 * ANGLES)])
                )
                memory = np.array([pairs(row) for row in state.ssm[b, h].numpy()]) * back
                k_before, v_before = (
                    pairs(state.key[b, h].numpy()) * back,
                    state.value[b, h].numpy(),
                )
            for i in range(length):
                dt = x["step_size"][b, i, h]
                turn = np.pi * np.tanh(x["angle_rate"][b, i]) * dt
                back = np.exp(-1j * np.concatenate([turn, np.zeros(STATE - 2 * ANGLES)]))
                share = 1 / (1 + np.exp(-x["trapezoid"][b, i, h]))
                k = pairs(x["key"][b, i] + x["key_bias"][h])
                q = pairs(x["query"][b, i] + x["query_bias"][h])
                v = x["value"][b, i, h]
                if x["document_start"] is not None and x["document_start"][b, i]:
                    memory, v_before = memory * 0, v_before * 0
                euler_back = (1 - share) * dt * np.outer(v_before, k_before)
                memory = np.exp(x["log_decay"][b, i, h]) * back * (
                    memory + euler_back
                ) + share * dt * np.outer(v, k)
                gate = x["gate"][b, i, h]
                y = (memory @ q.conj()).real + x["skip"][h] * v
                out[b, i, h] = y * gate / (1 + np.exp(-gate))
                k_before, v_before = k, v
    return out


@each_scan
@pytest.mark.parametrize("starts", [(), (6, 11)], ids=["one document", "three documents"])
@pytest.mark.parametrize("carried", [False, True], ids=["from zero", "from a state"])
def test_mamba3_follows_the_papers_complex_form(scan, starts, carried):
    inputs = make_inputs(18, starts=starts)
    state = make_state() if carried else None
    assert_close(scan(inputs, state)[0], torch.from_numpy(complex_mamba3(inputs, state)))


@each_scan
def test_mamba2_is_the_plain_recurrence(scan):
    """h <- exp(A dt) h + dt v k^T; y = (h q + D v) · SiLU(gate)."""
    zeros = torch.zeros(HEADS, STATE, dtype=torch.float64)
    inputs = make_inputs(20, key_bias=zeros, query_bias=zeros, **SWITCHES["Mamba-2"])
    expected = torch.zeros_like(inputs.value)
    for b in range(2):
        for h in range(HEADS):
            memory = torch.zeros(CHANNELS, STATE, dtype=torch.float64)
            for i in range(20):
                dt, v = inputs.step_size[b, i, h], inputs.value[b, i, h]
                memory = math.exp(inputs.log_decay[b, i, h]) * memory + dt * torch.outer(
                    v, inputs.key[b, i]
                )
                expected[b, i, h] = memory @ inputs.query[b, i] + inputs.skip[h] * v
    assert_close(scan(inputs, None)[0], expected * F.silu(inputs.gate))


@each_scan
@pytest.mark.parametrize("position", [0, 6, 7, 8, 19])
def test_outputs_do_not_depend_on_later_tokens_by_a_single_bit(scan, position):
    """A weight that looks one token ahead and is subtracted again is causal on paper, but not in
    floating point.
    """
    inputs, other = make_inputs(20, seed=1), make_inputs(20, seed=2)
    for dtype in (torch.float64, torch.float32):
        a, b = (
            t.ScanInputs(*(x if x is None else x.to(dtype) for x in i)) for i in (inputs, other)
        )
        per_token = (f for f in a._fields if getattr(a, f) is not None and getattr(a, f).dim() > 2)
        changed = {
            f: torch.cat([getattr(a, f)[:, : position + 1], getattr(b, f)[:, position + 1 :]], 1)
            for f in per_token
        }
        y, z = scan(a, None)[0], scan(a._replace(**changed), None)[0]
        assert torch.equal(y[:, : position + 1], z[:, : position + 1])


# ---- The short convolution in front of Mamba-2 ---------------------------------------------------


def make_conv(width: int) -> t.ShortConv:
    conv = t.ShortConv(6, width).double()
    torch.nn.init.normal_(conv.bias)
    return conv


@pytest.mark.parametrize("width", [2, 3, 4])
def test_short_convolution_is_conv1d_with_silu(width):
    conv, x = make_conv(width), torch.randn(2, 11, 6, dtype=torch.float64)
    padded = F.pad(x.mT, (width - 1, 0))
    expected = F.silu(F.conv1d(padded, conv.weight.unsqueeze(1), conv.bias, groups=6)).mT
    assert_close(conv(x)[0], expected)
