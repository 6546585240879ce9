"""Attention's backends beside the formula, and documents that must not see each other."""

import sys
import types

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import train_gpt as t
from tests.support import (
    CPU,
    SOLO,
    document_stream,
    random_model,
    random_tokens,
    relative,
    tiny,
    validation_set,
)

LIBRARIES = {"fa2": "flash_attn", "fa3": "flash_attn_interface"}


def random_heads(length: int, batch: int = 2, dtype=torch.float32) -> list[torch.Tensor]:
    """Query of four heads, key and value of two, 16 numbers each."""
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(batch, length, heads, 16, generator=generator, dtype=dtype)
        for heads in (4, 2, 2)
    ]


def random_starts(length: int, batch: int = 2, mean: int = 30) -> torch.Tensor:
    """Document starts, two next to each other among them, and one window that begins with none."""
    generator = torch.Generator().manual_seed(length)
    start = torch.rand(batch, length, generator=generator) < 1 / mean
    start[0, 3:5] = True
    start[1, 0] = False
    return start


# ---- Backends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("confined", [False, True])
def test_the_formula_is_one_softmax_for_each_query_over_what_it_may_see(confined):
    query, key, value = random_heads(40, dtype=torch.float64)
    start = random_starts(40)
    documents = t.find_documents(start, "math") if confined else None
    y = t.attend(query, key, value, documents, "math")
    for b in range(2):
        first = 0
        for position in range(40):
            if confined and start[b, position]:
                first = position
            for head in range(4):
                seen = slice(first, position + 1)
                scores = key[b, seen, head // 2] @ query[b, position, head] / 4
                expected = scores.softmax(0) @ value[b, seen, head // 2]
                assert relative(y[b, position, head], expected) < 1e-12


@pytest.mark.parametrize("backend", ["auto", "flash"])
@pytest.mark.parametrize("length", [1, 40, 300])
def test_sdpa_gives_what_the_formula_gives(backend, length):
    leaves = [x.requires_grad_() for x in random_heads(length)]
    weights = torch.randn(2, length, 4, 16)
    found, expected = (t.attend(*leaves, None, name) for name in (backend, "math"))
    assert relative(found, expected) < 1e-6
    pairs = [torch.autograd.grad(y, leaves, weights) for y in (found, expected)]
    for mine, theirs in zip(*pairs, strict=True):
        assert (mine - theirs).norm() < 1e-5 * weights.norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("length", [1, 128, 300, 512])
@pytest.mark.parametrize("confined", [False, True])
def test_flex_attention_gives_what_the_formula_gives(length, confined):
    heads, start = random_heads(length), random_starts(max(length, 5))[:, :length]
    found, expected = (
        t.attend(*heads, t.find_documents(start, name) if confined else None, name)
        for name in ("flex", "math")
    )
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("length", [128, 300, 1024])
@pytest.mark.parametrize("mean", [8, 100, 10_000])
def test_blocks_are_those_that_torch_finds_by_looking_at_every_pair(length, mean):
    """Full, masked or left out: also at a window's end that fills no block."""
    blocks = t.find_documents(random_starts(length, mean=mean), "flex").blocks
    expected = create_block_mask(blocks.mask_mod, 2, None, length, length, device="cpu")
    assert torch.equal(blocks.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(blocks, name), getattr(expected, name)), name
    for counts, places in (("kv_num_blocks", "kv_indices"), ("q_num_blocks", "q_indices")):
        for prefix in ("", "full_"):
            listed = torch.arange(blocks.kv_indices.shape[-1]) < getattr(
                blocks, prefix + counts
            ).unsqueeze(-1)
            mine, theirs = (getattr(mask, prefix + places) for mask in (blocks, expected))
            assert torch.equal(mine[listed], theirs[listed])


def test_short_documents_leave_most_blocks_out():
    """At 2,048 tokens and a mean of 200, a causal mask alone would leave 47 % out."""
    start = random_starts(2048, mean=200)
    assert t.find_documents(start, "flex").blocks.sparsity() > 75
    assert t.find_documents(torch.zeros_like(start), "flex").blocks.sparsity() < 48


def test_edges_are_where_documents_and_windows_begin_and_then_the_end():
    start = torch.zeros(2, 50, dtype=torch.bool)
    start[0, [7, 8]] = True
    start[1, [0, 49]] = True
    edges, crowded = t.document_edges(start)
    assert edges[:6].tolist() == [0, 7, 8, 50, 99, 100]
    assert (edges[5:] == 100).all()
    assert edges.dtype == torch.int32
    assert len(edges) == 2 + 256 + 1
    assert not crowded
    start = torch.ones(2, 300, dtype=torch.bool)
    edges, crowded = t.document_edges(start)
    assert len(edges) == 2 + 256 + 1
    assert crowded


class Formula(torch.autograd.Function):
    """The formula, within documents of these lengths, as an autograd.Function: a library's form."""

    @staticmethod
    def forward(ctx, lengths, *heads):
        ctx.lengths = lengths
        ctx.save_for_backward(*heads)
        return Formula.within(lengths, heads)

    @staticmethod
    def backward(ctx, d_y):
        _, pull = torch.func.vjp(
            lambda *heads: Formula.within(ctx.lengths, heads), *ctx.saved_tensors
        )
        return None, *pull(d_y)

    @staticmethod
    def within(lengths, heads):
        if lengths is None:
            return t.attend(*heads, None, "math")
        parts = zip(*(x.unsqueeze(0).split(lengths, dim=1) for x in heads), strict=True)
        return torch.cat([t.attend(*part, None, "math") for part in parts], dim=1)[0]


def flash_stand_in(calls: list[str], log_sums: bool) -> types.SimpleNamespace:
    """What FlashAttention's modules offer, by the formula; notes which function was called."""

    def flash_attn_func(query, key, value, causal, deterministic):
        assert causal
        assert not deterministic
        calls.append("dense")
        y = Formula.apply(None, query, key, value)
        return (y, None) if log_sums else y

    def flash_attn_varlen_func(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
    ):
        assert options == {"causal": True, "deterministic": False}
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_q.diff().max() <= max_seqlen_q == max_seqlen_k
        calls.append("varlen")
        lengths = [length for length in cu_seqlens_q.diff().tolist() if length]
        y = Formula.apply(lengths, query, key, value)
        return (y, None) if log_sums else y

    return types.SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
    )


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize("confined", [False, True])
def test_flash_attention_is_called_as_its_users_call_it(monkeypatch, backend, confined):
    """A module of its name stands in for it: values, gradients, and the whole as one graph."""
    calls: list[str] = []
    monkeypatch.setitem(sys.modules, LIBRARIES[backend], flash_stand_in(calls, backend == "fa3"))
    leaves = [x.requires_grad_() for x in random_heads(40)]
    start, weights = random_starts(40), torch.randn(2, 40, 4, 16)

    def attend(start, *heads, name=backend):
        return t.attend(*heads, t.find_documents(start, name) if confined else None, name)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)
    expected = attend(start, *leaves, name="math")
    gradients = torch.autograd.grad(expected, leaves, weights)
    for function in (attend, compiled):
        y = function(start, *leaves)
        assert relative(y, expected) < 1e-6
        for mine, theirs in zip(torch.autograd.grad(y, leaves, weights), gradients, strict=True):
            assert relative(mine, theirs) < 1e-5
    assert set(calls) == {"varlen" if confined else "dense"}


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ((2, 10), {"is_causal": True}),
        ((2, 11), {"window_size": (-1, 0)}),
        ((2, 12), {"window_size": (-1, 0), "enable_gqa": True}),
    ],
)
def test_torchs_attention_of_many_lengths_gets_edges_and_as_many_heads_as_it_takes(
    monkeypatch, version, options
):
    """Keys are repeated for versions that know no grouped heads."""
    grouped = "enable_gqa" in options
    module = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(t, "TORCH", version)

    def stand_in(query, key, value, edges, edges_too, longest, longest_too, **found):
        assert found == options
        assert key.shape[1] == (2 if grouped else 4)
        return flash_stand_in([], False).flash_attn_varlen_func(
            query, key, value, edges, edges_too, longest, longest_too, causal=True,
            deterministic=False,
        )  # fmt: skip

    module.varlen_attn = stand_in
    heads, start = random_heads(40), random_starts(40)
    found, expected = (
        t.attend(*heads, t.find_documents(start, name), name) for name in ("flash", "math")
    )
    assert relative(found, expected) < 1e-6
    crowded = torch.ones(2, 300, dtype=torch.bool)
    module.varlen_attn = lambda query, *_, **__: query
    y = t.attend(*random_heads(300), t.find_documents(crowded, "flash"), "flash")
    assert y.isnan().all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_backend": "cudnn"}, "ATTENTION_BACKEND=cudnn does not run here: .*; auto"),
        ({"attention_backend": "flex"}, "no backward pass on a CPU"),
        ({"attention_backend": "fa3"}, "No module named 'flash_attn_interface' .build it"),
        ({"attention_backend": "fa2"}, "No module named 'flash_attn' .build it"),
        ({"attention_backend": "cudnn", "document_reset": True}, "cannot keep documents apart"),
    ],
    ids=str,
)
def test_a_backend_that_cannot_run_here_is_refused_in_one_line(changes, said):
    with pytest.raises(t.UserError, match=said) as error:
        t.choose_attention_backend(tiny(**changes), CPU)
    assert "\n" not in str(error.value)
    assert t.choose_attention_backend(tiny(**changes), torch.device("meta")) == "math"


