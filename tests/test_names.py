"""The contest's names for settings, and others that people reach for: each works or is refused.

data/contest_names.txt lists, one a line, what four published scripts read from their environment.
"""

import functools
from pathlib import Path

import pytest
import torch

import train_gpt as t
from tests.support import (
    SOLO,
    document_stream,
    random_tokens,
    run_environment,
    run_here,
    tiny_environment,
    validation_set,
)

NAMES = (Path(__file__).parent / "data" / "contest_names.txt").read_text().split()
OURS = {name.upper() for name in t.FIELDS}
REFUSED = t.REFUSED
REACHED_FOR_TEXT = """
    LR LEARNING_RATE BASE_LR MAX_LR ADAM_LR MUON_LR WD GRAD_CLIP MAX_GRAD_NORM ADAM_BETA1 ADAM_BETA2
    BATCH_SIZE TRAIN_BATCH_SIZE GLOBAL_BATCH_SIZE TOTAL_BATCH_SIZE DEVICE_BATCH_SIZE BATCH_TOKENS
    MICRO_BATCH_SIZE GRAD_ACCUM GRADIENT_ACCUMULATION_STEPS
    MAX_WALLCLOCK WALLCLOCK MAX_SECONDS NUM_ITERATIONS ITERS MAX_ITERS NUM_STEPS MAX_STEPS
    TRAIN_STEPS EPOCHS NUM_EPOCHS WARMUP_ITERS WARMUP_RATIO WARMDOWN_STEPS WARMDOWN_FRAC
    SEQ_LEN SEQUENCE_LENGTH CONTEXT_LENGTH MAX_SEQ_LEN D_MODEL N_EMBD HIDDEN_SIZE N_LAYER N_LAYERS
    N_HEAD N_HEADS N_KV_HEADS D_STATE DROPOUT QUANT EMA_HORIZON
    VAL_EVERY EVAL_EVERY EVAL_INTERVAL LOG_EVERY LOG_INTERVAL
    SAVE_EVERY CKPT_EVERY CHECKPOINT_INTERVAL
    DEPTH HEADS KV_HEADS LAYERS DIM EMBED_DIM HIDDEN_DIM D_FF FFN_DIM MLP_RATIO
    LRATE BATCHSIZE SEQLEN N_CTX TOTAL_STEPS NSTEPS NHEADS ROPE_THETA CLIP_GRAD TIME_LIMIT
"""
REACHED_FOR = REACHED_FOR_TEXT.split()
FORMER = ["SDCLIP_ATTENTION", "SDCLIP_MLP", "TTT_LORA_ALPHA"]  # settings once


# ---- The list ------------------------------------------------------------------------------------


def test_each_of_the_contests_names_has_one_fate_and_at_most_fifty_are_refused():
    assert len(NAMES) == len(set(NAMES)) == 137
    for name in NAMES + REACHED_FOR:
        assert (name in OURS) + (name in t.ALIASES) + (name in REFUSED) == 1, name
    assert sum(name in REFUSED for name in NAMES) <= 50


def test_what_is_known_but_not_ours_is_the_contests_or_reached_for_or_was_ours():
    assert {*t.ALIASES, *REFUSED} <= {*NAMES, *REACHED_FOR, *FORMER}
    assert {*FORMER} <= {*REFUSED}


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_sets_nothing_is_refused_with_what_holds_instead(name):
    value, reason = REFUSED[name]
    with pytest.raises(t.UserError) as caught:
        t.read_settings({name: "another value"})
    assert str(caught.value) == f"{name}=another value cannot be set: {reason}"
    if value:
        settings, given = t.read_settings({name: f" {value.upper()} "})
        own = {"ttt_optimizer"} & {name.lower()}  # is of some modes only
        assert (settings, given) == (t.Settings(eval_mode="sliding" if own else "documents"), own)
        (line,) = t.translate_names({name: value})[1]
        assert line == f"{name}={value} sets nothing: {reason}"
        assert t.what_holds(name, value) == t.what_holds(name.lower(), f"{value} ") == ""
    assert t.what_holds(name, "another value") == t.what_holds(name.lower(), None) == reason


