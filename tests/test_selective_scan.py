"""The first Mamba: its scan in a loop and in parallel against equations written anew here; the
libraries' operators, on stand-ins for the libraries; and the published hybrids, shrunk, from shards
to a score.
"""

import dataclasses
import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from tests.support import (
    FINAL,
    SOLO,
    gradients,
    random_model,
    random_tokens,
    relative,
    run_environment,
    run_here,
    tiny,
)

CHANNELS, STATE = 3, 8
BACKENDS = ("sequential", "parallel")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def make_inputs(
    length: int, batch: int = 2, dtype=torch.float64, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The tensors of selective_scan(), whose rates are as those of a new layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    return {
        "value": normal(batch, length, CHANNELS),
        "step": normal(batch, length, CHANNELS),
        "decay_rate": -torch.arange(1, STATE + 1, dtype=wide).repeat(CHANNELS, 1),
        "key": normal(batch, length, STATE),
        "query": normal(batch, length, STATE),
        "skip": normal(CHANNELS).to(wide),
        "gate": normal(batch, length, CHANNELS),
        "step_bias": normal(CHANNELS).to(wide) - 2,
    }


PER_TOKEN = ("value", "step", "key", "query", "gate")


def cut(inputs: dict, first: int, last: int) -> dict:
    return {name: x[:, first:last] if name in PER_TOKEN else x for name, x in inputs.items()}


def scan(inputs: dict, backend: str, chunk: int = 64, starts=None, state=None):
    return t.selective_scan(list(inputs.values()), starts, state, backend, chunk)


def document_starts(length: int, *places: int) -> torch.Tensor:
    """Starts in the first of two sequences."""
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[0, list(places)] = True
    return starts


# ---- Against the definition, and the backends against each other ---------------------------------


@each_backend
@pytest.mark.parametrize("starts", [(), (0, 5, 17)], ids=str)
def test_the_scan_is_the_papers_recurrence(backend, starts):
    """h = exp(dt A) h + dt B x; y = (C h + D x) SiLU(z), one number at a time."""
    inputs = make_inputs(20)
    x = {name: tensor.numpy() for name, tensor in inputs.items()}
    expected = np.zeros_like(x["value"])
    for b, c in np.ndindex(2, CHANNELS):
        h = np.zeros(STATE)
        for i in range(20):
            dt, value = (
                np.log1p(np.exp(x["step"][b, i, c] + x["step_bias"][c])),
                x["value"][b, i, c],
            )
            h = (
                h * (0 if b == 0 and i in starts else np.exp(dt * x["decay_rate"][c]))
                + dt * x["key"][b, i] * value
            )
            y, z = x["query"][b, i] @ h + x["skip"][c] * value, x["gate"][b, i, c]
            expected[b, i, c] = y * z / (1 + np.exp(-z))
    y, _ = scan(inputs, backend, 8, document_starts(20, *starts) if starts else None)
    assert relative(y, torch.from_numpy(expected)) < 1e-12


@pytest.mark.parametrize("chunk", [8, 64, 2048])
def test_parallel_equals_sequential_at_every_length(chunk):
    """At each length from 1 to 64 and a spread up to 2048; and a long run's prefix is the shorter
    run.
    """
    whole = make_inputs(2048, batch=1)
    expected, _ = scan(whole, "sequential", 256)
    for length in [
        *range(1, 65),
        65,
        100,
        127,
        128,
        129,
        255,
        500,
        777,
        1023,
        1024,
        1025,
        1500,
        2047,
        2048,
    ]:
        y, last = scan(cut(whole, 0, length), "parallel", chunk)
        assert relative(y, expected[:, :length]) < 1e-12, length
        if length <= 64:
            _, state = scan(cut(whole, 0, length), "sequential", chunk)
            assert relative(last, state) < 1e-12, length


@pytest.mark.parametrize("starts", [None, (0, 4, 9, 30)], ids=str)
@pytest.mark.parametrize("length", [1, 7, 33])
def test_gradients_agree(length, starts):
    """Of a random weighting of outputs and last state, with respect to every input and the state
    carried in.
    """
    found = []
    for backend, chunk in (("sequential", 64), ("parallel", 64), ("parallel", 8)):
        generator = torch.Generator().manual_seed(1)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: B023

        leaves = {name: x.requires_grad_() for name, x in make_inputs(length).items()}
        state = random(2, CHANNELS, STATE).requires_grad_()
        places = (
            None if starts is None else document_starts(length, *(s for s in starts if s < length))
        )
        outputs = scan(leaves, backend, chunk, places, state)
        loss = sum((y * random(*y.shape)).sum() for y in outputs)
        found.append(
            dict(
                zip(
                    (*leaves, "state"),
                    torch.autograd.grad(loss, (*leaves.values(), state)),
                    strict=True,
                )
            )
        )
    for name, expected in found[0].items():
        assert expected.norm() > 0
        for other in found[1:]:
            assert relative(other[name], expected) < 1e-10, name


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_leave_neither_nan_nor_infinity(backend, dtype):
    """Steps from 1e-6 to 100 and rates up to 2,000 leave float16's range; the recurrence is in
    float32.
    """
    inputs = make_inputs(300, dtype=dtype)
    inputs["step"] = torch.linspace(-12, 100, 300).to(dtype)[:, None].expand(2, 300, CHANNELS)
    inputs["decay_rate"] = inputs["decay_rate"] * torch.tensor([1e-3, 1.0, 250.0]).unsqueeze(1)
    inputs["key"], inputs["query"] = inputs["key"] * 0.1, inputs["query"] * 0.1
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, state = scan(leaves, backend)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert y.isfinite().all()
    assert state.isfinite().all()
    y.float().mean().backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())
    expected, _ = scan({name: x.double() for name, x in inputs.items()}, "sequential")
    assert relative(y, expected) < (1e-3 if dtype == torch.float16 else 1e-2)