def test_the_reason_is_a_whole_sentence(monkeypatch):
    def attend(*_):
        raise NotImplementedError(f"{reason}. This could be because\nof much")

    reason = "Could not run " + "a long name " * 20
    monkeypatch.setattr(t, "attend", attend)
    t.attention_problem.cache_clear()
    with pytest.raises(t.UserError, match=f"does not run here: {reason}; auto does"):
        t.choose_attention_backend(tiny(attention_backend="fa3"), CPU)
    t.attention_problem.cache_clear()


def test_an_empty_module_of_flash_attentions_name_is_refused(monkeypatch):
    """Such a package stands in the registry: it must not fail at the first step."""
    t.attention_problem.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("shell"))
    with pytest.raises(t.UserError, match="flash_attn_func.*FlashAttention's own repository"):
        t.choose_attention_backend(tiny(attention_backend="fa3"), CPU)
    t.attention_problem.cache_clear()


def test_heads_that_flex_attention_cannot_compile_go_by_the_formula(monkeypatch):
    """tl.dot takes no fewer than 16 numbers; sizes beyond 256 are tried, here in vain."""
    monkeypatch.setattr(t, "kernel_limits", lambda device: (90, 232_448))
    gpu = torch.device("cuda")
    for head, backend in ((8, "math"), (16, "flex"), (48, "flex"), (256, "flex"), (512, "math")):
        settings = tiny(document_reset=True, model_dim=2 * head, num_heads=2, num_kv_heads=1)
        assert t.choose_attention_backend(settings, gpu) == backend, head