@pytest.mark.parametrize("name", ["QAT_ENABLED", "USE_LZMA"])
def test_a_word_of_truth_is_as_good_as_its_number(name):
    words = {"0": "False", "1": "true"}
    right = REFUSED[name][0]
    assert t.read_settings({name: words.pop(right)}) == (t.Settings(), set())
    with pytest.raises(t.UserError, match=f"{name}=.* cannot be set"):
        t.read_settings({name: words.popitem()[1]})


def test_what_a_reason_names_exists():
    """Words in capitals in the reasons are settings, or a few words of the trade."""
    trade = {"GPTQ", "LZMA", "QAT", "SGD"}
    for _, reason in REFUSED.values():
        words = {word.removesuffix("'s").strip(",.;:()") for word in reason.split()}
        named = {word for word in words if len(word) > 2 and word.isupper() or "_" in word}
        assert named - trade - {"out_proj", "dt_bias"} <= OURS, reason


# ---- Other names ---------------------------------------------------------------------------------

TRANSLATIONS = [  # environment, and what it comes to
    ({"GPTQ_CLIP_SIGMAS": "12.85"}, {"sdclip_k": 12.85}),
    ({"MUON_WD": "0.04"}, {"weight_decay": 0.04}),
    ({"WALLCLOCK": "60"}, {"max_wallclock_seconds": 60.0}),
    ({"NUM_LOOPS": "2"}, {"layer_order": "0,1,2,3,4,3,4,3,4,5,6,7,8"}),
    ({"NUM_LOOPS": "0"}, {"layer_order": "all"}),
    ({"NUM_LOOPS": "0", "PRESET": "tiny"}, {"layer_order": "all"}),
    ({"NUM_LOOPS": "1", "LOOP_START": "0", "LOOP_END": "1", "NUM_LAYERS": "3", "MAMBA_LAYERS": "0"},
     {"layer_order": "0,1,0,1,2"}),
    ({"RECUR_LAYERS": "3,4", "RECUR_MODE": "block", "RECUR_REPEATS": "2"},
     {"layer_order": "0,1,2,3,4,3,4,3,4,5,6,7,8"}),
    ({"RECUR_LAYERS": "3,5"}, {"layer_order": "0,1,2,3,4,5,3,5,6,7,8"}),
    ({"RECUR_LAYERS": "3,4", "RECUR_MODE": "layer"}, {"layer_order": "0,1,2,3,3,4,4,5,6,7,8"}),
    ({"RECUR_LAYERS": "none"}, {"layer_order": "all"}),
    ({"RECUR_START_FRAC": "0.5"}, {"recur_start": 0.5}),
    ({"ROPE_DIMS": "16"}, {"rope_fraction": 0.25}),
    ({"ROPE_DIMS": "0"}, {"rope_fraction": 1.0}),
    ({"BIGRAM_BUCKETS": "2048"}, {"bigram_vocab_size": 2048}),
    ({"SWA_ENABLED": "1"}, {"average": "ema+swa"}),
    ({"SWA_ENABLED": "1", "EMA_ENABLED": "0"}, {"average": "swa"}),
    ({"EMA_ENABLED": "0"}, {"average": "none"}),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "wanted"), TRANSLATIONS, ids=str)
def test_another_name_sets_ours_and_the_log_says_so(environment, wanted):
    settings, given = t.read_settings(environment)
    assert {name: getattr(settings, name) for name in wanted} == wanted
    assert given >= set(wanted)
    t.validate_settings(settings, 1)
    aliases = environment.keys() & t.ALIASES.keys()
    _, lines = t.translate_names(environment)
    assert len(lines) == len(aliases)
    for name in aliases:
        (line,) = (x for x in lines if x.startswith(f"{name}="))
        assert f" is {t.ALIASES[name][0]}=" in line


