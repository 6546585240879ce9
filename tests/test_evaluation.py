"""Evaluation: every target scored once, from what came before it alone, and honestly converted to
bits per byte.
"""

import copy
import itertools
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as t
from tests.support import (
    SOLO,
    document_stream,
    random_model,
    random_tokens,
    relative,
    run_ranks,
    tiny,
    validation_set,
)

MODES = ("plain", "sliding", "stateful", "documents")
each_mode = pytest.mark.parametrize("mode", MODES)


def evaluate(
    model: t.Model,
    settings: t.Settings,
    tokens: np.ndarray,
    ranks: t.Ranks = SOLO,
    observer: t.EvaluationObserver | None = None,
) -> t.Score:
    """The score that a run would claim, with a copy of the model."""
    model = copy.deepcopy(model)
    model.requires_grad_(True)
    return t.Evaluator(model, settings, ranks, validation_set(tokens), observer=observer).evaluate()


# ---- Who scores what -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ("plain", "sliding"))
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 31, 32, 33, 64, 200])
def test_windows_of_all_ranks_cover_every_target_once(mode, world_size, length):
    """Whatever the stride, and also in a later part of the stream; no window is longer than a
    training sequence.
    """
    for stride, first in itertools.product((1, 8, 20, 32), (0, 64)):
        settings = tiny(eval_mode=mode, eval_stride=stride)
        windows = [
            w
            for r in range(world_size)
            for w in t.plan_windows(settings, first, first + length, r, world_size)
        ]
        scored = sorted(p for _, begin, end in windows for p in range(begin, end))
        assert scored == list(range(first, first + length))
        for context, begin, end in windows:
            assert 0 <= context <= begin < end <= context + 32
            if mode == "sliding" and end - begin == stride:
                assert end - context == min(32, end)


@each_mode
@pytest.mark.parametrize("ttt_enabled", [False, True], ids=["frozen", "adapting"])
@pytest.mark.parametrize("length", [33, 34, 64, 65, 130, 257])
def test_streams_of_every_length_are_scored_whole(mode, ttt_enabled, length):
    """Evaluator itself raises unless every target was scored once; nothing may be left at zero nats
    either.
    """
    settings = tiny(eval_mode=mode, ttt_enabled=ttt_enabled)
    score = evaluate(random_model(settings), settings, document_stream(length))
    assert score.nats.shape == (length - 1,)
    assert (score.nats > 0).all()
    assert score.val_loss == pytest.approx(score.nats.mean(dtype=np.float64), rel=1e-6)
    assert score.val_bpb == pytest.approx(
        score.nats.sum(dtype=np.float64) / math.log(2) / (2 * (length - 1)), rel=1e-6
    )


@pytest.mark.parametrize("change", [0, 2])
def test_a_target_left_out_or_scored_twice_is_an_error(monkeypatch, change):
    settings = tiny(eval_mode="plain", ttt_enabled=False)
    plan = t.plan_windows

    def changed(*arguments) -> np.ndarray:
        windows = plan(*arguments)
        return np.concatenate([windows[:1]] * change + [windows[1:]])

    monkeypatch.setattr(t, "plan_windows", changed)
    with pytest.raises(RuntimeError, match="exactly once"):
        evaluate(random_model(settings), settings, document_stream(100))


@each_mode
@pytest.mark.parametrize("ttt_enabled", [False, True], ids=["frozen", "adapting"])
def test_two_ranks_score_and_adapt_as_one(mode, ttt_enabled):
    settings = tiny(eval_mode=mode, ttt_enabled=ttt_enabled, ttt_lr=0.05)
    model, stream = random_model(settings), document_stream(300)
    alone = evaluate(model, settings, stream)
    first, second = run_ranks(2, lambda ranks: evaluate(model, settings, stream, ranks))
    assert np.array_equal(first.nats, second.nats)
    assert first.val_bpb == second.val_bpb == pytest.approx(alone.val_bpb, rel=1e-5)
    assert np.allclose(first.nats, alone.nats, rtol=1e-3, atol=1e-4)