@each_backend
@pytest.mark.parametrize("position", [0, 7, 8, 30])
def test_outputs_do_not_depend_on_later_tokens_by_a_single_bit(backend, position):
    one, other = make_inputs(40, dtype=torch.float32), make_inputs(40, dtype=torch.float32, seed=1)
    changed = {
        name: torch.cat([x[:, : position + 1], other[name][:, position + 1 :]], 1)
        if name in PER_TOKEN
        else x
        for name, x in one.items()
    }
    y, z = scan(one, backend, 16)[0], scan(changed, backend, 16)[0]
    assert torch.equal(y[:, : position + 1], z[:, : position + 1])
    assert not torch.equal(y[:, position + 1 :], z[:, position + 1 :])


@each_backend
@pytest.mark.parametrize("places", [(1,), (8,), (5, 6), (16, 33)], ids=str)
def test_a_sequence_in_several_calls_equals_one_call(backend, places):
    inputs, starts = make_inputs(40), document_starts(40, 3, 16)
    expected, last = scan(inputs, backend, 8, starts)
    state, outputs = None, []
    for first, end in zip((0, *places), (*places, 40), strict=True):
        y, state = scan(cut(inputs, first, end), backend, 8, starts[:, first:end], state)
        outputs.append(y)
    assert relative(torch.cat(outputs, 1), expected) < 1e-12
    assert relative(state, last) < 1e-12


@each_backend
def test_packed_documents_equal_each_document_alone(backend):
    inputs, carried = make_inputs(30), torch.randn(2, CHANNELS, STATE, dtype=torch.float64)
    y, _ = scan(inputs, backend, 8, document_starts(30, 0, 8, 19), carried)
    for first, last in ((0, 8), (8, 19), (19, 30)):
        assert (
            relative(y[:1, first:last], scan(cut(inputs, first, last), backend, 8)[0][:1]) < 1e-12
        )


