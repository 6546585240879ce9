"""EVAL_MODE=documents: each document is scored by itself, and adapts the model for itself alone."""

import copy
import dataclasses
import json
import math
import re
import subprocess
import types

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.support import (
    PATIENCE,
    SCRIPT,
    SOLO,
    mistake,
    plan_pieces,
    process_environment,
    random_model,
    run_environment,
    run_here,
    run_ranks,
    stream_of,
    tiny,
    tiny_environment,
    torchrun,
    validation_set,
    with_settings,
)
from tests.test_evaluation import evaluate
from tools import summary

LENGTHS = [70, 25, 61, 33, 80, 44, 9, 2]
MATRICES = "query,key,value,out,in_proj,out_proj"
each_way = pytest.mark.parametrize("ttt_enabled", [False, True], ids=["frozen", "adapting"])


def documents(**changes) -> t.Settings:
    """Settings of a small model whose branches learn in large steps."""
    return tiny(**{"eval_mode": "documents", **changes})


# ---- Who scores what -----------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_batches_of_all_ranks_hold_every_target_once(world_size, slots):
    tokens = stream_of(LENGTHS)
    settings = documents(ttt_lora_slots=slots)
    batches = t.plan_batches(tokens, settings)
    shares = t.share_batches(batches, settings, world_size)
    assert len(shares) == world_size
    assert sum(len(share) for share in shares) == len(batches)
    scored = []
    for batch in (batch for share in shares for batch in share):
        assert batch.begins.shape == batch.lengths.shape == (slots, 1)
        assert (np.diff(batch.lengths[:, 0]) <= 0).all()
        for begin, length in zip(batch.begins[:, 0], batch.lengths[:, 0], strict=True):
            scored += range(begin, begin + length)
    assert sorted(scored) == [*range(len(tokens) - 1)]


def test_a_text_that_begins_or_ends_within_a_document_is_scored_whole():
    settings = documents()
    model = random_model(settings)
    for tokens in (stream_of([40, 9])[3:], stream_of([40, 9])[:-5], stream_of([3])[:2]):
        score = evaluate(model, settings, tokens)
        assert (score.nats > 0).all()
        assert score.val_loss == pytest.approx(score.nats.mean(dtype=np.float64), rel=1e-6)


def test_a_rank_gets_the_next_batch_when_it_has_the_fewest_tokens_to_read():
    settings = documents(ttt_lora_slots=1)
    batches = t.plan_batches(stream_of([80, 40, 40, 40]), settings)
    shares = t.share_batches(batches, settings, 2)
    assert [[int(b.lengths[0, 0]) for b in share] for share in shares] == [[80], [40, 40, 40]]


def test_pieces_and_their_windows():
    def pieces(length: int, learns: bool, piece: int = 8) -> list:
        batch = t.DocumentBatch(np.zeros((1, 1)), np.array([[length]]))
        settings = tiny(ttt_lora_piece=piece, train_seq_len=16)
        return [*plan_pieces(batch, settings, learns)]

    assert pieces(22, True) == [(0, 0, 8), (0, 8, 16), (8, 16, 22)]
    assert pieces(22, False) == [(0, 0, 16), (8, 16, 22)]
    assert pieces(5, True) == pieces(5, False) == [(0, 0, 5)]
    assert pieces(40, True, piece=64) == [(0, 0, 16), (16, 16, 32), (32, 32, 40)]


# ---- References ----------------------------------------------------------------------------------