def test_a_run_says_what_another_name_means(monkeypatch, capsys, tmp_path):
    names = run_environment(tmp_path, tmp_path, sdclip_k=None) | {"GPTQ_CLIP_SIGMAS": "7"}
    assert run_here(monkeypatch, names | {"USE_LZMA": "1"}) == 2  # there is no tokenizer
    lines = capsys.readouterr().out.splitlines()
    assert "GPTQ_CLIP_SIGMAS=7 is SDCLIP_K=7 here" in lines
    assert "SDCLIP_K=7.0" in next(line for line in lines if line.startswith("settings given:"))
    assert any(line.startswith("USE_LZMA=1 sets nothing: ") for line in lines)


@pytest.mark.parametrize("dims", range(2, 49, 2))
def test_rope_dims_turns_so_many_dimensions(dims):
    settings, _ = t.read_settings({"ROPE_DIMS": str(dims), "MODEL_DIM": "384"})
    assert 2 * (int(48 * settings.rope_fraction) // 2) == dims


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GPTQ_CLIP_SIGMAS": "5", "SDCLIP_K": "6"}, "GPTQ_CLIP_SIGMAS is SDCLIP_K=5 here, but"),
        ({"WALLCLOCK": "5", "MAX_WALLCLOCK": "6"}, "is MAX_WALLCLOCK_SECONDS="),
        ({"NUM_LOOPS": "1", "RECUR_LAYERS": "3"}, "is LAYER_ORDER="),
        ({"LOOP_START": "3"}, "need NUM_LOOPS"),
        ({"RECUR_REPEATS": "2"}, "need RECUR_LAYERS"),
        ({"NUM_LOOPS": "1", "LOOP_END": "9"}, "LOOP_START=3 LOOP_END=9 are not layers of 9"),
        ({"NUM_LOOPS": "1", "NUM_LAYERS": "4"}, "NUM_LOOPS=1: LOOP_START=3 LOOP_END=4 are not"),
        ({"NUM_LOOPS": "99999"}, "NUM_LOOPS=99999 must be from 0 to 10000"),
        ({"NUM_LOOPS": "two"}, 'NUM_LOOPS="two" should be a whole number'),
        ({"RECUR_LAYERS": "3,9"}, "RECUR_LAYERS=3,9: no layer 9"),
        ({"RECUR_LAYERS": "3", "RECUR_MODE": "spread"}, "RECUR_MODE=spread should be one of"),
        ({"ROPE_DIMS": "128"}, "ROPE_DIMS=128 is more than a head has, 64"),
        ({"USE_GPTQ": "maybe"}, "USE_GPTQ=maybe cannot be set: QUANTIZER is round without GPTQ"),
        ({"EMBED_LR": "0.6"}, "EMBED_LR means nothing with TIE_EMBEDDINGS=1: TIED_EMBED_LR is"),
        ({"TIED_EMBED_LR": "0.6", "TIE_EMBEDDINGS": "0"}, "EMBED_LR and HEAD_LR are the rates"),
    ],
    ids=str,
)
def test_names_that_contradict_each_other_or_say_nothing_are_one_line(environment, message):
    with pytest.raises(t.UserError, match=message) as caught:
        t.read_settings(environment)
    assert str(caught.value).isprintable()


def test_a_name_beside_its_own_setting_with_the_same_value_is_no_contradiction():
    settings, _ = t.read_settings({"GPTQ_CLIP_SIGMAS": "5", "SDCLIP_K": "5.0"})
    assert settings.sdclip_k == 5.0


def test_a_line_break_behind_another_name_is_none_in_the_log():
    _, lines = t.translate_names({"QUANT": "gptq\n", "USE_LZMA": "1\n", "SWA_ENABLED": "1\r\n"})
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)


# ---- What they change ----------------------------------------------------------------------------