# ---- What a score depends on ---------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("ttt_enabled", [False, True], ids=["frozen", "adapting"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"document_reset": True}, {"mamba_version": 2}],
    ids=["Mamba-3", "documents", "Mamba-2"],
)
def test_later_tokens_change_no_score_by_a_single_bit(mode, ttt_enabled, changes):
    """Position p scores tokens[p + 1]. All tokens after that one are replaced; scores up to p must
    not notice. Where documents end elsewhere then, each is scored beside others, which rounding
    may notice.
    """
    settings = tiny(eval_mode=mode, ttt_enabled=ttt_enabled, ttt_lr=0.05, **changes)
    model, stream, other = (
        random_model(settings),
        document_stream(230, seed=1),
        document_stream(230, seed=2),
    )
    expected = evaluate(model, settings, stream).nats
    # Where chunks and windows end is the evaluation's, and the same for all kinds of models.
    for position in (40, 63, 150) if changes else (0, 40, 63, 64, 150, 191):
        changed = np.concatenate([stream[: position + 2], other[position + 2 :]])
        nats = evaluate(model, settings, changed).nats
        moved = np.abs(nats - expected)[: position + 1].max()
        assert moved <= (1e-4 if mode == "documents" else 0)
        assert (nats[position + 1 :] != expected[position + 1 :]).mean() > 0.9


@pytest.mark.parametrize("mode", MODES[:3])  # of documents: tests/test_documents.py
@pytest.mark.parametrize("world_size", [1, 2])
def test_adapting_changes_later_chunks_and_never_the_first(mode, world_size):
    """The first chunk is scored by the artifact as it was loaded; it is trained on only
    afterwards.
    """
    settings = tiny(eval_mode=mode, ttt_lr=0.05)
    model, stream = random_model(settings), document_stream(230)

    def both(ranks: t.Ranks) -> tuple[np.ndarray, np.ndarray]:
        still = evaluate(model, tiny(eval_mode=mode, ttt_lr=0.0), stream, ranks)
        return still.nats, evaluate(model, settings, stream, ranks).nats

    still, adapted = run_ranks(world_size, both)[0]
    assert np.array_equal(adapted[:64], still[:64])
    assert (adapted[64:] != still[64:]).all()


@pytest.mark.parametrize(("targets", "chunks"), [(64, 0), (65, 1), (128, 1), (192, 2), (230, 3)])
def test_the_last_chunk_is_not_trained_on_and_the_others_are_after_they_are_scored(targets, chunks):
    settings = tiny(eval_mode="plain", ttt_lr=0.05)
    scored, trained = np.zeros(targets, dtype=int), []

    class Watch(t.EvaluationObserver):
        def on_score(self, excerpt, where, nats):
            scored[excerpt.positions[where]] += 1

        def on_train(self, excerpt):
            assert (scored[: excerpt.positions.max() + 1] == 1).all()
            trained.append((excerpt.positions.min(), excerpt.positions.max() + 1))

    evaluate(random_model(settings), settings, document_stream(targets + 1), observer=Watch())
    assert trained == [(64 * c, 64 * c + 64) for c in range(chunks) for _ in range(2)]


@each_mode
@pytest.mark.parametrize("ttt_enabled", [False, True], ids=["frozen", "adapting"])
def test_an_observer_hears_of_everything_and_changes_nothing(mode, ttt_enabled):
    """What is read is the stream at the positions that it tells; what it hears scored, is the
    score.
    """
    settings = tiny(eval_mode=mode, ttt_enabled=ttt_enabled, ttt_lr=0.05)
    model, stream = random_model(settings), document_stream(230)
    heard = np.full(229, np.nan, dtype=np.float32)
    read, trained = [], []

    class Listener(t.EvaluationObserver):
        def on_read(self, excerpt):
            read.append(excerpt)
            for place, tokens in ((0, excerpt.tokens), (1, excerpt.targets)):
                expected = stream[np.clip(excerpt.positions + place, 0, 229)]
                assert np.array_equal(tokens.numpy(), expected)

        def on_score(self, excerpt, scored, nats):
            assert excerpt.tokens is read[-1].tokens and nats.shape == scored.shape
            assert np.isnan(heard[excerpt.positions[scored]]).all()
            heard[excerpt.positions[scored]] = nats[torch.from_numpy(scored)]

        def on_train(self, excerpt):
            whole = set(read[-1].positions.flatten())
            assert whole.issuperset(excerpt.positions.flatten()) and torch.is_grad_enabled()
            trained.append(excerpt)

    observed = evaluate(model, settings, stream, observer=Listener()).nats
    assert np.array_equal(observed, heard)
    assert np.array_equal(observed, evaluate(model, settings, stream).nats)
    assert bool(trained) == ttt_enabled