def by_hand(
    model: t.Model, settings: t.Settings, tokens: np.ndarray, drawn: t.Branches | None = None
) -> list[float]:
    """Nats of one document's targets: its branches are added to the matrices, torch's own
    derivatives go through the sums, and steps are written out.

    drawn: other branches than the script's; of those the settings may be the idea's, too.
    """
    s = settings
    drawn = drawn or t.Branches(model, s)
    window_is_lesson = getattr(s, "lesson", "") == "window"
    momentum = getattr(s, "momentum", 0.0)
    names = {module: name for name, module in model.named_modules()}
    branches = {f"{names[module]}.weight": branch for module, branch in drawn.beside.items()}
    branches["output_embedding.weight"] = drawn.head
    weights = {name: p.detach() for name, p in model.named_parameters()}
    learnt = {}  # A and B, the mean square of their gradients, and the gradients' mean
    for name, branch in branches.items():
        for part in ("down", "up"):
            x = getattr(branch, part)[0].detach().clone().requires_grad_()
            learnt[name, part] = [x, torch.zeros(()), torch.zeros_like(x)]
    text = torch.from_numpy(tokens.astype(np.int64))[None]
    nats = []
    count = len(tokens) - 1
    for step, begin in enumerate(range(0, count, s.ttt_lora_piece), 1):
        end = min(begin + s.ttt_lora_piece, count)
        context = max(0, begin + s.ttt_lora_piece - s.train_seq_len)
        merged = dict(weights)
        for name in branches:
            (down, *_), (up, *_) = learnt[name, "down"], learnt[name, "up"]
            merged[name] = weights[name] + 1.8 * (down @ up).T
        window = (text[:, context:end], text[:, context + 1 : end + 1], model.order(True))
        scores = torch.func.functional_call(
            Scored(model), {f"model.{name}": x for name, x in merged.items()}, window
        )
        piece = scores[0, begin - context :]
        nats += piece.tolist()
        if end == count:
            break
        for x, *_ in learnt.values():
            x.grad = None
        (scores[0] if window_is_lesson else piece).mean().backward()
        for (_, part), (x, square, mean) in learnt.items():
            if part == "down" and not getattr(s, "moves", True):
                continue
            square.mul_(0.99).add_(0.01 * x.grad.square().mean())
            root = (square / (1 - 0.99**step)).sqrt() + 1e-10
            mean.mul_(momentum).add_((1 - momentum) * x.grad)
            change = mean / (1 - momentum**step) / root
            x.data = x.data * (1 - s.ttt_lora_lr * s.ttt_lora_decay) - s.ttt_lora_lr * change
    return nats


