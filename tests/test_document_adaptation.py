"""The idea of documents that adapt the model while they are scored."""

import dataclasses
import functools
import json
import sys

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.support import SOLO, random_model, stream_of, tiny, tiny_environment, validation_set
from tools.ideas import document_adaptation as idea

# Steps that are large enough to be seen after a few pieces.
QUICK = {"rank": 3, "rate": 0.02, "piece": 8, "slots": 3, "phase_rate": 0.1, "phase_tokens": 64}


def frozen_nats(model: t.Model, tokens: np.ndarray, **changes) -> np.ndarray:
    """Scores of a stream by the idea without branches and phases."""
    return adapted_nats(model, tokens, **{"rank": 0, **changes})


def adapted_nats(model: t.Model, tokens: np.ndarray, **changes) -> np.ndarray:
    """Scores of a stream by a choice; the model keeps what it has learnt."""
    model.requires_grad_(False)
    documents = idea.find_documents(tokens)
    choice = idea.Choice("test", **{**QUICK, **changes})
    torch.manual_seed(0)
    scorer, _ = idea.score_variant(model, tokens, documents, choice)
    return scorer.collect(documents)


@pytest.mark.parametrize("scope", ["all", "scans"])
def test_frozen_scores_are_those_of_sliding_windows_that_documents_end_in(scope):
    """Of documents that a window holds wherever it ends: its length less a stride."""
    reset = {"document_reset": True, "document_scope": scope, "mamba_layers": "0-2"}
    settings = tiny(**reset, eval_mode="sliding", ttt_enabled=False)
    model = random_model(settings)
    tokens = stream_of(np.random.default_rng(1).integers(2, 25, 20))
    score = t.Evaluator(model, settings, SOLO, validation_set(tokens)).evaluate()
    assert np.abs(frozen_nats(model, tokens) - score.nats).max() < 1e-4


def test_frozen_scores_do_not_depend_on_pieces_within_a_window():
    model = random_model(tiny())
    tokens = stream_of([32, 9, 30, 17, 2])
    whole = frozen_nats(model, tokens, piece=32)
    for piece in (4, 8):
        assert np.abs(frozen_nats(model, tokens, piece=piece) - whole).max() < 1e-5
        unmoved = adapted_nats(model, tokens, piece=piece, rate=0.0)
        assert np.abs(unmoved - whole).max() < 1e-5


@pytest.mark.parametrize(
    ("phases", "text", "lesson"),
    [("", "all", "window"), ("0.3", "all", "piece"), ("each", "new", "piece")],
)
def test_a_score_depends_on_earlier_tokens_of_its_document_and_on_earlier_batches(
    phases, text, lesson
):
    settings = tiny(document_reset=bool(phases))
    layers = "mlp,head,attention,in_proj,out_proj"
    choice = {"layers": layers, "phases": phases, "phase_text": text, "lesson": lesson}
    lengths = [70, 25, 61, 33, 80, 44, 9, 45, 52]
    tokens = stream_of(lengths)
    scores = adapted_nats(random_model(settings), tokens, **choice)
    documents = idea.find_documents(tokens)
    generator = np.random.default_rng(2)
    others = tokens.copy()
    kept, changed = [], []
    for place, (begin, length) in enumerate(zip(*documents, strict=True)):
        batch = place // QUICK["slots"]
        seen = {0: length, 1: int(generator.integers(1, length + 1))}.get(batch, 1)
        end = begin + seen
        fresh = generator.integers(4, 512, length - seen).astype(np.uint16)
        others[end : begin + length] = fresh
        kept.append(np.arange(begin, end - 1))
        changed.append(np.arange(end, begin + length))
    again = adapted_nats(random_model(settings), others, **choice)
    where = np.concatenate(kept)
    assert len(where) > sum(sorted(lengths)[-3:])
    assert np.array_equal(scores[where], again[where])
    elsewhere = np.concatenate(changed)
    assert (scores[elsewhere] != again[elsewhere]).mean() > 0.9


@pytest.mark.parametrize("layers", ["head", "mlp", "out_proj", "in_proj", "attention"])
def test_a_repeated_text_is_learnt_while_it_is_scored(layers):
    model = random_model(tiny())
    tokens = np.append(np.concatenate([stream_of([12])[:-1], *[stream_of([20])[1:-1]] * 6]), 1)
    tokens = tokens.astype(np.uint16)
    frozen = frozen_nats(model, tokens)
    adapted = adapted_nats(model, tokens, layers=layers)
    assert np.allclose(adapted[:8], frozen[:8], atol=1e-5)  # nothing was learnt from yet
    assert adapted[60:].mean() < frozen[60:].mean() - 0.05