def test_backward_keeps_no_more_than_a_chunk_of_states():
    """Else a layer of contest size would keep gigabytes."""
    inputs = {name: x.requires_grad_() for name, x in make_inputs(1024).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        scan(inputs, "parallel", 32)
    assert sum(kept) < 1024 * CHANNELS * STATE * 2 * 2


# ---- The block -----------------------------------------------------------------------------------

FIRST = {"mamba_version": 1}


@torch.no_grad()
def test_the_block_is_the_papers():
    settings = tiny(num_layers=1, mamba_layers="all", scan_backend="sequential", **FIRST)
    model = random_model(settings)
    block, u = model.blocks[0].mixer, torch.randn(2, 9, 32)
    y, _ = block(u, t.Context(None, model.rotary_table[:, :9]))
    z, x = (u @ block.in_proj.weight.T).split(64, dim=-1)
    padded = F.pad(x.mT, (3, 0))
    x = F.silu(F.conv1d(padded, block.conv.weight.unsqueeze(1), block.conv.bias, groups=64)).mT
    low, b, c = (x @ block.x_proj.weight.T).split([16, 8, 8], dim=-1)
    dt = F.softplus(low @ block.dt_proj.weight.T + block.dt_bias)
    h, outputs = torch.zeros(2, 64, 8), []
    for i in range(9):
        h = (
            torch.exp(-dt[:, i, :, None] * block.A_log.exp()) * h
            + (dt * x)[:, i, :, None] * b[:, i, None]
        )
        outputs.append((h * c[:, i, None]).sum(-1) + block.D * x[:, i])
    assert relative(y, (torch.stack(outputs, 1) * F.silu(z)) @ block.out_proj.weight.T) < 1e-5


def test_both_backends_train_alike():
    parallel, sequential = (
        gradients(random_model(tiny(scan_backend=backend, **FIRST))) for backend in BACKENDS[::-1]
    )
    assert all(relative(parallel[name], gradient) < 1e-4 for name, gradient in sequential.items())


def test_new_steps_and_rates_are_the_papers():
    block = t.build_model(tiny(num_layers=1, mamba_layers="all", **FIRST), SOLO).blocks[0].mixer
    step = F.softplus(block.dt_bias)
    assert 0.9e-3 < step.min() < step.max() < 1.1e-1
    assert torch.allclose(block.A_log.exp(), torch.arange(1.0, 9).expand(64, 8))


@torch.no_grad()
def test_what_makes_steps_keys_and_queries_has_eight_bits():
    model = random_model(tiny(**FIRST))
    limits = {
        name.rpartition("mixer.")[2]: rows.unique().tolist()
        for name, rows in t.grid_limits(model).items()
    }
    assert limits["x_proj.weight"] == limits["dt_proj.weight"] == [t.INT8_MAX]
    assert (
        limits["in_proj.weight"]
        == limits["out_proj.weight"]
        == limits["query.weight"]
        == [t.INT6_MAX]
    )


# ---- The libraries' operators --------------------------------------------------------------------


def autograd_function(forward):
    """forward as one node of the graph, as the libraries' functions are: nothing within an operator
    records another.
    """

    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            ctx.save_for_backward(*arguments)
            return forward(*arguments).contiguous()

        @staticmethod
        def backward(ctx, d_y):
            included = torch._C._IncludeDispatchKeyGuard(torch._C.DispatchKey.AutogradCPU)
            excluded = torch._C._ForceDispatchKeyGuard(
                torch._C._dispatch_tls_local_include_set(),
                torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradCPU),
            )
            with included, excluded, torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                return torch.autograd.grad(forward(*leaves), leaves, d_y)

    return Whole.apply