def read(environment: dict[str, str]) -> t.Settings:
    """Settings of six steps of a small model."""
    averages = {"ema_decay": 0.5, "average_horizon": 0.9, "swa_every": 1, "swa_start_frac": 1}
    names = tiny_environment(iterations=6, max_wallclock_seconds=0, **averages)
    del names["ROPE_FRACTION"]  # which ROPE_DIMS would contradict
    if not {"RECUR_START_FRAC", "ENABLE_LOOPING_AT"} & environment.keys():
        names["RECUR_START"] = "0"
    settings, _ = t.read_settings(names | environment)
    t.validate_settings(settings, 1)
    return settings


def train(settings: t.Settings) -> float:
    """The loss of the averaged weights on other text."""
    with torch.enable_grad():
        model = t.build_model(settings, SOLO)
    optimizers = t.Optimizers(model, settings, SOLO)
    average = t.WeightAverage(model, settings, SOLO)
    for step in range(settings.iterations):
        now = t.schedule_at(settings, step, 0.0)
        tokens = random_tokens(4, 33, seed=step)
        model.loss(tokens[:, :-1], tokens[:, 1:], model.order(now.recurrent)).backward()
        optimizers.step(now.lr_factor, now.momentum)
        average.update(average.rate(step + 1), optimizers.skip)
        average.after_step(step + 1, optimizers.skip, now.snapshot)
    average.apply()
    tokens = random_tokens(4, 33, seed=99)
    with torch.no_grad():
        return float(model.loss(tokens[:, :-1], tokens[:, 1:], model.order(True)))


# Most cases have one value that is the default: the loss with it is found once.
loss_of = functools.cache(train)

LOOP = {"NUM_LOOPS": "1", "LOOP_START": "0", "LOOP_END": "1"}
RECUR = {"RECUR_LAYERS": "0,1"}
UNTIED = {"TIE_EMBEDDINGS": "0"}
TWO_LOSSES = [  # name, two values, what else is set
    ("GRAD_CLIP_NORM", "0", "0.01", {}),
    ("BETA1", "0.9", "0.5", {}),
    ("BETA2", "0.95", "0.5", {}),
    ("ADAM_EPS", "1e-8", "1e-2", {}),
    ("MIN_LR", "0", "0.5", {}),
    ("WARMDOWN_SHAPE", "linear", "cosine", {}),
    ("MUON_MOMENTUM_WARMUP_START", "0.5", "0.9", {}),
    ("MUON_MOMENTUM_WARMUP_STEPS", "1", "100", {}),
    ("MUON_WD", "0.1", "9", {}),
    ("EMBED_WD", "0.1", "9", {}),
    ("ADAM_WD", "0", "9", {}),
    ("TIE_EMBEDDINGS", "0", "1", {}),
    ("EMBED_LR", "0.01", "0.1", UNTIED),
    ("HEAD_LR", "0.01", "0.1", UNTIED),
    ("TIED_EMBED_INIT_STD", "0.005", "0.05", {}),
    ("LN_SCALE", "0", "1", {}),
    ("ROPE_BASE", "10000", "50", {}),
    ("ROPE_DIMS", "4", "8", {}),
    ("XSA_LAST_N", "0", "2", {}),
    ("SWA_ENABLED", "0", "1", {}),
    ("EMA_ENABLED", "0", "1", {}),
    ("SWA_EVERY", "1", "2", {"SWA_ENABLED": "1"}),
    ("SWA_START_FRAC", "0.3", "1", {"SWA_ENABLED": "1"}),
    ("NUM_LOOPS", "0", "1", {"LOOP_START": "0", "LOOP_END": "1"}),
    ("LOOP_START", "0", "1", LOOP),
    ("LOOP_END", "1", "2", LOOP),
    ("ENABLE_LOOPING_AT", "0", "0.5", LOOP),
    ("RECUR_LAYERS", "0", "1", {}),
    ("RECUR_MODE", "block", "layer", RECUR),
    ("RECUR_REPEATS", "1", "2", RECUR),
    ("RECUR_START_FRAC", "0", "0.5", RECUR),
]