@pytest.mark.parametrize("changes", [{}, {"layer_order": "0-2,1-2"}], ids=["once", "repeated"])
def test_an_observer_on_any_rank_is_shown_the_states_that_its_part_began_with(changes):
    """By which it computes the scores anew, as one rank would: parts do not depend on ranks."""
    settings = tiny(eval_mode="stateful", ttt_enabled=False, val_batch_size=32, **changes)
    model, stream = random_model(settings), document_stream(300)

    def shown(ranks: t.Ranks) -> dict[int, list[torch.Tensor]]:
        began = {}

        class Listener(t.EvaluationObserver):
            def on_score(self, excerpt, scored, nats):
                _, states = excerpt.resumed
                copies = [x.clone() for state in states for x in t.tensors_of(state)]
                began[int(excerpt.positions[scored].min())] = copies

        evaluate(model, settings, stream, ranks, observer=Listener())
        return began

    alone = shown(SOLO)
    first, second, third = run_ranks(3, shown)
    assert len(alone) > 5
    assert min(map(len, (first, second, third))) > 1
    for position, states in (first | second | third).items():
        assert len(states) == len(alone[position])
        assert all(map(torch.equal, states, alone[position]))


def test_adapting_helps_on_a_text_that_repeats_itself():
    """If gradients had the wrong sign, or other targets, the second half would not be easier than
    the frozen one.
    """
    stream = np.tile(random_tokens(64, seed=3).numpy().astype(np.uint16), 8)
    frozen, adapting = (
        tiny(eval_mode="plain", ttt_enabled=on, ttt_lr=0.05, ttt_epochs=4) for on in (False, True)
    )
    model = random_model(frozen)
    assert (
        evaluate(model, adapting, stream).nats[256:].mean()
        < 0.9 * evaluate(model, frozen, stream).nats[256:].mean()
    )


# ---- The modes against each other, and against the definition ------------------------------------


def full_forward_nats(model: t.Model, tokens: np.ndarray) -> np.ndarray:
    """The definition: -log softmax of the whole stream in one sequence, in float64 at the end."""
    stream = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = model.logits(model(stream[:, :-1], model.order(True)))[0].double()
    return -F.log_softmax(logits, dim=-1)[torch.arange(len(tokens) - 1), stream[0, 1:]].numpy()


def test_sliding_by_whole_windows_is_plain():
    settings = tiny(eval_mode="sliding", eval_stride=32, ttt_enabled=False)
    model, stream = random_model(settings), document_stream(230)
    plain = evaluate(model, tiny(eval_mode="plain", ttt_enabled=False), stream)
    assert np.array_equal(evaluate(model, settings, stream).nats, plain.nats)