def plain_conv(x, weight, bias, activation):
    assert activation == "silu"
    assert x.stride(-1) == 1

    def conv(x, weight, bias):
        return F.silu(
            F.conv1d(
                F.pad(x, (weight.shape[1] - 1, 0)), weight.unsqueeze(1), bias, groups=len(weight)
            )
        )

    return autograd_function(conv)(x, weight, bias)


def plain_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):  # the library's names
    assert delta_softplus
    assert all(x.stride(-1) == 1 for x in (u, delta, B, C, z))

    def scan(u, delta, A, B, C, D, z, delta_bias):
        turned = u.mT, delta.mT, A, B.mT, C.mT, D, z.mT, delta_bias
        return t.selective_scan(turned, None, None, "sequential", 1024)[0].mT

    return autograd_function(scan)(u, delta, A, B, C, D, z, delta_bias)


def plain_chunk_scan(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    return_final_states=False,
    return_varlen_states=False,
):
    """mamba_ssm's signature; the recurrence one token after another, by the papers' letters."""
    assert dt_softplus
    assert chunk_size == 16
    assert B.shape == C.shape == (*x.shape[:2], 1, B.shape[-1])
    assert seq_idx is None or (seq_idx.dtype, seq_idx.shape) == (torch.int32, x.shape[:2])

    def scan(x, dt, A, B, C, D, z, dt_bias):
        step, h, outputs = F.softplus(dt + dt_bias), 0.0, []
        for i in range(x.shape[1]):
            if seq_idx is not None and i > 0:
                h = h * (seq_idx[:, i] == seq_idx[:, i - 1])[:, None, None, None]
            add = (step[:, i, :, None] * x[:, i])[..., None] * B[:, i, :, None]
            h = torch.exp(step[:, i] * A)[..., None, None] * h + add
            outputs.append((h * C[:, i, :, None]).sum(-1) + D[:, None] * x[:, i])
        return (torch.stack(outputs, 1) * F.silu(z)).to(x.dtype)

    return autograd_function(scan)(x, dt, A, B, C, D, z, dt_bias)


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for both libraries, and a CPU that is taken for a GPU where a scan is chosen."""
    names = {name for modules in t.LIBRARIES.values() for name in modules}
    parents = {"mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"}
    for name in names | parents:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["causal_conv1d"].causal_conv1d_fn = plain_conv
    sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn = plain_scan
    combined = sys.modules["mamba_ssm.ops.triton.ssd_combined"]
    combined.mamba_chunk_scan_combined = plain_chunk_scan
    choose = t.choose_scan_backend
    monkeypatch.setattr(
        t, "choose_scan_backend", lambda settings, _: choose(settings, torch.device("cuda"))
    )


def operator_arguments() -> dict[str, tuple]:
    """library_kernel()'s arguments by the name of the library's function."""
    x = {
        name: value.mT.contiguous() if name in PER_TOKEN else value
        for name, value in make_inputs(9).items()
    }

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    conv = [x["value"], normal(CHANNELS, 4), normal(CHANNELS)]
    chunk = [
        normal(2, 9, 2, 4),
        normal(2, 9, 2),
        -normal(2).exp(),
        normal(2, 9, 1, 8),
        normal(2, 9, 1, 8),
        normal(2),
        normal(2, 9, 2, 4),
        normal(2),
    ]
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9], dtype=torch.int32)
    return {
        "convolution": (conv, None, "convolution", 0),
        "selective_scan": (list(x.values()), None, "selective_scan", 0),
        "chunk_scan": (chunk, None, "chunk_scan", 16),
        "chunk_scan of documents": (chunk, numbers, "chunk_scan", 16),
    }


@pytest.mark.parametrize("name", operator_arguments())
def test_operators_have_the_fake_and_gradients_that_torch_wants(name, libraries):
    tensors, *others = operator_arguments()[name]
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(getattr(torch.ops, t.OPERATORS).library_kernel.default, (leaves, *others))
    gradient = torch.randn_like(tensors[0])
    arguments = (gradient, [x.detach() for x in tensors], *others)
    torch.library.opcheck(getattr(torch.ops, t.OPERATORS).library_backward.default, arguments)


def test_operators_compute_shapes_without_their_libraries():
    for tensors, *others in operator_arguments().values():
        y = t.library_kernel([x.to("meta") for x in tensors], *others)
        assert (y.shape, y.dtype, y.device.type) == (tensors[0].shape, torch.float64, "meta")


@each_backend
def test_a_state_that_is_passed_on_does_not_hold_its_chunks_states(backend):
    """Between chunks only one state is kept for backward. A view of the last would keep all of
    them.
    """
    _, state = scan(make_inputs(64), backend, chunk=16)
    assert state.untyped_storage().nbytes() == state.nbytes


MODELS = {
    "first": FIRST,
    "Mamba-2": {"mamba_version": 2, "mamba_chunk_size": 16},
    "Mamba-2, documents": {"mamba_version": 2, "mamba_chunk_size": 16, "document_reset": True},
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_trains_as_a_sequential_one(name, compiled, libraries):
    settings = tiny(num_layers=2, mamba_layers="0", **MODELS[name])
    fused, sequential = (
        random_model(dataclasses.replace(settings, scan_backend=b)) for b in ("fused", "sequential")
    )
    assert fused.blocks[0].mixer.backend == "fused"
    if compiled:
        fused.loss = torch.compile(fused.loss, backend="aot_eager", fullgraph=True, dynamic=False)
    expected, found = gradients(sequential), gradients(fused)
    assert {name: relative(x, expected[name]) for name, x in found.items()} == pytest.approx(
        dict.fromkeys(found, 0), abs=1e-4
    )


def test_mamba_2_behind_a_state_is_computed_without_the_library(libraries, monkeypatch):
    """The library's scan passes no state on: what has one goes by chunks."""
    settings = tiny(num_layers=1, mamba_layers="all", **MODELS["Mamba-2"])
    fused, chunked = (
        random_model(dataclasses.replace(settings, scan_backend=b)).blocks[0].mixer
        for b in ("fused", "chunked")
    )
    u, context = torch.randn(2, 9, 32), t.Context(None, None)
    state = chunked(u, context, chunked.new_state(2, 0, u.dtype))[1]
    monkeypatch.setattr(t, "library_scan", None)
    y, _ = fused(u, context, state)
    expected, _ = chunked(u, context, state)
    assert relative(y, expected) < 1e-5