def test_a_branch_is_a_change_of_its_matrix():
    """Also of a matrix whose input is scaled behind it, and of the output matrix."""
    model = random_model(tiny(tie_embeddings=False))
    layers = "attention,in_proj,out_proj,head"
    branches = idea.Branches(model, idea.Choice("test", layers=layers, **QUICK))
    tokens = stream_of([30])
    documents = idea.find_documents(tokens)
    scorer = idea.Scorer(model, tokens, branches)
    generator = torch.Generator().manual_seed(3)
    assert len(branches.beside) == 2 * 2 + 4
    for branch in [*branches.beside.values(), branches.head]:
        branch.up.data = 0.1 * torch.randn(branch.up.shape, generator=generator)
    with torch.no_grad(), t.documents_alone(model, branches):
        adapted = scorer.score_piece(documents, 0, 0, 30)
    pairs = [(module.weight, branch) for module, branch in branches.beside.items()]
    for matrix, branch in [*pairs, (model.output_matrix, branches.head)]:
        matrix.data += branch.gain * (branch.down[0] @ branch.up[0]).mT.detach()
    merged = frozen_nats(model, tokens)
    assert np.abs(adapted[0].numpy() - merged).max() < 1e-4


def test_an_mlps_branch_reads_what_its_first_matrix_reads():
    model = random_model(tiny(ln_scale=True))
    branches = idea.Branches(model, idea.Choice("test", layers="mlp", **QUICK))
    first, second = {}, {}
    for mlp, branch in branches.beside.items():
        mlp.up.register_forward_pre_hook(functools.partial(note_input, first, mlp))
        branches.beside[mlp] = functools.partial(noted, second, mlp, branch)
    with torch.no_grad(), t.documents_alone(model, branches):
        model(torch.from_numpy(stream_of([20])[None]).long(), model.order(True))
    assert len(first) == 3
    for mlp, x in first.items():
        assert torch.equal(x, second[mlp])


def note_input(seen: dict, mlp: t.MLP, module, arguments: tuple) -> None:
    """A hook that keeps what a module reads."""
    (seen[mlp],) = arguments


def noted(seen: dict, mlp: t.MLP, branch: t.LowRank, x: torch.Tensor) -> torch.Tensor:
    """What a branch says; what it reads is kept."""
    seen[mlp] = x
    return branch(x)


def test_a_trial_compares_with_the_same_windows_and_gives_the_weights_back():
    model = random_model(tiny())
    tokens = stream_of([70, 25, 61, 33, 80, 44, 9])
    trial = idea.Trial(model, validation_set(tokens))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    nothing = idea.Choice("nothing", **QUICK | {"rank": 0})
    line = json.loads(json.dumps(trial.run(nothing)))
    assert line["gain"] == line["gain_error"] == 0
    assert line["tokens"] == len(tokens) - 1
    nats = frozen_nats(model, tokens)
    assert line["bpb"] == pytest.approx(nats.sum() / np.log(2) / (2 * len(nats)), abs=1e-5)
    phases = dataclasses.replace(nothing, phases="0.3")
    line = trial.run(phases)
    assert line["phase_steps"] == 3
    assert line["gain"] != 0
    assert sum(row["documents"] for row in line["by_length"]) == 7
    after = model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_so_many_documents_are_of_all_lengths():
    tokens = stream_of(range(2, 42))
    documents = idea.find_documents(tokens, 4)
    assert documents.lengths.tolist() == [36, 26, 16, 6]
    assert len(idea.find_documents(tokens).lengths) == 40  # not the empty one


def test_pieces_and_their_windows():
    assert [*idea.plan_pieces(22, 8, 16)] == [(0, 0, 8), (0, 8, 16), (8, 16, 22)]
    assert [*idea.plan_pieces(22, 8, 16, merged=True)] == [(0, 0, 16), (8, 16, 22)]
    assert [*idea.plan_pieces(5, 8, 16)] == [(0, 0, 5)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rank=3", "a colon"),
        ("a: ranks=3", "ranks=3"),
        ("a: rank=b", "no number"),
        ("a: layers=mlp,tail", "layers are of"),
        ("a: slots=0", "above 0"),
        ("a: rate=nan", "numbers from 0"),
        ("a: phase_rate=inf", "numbers from 0"),
        ("a: decay=-1", "numbers from 0"),
        ("a: phases=5", "phases are parts"),
        ("a: phase_text=some", "all or new"),
        ("a: lesson=none", "piece or window"),
    ],
)
def test_a_mistaken_variant_is_one_line(text, problem):
    with pytest.raises(idea.UserError, match=problem):
        idea.read_choice(text)


