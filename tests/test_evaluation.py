"""Evaluation: every target scored once, from what came before it alone, and honestly converted to bits per byte."""

import copy
import itertools
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from tests.support import (
    SOLO,
    document_stream,
    random_model,
    random_tokens,
    run_ranks,
    tiny,
    validation_set,
)

MODES = ("plain", "sliding")
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


# ---- Who scores what -------------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 31, 32, 33, 64, 200])
def test_windows_of_all_ranks_cover_every_target_once(mode, world_size, length):
    """Whatever the stride, and also in a later part of the stream; no window is longer than a training sequence."""
    for stride, first in itertools.product((1, 8, 20, 32), (0, 64)):
        settings = tiny(eval_mode=mode, eval_stride=stride)
        windows = [
            w
            for r in range(world_size)
            for w in t.plan_windows(settings, first, first + length, r, world_size)
        ]
        scored = sorted(p for w in windows for p in range(w.first, w.last))
        assert scored == list(range(first, first + length))
        for w in windows:
            assert 0 <= w.context <= w.first < w.last <= w.context + 32
            if mode == "sliding" and w.last - w.first == stride:
                assert w.last - w.context == min(32, w.last)


@each_mode
@pytest.mark.parametrize("ttt_enabled", [False, True], ids=["frozen", "adapting"])
@pytest.mark.parametrize("length", [33, 34, 64, 65, 130, 257])
def test_streams_of_every_length_are_scored_whole(mode, ttt_enabled, length):
    """Evaluator itself raises unless every target was scored once; nothing may be left at zero nats either."""
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
    monkeypatch.setattr(
        t, "plan_windows", lambda *args: [plan(*args)[0]] * change + plan(*args)[1:]
    )
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


# ---- What a score depends on -----------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("ttt_enabled", [False, True], ids=["frozen", "adapting"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"document_reset": True}, {"mamba_version": 2}],
    ids=["Mamba-3", "documents", "Mamba-2"],
)
def test_later_tokens_change_no_score_by_a_single_bit(mode, ttt_enabled, changes):
    """Position p scores tokens[p + 1]. All tokens after that one are replaced; scores up to p must not notice."""
    settings = tiny(eval_mode=mode, ttt_enabled=ttt_enabled, ttt_lr=0.05, **changes)
    model, stream, other = (
        random_model(settings),
        document_stream(230, seed=1),
        document_stream(230, seed=2),
    )
    expected = evaluate(model, settings, stream).nats
    for position in (0, 40, 63, 64, 150, 191):
        changed = np.concatenate([stream[: position + 2], other[position + 2 :]])
        nats = evaluate(model, settings, changed).nats
        assert np.array_equal(nats[: position + 1], expected[: position + 1])
        assert (nats[position + 1 :] != expected[position + 1 :]).mean() > 0.9


@each_mode
@pytest.mark.parametrize("world_size", [1, 2])
def test_adapting_changes_later_chunks_and_never_the_first(mode, world_size):
    """The first chunk is scored by the artifact as it was loaded; it is trained on only afterwards."""
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
    """What is read is the stream at the positions that it tells; what it hears scored, is the score."""
    settings = tiny(eval_mode=mode, ttt_enabled=ttt_enabled, ttt_lr=0.05)
    model, stream = random_model(settings), document_stream(230)
    heard = np.full(229, np.nan, dtype=np.float32)
    read, trained = [], []

    class Listener(t.EvaluationObserver):
        def on_read(self, excerpt):
            read.append(excerpt)
            for place, tokens in ((0, excerpt.tokens), (1, excerpt.targets)):
                expected = stream[np.minimum(excerpt.positions + place, 229)]
                assert np.array_equal(tokens.numpy(), expected)

        def on_score(self, excerpt, scored, nats):
            assert excerpt is read[-1] and nats.shape == scored.shape
            assert np.isnan(heard[excerpt.positions[scored]]).all()
            heard[excerpt.positions[scored]] = nats[torch.from_numpy(scored)]

        def on_train(self, excerpt):
            assert excerpt is read[-1] and torch.is_grad_enabled()
            trained.append(excerpt)

    observed = evaluate(model, settings, stream, observer=Listener()).nats
    assert np.array_equal(observed, heard)
    assert np.array_equal(observed, evaluate(model, settings, stream).nats)
    assert bool(trained) == ttt_enabled


def test_adapting_helps_on_a_text_that_repeats_itself():
    """If gradients had the wrong sign, or other targets, the second half would not be easier than the frozen one."""
    stream = np.tile(random_tokens(64, seed=3).numpy().astype(np.uint16), 8)
    frozen, adapting = (
        tiny(eval_mode="plain", ttt_enabled=on, ttt_lr=0.05, ttt_epochs=4) for on in (False, True)
    )
    model = random_model(frozen)
    assert (
        evaluate(model, adapting, stream).nats[256:].mean()
        < 0.9 * evaluate(model, frozen, stream).nats[256:].mean()
    )


# ---- The modes against each other, and against the definition --------------------------------------------------------


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
    """Sliding by 8: position p is scored in a sequence of 32 tokens that ends with the 8 new ones."""
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


def test_bits_per_byte_of_real_text(sample):
    """Against the text itself: -log2 of the probabilities of its tokens, over the bytes of the decoded documents."""
    settings = tiny(vocab_size=1024, eval_mode="plain", ttt_enabled=False, data_path=str(sample))
    tokenizer = t.Tokenizer(str(sample / "sample_1024_bpe.model"), 1024)
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


# ---- The evaluation clock --------------------------------------------------------------------------------------------


def on_a_fake_clock(
    monkeypatch, budget: float, score_cost: float, epoch_cost: float
) -> tuple[t.Score, float]:
    """Evaluates ten chunks where scoring and training take so many seconds; returns the score and the time taken."""
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
    """Ten chunks to score and 9 × 2 epochs at 10 s would take 190 s, or 280 s where scoring is slow, too."""
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
