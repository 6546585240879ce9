"""tools/ideas/both_mixers.py: layers that are attention's and Mamba's at once."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.support import (
    CPU,
    SOLO,
    collect_factors,
    document_stream,
    gradients,
    interpreted,
    random_model,
    random_tokens,
    relative,
    stream_of,
    tiny,
    with_settings,
)
from tests.test_documents import MATRICES, by_hand
from tests.test_evaluation import (
    HeldStates,
    evaluate,
    exact_model,
    named_tensors,
    resumed_hidden,
    whole_hidden,
)
from tests.test_generate import LENGTH, model_and_tokens, step_by_step
from tools.ideas import both_mixers

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def script(monkeypatch):
    """train_gpt.py with the idea, and as it was once the test is over: layer 1 has both mixers."""
    for name in ("Block", "why_not_float8"):
        monkeypatch.setattr(t, name, getattr(t, name))
    both_mixers.install(t)
    return t


def hidden(model: t.Model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, model.order(True))


def test_a_layer_adds_both_parts_each_normed_before_its_output_matrix():
    """As one matrix of both parts side by side does, of what the script's own mixers make."""
    model = random_model(tiny())
    mixer = model.blocks[1].mixer
    attention, mamba = mixer.attention, mixer.mamba
    read = {}
    for layer in (attention.out, mamba.out_proj):
        layer.register_forward_pre_hook(lambda layer, x: read.update({layer: x[0]}))
    mixer.register_forward_hook(lambda _, x, y: read.update(added=y[0]))
    hidden(model, random_tokens(2, 32))
    parts = [read[layer] for layer in (attention.out, mamba.out_proj)]
    assert [part.shape[-1] for part in parts] == [16, 16]
    normed = [part / part.square().mean(-1, keepdim=True).sqrt() for part in parts]
    matrix = torch.cat([attention.out.weight, mamba.out_proj.weight], dim=1)
    assert relative(read["added"], torch.cat(normed, dim=-1) @ matrix.T) < 1e-3
    assert attention.query_gain.shape == (2,)
    assert mamba.sizes == t.MambaSizes(heads=2, channels=8, state=8, angles=2, version=3)


def test_every_parameter_learns_and_other_layers_begin_as_they_would(monkeypatch):
    model = random_model(tiny())
    tokens = random_tokens(2, 33)
    model.loss(tokens[:, :-1], tokens[:, 1:], model.order(True)).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    first, again = (t.build_model(tiny(), SOLO) for _ in range(2))
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    monkeypatch.undo()
    usual = dict(t.build_model(tiny(), SOLO).named_parameters())
    others = {n: p for n, p in first.named_parameters() if not n.startswith("blocks.1.mixer.")}
    assert len(others) == 30
    assert all(torch.equal(p, usual[name]) for name, p in others.items())
    drawn = torch.cat([p.detach().flatten() for p in others.values() if p.dim() == 2])
    for name in ("attention.query", "attention.value", "mamba.in_proj"):
        own = first.get_parameter(f"blocks.1.mixer.{name}.weight").detach()
        assert torch.isin(own, drawn).double().mean() < 0.01, name  # float32 has equals by chance


@pytest.mark.parametrize("reset", [False, True], ids=["one text", "documents"])
@torch.no_grad()
def test_outputs_depend_neither_on_later_tokens_nor_on_other_documents(reset):
    model = random_model(tiny(document_reset=reset))
    tokens = random_tokens(1, 32)
    tokens[0, [0, 10]] = t.BOS_ID
    expected = hidden(model, tokens)
    later, earlier = tokens.clone(), tokens.clone()
    later[0, 20:] = 7
    earlier[0, 1:10] = 7
    assert torch.equal(hidden(model, later)[:, :20], expected[:, :20])
    moved = relative(hidden(model, earlier)[:, 10:], expected[:, 10:])
    # Sums of logarithms that hold a document's start lose digits.
    assert moved < 1e-4 if reset else moved > 1e-2


@pytest.mark.parametrize("reset", [False, True], ids=["one text", "documents"])
@torch.no_grad()
def test_one_token_at_a_time_gives_the_full_forwards_logits(reset):
    model, tokens = model_and_tokens({"document_reset": reset}, torch.float64)
    found = step_by_step(model, tokens)
    assert found.shape[1] == LENGTH
    assert relative(found, model.logits(hidden(model, tokens))) < 1e-9