@pytest.mark.parametrize("error", [AssertionError("a\nb"), TypeError("a. b"), OSError("a")])
def test_whatever_a_backend_raises_is_refused_in_one_line(error, monkeypatch):
    def attend(*_):
        raise error

    monkeypatch.setattr(t, "attend", attend)
    t.attention_problem.cache_clear()
    with pytest.raises(
        t.UserError, match="^ATTENTION_BACKEND=fa2 does not run here: a; auto does$"
    ):
        t.choose_attention_backend(tiny(attention_backend="fa2"), CPU)
    t.attention_problem.cache_clear()


def test_auto_is_what_is_fastest_where_it_runs():
    gpu = torch.device("cuda")
    assert t.choose_attention_backend(tiny(), gpu) == "auto"
    confined = tiny(document_reset=True, model_dim=64)
    assert t.choose_attention_backend(confined, gpu) == "flex"
    assert t.choose_attention_backend(confined, CPU) == "math"
    scans = tiny(document_reset=True, document_scope="scans")
    assert t.choose_attention_backend(scans, gpu) == "auto"


# ---- Documents -----------------------------------------------------------------------------------

MIXERS = {
    "Mamba-3": {"mamba_layers": "all"},
    "Mamba-2": {"mamba_layers": "all", "mamba_version": 2},
    "first Mamba": {"mamba_layers": "all", "mamba_version": 1},
    "attention": {"mamba_layers": "none"},
    "hybrid": {"layer_order": "0,1,2,1,2", "mamba_version": 2, "xsa_last_n": 3, "ln_scale": True},
}
each_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
LENGTHS = (5, 1, 14, 12)  # of four documents in one window; the first runs at its start