@pytest.mark.parametrize(
    ("name", "one", "other", "beside"), TWO_LOSSES, ids=[case[0] for case in TWO_LOSSES]
)
def test_two_values_give_two_losses(name, one, other, beside):
    first, second = (loss_of(read(beside | {name: value})) for value in (one, other))
    assert first != second


@pytest.mark.parametrize("case", [{}, UNTIED, LOOP, RECUR, {"SWA_ENABLED": "1"}], ids=str)
def test_neither_loss_is_so_by_chance(case):
    settings = read(case)
    assert train(settings) == train(settings)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("TTT_GRAD_CLIP", "0.01", "1"),
        ("TTT_FREEZE_BLOCKS", "0", "2"),
        ("TTT_MOMENTUM", "0", "0.9"),
    ],
)
def test_two_values_give_two_scores(name, one, other):
    validation = validation_set(document_stream(200))
    losses = []
    for value in (one, other):
        names = tiny_environment(ttt_lr=1.0)
        settings, _ = t.read_settings(names | {name: value})
        with torch.enable_grad():
            model = t.build_model(settings, SOLO)
        losses.append(t.Evaluator(model, settings, SOLO, validation).evaluate().val_loss)
    assert losses[0] != losses[1]


def test_exclusive_attention_reads_nothing_along_a_tokens_own_value():
    y, value = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    y = t.without_own_value(y, value)
    along = (y.unflatten(2, (2, 2)) * value.unsqueeze(3)).sum(-1)  # two heads share a value
    assert along.abs().max() < 1e-5
    model = t.build_model(t.read_settings(tiny_environment(xsa_last_n=1))[0], SOLO)
    assert not model.blocks[1].mixer.exclusive  # layer 1 of 0 to 2 is the one of attention
    model = t.build_model(t.read_settings(tiny_environment(xsa_last_n=2))[0], SOLO)
    assert model.blocks[1].mixer.exclusive


def test_frozen_blocks_stay_while_the_rest_adapts():
    settings, _ = t.read_settings(tiny_environment(ttt_lr=1.0, ttt_freeze_blocks=2))
    model = t.build_model(settings, SOLO)
    before = {name: p.clone() for name, p in model.named_parameters()}
    t.Evaluator(model, settings, SOLO, validation_set(document_stream(200))).evaluate()
    for name, p in model.named_parameters():
        frozen = name.startswith(("blocks.0.", "blocks.1."))
        assert torch.equal(p, before[name]) or not frozen, name
    assert not torch.equal(model.embedding.weight, before["embedding.weight"])
    assert any(
        not torch.equal(p, before[name])
        for name, p in model.named_parameters()
        if name.startswith("blocks.2.")
    )


def test_an_output_matrix_of_its_own_has_8_bits_a_rate_and_the_hessian_of_hidden_states():
    settings, _ = t.read_settings(tiny_environment(tie_embeddings=0, head_lr=0.5, embed_lr=0.25))
    model = t.build_model(settings, SOLO)
    assert not torch.equal(model.output_embedding.weight, model.embedding.weight)
    limits = t.grid_limits(model)
    assert bool((limits["output_embedding.weight"] == t.INT8_MAX).all())
    hessians, _ = t.collect_costs(model, random_tokens(4, 32).split(2), SOLO)
    assert "output_embedding.weight" in hessians
    assert "embedding.weight" not in hessians
    rates = {}
    for group in t.Optimizers(model, settings, SOLO).adam.param_groups:
        rates |= {id(p): group["base_lr"] for p in group["params"]}
    assert rates[id(model.output_embedding.weight)] == 0.5
    assert rates[id(model.embedding.weight)] == rates[id(model.bigram_embedding.weight)] == 0.25