@pytest.mark.parametrize("reset", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize("part", [48, 96])
def test_parts_with_carried_states_are_one_sequence_of_the_whole_stream(part, reset, monkeypatch):
    model = exact_model(tiny(document_reset=reset))
    tokens = torch.from_numpy(document_stream(288).astype(np.int64))[None]
    found = resumed_hidden(model, tokens, part, HeldStates(model, model.order(True)))
    assert relative(found, whole_hidden(model, tokens, monkeypatch)) < 1e-9


@torch.no_grad()
def test_every_carried_tensor_of_both_mixers_matters():
    model = exact_model(tiny())
    tokens = torch.from_numpy(document_stream(96).astype(np.int64))[None]
    overlap, order = model.settings.attention_overlap, model.order(True)

    def second_part(part: str = "", name: str = "") -> torch.Tensor:
        states = HeldStates(model, order)
        resumed_hidden(model, tokens[:, :48], 48, states)
        if part:
            named_tensors(getattr(states.states[1], part))[name].zero_()
        return model.resume(tokens[:, 48 - overlap :], torch.tensor(overlap), order, states)

    expected = second_part()
    carried = {"attention": ["key", "value"], "mamba": ["angle", "ssm", "key", "value"]}
    for part, names in carried.items():
        assert [*named_tensors(getattr(model.new_states(order)[1], part))] == names
        for name in names:
            assert relative(second_part(part, name), expected) > 1e-4, (part, name)


@pytest.mark.parametrize("mode", ["sliding", "documents"])
def test_an_artifact_scores_as_the_model_that_it_holds(mode, tmp_path):
    """Of all matrices, both mixers' too, GPTQ has Hessians, and Mamba's dynamics have 8 bits."""
    settings = tiny(eval_mode=mode, trellis_states=32, sdclip_by_matrix=1.0, shared_tables=True)
    model = random_model(settings)
    factors = collect_factors(model, random_tokens(8, 32), 4)
    limits = t.grid_limits(model)
    assert factors.keys() | {"bigram_embedding.weight"} == limits.keys()
    dynamics = model.blocks[1].mixer.mamba.in_proj.dynamics_rows
    assert (limits["blocks.1.mixer.mamba.in_proj.weight"] == t.INT8_MAX).sum() == dynamics == 8
    stored = t.quantize_model(model, settings, SOLO, factors, 5.0)
    path = tmp_path / "artifact"
    path.write_bytes(t.pack_artifact(settings, stored))
    loaded, chosen = t.load_model(path, settings, set(), SOLO)
    for name in limits:  # each is the one that was written, but for its grid
        written = model.get_parameter(name)
        assert 0 < relative(loaded.get_parameter(name), written) < 0.2, name
    text = document_stream(150)
    found = evaluate(loaded, chosen, text).val_bpb
    held = copy.deepcopy(model)
    held.load_state_dict(loaded.state_dict())
    assert found == evaluate(held, settings, text).val_bpb
    assert 0 < abs(found - evaluate(model, settings, text).val_bpb) < 0.1


def test_hessians_are_of_what_the_output_matrix_sees():
    """Of normed rows: 2 sum x x^T has the trace 2 · tokens · columns."""
    model = random_model(tiny())
    hessians, _ = t.collect_costs(model, [random_tokens(4, 32)], SOLO)
    for name in ("attention.out", "mamba.out_proj"):
        hessian = hessians[f"blocks.1.mixer.{name}.weight"]
        assert hessian.trace().item() == pytest.approx(2 * 4 * 32 * 16, rel=1e-3)


def test_documents_branches_stand_beside_both_mixers_matrices():
    layers = f"{MATRICES},head"
    settings = tiny(
        eval_mode="documents", ttt_lora_layers=layers, tie_embeddings=False, ttt_lora_lr=0.01
    )
    model = random_model(settings)
    own = set(model.blocks[1].mixer.modules())
    assert len(own & set(t.Branches(model, settings).beside)) == 6
    tokens = stream_of([70, 25])
    found = evaluate(model, settings, tokens).nats
    for begin, end in ((0, 70), (70, 95)):
        expected = by_hand(model, settings, tokens[begin : end + 1])
        assert np.abs(found[begin:end] - expected).max() < 2e-4


def test_the_short_presets_shape_is_as_large_as_it_says_and_runs_in_the_kernels(monkeypatch):
    settings, _ = t.read_settings({"PRESET": "short"})
    skeleton = t.model_skeleton(settings)
    assert t.name_layers(skeleton, skeleton.full_order) == "M0 M1 B2 M3 M4 M5 B6 M7 M8"
    found = sum(skeleton.get_parameter(name).numel() for name in t.grid_limits(skeleton))
    said = Path(both_mixers.__file__).read_text()
    assert f"{found:,} numbers in matrices" in said
    mixer = skeleton.blocks[2].mixer
    assert mixer.mamba.sizes == t.MambaSizes(heads=8, channels=32, state=64, angles=16, version=3)
    assert mixer.mamba.in_proj.out_features % 8 == 0
    if t.triton is None:
        pytest.skip("needs triton")
    own = with_settings(settings, mamba_expand=0.5, mamba_head_dim=32)
    for capability, shared in ((80, 166_912), (89, 101_376), (90, 232_448)):
        monkeypatch.setattr(t, "kernel_limits", lambda _, found=(capability, shared): found)
        assert t.choose_scan_backend(own, GPU) == "triton", capability
    skeleton.compute_dtype = torch.bfloat16
    assert t.why_not_float8(skeleton, t.EVERY_FLOAT8, GPU) == ""
    monkeypatch.undo()
    monkeypatch.setattr(t, "kernel_limits", lambda _: (90, 232_448))
    assert "mamba.in_proj.weight is 680 x 512" in t.why_not_float8(skeleton, "in_proj", GPU)


@interpreted
@pytest.mark.filterwarnings("ignore:overflow", "ignore:Conversion of an array")  # interpreter's own
def test_the_kernels_scan_heads_of_both_sizes():
    """As the equation in a loop does, to every gradient."""
    sizes = {"mamba_head_dim": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}
    settings = tiny(**sizes, scan_backend="triton", document_reset=True)
    fused = random_model(settings)
    shapes = [mamba.sizes[:2] for mamba in fused.modules() if isinstance(mamba, t.Mamba)]
    assert shapes == [(2, 32), (1, 16), (2, 32)]
    looped = t.Model(with_settings(settings, scan_backend="sequential"), CPU, "sequential")
    looped.load_state_dict(fused.state_dict())
    expected = gradients(looped)
    for name, gradient in gradients(fused).items():
        assert relative(gradient, expected[name]) < 1e-3, name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_kv_heads": 1}, "NUM_KV_HEADS=1 cannot be halved"),
        ({"model_dim": 40, "mamba_head_dim": 16}, "MAMBA_HEAD_DIM=16 halved does not divide"),
    ],
)
def test_what_cannot_be_halved_is_told_in_one_line(changes, said):
    with pytest.raises(t.UserError, match=said):
        t.Block(tiny(**changes), 1, "sequential", CPU)