def documents_model(dtype=torch.float32, **changes) -> t.Model:
    """A model that keeps documents apart, all of it in dtype, rotary angles too."""
    plain = "parallel" if changes.get("mamba_version") == 1 else "chunked"
    settings = tiny(**{"document_reset": True, "scan_backend": plain} | changes)
    model = random_model(settings).to(dtype)
    model.compute_dtype = dtype
    position = torch.arange(model.rotary_table.shape[1], dtype=dtype)
    pairs = model.rotary_table.shape[2]
    frequency = model.settings.rope_base ** -(torch.arange(pairs, dtype=dtype) / pairs)
    angles = position[:, None] * frequency
    model.rotary_table.copy_(torch.stack([angles.cos(), angles.sin()]))
    return model


def four_documents() -> list[torch.Tensor]:
    """Each of tokens that no other has but BOS, which the first lacks: its start lies before."""
    documents = []
    for number, length in enumerate(LENGTHS):
        tokens = 100 * number + 4 + random_tokens(1, length, seed=number) % 90
        if number:
            tokens[:, 0] = t.BOS_ID
        documents.append(tokens)
    return documents


def hidden(model: t.Model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, model.order(True))


@each_mixer
@torch.no_grad()
def test_documents_in_one_window_equal_each_alone(mixer):
    model = documents_model(torch.float64, **mixer)
    documents = four_documents()
    together = hidden(model, torch.cat(documents, dim=1)).split(LENGTHS, dim=1)
    for document, part in zip(documents, together, strict=True):
        assert relative(part, hidden(model, document)) < 1e-9


@each_mixer
@torch.no_grad()
def test_what_a_document_computes_does_not_depend_on_another_by_a_bit(mixer):
    """But for Mamba-3, whose angles run on: turns that cancel leave their rounding behind."""
    slow = "parallel" if mixer.get("mamba_version") == 1 else "sequential"
    model, documents = documents_model(scan_backend=slow, **mixer), four_documents()
    exact = mixer is not MIXERS["Mamba-3"]
    before = hidden(model, torch.cat(documents, dim=1)).split(LENGTHS, dim=1)
    for changed in range(4):
        others = [document.clone() for document in documents]
        others[changed][:, 1 if changed else 0 :] += 7
        after = hidden(model, torch.cat(others, dim=1)).split(LENGTHS, dim=1)
        for number in range(4):
            if number != changed and exact:
                assert torch.equal(before[number], after[number])
            elif number != changed or LENGTHS[number] == 1:
                assert relative(before[number], after[number]) < 1e-5
            else:
                assert relative(before[number], after[number]) > 0.1


@each_mixer
def test_no_gradient_of_a_document_reaches_another(mixer):
    """By the rows of the embedding; a scan's decay at a start, 1e-26, and rounding are none."""
    model, documents = documents_model(torch.float64, **mixer), four_documents()
    parts = hidden(model, torch.cat(documents, dim=1)).split(LENGTHS, dim=1)
    for number, part in enumerate(parts):
        weights = torch.randn(part.shape)
        (rows,) = torch.autograd.grad(
            (part * weights).sum(), model.embedding.weight, retain_graph=True
        )
        for other, document in enumerate(documents):
            own = document[document != t.BOS_ID]
            if other == 1:
                assert len(own) == 0
            elif other == number:
                assert rows[own].abs().max() > 1
            elif mixer is MIXERS["attention"] or mixer is MIXERS["first Mamba"]:
                assert not rows[own].any()
            else:
                assert rows[own].abs().max() < 1e-12


@pytest.mark.parametrize("mixer", ["attention", "hybrid"])
@torch.no_grad()
def test_document_scope_scans_is_what_document_reset_once_meant(mixer):
    """Attention and convolutions see the document before; an artifact of then says so."""
    model = documents_model(document_scope="scans", **MIXERS[mixer])
    documents = four_documents()
    together = hidden(model, torch.cat(documents, dim=1)).split(LENGTHS, dim=1)
    assert relative(together[3], hidden(model, documents[3])) > 1e-3
    assert t.FORMER_DEFAULTS["document_scope"] == "scans"


def test_the_librarys_convolution_is_left_where_documents_end(monkeypatch):
    monkeypatch.setattr(t, "library_kernel", None)
    conv, x = t.ShortConv(6, 4), torch.randn(2, 12, 6)
    reach = t.find_documents(random_starts(12, mean=4), "math").reach
    assert torch.equal(conv(x, reach, fused=True)[0], conv(x, reach)[0])