def test_every_window_scores_what_a_forward_pass_over_its_context_gives():
    """Sliding by 8: position p is scored in a sequence of 32 tokens that ends with the 8 new
    ones.
    """
    settings = tiny(eval_mode="sliding", ttt_enabled=False)
    model, stream = random_model(settings), document_stream(150)
    nats = evaluate(model, settings, stream).nats
    for position in (0, 5, 23, 24, 31, 32, 77, 148):
        last = min(149, 8 * (position // 8 + 1))
        context = max(0, 8 * (position // 8 + 1) - 32)
        expected = full_forward_nats(model, stream[context : last + 1])[position - context]
        assert nats[position] == pytest.approx(expected, rel=1e-4)


@each_mode
@pytest.mark.parametrize("ttt_enabled", [False, True], ids=["frozen", "adapting"])
def test_batching_windows_changes_neither_scores_nor_adaptation(mode, ttt_enabled):
    changes = {"eval_mode": mode, "ttt_enabled": ttt_enabled, "ttt_momentum": 0.0}
    many, few = (tiny(val_batch_size=size, **changes) for size in (32 * 7, 1))
    model, stream = random_model(many), document_stream(230)
    assert np.allclose(
        evaluate(model, many, stream).nats, evaluate(model, few, stream).nats, atol=1e-3
    )


# ---- Stateful ------------------------------------------------------------------------------------


class HeldStates:
    """All mixers' states in one place, as float64."""

    def __init__(self, model: t.Model, order: tuple[int, ...]):
        self.states = [t.map_state(torch.Tensor.double, s) for s in model.new_states(order)]

    def take(self, place: int):
        return self.states[place]

    def put(self, place: int, state) -> None:
        self.states[place] = state


def exact_model(settings: t.Settings) -> t.Model:
    """In float64, and with rotations that are exact to as many digits."""
    model = random_model(settings).double()
    model.compute_dtype = torch.float64
    model.rotary_table = exact_rotations(model, settings.train_seq_len)
    return model


def exact_rotations(model: t.Model, length: int) -> torch.Tensor:
    pairs = model.rotary_table.shape[-1]
    frequencies = model.settings.rope_base ** -(
        torch.arange(pairs, dtype=torch.float64) / max(pairs, 1)
    )
    return t.rotary_turns(torch.arange(length, dtype=torch.float64), frequencies)


@torch.no_grad()
def resumed_hidden(model: t.Model, tokens: torch.Tensor, part: int, states) -> torch.Tensor:
    """Hidden states of tokens (1, T), part by part."""
    overlap, order, hidden = model.settings.attention_overlap, model.order(True), []
    padded = F.pad(tokens, (overlap, 0), value=99)  # what stands before a stream, is not read
    for first in range(0, tokens.shape[1], part):
        seen = torch.tensor(min(overlap, first))
        piece = padded[:, first : first + overlap + part]
        hidden.append(model.resume(piece, seen, order, states))
    return torch.cat(hidden, dim=1)


@torch.no_grad()
def whole_hidden(model: t.Model, tokens: torch.Tensor, monkeypatch) -> torch.Tensor:
    """The definition: all tokens in one sequence, where attention's reach is a matter of a mask."""
    length, settings = tokens.shape[1], model.settings
    stride = settings.train_seq_len - settings.attention_overlap
    position = torch.arange(length)
    earliest = position // stride * stride - settings.attention_overlap
    seen = (position <= position[:, None]) & (position >= earliest[:, None])

    def masked(query, key, value, documents, _):
        mask = seen
        if documents is not None:
            mask = seen & (position >= position[:, None] - documents.reach[0, :, None])
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2)

    with monkeypatch.context() as patch:
        patch.setattr(t, "attend", masked)
        patch.setattr(model, "rotary_table", exact_rotations(model, length))
        return model(tokens, model.order(True))


STREAMS = {
    "Mamba-3 alone": {"mamba_layers": "0-2"},
    "Mamba-2 alone": {"mamba_layers": "0-2", "mamba_version": 2},
    "the first Mamba alone": {"mamba_layers": "0-2", "mamba_version": 1},
    "hybrid": {},
    "overlap of a quarter": {"eval_overlap": 8},
    "overlap of three quarters": {"eval_overlap": 24},
    "attention alone": {"mamba_layers": ""},
    "recurrence": {"layer_order": "0,1,0,1,2"},
    "Mamba-2 in documents": {"mamba_layers": "0,2", "mamba_version": 2, "document_reset": True},
    "documents": {"document_reset": True},
    "documents for scans only": {"document_reset": True, "document_scope": "scans"},
    "the first Mamba in documents": {"mamba_version": 1, "document_reset": True},
}


@pytest.mark.parametrize("changes", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("part", [48, 96])
def test_parts_with_carried_states_are_one_sequence_of_the_whole_stream(changes, part, monkeypatch):
    model = exact_model(tiny(**changes))
    tokens = torch.from_numpy(document_stream(288).astype(np.int64))[None]
    states = HeldStates(model, model.order(True))
    hidden = resumed_hidden(model, tokens, part, states)
    assert relative(hidden, whole_hidden(model, tokens, monkeypatch)) < 1e-9


@pytest.mark.parametrize(("version", "used"), [(1, "scan inputs"), (2, "ssm inputs"), (3, "")])
def test_every_carried_tensor_matters(version, used):
    """Without any one of them the next part comes out differently, in each layer.

    Mamba-2 neither turns keys nor weighs a token with the one before, so needs only some of what
    Mamba-3 does.
    """
    model = exact_model(tiny(mamba_version=version))
    tokens = torch.from_numpy(document_stream(96).astype(np.int64))[None]
    overlap, order = model.settings.attention_overlap, model.order(True)

    @torch.no_grad()
    def second_part(place: int, name: str) -> torch.Tensor:
        """Hidden states of the second part, where a tensor of a state was lost before it."""
        states = HeldStates(model, order)
        resumed_hidden(model, tokens[:, :48], 48, states)
        if name:
            named_tensors(states.states[place])[name].zero_()
        return model.resume(tokens[:, 48 - overlap :], torch.tensor(overlap), order, states)

    expected = second_part(0, "")
    for place, state in enumerate(model.new_states(order)):
        for name in named_tensors(state):
            matters = place == 1 or not used or name in used.split()
            assert (relative(second_part(place, name), expected) > 1e-4) == matters, (place, name)


def named_tensors(state) -> dict[str, torch.Tensor]:
    """A state's tensors by the names of their fields."""
    named = {}
    for name, part in zip(state._fields, state, strict=True):
        if isinstance(part, torch.Tensor):
            named[name] = part
        elif part is not None:
            named |= named_tensors(part)
    return named


@pytest.mark.parametrize("ttt_enabled", [False, True], ids=["frozen", "adapting"])
def test_states_cross_the_borders_of_ranks(ttt_enabled):
    """Scores are the same on 1, 2 and 4 ranks; to the bit, where no gradients are summed."""
    settings = tiny(
        eval_mode="stateful", ttt_enabled=ttt_enabled, ttt_chunk_tokens=128, eval_overlap=24
    )
    model, stream = random_model(settings), document_stream(300)
    alone = evaluate(model, settings, stream)
    for world_size in (2, 4):
        scores = run_ranks(world_size, lambda ranks: evaluate(model, settings, stream, ranks))
        for score in scores:
            assert abs(score.val_bpb - alone.val_bpb) < 1e-6
            if not ttt_enabled:
                assert np.array_equal(score.nats, alone.nats)


def test_after_an_update_states_are_those_of_the_new_weights_over_the_last_window():
    """The second chunk's scores are those of a stream that begins a window before it."""
    settings = tiny(eval_mode="stateful", ttt_lr=0.05)
    model, stream = random_model(settings), document_stream(129)
    adapted = copy.deepcopy(model)
    evaluator = t.Evaluator(adapted, settings, SOLO, validation_set(stream))
    nats = evaluator.evaluate().nats  # two chunks of 64: adapted to the first, and kept so
    frozen = tiny(eval_mode="stateful", ttt_enabled=False)
    again = evaluate(adapted, frozen, stream[32:]).nats
    assert np.allclose(nats[64:], again[32:], rtol=1e-4)
    assert not np.allclose(nats[64:], evaluate(adapted, frozen, stream).nats[64:], rtol=1e-4)


def test_bits_per_byte_of_real_text(shards):
    """Against the text itself: -log2 of the probabilities of its tokens, over the bytes of the
    decoded documents.
    """
    settings = tiny(eval_mode="plain", ttt_enabled=False, data_path=str(shards))
    tokenizer = t.Tokenizer(str(shards / "tokenizer.model"), 512)
    tokens = t.load_validation(settings, tokenizer).tokens
    starts = np.flatnonzero(tokens == t.BOS_ID)
    tokens = tokens[: starts[2]].copy()
    model = random_model(settings)
    validation = t.ValidationSet(tokens, tokenizer.target_bytes(tokens))
    score = t.Evaluator(model, settings, SOLO, validation).evaluate()
    texts = (
        tokenizer.model.DecodeIds(part.tolist())
        for part in (tokens[1 : starts[1]], tokens[starts[1] + 1 :])
    )
    probabilities = [
        np.exp(-full_forward_nats(model, tokens[p : p + 33])) for p in range(0, len(tokens) - 1, 32)
    ]  # windows of 32 side by side
    bits = -np.log2(np.concatenate(probabilities)).sum()
    assert score.val_bpb == pytest.approx(
        bits / sum(len(text.encode()) for text in texts), rel=1e-5
    )


# ---- The evaluation clock ------------------------------------------------------------------------


def on_a_fake_clock(
    monkeypatch, budget: float, score_cost: float, epoch_cost: float
) -> tuple[t.Score, float]:
    """Evaluates ten chunks where scoring and training take so many seconds; returns the score and
    the time taken.
    """
    settings = tiny(eval_mode="plain", ttt_lr=0.05, eval_max_seconds=budget)
    now = [1000.0]

    class Costly(t.EvaluationObserver):
        """A chunk is scored in one batch and trained on in one."""

        def on_score(self, *_):
            now[0] += score_cost

        def on_train(self, *_):
            now[0] += epoch_cost

    monkeypatch.setattr(t, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    score = evaluate(random_model(settings), settings, document_stream(641), observer=Costly())
    return score, now[0] - 1000


def test_the_clock_runs_from_when_the_caller_says(monkeypatch):
    """What loading the artifact took is no longer there for epochs."""
    settings = tiny(eval_mode="plain", eval_max_seconds=100.0)
    monkeypatch.setattr(t, "time", types.SimpleNamespace(perf_counter=lambda: 1000.0))
    validation = validation_set(document_stream(193))
    for started, given_up in ((None, 0), (950.0, 0), (900.0, 4)):
        evaluator = t.Evaluator(random_model(settings), settings, SOLO, validation)
        assert evaluator.evaluate(started).epochs_given_up == given_up


@pytest.mark.parametrize(("budget", "score_cost"), [(80, 1), (150, 10)])
def test_epochs_are_given_up_to_keep_the_clock_and_every_target_is_scored(
    monkeypatch, budget, score_cost
):
    """Ten chunks to score and 9 × 2 epochs at 10 s would take 190 s, or 280 s where scoring is
    slow, too.
    """
    score, seconds = on_a_fake_clock(monkeypatch, budget, score_cost, epoch_cost=10)
    assert seconds <= budget
    assert 0 < score.epochs_given_up < 18
    assert (score.nats > 0).all()


def test_no_epoch_is_given_up_while_there_is_time(monkeypatch):
    score, seconds = on_a_fake_clock(monkeypatch, budget=200, score_cost=1, epoch_cost=10)
    assert (score.epochs_given_up, seconds) == (0, 190)


def test_without_any_time_everything_is_scored_and_nothing_trained_on(monkeypatch):
    """That such a score is not claimed is evaluate_artifact()'s part: see test_run.py."""
    score, seconds = on_a_fake_clock(monkeypatch, budget=0.5, score_cost=1, epoch_cost=10)
    assert (score.epochs_given_up, seconds) == (18, 10)
    assert (score.nats > 0).all()


# ---- What the log keeps of a score ---------------------------------------------------------------


def tables_by_hand(settings: t.Settings, validation: t.ValidationSet, nats: np.ndarray) -> dict:
    """profile()'s columns, target by target."""
    tokens, target_bytes = validation.tokens.tolist(), validation.target_bytes
    rows = dict.fromkeys(("document_length", "document_position", "window_position"), 16)
    rows["chunks"] = math.ceil(len(nats) / settings.ttt_chunk_tokens)
    found = {name: np.zeros((count, 3)) for name, count in rows.items()}
    for p in range(len(nats)):
        begin = max(i for i in range(p + 2) if i == 0 or tokens[i] == t.BOS_ID)
        end = next((i for i in range(p + 2, len(tokens)) if tokens[i] == t.BOS_ID), len(tokens))
        context, *_ = next(
            window for window in t.plan_windows(settings, 0, len(nats), 0, 1) if window[2] > p
        )
        where = {"document_length": end - begin, "document_position": p + 1 - begin}
        where["window_position"] = p - context
        for name, x in where.items():
            found[name][min(15, int(x).bit_length())] += 1, target_bytes[p], nats[p]
        found["chunks"][p // settings.ttt_chunk_tokens] += 1, target_bytes[p], nats[p]
    return found


def test_tables_say_where_the_nats_are_as_a_loop_over_targets_finds_them():
    settings = tiny(eval_mode="plain", ttt_enabled=False)
    generator = np.random.default_rng(0)
    stream = document_stream(461)
    stream[:9] = 17  # what goes on from a text before has no BOS
    stream[40:47] = t.BOS_ID  # documents of one token
    nats = generator.gamma(2.0, 1.5, 460).astype(np.float32)
    validation = t.ValidationSet(stream, generator.integers(0, 9, 460))
    score = t.Score(float(nats.mean()), 1.0, nats, 0)
    tables = t.profile(settings, validation, score)
    expected = tables_by_hand(settings, validation, nats)
    assert tables.keys() == expected.keys()
    for name, rows in expected.items():
        found = np.zeros_like(rows)
        columns = np.array([tables[name][key] for key in ("targets", "bytes", "nats")]).T
        assert len(columns) <= len(rows)
        found[: len(columns)] = columns
        assert np.allclose(found, rows, atol=0.001), name
    assert max(map(len, tables["document_length"].values())) <= 16
    assert len({*tables["document_position"]["targets"]}) > 3


@each_mode
def test_the_profile_is_the_same_for_any_number_of_ranks(mode):
    settings = tiny(eval_mode=mode, ttt_lr=0.05, ttt_epochs=3)
    model, stream = random_model(settings), document_stream(300)

    def profiled(ranks: t.Ranks) -> dict:
        score = evaluate(model, settings, stream, ranks)
        return t.profile(settings, validation_set(stream), score)

    alone = profiled(SOLO)
    assert ("window_position" in alone) == (mode == "plain")
    for other in run_ranks(2, profiled):
        for name, table in alone.items():
            for key, column in table.items():
                if "seconds" not in key:
                    assert other[name][key] == pytest.approx(column, rel=1e-4, abs=0.002)


def test_a_chunks_nats_are_told_before_its_first_and_its_last_update():
    """The first epoch begins with the weights that scored the chunk; an update lowers its nats."""
    settings = tiny(eval_mode="plain", ttt_lr=0.05, ttt_epochs=3)
    model, stream = random_model(settings), document_stream(230)
    score = evaluate(model, settings, stream)
    chunks = t.profile(settings, validation_set(stream), score)["chunks"]
    assert chunks["epochs"] == [3, 3, 3, 0] and chunks["targets"] == [64, 64, 64, 37]
    assert chunks["first_epoch"][:3] == pytest.approx(chunks["nats"][:3], rel=1e-5)
    assert chunks["first_epoch"][3] == chunks["last_epoch"][3] == chunks["adapt_seconds"][3] == 0
    for first, last in list(zip(chunks["first_epoch"], chunks["last_epoch"], strict=True))[:3]:
        assert last < first - 0.1
    # By hand: the first chunk's nats after two updates, which a third one follows.
    by_hand = t.Evaluator(copy.deepcopy(model), settings, SOLO, validation_set(stream))
    by_hand.model.requires_grad_(True)
    sgd = torch.optim.SGD(by_hand.trained, lr=0.05, momentum=settings.ttt_momentum)
    by_hand._adapt(0, 64, sgd, 2)
    with torch.no_grad():
        tokens = torch.tensor(stream[:65].astype(np.int64))
        after = by_hand.model.score(
            tokens[:-1].view(2, 32), tokens[1:].view(2, 32), by_hand.model.order(True)
        )
    assert chunks["last_epoch"][0] == pytest.approx(float(after.sum()), rel=1e-5)
    once = evaluate(model, tiny(eval_mode="plain", ttt_lr=0.05, ttt_epochs=1), stream).chunks
    assert (once[:, 0] == once[:, 1]).all() and once[0, 0] > 0


class NumbersRead(TorchDispatchMode):
    """Counts how often the host waits for a number of the device's."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_what_the_log_keeps_of_a_chunk_makes_no_step_wait():
    settings = tiny(eval_mode="plain", ttt_lr=0.05)
    evaluator = t.Evaluator(
        random_model(settings), settings, SOLO, validation_set(document_stream(200))
    )
    sgd = torch.optim.SGD(evaluator.trained, lr=0.05)
    with NumbersRead() as read:
        evaluator._score_chunk(0, 64)
        evaluator._adapt(0, 64, sgd, 3)
        assert read.count == 0
        assert float(evaluator.epoch_nats[0, 0]) > float(evaluator.epoch_nats[0, 1]) > 0
    assert read.count == 2


def test_a_chunks_seconds_are_those_of_its_scoring_and_its_epochs(monkeypatch):
    score, seconds = on_a_fake_clock(monkeypatch, budget=80, score_cost=1, epoch_cost=10)
    epochs, scoring, adapting = score.chunks.T[2:]
    assert (scoring == 1).all()
    assert (adapting == 10 * epochs).all() and adapting[-1] == 0
    assert epochs.sum() == 18 - score.epochs_given_up
    assert score.seconds == scoring.sum() + adapting.sum() == seconds