# ---- The published systems -----------------------------------------------------------------------

PUBLISHED = {  # parameters, and within which part of that
    "hybrid11": (31_800_000, 0.03),
    "hybrid18": (27_191_065, 0.01),
}


def skeleton(environment: dict[str, str]) -> t.Model:
    settings, _ = t.read_settings(environment)
    t.validate_settings(settings, 8)
    with torch.device("meta"):
        return t.Model(settings, torch.device("meta"))


@pytest.mark.parametrize(("preset", "published"), PUBLISHED.items(), ids=PUBLISHED)
def test_a_published_hybrid_has_its_parameters(preset, published):
    total, tolerance = published
    assert sum(p.numel() for p in skeleton({"PRESET": preset}).parameters()) == pytest.approx(
        total, rel=tolerance
    )


def test_hybrid18s_mamba_blocks_have_exactly_the_published_parameters():
    blocks = [b for b in skeleton({"PRESET": "hybrid18"}).blocks if isinstance(b.mixer, t.Mamba)]
    assert len(blocks) == 15
    assert all(block.mlp is None for block in blocks)
    assert sum(p.numel() for block in blocks for p in block.mixer.parameters()) == 19_249_920


def test_hybrid18_takes_the_published_command():
    command = """MAMBA_LAYERS=0,1,2,3,4,5,6,7,8,9,10,11,15,16,17 NUM_LAYERS=18
        MAMBA_D_STATE=32 MAMBA_D_CONV=4 MAMBA_EXPAND=1.5 MAMBA_MATRIX_LR=0.015
        BIGRAM_VOCAB_SIZE=2048 BIGRAM_DIM=128 WARMDOWN_ITERS=3500 TARGET_MB=15.9
        SEED=42"""
    given = skeleton({"PRESET": "hybrid18"} | dict(word.split("=") for word in command.split()))
    plain = skeleton({"PRESET": "hybrid18"})
    assert [(n, p.shape) for n, p in given.named_parameters()] == [
        (n, p.shape) for n, p in plain.named_parameters()
    ]
    assert (given.settings.warmdown_iters, given.settings.seed, plain.settings.target_mb) == (
        3500,
        42,
        15.9,
    )
    letters = "".join(type(block.mixer).__name__[0] for block in given.blocks)
    assert letters == "M" * 12 + "AAA" + "M" * 3
    assert [layer for layer, block in enumerate(given.blocks) if block.mlp is not None] == [
        12,
        13,
        14,
    ]