class Scored(torch.nn.Module):
    """A model whose forward() is score()."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *window):
        return self.model.score(*window)


@pytest.mark.parametrize("changes", [{}, {"mamba_version": 2}], ids=["Mamba-3", "Mamba-2"])
def test_scores_are_those_of_branches_that_are_added_to_their_matrices(changes):
    layers = f"{MATRICES},head"
    settings = documents(ttt_lora_layers=layers, tie_embeddings=False, ttt_lora_lr=0.01, **changes)
    model = random_model(settings)
    tokens = stream_of([70, 25, 61])
    found = evaluate(model, settings, tokens).nats
    begins = [0, 70, 95, 156]
    for begin, end in zip(begins, begins[1:], strict=False):
        expected = by_hand(model, settings, tokens[begin : end + 1])
        assert np.abs(found[begin:end] - expected).max() < 2e-4
    frozen = evaluate(model, with_settings(settings, ttt_enabled=False), tokens).nats
    assert np.abs(found - frozen).max() > 0.1


def test_an_mlps_branch_adds_to_it_and_reads_what_its_first_matrix_reads():
    model = random_model(documents(ln_scale=True)).requires_grad_(False)
    branches = t.Branches(model, documents(ttt_lora_layers="mlp"))
    assert len(branches.beside) == 3
    stream = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    read = []
    for mlp, branch in branches.beside.items():
        torch.nn.init.normal_(branch.up.data, generator=torch.Generator().manual_seed(2))
        mlp.up.register_forward_pre_hook(lambda _, x: read.extend(x))
        plain = mlp(stream, 0.5)
        with t.documents_alone(model, branches):
            adapted = mlp(stream, 0.5)
        added = branch(read.pop())
        assert added.std() > 0.1
        assert torch.allclose(adapted, plain + added, atol=1e-6)


@pytest.mark.parametrize("scope", ["all", "scans"])
def test_frozen_scores_are_those_of_sliding_windows_that_documents_end_in(scope):
    """Of documents that a window holds wherever it ends: its length less a stride."""
    reset = {"document_reset": True, "document_scope": scope, "mamba_layers": "0-2"}
    settings = documents(**reset, ttt_enabled=False)
    model = random_model(settings)
    tokens = stream_of(np.random.default_rng(1).integers(2, 25, 20))
    found = evaluate(model, settings, tokens).nats
    sliding = evaluate(model, with_settings(settings, eval_mode="sliding"), tokens).nats
    assert np.abs(found - sliding).max() < 1e-4


def test_scores_do_not_depend_on_pieces_within_a_window_without_steps():
    model = random_model(documents())
    tokens = stream_of([32, 9, 30, 17, 2])
    whole = evaluate(model, documents(ttt_enabled=False, ttt_lora_piece=32), tokens).nats
    for changes in ({"ttt_enabled": False}, {"ttt_lora_lr": 0.0}):
        found = evaluate(model, documents(**changes), tokens).nats
        assert np.abs(found - whole).max() < 1e-5, changes


# ---- What a score depends on ---------------------------------------------------------------------


@each_way
def test_a_document_scores_the_same_alone(ttt_enabled):
    settings = documents(ttt_enabled=ttt_enabled)
    model = random_model(settings)
    tokens = stream_of(LENGTHS)
    together = evaluate(model, settings, tokens).nats
    begin = 0
    for length in LENGTHS:
        alone = evaluate(model, settings, tokens[begin : begin + length + 1]).nats
        assert np.abs(alone - together[begin : begin + length]).max() < 1e-4
        begin += length


@each_way
def test_neither_later_tokens_nor_other_documents_move_a_score_by_a_bit(ttt_enabled):
    """As long as all documents are as long as before, so that the same ones are read at once."""
    settings = documents(ttt_enabled=ttt_enabled, document_reset=True)
    model = random_model(settings)
    tokens = stream_of(LENGTHS)
    expected = evaluate(model, settings, tokens).nats
    begins = np.cumsum([0, *LENGTHS])
    generator = np.random.default_rng(3)
    for chosen, seen in ((0, 30), (1, 7), (2, 8), (4, 64)):
        other = generator.integers(4, 512, len(tokens)).astype(np.uint16)
        other[tokens == t.BOS_ID] = t.BOS_ID
        kept = np.arange(begins[chosen], begins[chosen] + seen)
        other[kept] = tokens[kept]
        found = evaluate(model, settings, other).nats
        assert np.array_equal(found[kept[:-1]], expected[kept[:-1]])
        assert (found != expected).mean() > 0.5


@each_way
def test_any_number_of_ranks_gives_the_same_bits(ttt_enabled):
    settings = documents(ttt_enabled=ttt_enabled)
    model = random_model(settings)
    tokens = stream_of(LENGTHS)
    alone = evaluate(model, settings, tokens)
    for world_size in (2, 3):
        for score in run_ranks(world_size, lambda ranks: evaluate(model, settings, tokens, ranks)):
            assert np.array_equal(score.nats, alone.nats)
            assert score.val_bpb == alone.val_bpb


def test_scores_do_not_depend_on_the_seed():
    """By which the artifact alone, without its log, gives a run's score again."""
    model = random_model(documents())
    tokens = stream_of([40, 25])
    scores = [evaluate(model, documents(seed=seed), tokens).nats for seed in (1, 2)]
    assert np.array_equal(*scores)