@pytest.mark.parametrize("backend", ["math", "flex"])
@torch.no_grad()
def test_one_compiled_graph_serves_windows_with_other_documents(backend):
    """fullgraph=True with the mask made inside; a second compilation would raise."""
    model = documents_model(mamba_layers="0", num_layers=2)
    order, tokens = model.order(True), random_tokens(3, 2, 32)
    expected = [model(window, order) for window in tokens]
    model.attention_backend = backend
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    compiled(tokens[0], order)
    with torch.compiler.set_stance("fail_on_recompile"):
        for number, window in enumerate(tokens):
            window[:, 5 * number + 3] = t.BOS_ID
            model.attention_backend = "math"
            plain = model(window, order)
            model.attention_backend = backend
            assert relative(compiled(window, order), plain) < 1e-5
            assert relative(plain, expected[number]) > 1e-3


class States:
    """What Model.resume() leaves with each mixer, in memory."""

    def __init__(self, model: t.Model):
        self.held = model.new_states(model.order(True))

    def take(self, place: int):
        return self.held[place]

    def put(self, place: int, state) -> None:
        self.held[place] = state


@each_mixer
@torch.no_grad()
def test_a_stream_read_in_parts_ends_documents_where_windows_do(mixer):
    """Documents across the parts' borders, each shorter than what attention's windows overlap
    by.
    """
    model = documents_model(torch.float64, train_seq_len=64, eval_overlap=32, **mixer)
    documents = [document for _ in range(3) for document in four_documents()]
    for document in documents:
        document[:, 0] = t.BOS_ID
    stream = torch.cat(documents, dim=1)[:, :64]
    padded = torch.nn.functional.pad(stream, (32, 0))
    states, parts = States(model), []
    for seen, first in ((0, 0), (32, 32)):
        tokens = padded[:, first : first + 64]
        parts.append(model.resume(tokens, torch.tensor(seen), model.order(True), states))
    together = torch.cat(parts, dim=1)
    place = 0
    for document in documents:
        part = document[:, : max(0, 64 - place)]
        if part.shape[1]:
            found = together[:, place : place + part.shape[1]]
            assert relative(found, hidden(model, part)) < 1e-9
        place += document.shape[1]


@pytest.mark.parametrize("mixer", ["Mamba-3", "Mamba-2", "first Mamba"])
@pytest.mark.parametrize("overlap", [1, 2])
@torch.no_grad()
def test_a_short_overlap_takes_nothing_from_a_short_convolution(mixer, overlap):
    """Its four taps reach over what attention reads again: over documents' borders or not."""
    new = 16 - overlap
    changes = MIXERS[mixer] | {"train_seq_len": 16, "eval_overlap": overlap, "mamba_d_conv": 4}
    model = documents_model(torch.float64, **changes)
    stream = random_tokens(1, 4 * new)
    for place in (0, 9, new - 2, new, 2 * new - 1, 2 * new + 1):
        stream[:, place] = t.BOS_ID
    states, order = States(model), model.order(True)
    padded = torch.nn.functional.pad(stream, (overlap, 0))
    for first in range(0, 4 * new, new):
        tokens = padded[:, first : first + 16]
        part = model.resume(tokens, torch.tensor(min(first, overlap)), order, states)
        expected = hidden(model, stream)[:, first : first + new]
        assert relative(part, expected) < 1e-9, first


@each_mixer
@torch.no_grad()
def test_sliding_windows_score_a_document_by_itself(mixer):
    """Windows cut documents anywhere; what another document says changes no target's nats."""
    settings = tiny(
        document_reset=True, eval_mode="sliding", ttt_enabled=False, eval_stride=8, **mixer
    )
    model, stream = random_model(settings), document_stream(120)
    number = (stream == t.BOS_ID).cumsum()
    other = stream.copy()
    other[(number == 2) & (stream != t.BOS_ID)] ^= 1
    assert (other != stream).sum() > 3
    before, after = (
        t.Evaluator(model, settings, SOLO, validation_set(tokens)).evaluate().nats
        for tokens in (stream, other)
    )
    changed = np.abs(after - before) > 1e-4
    assert changed.any()
    assert set(number[1:][changed] - (stream[1:][changed] == t.BOS_ID)) == {2}


@pytest.mark.parametrize("length", [100, 128, 400])
def test_the_operator_of_document_blocks_keeps_what_it_says_of_its_results(length):
    """Shapes and strides: a compiled graph relies on them."""
    reach = t.find_documents(random_starts(length), "math").reach
    torch.library.opcheck(t.document_block_lists, (reach,))