def test_nemotron_hinge_runs_the_published_order():
    model = skeleton({"PRESET": "nemotron_hinge"})
    order = " ".join(
        f"{type(model.blocks[layer].mixer).__name__[0]}{layer}" for layer in model.order(True)
    )
    assert order == "M0 M1 M2 M3 A4 M3 A4 M3 A4 M5 M6 M7"
    assert t.schedule_at(model.settings, 0, 0.0).recurrent
    sizes = model.blocks[0].mixer.sizes
    assert (sizes.state, sizes.channels, sizes.heads, sizes.angles) == (64, 64, 16, 16)


SHRINK = {
    "vocab_size": 512,
    "train_seq_len": 32,
    "train_batch_tokens": 64,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mamba_d_state": 8,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 16,
    "bigram_vocab_size": 64,
    "bigram_dim": 8,
    "eval_stride": 16,
    "val_batch_size": 128,
    "ttt_chunk_tokens": 128,
    "calibration_tokens": 128,
    "iterations": 2,
    "warmup_steps": 0,
    "sdclip_k": 5.0,
}


@pytest.mark.parametrize("preset", ["nemotron_hinge", "hybrid11", "hybrid18"])
def test_a_published_system_runs_from_shards_to_a_score(
    preset, monkeypatch, capsys, shards, tmp_path
):
    """Trains, exports, loads again and scores, shrunk by nothing but variables."""
    environment = run_environment(shards, tmp_path, **SHRINK)
    kept = {"DATA_PATH", "TOKENIZER_PATH", "LOG_DIR", "RUN_ID", "DEVICE", "MAX_WALLCLOCK_SECONDS"}
    environment = {k: v for k, v in environment.items() if k in kept or k.lower() in SHRINK} | {
        "PRESET": preset.lower()
    }
    assert run_here(monkeypatch, environment) == 0
    assert FINAL.fullmatch(capsys.readouterr().out.strip().splitlines()[-1])
    _, settings = t.load_model(
        tmp_path / "a.int6.lzma", t.read_settings(environment)[0], set(), SOLO
    )
    assert (settings.mamba_version, settings.num_layers) == {
        "nemotron_hinge": (3, 8), "hybrid11": (1, 11), "hybrid18": (1, 18)
    }[preset]  # fmt: skip


def test_learning_brings_the_loss_down():
    settings = dataclasses.replace(tiny(mamba_layers="all", **FIRST), matrix_lr=0.02)
    model = t.build_model(settings, SOLO)
    optimizers, tokens = (
        t.Optimizers(model, settings, SOLO),
        random_tokens(1, 8).repeat(4, 5)[:, :33],
    )
    for step in range(20):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], model.order(True))
        loss.backward()
        optimizers.step(1.0, 0.9)
        if step == 0:
            assert abs(loss.item() - math.log(512)) < 0.1
    assert loss.item() < 0.6 * math.log(512)