def test_documents_adapt_from_their_second_piece_on_and_never_learn_from_their_last():
    settings = documents()
    model = random_model(settings)
    tokens = stream_of(LENGTHS)
    begins = np.cumsum([0, *LENGTHS])
    trained = []

    class Listener(t.EvaluationObserver):
        def on_train(self, excerpt):
            trained.append(excerpt.positions)

    adapted = evaluate(model, settings, tokens, observer=Listener()).nats
    still = evaluate(model, with_settings(settings, ttt_lora_lr=0.0), tokens).nats
    taught = np.concatenate([positions.flatten() for positions in trained])
    expected = []
    for begin, length in zip(begins, LENGTHS, strict=False):
        assert np.abs(adapted[begin : begin + 8] - still[begin : begin + 8]).max() < 1e-5
        later = slice(begin + 8, begin + length)
        assert (adapted[later] != still[later]).all()
        expected += range(begin, begin + (length - 1) // 8 * 8)
    assert sorted(taught) == expected


def test_a_repeated_text_is_learnt_while_it_is_scored():
    model = random_model(tiny())
    tokens = np.append(np.tile(stream_of([20])[1:-1], 7), 1).astype(np.uint16)
    for layers in t.BRANCHED:
        settings = documents(ttt_lora_layers=layers)
        adapted = evaluate(model, settings, tokens).nats
        frozen = evaluate(model, with_settings(settings, ttt_enabled=False), tokens).nats
        assert adapted[60:].mean() < frozen[60:].mean() - 0.01, layers


def test_the_model_is_as_before_afterwards():
    settings = documents(document_reset=True)
    model = random_model(settings)
    before = {name: p.clone() for name, p in model.named_parameters()}
    facts = model.settings, model.attention_backend, model.head_branch
    t.Evaluator(model, settings, SOLO, validation_set(stream_of(LENGTHS))).evaluate()
    assert facts == (model.settings, model.attention_backend, model.head_branch)
    assert not any(module._forward_hooks for module in model.modules())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None


# ---- Clock, settings, runs -----------------------------------------------------------------------


@pytest.fixture
def costly(monkeypatch):
    """An observer with which every score takes a second of the evaluation's clock."""
    now = [1000.0]

    class Costly(t.EvaluationObserver):
        def on_score(self, *_):
            now[0] += 1.0

    monkeypatch.setattr(t, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return Costly()


def test_documents_of_the_clocks_last_tenth_are_scored_by_the_artifacts_weights(costly):
    settings = documents(eval_max_seconds=17.7)  # the first batch has ten pieces, the second six
    model = random_model(settings)
    tokens = stream_of(LENGTHS)
    score = evaluate(model, settings, tokens, observer=costly)
    assert score.seconds < 17.7
    assert score.epochs_given_up == len(LENGTHS) - 6
    frozen = evaluate(model, with_settings(settings, ttt_enabled=False), tokens).nats
    moved = np.abs(score.nats - frozen) > 1e-4
    begins = np.cumsum([0, *LENGTHS])
    for begin, length in zip(begins, LENGTHS, strict=False):
        assert moved[begin : begin + length].any() == (length > 9)


def test_a_document_that_outlasts_the_clock_learns_no_more_and_takes_fewer_windows(costly):
    """A text without BOS is one: learning on to its end, it had no score within the clock."""
    settings = documents(eval_max_seconds=30.0)  # pieces of 8, then 16, of windows of 32
    model = random_model(settings)
    tokens = stream_of([240])
    whole = evaluate(model, settings, tokens, observer=t.EvaluationObserver())
    assert whole.epochs_given_up == 0
    score = evaluate(model, settings, tokens, observer=costly)
    assert score.epochs_given_up == 1
    assert score.seconds == 27 + 2
    assert np.array_equal(score.nats[: 27 * 8], whole.nats[: 27 * 8])
    assert not np.array_equal(score.nats, whole.nats)
    # What it has learnt by then stays.
    frozen = evaluate(model, with_settings(settings, ttt_enabled=False), tokens)
    assert np.abs(score.nats - frozen.nats)[27 * 8 :].min() > 0
    at_once = evaluate(model, with_settings(settings, eval_max_seconds=1e-14), tokens)
    assert at_once.epochs_given_up == 1
    assert np.allclose(at_once.nats[:32], frozen.nats[:32], atol=1e-5)


def test_attention_is_tried_once_for_all_batches_of_documents(monkeypatch):
    """A short text is read forward and backward for that, which would add up."""
    model = random_model(documents(attention_backend="flash"))
    tried = []
    attend = t.attend

    def trying(query, *facts):
        tried.extend([query.shape] if query.shape[1] == t.BLOCK else [])
        return attend(query, *facts)

    monkeypatch.setattr(t, "attend", trying)
    t.attention_problem.cache_clear()
    evaluate(model, model.settings, stream_of(LENGTHS))
    assert len(LENGTHS) > 2 * model.settings.ttt_lora_slots and len(tried) == 1


@pytest.mark.parametrize(
    ("lengths", "ways"),
    [
        ([320], {8, 16}),  # its last 13 windows took longer than the tenth's three seconds
        ([640], {8, 16, 32}),  # half windows would take 40 s
        ([80] * 15, {8, 16}),  # five batches
        ([80] * 6, {8}),
    ],
    ids=str,
)
def test_documents_stop_learning_in_time_for_the_rest(costly, monkeypatch, lengths, ways):
    """They learnt on until the clock's last tenth, which may be too short for all that is left."""
    settings = documents(eval_max_seconds=30.0)
    moves = set()  # by how many targets windows move
    plan = t.plan_piece

    def planned(batch, settings, begin, *facts):
        context, end = plan(batch, settings, begin, *facts)
        moves.update({end - begin} if begin >= 32 and end < lengths[0] else ())
        return context, end

    monkeypatch.setattr(t, "plan_piece", planned)
    score = evaluate(random_model(settings), settings, stream_of(lengths), observer=costly)
    assert score.seconds < 30.0
    assert moves == ways
    assert (score.epochs_given_up > 0) == (ways != {8})


def test_documents_learn_on_after_a_moment_in_which_reading_was_slow(costly):
    """As where others used the machine: else it would have ended their learning for good."""
    settings = documents(eval_max_seconds=70.0)
    model = random_model(settings)
    events = []
    tick = costly.on_score

    def on_score(*facts):
        events.append("score")
        for _ in range(10 if len(events) == 5 else 1):
            tick(*facts)

    costly.on_score = on_score
    costly.on_train = lambda _: events.append("train")
    score = evaluate(model, settings, stream_of([240]), observer=costly)
    assert score.epochs_given_up == 1
    pauses = "".join(event[0] for event in events).replace("st", "l")
    assert re.fullmatch("ll+s+l+s", pauses), pauses


# ---- A GPU whose memory is short -----------------------------------------------------------------


class ShortMemory(t.EvaluationObserver):
    """Room for so many tokens at once in Model.forward(), fewer with gradients, and behind them."""

    def __init__(self, monkeypatch, forward: int, with_gradients: int, backward: int):
        self.said = []  # how many rows there was room for
        self.scored = []
        self.learnt = []
        forward_of = t.Model.forward
        backward_of = t.Branches.add_gradients

        def run(model, tokens, *arguments):
            hidden = forward_of(model, tokens, *arguments)
            most = with_gradients if torch.is_grad_enabled() else forward
            if tokens.numel() > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return hidden

        def go_back(branches, nats):
            backward_of(branches, nats)  # which leaves gradients behind
            if nats.numel() > backward:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        monkeypatch.setattr(t.Model, "forward", run)
        monkeypatch.setattr(t.Branches, "add_gradients", go_back)

    def on_short_memory(self, rows: int) -> None:
        """Keeps what was said."""
        self.said.append(rows)

    def on_score(self, excerpt, scored, nats) -> None:
        """Keeps which targets were scored, with their nats."""
        self.scored += zip(excerpt.positions[scored], nats.numpy()[scored], strict=True)

    def on_train(self, excerpt) -> None:
        """Keeps which targets are learnt from."""
        self.learnt += excerpt.positions.flatten().tolist()


ENOUGH = 1 << 20


@pytest.mark.parametrize(
    ("room", "said"),
    [
        ((ENOUGH, ENOUGH, ENOUGH), []),
        ((ENOUGH, 96, ENOUGH), [3]),
        ((ENOUGH, ENOUGH, 16), [3, 2]),
        ((70, 40, 8), [3, 2, 1]),
        ((32, 32, 8), [3, 2, 1]),
    ],
    ids=["enough", "graph", "backward", "all", "one document"],
)
def test_documents_are_read_in_parts_where_memory_is_short(monkeypatch, room, said):
    """With the same scores, each made once, and lessons of as many targets."""
    settings = documents(ttt_lora_slots=6)
    model = random_model(settings)
    tokens = stream_of(LENGTHS)
    usual = evaluate(model, settings, tokens)
    memory = ShortMemory(monkeypatch, *room)
    score = evaluate(model, settings, tokens, observer=memory)
    assert memory.said == said
    np.testing.assert_allclose(score.nats, usual.nats, atol=2e-6)
    assert sorted(place for place, _ in memory.scored) == list(range(len(tokens) - 1))
    assert all(score.nats[place] == nats for place, nats in memory.scored)
    frozen = evaluate(model, with_settings(settings, ttt_enabled=False), tokens)
    assert np.abs(usual.nats - frozen.nats).max() > 1e-2  # or lessons that were lost would pass
    assert len(memory.learnt) == len(set(memory.learnt)) > 100


@pytest.mark.parametrize("mode", ["plain", "sliding"])
def test_windows_are_read_in_parts_where_memory_is_short(monkeypatch, mode):
    settings = tiny(eval_mode=mode, ttt_enabled=False, compile="off")
    model = random_model(settings)
    tokens = stream_of(LENGTHS)
    usual = evaluate(model, settings, tokens)
    memory = ShortMemory(monkeypatch, 2 * settings.train_seq_len, 0, 0)
    score = evaluate(model, settings, tokens, observer=memory)
    assert memory.said[-1] == 2, memory.said
    np.testing.assert_allclose(score.nats, usual.nats, atol=2e-6)
    assert sorted(place for place, _ in memory.scored) == list(range(len(tokens) - 1))


def test_a_last_window_is_not_a_single_row_if_spare_ones_are_read_with_it(monkeypatch):
    """Memory may end there, though as many rows had room before."""
    settings = tiny(eval_mode="plain", ttt_enabled=False, compile="off")
    rows, length = settings.val_batch_size // settings.train_seq_len, settings.train_seq_len
    assert rows > 2
    model = random_model(settings)
    tokens = stream_of(LENGTHS)[: (rows + 1) * length]
    usual = evaluate(model, settings, tokens)
    forward = t.Model.forward
    read = []

    def run(model, tokens, *arguments):
        read.append(len(tokens))
        if len(read) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(model, tokens, *arguments)

    monkeypatch.setattr(t.Model, "forward", run)
    score = evaluate(model, settings, tokens)
    assert read == [rows, rows, math.ceil(rows / 2)]
    np.testing.assert_allclose(score.nats, usual.nats, atol=2e-6)


@pytest.mark.parametrize("mode", ["plain", "documents"])
def test_where_a_single_row_is_too_much_the_lack_of_memory_is_an_error(monkeypatch, mode):
    settings = tiny(eval_mode=mode, compile="off")
    memory = ShortMemory(monkeypatch, 7, 7, 7)
    with pytest.raises(torch.OutOfMemoryError, match="a single row"):
        evaluate(random_model(settings), settings, stream_of(LENGTHS), observer=memory)
    assert memory.said[-1] == 1


def test_a_log_says_that_memory_was_short():
    lines = []
    validation = validation_set(stream_of(LENGTHS))
    for what, *rows in (("evaluation", "documents"), ("evaluation", "windows"), ("plain windows",)):
        t.ScoringProgress(lines.append, what, validation, SOLO, *rows).on_short_memory(8)
    assert lines == [
        "warning: evaluation: memory has room for 8 documents at once, from now on",
        "warning: evaluation: memory has room for 8 windows at once, from now on",
        "warning: plain windows: memory has room for 8 windows at once, from now on",
    ]


@pytest.mark.parametrize("mode", ["sliding", "documents"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_progress_rises_to_the_whole_text(mode, world_size):
    settings = tiny(eval_mode=mode)
    model = random_model(settings)
    validation = validation_set(stream_of(LENGTHS))

    def parts_on(ranks: t.Ranks) -> list[float]:
        parts = []
        log = types.SimpleNamespace(progress=lambda what, part, *_: parts.append(part))
        shown = t.ScoringProgress(log, "evaluation", validation, ranks)
        mine = copy.deepcopy(model)
        t.Evaluator(mine, settings, ranks, validation, observer=shown).evaluate()
        return parts

    for parts in run_ranks(world_size, parts_on):
        assert sorted(parts) == parts
        # Ranks have unequal shares of documents: each takes its own for all.
        assert 0 < parts[0] < 0.5 < parts[-1] <= 1
        assert world_size > 1 or parts[-1] == 1


def test_tools_say_how_documents_are_scored():
    told = dataclasses.asdict(documents())
    assert summary.way_of_scoring(told) == "documents by themselves, adapting as it goes"
    told["ttt_enabled"] = False
    assert summary.way_of_scoring(told) == "documents by themselves, weights frozen"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ttt_lr": 0.1}, "TTT_LR means nothing with EVAL_MODE=documents"),
        ({"ttt_epochs": 1}, "TTT_EPOCHS means nothing with EVAL_MODE=documents"),
        ({"eval_mode": "plain", "ttt_lora_lr": 1e-3}, "TTT_LORA_LR means nothing with EVAL_MODE="),
        ({"ttt_lora_layers": "mlp,tail"}, "TTT_LORA_LAYERS=mlp,tail should be some of mlp,head,"),
        ({"ttt_lora_layers": ""}, "TTT_LORA_LAYERS= should be some of"),
        ({"ttt_lora_rank": 0}, "TTT_LORA_RANK=0 must be from 1"),
        ({"ttt_lora_size": 1}, "TTT_LORA_SIZE is not a setting"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_one_line(monkeypatch, capsys, changes, problem):
    environment = tiny_environment(**{"eval_mode": "documents", **changes})
    assert problem in mistake(monkeypatch, capsys, environment)


def test_branches_of_layers_that_a_model_lacks_and_in_float16_are_refused():
    settings = documents(ttt_lora_layers="query", mamba_layers="all")
    with pytest.raises(t.UserError, match="TTT_LORA_LAYERS=query names nothing that the model has"):
        t.Branches(random_model(settings), settings)
    model = random_model(documents())
    model.compute_dtype = torch.float16
    with pytest.raises(t.UserError, match="float16 loses the gradients"):
        t.Branches(model, documents())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"precision": "float16"}, "float16 loses the gradients"),
        ({"mlp_layers": "none", "ttt_lora_layers": "mlp"}, "names nothing that the model has"),
    ],
    ids=["float16", "no such layer"],
)
def test_what_could_not_adapt_is_not_trained(
    monkeypatch, capsys, shards, tmp_path, changes, problem
):
    environment = run_environment(shards, tmp_path, **{"eval_mode": "documents", **changes})
    assert problem in mistake(monkeypatch, capsys, environment)
    assert list(tmp_path.glob("a.*")) == []  # neither a log nor an artifact


def test_a_run_scores_documents_and_its_artifact_again(monkeypatch, capsys, shards, tmp_path):
    """With every target's nats in place; the clock that is over is an error in one line."""
    nats = tmp_path / "nats.npy"
    changes = {"eval_mode": "documents", "eval_nll_path": nats}
    assert run_here(monkeypatch, run_environment(shards, tmp_path, **changes)) == 0
    said = (tmp_path / "a.txt").read_text()
    *_, last = said.splitlines()
    assert last.startswith("final_int6_lzma_documents_ttt_exact val_loss:")
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    final = records[-2]
    assert final["event"] == "final" and final["mode"] == "documents_ttt"
    first = np.load(nats)
    assert final["val_loss"] == pytest.approx(first.mean(dtype=np.float64))
    again = {"EVAL_ONLY": "1", "RUN_ID": "a", "LOG_DIR": str(tmp_path), "DEVICE": "cpu"}
    again["EVAL_NLL_PATH"] = str(tmp_path / "again.npy")
    assert run_here(monkeypatch, again) == 0
    assert np.array_equal(np.load(tmp_path / "again.npy"), first)
    assert run_here(monkeypatch, again | {"TTT_ENABLED": "0"}) == 0
    *_, last = (tmp_path / "a.eval.txt").read_text().splitlines()
    assert last.startswith("final_int6_lzma_documents_exact val_loss:")
    frozen = np.load(tmp_path / "again.npy")
    begins = t.open_shards(str(shards), "val")[0].read()[:-1] == t.BOS_ID
    assert np.array_equal(frozen[begins], first[begins])
    assert not np.array_equal(frozen, first)
    capsys.readouterr()
    assert "TTT_LR means nothing with EVAL_MODE=documents" in mistake(
        monkeypatch, capsys, again | {"TTT_LR": "0.1", "EVAL_MODE": "documents"}
    )
    late = again | {"EVAL_MAX_SECONDS": "1e-6"}
    assert "no score in EVAL_MAX_SECONDS" in mistake(monkeypatch, capsys, late)


def test_two_ranks_of_torchrun_score_as_their_artifact_alone_does(monkeypatch, shards, tmp_path):
    """A whole run in processes of its own; then its artifact in this one, to the bit."""
    changes = {"eval_mode": "documents", "eval_nll_path": tmp_path / "two.npy"}
    done = subprocess.run(
        torchrun("--nproc_per_node=2", str(SCRIPT)),
        env=process_environment(run_environment(shards, tmp_path, **changes)),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "final_int6_lzma_documents_ttt_exact" in done.stdout
    again = {"EVAL_ONLY": "1", "RUN_ID": "a", "LOG_DIR": str(tmp_path), "DEVICE": "cpu"}
    assert run_here(monkeypatch, again | {"EVAL_NLL_PATH": str(tmp_path / "one.npy")}) == 0
    one, two = (np.load(tmp_path / name) for name in ("one.npy", "two.npy"))
    assert np.array_equal(one, two)
    scores = []
    for name in ("a.jsonl", "a.eval.jsonl"):
        (final,) = (r for r in t.read_records(tmp_path / name) if r["event"] == "final")
        scores.append(final["val_bpb"])
    assert scores[0] == scores[1]