@pytest.fixture
def start(monkeypatch, capsys, tmp_path, shards):
    """Starts the command on the artifact of a random model; its lines of JSON."""
    where = {"data_path": str(shards), "tokenizer_path": str(shards / "tokenizer.model")}
    model = random_model(tiny(num_layers=2, mamba_layers="0", **where))
    stored = t.quantize_model(model, model.settings, SOLO, {}, 6.0)
    artifact = tmp_path / "a.lzma"
    artifact.write_bytes(t.pack_artifact(model.settings, stored))
    shared = dict.fromkeys(t.MODEL_FIELDS)
    for name, value in tiny_environment(**shared | where, log_dir=str(tmp_path)).items():
        monkeypatch.setenv(name, value)

    def run(*arguments) -> list[dict]:
        name = "document_adaptation"
        monkeypatch.setattr(sys, "argv", [name, "--artifact", str(artifact), *arguments])
        assert idea.command() == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_the_command_scores_a_finished_artifact(start, shards, tmp_path):
    [shard] = t.open_shards(str(shards), "val")
    np.save(tmp_path / "a.npy", np.ones(shard.count - 1, dtype=np.float32))
    variants = [
        part for text in ("a: rank=2 piece=8", "b: rank=0 piece=8") for part in ("--variant", text)
    ]
    lines = start(*variants, "--documents", "3", "--nats", str(tmp_path / "a.npy"))
    assert [line["variant"] for line in lines] == ["a", "b"]
    assert lines[0]["frozen_bpb"] == lines[1]["bpb"] and lines[1]["gain"] == 0
    assert lines[0]["documents"] == 3 and lines[0]["choice"]["rank"] == 2
    nats = lines[0]["frozen_bpb"] / lines[0]["nats_bpb"]  # of a target, as these are 1 each
    assert 5 < nats < 10
    with pytest.raises(idea.UserError, match="piece is 1 to 32 tokens"):
        start("--variant", "a: piece=64")
    with pytest.raises(idea.UserError, match="no score for each target"):
        np.save(tmp_path / "a.npy", np.ones(3))
        start("--nats", str(tmp_path / "a.npy"))


@pytest.mark.parametrize("rule", ["matrix", "rows"])
def test_coarse_steps_are_adamws_where_gradients_differ_in_sign_alone(rule):
    """And where one row has the gradient, "matrix" moves the others by what they have: nothing."""
    choice = idea.Choice("test", rule=rule, rate=0.01, decay=0.5, moves=1.0)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 4, 5, generator=generator)
    coarse, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    adamw = torch.optim.AdamW([plain], lr=0.01, betas=idea.BETAS, eps=1e-10, weight_decay=0.5)
    steps = idea.Coarse([coarse], choice)
    for size in (1.0, 3.0, 0.1):
        gradient = size * torch.randn(2, 4, 5, generator=generator).sign()
        for p, optimizer in ((coarse, steps), (plain, adamw)):
            p.grad = gradient.clone()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(coarse, plain, atol=1e-6)
    before = coarse.detach().clone()
    coarse.grad = torch.zeros_like(before)
    coarse.grad[:, 0] = 1.0
    steps.step()
    assert torch.allclose(coarse[:, 1:], before[:, 1:] * (1 - 0.01 * 0.5))
    assert not torch.allclose(coarse[:, 0], before[:, 0] * (1 - 0.01 * 0.5))


@pytest.mark.parametrize("rule", ["matrix", "rows"])
def test_documents_adapt_by_coarse_steps(rule):
    """Scores change behind the first piece, and not in it."""
    model = random_model(tiny())
    tokens = stream_of([24])
    moved = adapted_nats(model, tokens, rule=rule) - frozen_nats(model, tokens)
    assert np.abs(moved[:8]).max() < 1e-6 < np.abs(moved[8:]).min()


def test_branches_may_begin_orthogonal_and_leave_a_as_it_is():
    """With momentum too, of which the first step knows nothing."""
    choice = idea.Choice("test", start="orthogonal", moves=0.0, momentum=0.5, rank=4, slots=2)
    branch = idea.LowRank(choice, 16, 5, torch.device("cpu"))
    squares = branch.down[0].mT @ branch.down[0]
    assert torch.allclose(squares, torch.eye(4) / 3, atol=1e-6)
    first = branch.down.detach().clone()
    steps = idea.Coarse([branch.down, branch.up], choice)
    plain = idea.Choice("test", rank=4, slots=2)
    other = torch.zeros_like(branch.up)
    others = idea.Coarse([first.clone(), other], plain)
    for p in (*steps.parameters, *others.parameters):
        p.grad = torch.ones_like(p)
    steps.step()
    others.step()
    assert torch.equal(branch.down, first)
    assert torch.allclose(branch.up, other)
    steps.step()
    assert not torch.equal(branch.up, other)
