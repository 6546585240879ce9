"""Settings: what is read from the environment, what is refused, and what --help shows."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import train_gpt as t
from tests import bit_equal, forked
from tests.support import (
    PATIENCE,
    SOLO,
    bounded,
    process_environment,
    run_environment,
    run_here,
    tiny,
    with_settings,
)

NAMES = {f.name.upper() for f in dataclasses.fields(t.Settings)}


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("1", bool, True),
        ("false", bool, False),
        (" 12 ", int, 12),
        ("1_048_576", int, 1_048_576),
        ("-1", int, -1),
        ("9" * 400, int, int("9" * 400)),
        ("3e-3", float, 0.003),
        ("7", float, 7.0),
        (" kept as it is ", str, " kept as it is "),
    ],
)
def test_values_get_the_type_of_the_default(text, kind, value):
    parsed = t.parse_value("NAME", text, kind)
    assert parsed == value
    assert type(parsed) is kind


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("2", bool),
        ("yes", bool),
        ("", bool),
        ("1.0", int),
        ("1e3", int),
        ("", int),
        ("0,1", float),
        ("9" * 5000, int),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(text, kind):
    with pytest.raises(t.UserError, match="NAME="):
        t.parse_value("NAME", text, kind)


FLOATS = [f.name.upper() for f in dataclasses.fields(t.Settings) if isinstance(f.default, float)]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("name", FLOATS)
def test_what_is_no_finite_number_is_refused_with_the_range_under_every_name(name, text):
    value = str(float(text))
    said = rf"{name}={value} must be from (-?\d+|above 0) to (\d+|below 1) \("
    tied = {"TIE_EMBEDDINGS": "0"} if name in ("EMBED_LR", "HEAD_LR") else {}
    settings, _ = t.read_settings({name: text} | tied)
    with pytest.raises(t.UserError, match=f"^{said}"):
        t.check_values(settings)
    for other, (ours, convert) in t.ALIASES.items():
        if ours == name and convert is None:
            with pytest.raises(t.UserError, match=f"^{other} is {name} here: {said}"):
                t.read_settings({other: text})


BOUNDS = [f for f in dataclasses.fields(t.Settings) if isinstance(f.default, (int, float))]
BOUNDS = [f for f in BOUNDS if not isinstance(f.default, bool) and "|" not in f.metadata["unit"]]


@pytest.mark.parametrize("field", BOUNDS, ids=lambda field: field.name)
def test_a_number_is_refused_only_outside_the_range_that_the_line_names(field):
    low, high = field.metadata["low"], field.metadata["high"]
    for value in (low - 1, high + 1, 0, 1, 0.0, 1.0):
        settings = t.replace(t.Settings(), **{field.name: type(field.default)(value)})
        if low <= value <= high:
            t.check_values(settings)
            continue
        with pytest.raises(t.UserError) as refused:
            t.check_values(settings)
        text = str(refused.value).split(" must be from ")[1]
        least, most = re.fullmatch(r"(.+) to (.+) \(.*\)", text).groups()
        above = value > 0 if least == "above 0" else value >= int(least)
        below = value < 1 if most == "below 1" else value <= int(most)
        assert not (above and below)


ROOT = Path(t.__file__).parent


def test_a_variable_overrides_the_preset_and_the_preset_the_default():
    settings, given = t.read_settings({"PRESET": "tiny", "MODEL_DIM": "64"})
    assert (settings.model_dim, settings.num_heads, settings.qk_gain_init) == (64, 4, 1.5)
    assert given == {"preset", "model_dim"}


def test_lists_say_which_layers_are_mamba_and_have_an_mlp():
    model = t.build_model(tiny(num_layers=6, mamba_layers="0-1,4,5", mlp_layers="0,2,4-5"), SOLO)
    assert "".join(type(block.mixer).__name__[0] for block in model.blocks) == "MMAAMM"
    assert [block.mlp is not None for block in model.blocks] == [
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    assert all(block.mlp is None for block in t.build_model(tiny(mlp_layers="none"), SOLO).blocks)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("TRAIN_BATCH_TOKEN", "TRAIN_BATCH_TOKENS"),
        ("WARMDOWN_ITER", "WARMDOWN_ITERS"),
        ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("NUMLAYERS", "NUM_LAYERS"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("TTT_EPOCH", "TTT_EPOCHS"),
        ("MAMBA_STATE", "MAMBA_D_STATE"),
        ("MUON_MOMENTUM_WARM_UP", "MUON_MOMENTUM_WARMUP_ST"),
        ("MODEL_DMI", "MODEL_DIM"),
        ("ITERATION", "ITERATIONS"),
        ("TRAIN_SEQ_LENGTH", "TRAIN_SEQ_LEN"),
        ("TRAINING_BATCH_TOKENS", "TRAIN_BATCH_TOKENS"),
        ("GPTQ_CLIP_SIGMA", "GPTQ_CLIP_SIGMAS"),
        ("MLP_MULTIPLE", "MLP_MULT"),
        ("MLP_MULTIPLIER", "MLP_MULT"),
        ("MATRIX_LEARNING_RATE", "MATRIX_LR"),
        ("HEAD_LEARNING_RATES", "HEAD_LR"),
        ("MODEL_DIMENSION", "MODEL_DIM"),
        ("VOCABULARY_SIZE", "VOCAB_SIZE"),
        ("ADAM_EPSILON", "ADAM_EPS"),
    ],
)
def test_a_misspelt_variable_is_refused_and_the_nearest_name_offered(wrong, meant):
    with pytest.raises(t.UserError, match=f"{wrong} is not a setting; did you mean {meant}"):
        t.read_settings({wrong: "1"})


@pytest.mark.parametrize(
    "wrong", ["preset", "seed", "run_id", "log_dir", "vocab_size", "Beta1", "lr", "n_layer"]
)
def test_a_name_in_lower_case_is_refused_unless_the_right_one_is_there(wrong):
    right = wrong.upper()
    with pytest.raises(t.UserError, match=f"{wrong} is not a setting: write {right}, in capitals"):
        t.read_settings({wrong: "1"})
    if wrong in ("preset", "seed", "run_id", "log_dir"):  # as in: RUN_ID=$run_id
        value = {"preset": "tiny"}.get(wrong, "1")
        assert wrong in t.read_settings({wrong: value, right: value})[1]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("MUON_FOO", "see --help"),
        ("LEARNINGRATE", "MATRIX_LR, "),
        ("BASE_LEARNING_RATE", "MATRIX_LR, "),
        ("EMA_MODEL", "see --help"),
    ],
)
def test_no_name_is_offered_that_is_far_off_or_refused(wrong, hint):
    with pytest.raises(t.UserError, match=f"{wrong} is not a setting; {hint}"):
        t.read_settings({wrong: "1"})


# MAMBA_EXE and MAMBA_ROOT_PREFIX are set in every shell of the micromamba package manager,
# MAMBA_FORCE_BUILD is how mamba_ssm is built from source.
ORDINARY = """
    _ __ __CF_USER A PATH HOME SHELL TERM LANG LC_ALL PYTHONPATH VIRTUAL_ENV LD_LIBRARY_PATH TMPDIR
    HOSTNAME http_proxy no_proxy
    RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT
    TORCHELASTIC_RUN_ID OMP_NUM_THREADS
    CUDA_VISIBLE_DEVICES NCCL_DEBUG TORCH_LOGS TOKENIZERS_PARALLELISM
    PYTORCH_CUDA_ALLOC_CONF HF_HOME
    WANDB_MODE SLURM_JOB_ID RUNPOD_POD_ID RUNPOD_GPU_COUNT CONDA_PREFIX MAMBA_EXE
    MAMBA_ROOT_PREFIX MAMBA_FORCE_BUILD
    TORCHINDUCTOR_CACHE_DIR TORCHINDUCTOR_FX_GRAPH_CACHE TRITON_CACHE_DIR MAMBA_USER
    MAMBA_USER_ID MAMBA_USER_GID
    MAMBA_SKIP_CUDA_BUILD MAMBA_FORCE_CXX11_ABI MAMBA_NO_BANNER NUM_THREADS NUM_WORKERS
    NUM_GPUS MODEL_DIR MODEL_PATH
    MODEL_NAME COMPILER COMPILE_THREADS ARTIFACTS ARTIFACT_DIR LOGDIR LOGS LOG_LEVEL
    DEVICES DEVICE_ID ROPE PRESETS
    HEAD LAYER MODEL MODELS QUANTIZE DETERMINISTIC_BUILD CALIBRATION_DIR MAMBA_DEFAULT_ENV
    SEEDS RUN_NAME RUN_DIR DATA_DIR DATASET_PATH TRAIN_DATA VOCAB TOKENIZER PROFILE LAYERS_DIR
    USER LOGNAME MAIL PWD OLDPWD SHLVL EDITOR LS_COLORS LESSOPEN LESSCLOSE DEBIAN_FRONTEND
    SSH_CONNECTION SSH_CLIENT SSH_TTY SSH_AUTH_SOCK TMUX TMUX_PANE TERM_PROGRAM XDG_SESSION_ID
    XDG_RUNTIME_DIR DBUS_SESSION_BUS_ADDRESS LIBRARY_PATH PYTHONUNBUFFERED PYTHONIOENCODING
    PYTHONDONTWRITEBYTECODE PIP_NO_CACHE_DIR UV_CACHE_DIR CONDA_DEFAULT_ENV CUDA_HOME CUDA_VERSION
    CUDA_MODULE_LOADING CUDA_DEVICE_MAX_CONNECTIONS CUBLAS_WORKSPACE_CONFIG NVARCH
    NV_CUDA_LIB_VERSION NV_CUDNN_VERSION NV_LIBNCCL_PACKAGE NVIDIA_VISIBLE_DEVICES
    NVIDIA_REQUIRE_CUDA NVIDIA_DRIVER_CAPABILITIES NVIDIA_PRODUCT_NAME NCCL_IB_DISABLE
    NCCL_SOCKET_IFNAME NCCL_P2P_DISABLE NCCL_NVLS_ENABLE GLOO_SOCKET_IFNAME TORCH_HOME
    TORCH_CUDA_ARCH_LIST TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_EXTENSIONS_DIR MKL_NUM_THREADS
    OPENBLAS_NUM_THREADS OMP_PROC_BIND KMP_AFFINITY LD_PRELOAD MAX_JOBS HF_HUB_CACHE HF_TOKEN
    HUGGING_FACE_HUB_TOKEN HF_HUB_ENABLE_HF_TRANSFER HF_DATASETS_CACHE TRANSFORMERS_CACHE
    WANDB_API_KEY WANDB_PROJECT WANDB_RUN_ID SLURM_NTASKS SLURM_STEP_GPUS SLURM_TIME_LIMIT
    RUNPOD_API_KEY RUNPOD_VOLUME_ID RUNPOD_PUBLIC_IP PUBLIC_KEY JUPYTER_PASSWORD JUPYTER_TOKEN
    CONTAINER_ID CONTAINER_API_KEY VAST_CONTAINERLABEL DATA_DIRECTORY GPU_COUNT GPU_NAME
    TOKEN_PATH DATABASE_PATH DATA_PATH_HOST DATA_ROOT MODEL_ID EVAL_TEMPLATE EMBEDDING_DIM
    TF_CPP_MIN_LOG_LEVEL GIT_AUTHOR_NAME AWS_REGION NODE_RANK NNODES NODE_NAME POD_NAME HOST_IP
"""


@pytest.mark.parametrize("variable", ORDINARY.split())
def test_ordinary_variables_are_not_taken_for_misspelt_ones(variable):
    t.refuse_misspelt({variable: "1"})


def test_a_name_that_others_have_too_is_warned_of_unless_the_setting_is_there():
    (line,) = t.translate_names({"DATA_DIR": "d", "OUTPUT_DIR": "o", "LOG_DIR": "l"})[1]
    assert line == "warning: DATA_DIR is not read; DATA_PATH is the setting"
    assert set(t.UNREAD.values()) <= NAMES
    assert not t.UNREAD.keys() & (NAMES | t.ALIASES.keys() | t.REFUSED.keys())
    for name in t.UNREAD:
        t.refuse_misspelt({name: "1"})


def test_an_unknown_preset_is_refused_and_all_names_are_listed():
    with pytest.raises(t.UserError, match="PRESET=tny should be one of default, short, .* tiny"):
        t.read_settings({"PRESET": "tny"})


def test_apples_gpus_are_refused_in_one_line():
    with pytest.raises(t.UserError, match="^DEVICE=mps should be one of auto, cuda, cpu$"):
        t.validate_settings(tiny(device="mps"), 1)


@pytest.mark.parametrize("preset", t.PRESETS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_preset_is_valid_on_every_number_of_ranks(preset, world_size):
    t.validate_settings(t.read_settings({"PRESET": preset})[0], world_size)


NO_GRIDS = {"TRELLIS_STATES": 0, "SDCLIP_BY_MATRIX": 0.0, "SDCLIP_BY_ROW": 0.0}
YIELDING = [
    ({"QUANTIZER": "round"}, NO_GRIDS),
    ({"QUANTIZER": "ternary"}, NO_GRIDS | {"SPELLING_FEATURES": 0}),
    ({"LATE_QAT_THRESHOLD": "0.1"}, NO_GRIDS | {"SPELLING_FEATURES": 0}),
    ({"QUANTIZER": "dsq", "SDCLIP_BY_ROW": "0"}, NO_GRIDS),
    ({"TRAIN_SEQ_LEN": "256"}, {}),
    ({"TRAIN_SEQ_LEN": "256", "EVAL_MODE": "sliding"}, {"EVAL_STRIDE": 64}),
    ({"MAX_WALLCLOCK_SECONDS": "5"}, {"EXPORT_RESERVE_SECONDS": 1.0}),
    ({"MLP_MULT": "3"}, {}),
    ({"TTT_LR": "0.1"}, {"EVAL_MODE": "sliding"}),
    ({"TTT_LR": "0.1", "TRAIN_SEQ_LEN": "256"}, {"EVAL_MODE": "sliding", "EVAL_STRIDE": 64}),
    ({"EVAL_STRIDE": "64"}, {"EVAL_MODE": "sliding"}),
    ({"EVAL_OVERLAP": "1024", "TTT_EPOCHS": "1"}, {"EVAL_MODE": "stateful"}),
    ({"TTT_ENABLED": "0", "TTT_LORA_LR": "0.001"}, {}),
    ({"TTT_OPTIMIZER": "sgd"}, {"EVAL_MODE": "sliding"}),
    ({"EVAL_OVERLAP": "256"}, {"EVAL_MODE": "stateful", "TTT_CHUNK_TOKENS": 32_256}),
]


@pytest.mark.parametrize("preset", ["default", "short"])
@pytest.mark.parametrize(("typed", "yielding"), YIELDING, ids=str)
def test_what_the_recipe_has_yields_to_what_is_typed(preset, typed, yielding):
    """And no other setting does; the log's line names those that did."""
    environment = {"PRESET": preset} | typed
    settings, given = t.read_settings(environment)
    t.validate_settings(settings, 1)
    wanted = t.PRESETS[preset] | {name: getattr(settings, name) for name in given & {*t.FIELDS}}
    wanted |= {name.lower(): value for name, value in yielding.items()}
    assert dataclasses.asdict(settings) == dataclasses.asdict(t.Settings(**wanted))
    for name, value in yielding.items():
        assert type(getattr(settings, name.lower())) is type(value)
    line = t.describe_room(settings, given)
    told = {name: value for name, value in yielding.items() if name not in typed}
    pairs = dict(word.split("=") for word in line.partition(": ")[2].split())
    assert pairs == {name: t.shown(value) for name, value in told.items()}
    typed_too = environment | {name: str(value) for name, value in yielding.items()}
    again, given = t.read_settings(typed_too)  # as one had to before, and may
    assert again == settings
    assert t.describe_room(again, given) == ""


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ({"QUANTIZER": "round", "TRELLIS_STATES": "8"}, "^QUANTIZER=round needs TRELLIS_STATES=0$"),
        ({"LATE_QAT_THRESHOLD": "0.1", "SPELLING_FEATURES": "9"}, "needs SPELLING_FEATURES=0$"),
        ({"TRAIN_SEQ_LEN": "256", "EVAL_STRIDE": "257"}, "EVAL_STRIDE=257 is longer"),
        ({"MAX_WALLCLOCK_SECONDS": "5", "EXPORT_RESERVE_SECONDS": "5"}, "leaves no time"),
        ({"EVAL_STRIDE": "2049"}, "EVAL_STRIDE=2049 is longer"),
        ({"EXPORT_RESERVE_SECONDS": "600"}, "leaves no time"),
    ],
    ids=str,
)
def test_two_typed_settings_that_contradict_each_other_are_refused(typed, named):
    """By the typed one alone that would have to change; and one that fits no recipe's."""
    settings, _ = t.read_settings(typed)
    with pytest.raises(t.UserError, match=named):
        t.validate_settings(settings, 1)


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ({"EVAL_STRIDE": "64", "TTT_LORA_RANK": "3"}, "EVAL_STRIDE"),
        ({"EVAL_STRIDE": "64", "EVAL_OVERLAP": "1024"}, "EVAL_OVERLAP"),
        ({"PRESET": "tiny", "EVAL_STRIDE": "8", "EVAL_OVERLAP": "9"}, "EVAL_OVERLAP"),
    ],
    ids=str,
)
def test_typed_settings_that_no_mode_reads_together_are_refused(typed, named):
    """One of them did nothing, without a word; then the other was not named, which is to go."""
    settings, given = t.read_settings(typed)
    (other,) = typed.keys() - {named, "PRESET"}
    said = f"^{named} means nothing with EVAL_MODE=[a-z]+, and no mode reads it beside {other}: un"
    with pytest.raises(t.UserError, match=said):
        t.refuse_idle(settings, given)
    t.refuse_idle(*t.read_settings({name: typed[name] for name in typed if name != named}))


@pytest.mark.parametrize("preset", ["default", "tiny"])
@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize(
    ("name", "values"),
    [("EVAL_OVERLAP", [1, 64, 100, 255]), ("EVAL_STRIDE", [1, 100, 256]), ("TTT_EPOCHS", [0, 3])],
)
def test_a_setting_that_takes_a_mode_along_ends_in_a_run(preset, world_size, name, values):
    """EVAL_OVERLAP took one along whose strides were no part of the recipe's chunks."""
    for value in values:
        environment = {"PRESET": preset, name: str(value), "WORLD_SIZE": str(world_size)}
        settings, given = t.read_settings(environment)
        t.validate_settings(settings, world_size)
        t.refuse_idle(settings, given)
        assert settings.eval_mode == ("stateful" if name == "EVAL_OVERLAP" else "sliding")
        usual = t.Settings(**t.PRESETS[preset]).ttt_chunk_tokens
        assert usual / 2 < settings.ttt_chunk_tokens <= usual


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("mode", ["sliding", "stateful"])
@pytest.mark.parametrize("chunk", [1, 1000, 8191])
def test_chunks_that_cut_something_short_are_refused_with_one_that_fits(world_size, mode, chunk):
    settings = tiny(eval_mode=mode, ttt_chunk_tokens=chunk, train_batch_tokens=768, eval_overlap=9)
    said = "is not whole sequences for all ranks: TTT_CHUNK_TOKENS=([0-9]+) is$"
    if mode == "sliding" and chunk % world_size == 0 and chunk <= 32 * world_size:
        t.validate_settings(settings, world_size)
        return
    with pytest.raises(t.UserError, match=f"^TTT_CHUNK_TOKENS={chunk} {said}") as caught:
        t.validate_settings(settings, world_size)
    fits = int(re.search(said, str(caught.value)).group(1))
    t.validate_settings(with_settings(settings, ttt_chunk_tokens=fits), world_size)


@pytest.mark.parametrize("mode", t.EVAL_MODES)
def test_the_kind_of_test_time_training_goes_by_the_rule_of_its_settings(mode):
    """TTT_OPTIMIZER=sgd was taken beside documents, whose steps are others."""
    typed = {"TTT_OPTIMIZER": "sgd", "EVAL_MODE": mode}
    settings, given = t.read_settings(typed)
    if mode == "documents":
        with pytest.raises(t.UserError, match="^TTT_OPTIMIZER means nothing with EVAL_MODE=docu"):
            t.refuse_idle(settings, given)
    else:
        t.refuse_idle(settings, given)
        assert settings == t.Settings(eval_mode=mode)


def test_a_run_says_which_settings_yielded(monkeypatch, capsys, shards, tmp_path):
    changes = {"max_wallclock_seconds": 10, "tokenizer_path": "none"}  # it ends before it trains
    assert run_here(monkeypatch, run_environment(shards, tmp_path, **changes)) == 2
    line = "settings not given that yield to those given: EXPORT_RESERVE_SECONDS=2.0\n"
    assert line in capsys.readouterr().out


def test_small_settings_of_these_tests_are_valid():
    t.validate_settings(tiny(), 1)
    t.validate_settings(tiny(), 2)


IMPOSSIBLE = [
    ({"vocab_size": 0}, "VOCAB_SIZE"),
    ({"vocab_size": 70_000}, "VOCAB_SIZE"),
    ({"vocab_size": 1}, "VOCAB_SIZE"),
    ({"num_layers": 0}, "NUM_LAYERS"),
    ({"num_heads": 0}, "NUM_HEADS"),
    ({"num_heads": 5}, "NUM_HEADS"),
    ({"num_kv_heads": 3}, "NUM_KV_HEADS"),
    ({"model_dim": 36, "num_heads": 12, "num_kv_heads": 12}, "MODEL_DIM"),
    ({"mamba_head_dim": 24}, "MAMBA_HEAD_DIM"),
    ({"mamba_head_dim": 0}, "MAMBA_HEAD_DIM"),
    ({"mamba_d_state": 12}, "MAMBA_D_STATE"),
    ({"mamba_d_state": 4}, "MAMBA_D_STATE"),
    ({"mamba_chunk_size": 48}, "MAMBA_CHUNK_SIZE"),
    ({"mamba_d_conv": 5}, "MAMBA_D_CONV"),
    ({"mamba_d_conv": 1}, "MAMBA_D_CONV"),
    ({"mamba_version": 4}, "MAMBA_VERSION"),
    ({"mamba_version": 2, "mamba_decay": "heavy_tail"}, "MAMBA_DECAY"),
    ({"mamba_expand": 0.001}, "MAMBA_EXPAND"),
    ({"mlp_mult": 0.001}, "MLP_MULT"),
    ({"mlp_mult": 1e308}, "MLP_MULT"),
    ({"mamba_d_state": 2048}, "MAMBA_D_STATE"),
    ({"mamba_expand": 1e308}, "MAMBA_EXPAND"),
    ({"scan_backend": "mamba_ssm"}, "SCAN_BACKEND"),
    ({"mamba_layers": "0,7"}, "MAMBA_LAYERS"),
    ({"mamba_layers": "0;1"}, "MAMBA_LAYERS"),
    ({"mamba_layers": "0-"}, "MAMBA_LAYERS"),
    ({"mamba_layers": "2-0"}, "MAMBA_LAYERS"),
    ({"mamba_layers": "0-99999999999"}, "MAMBA_LAYERS"),
    ({"num_layers": 10**9, "mamba_layers": "all"}, "NUM_LAYERS"),
    ({"mamba_layers": "-1"}, "MAMBA_LAYERS"),
    ({"mlp_layers": "0,7"}, "MLP_LAYERS"),
    ({"layer_order": "0,1"}, "leaves out a layer"),
    ({"layer_order": "0,1,2,3"}, "LAYER_ORDER"),
    ({"bigram_vocab_size": 1}, "BIGRAM_VOCAB_SIZE"),
    ({"bigram_dim": 0}, "BIGRAM_DIM"),
    ({"train_batch_tokens": 100}, "TRAIN_BATCH_TOKENS"),
    ({"micro_batch_tokens": 40}, "MICRO_BATCH_TOKENS"),
    ({"export_reserve_seconds": 600.0, "max_wallclock_seconds": 600.0}, "EXPORT_RESERVE_SECONDS"),
    ({"export_reserve_seconds": 0.0, "max_wallclock_seconds": 600.0}, "EXPORT_RESERVE_SECONDS"),
    ({"train_seq_len": 2**40}, "TRAIN_SEQ_LEN"),
    ({"calibration_tokens": 2**50}, "CALIBRATION_TOKENS"),
    ({"sample_tokens": 2**50}, "SAMPLE_TOKENS"),
    ({"muon_backend_steps": 2**50}, "MUON_BACKEND_STEPS"),
    ({"run_id": "a/b"}, "RUN_ID=a/b must be one file name"),
    ({"run_id": ".."}, "RUN_ID=.. must be one file name"),
    # Its log would be that of EVAL_ONLY=1 RUN_ID=a, whose score would count as its own.
    ({"run_id": "a.eval"}, "RUN_ID=a.eval ends as only the logs of EVAL_ONLY do"),
    ({"run_id": "é" * 116}, "at most 230 bytes"),
    ({"target_mb": 16.5}, "TARGET_MB"),
    ({"target_mb": 0.0}, "TARGET_MB"),
    ({"eval_stride": 33}, "EVAL_STRIDE"),
    ({"ttt_chunk_tokens": 100}, "TTT_CHUNK_TOKENS"),
    ({"eval_overlap": 32}, "EVAL_OVERLAP"),
    ({"eval_mode": "stateful", "eval_overlap": 12}, "TTT_CHUNK_TOKENS"),
    ({"ttt_momentum": 1.0}, "TTT_MOMENTUM"),
    ({"muon_momentum": 1.0}, "MUON_MOMENTUM"),
    ({"warmdown_fraction": 1.5}, "WARMDOWN_FRACTION"),
    ({"logit_softcap": 61.0}, "LOGIT_SOFTCAP"),
    ({"rope_fraction": -0.1}, "ROPE_FRACTION"),
    ({"iterations": 0}, "ITERATIONS"),
    ({"matrix_lr": -1.0}, "MATRIX_LR"),
    ({"seed": -1}, "SEED"),
    ({"max_wallclock_seconds": -1.0}, "MAX_WALLCLOCK_SECONDS"),
]


@pytest.mark.parametrize(
    ("changes", "named"),
    IMPOSSIBLE,
    ids=[", ".join(f"{k}={v}" for k, v in c.items()) for c, _ in IMPOSSIBLE],
)
def test_impossible_settings_are_refused_by_name(changes, named):
    with bounded(), pytest.raises(t.UserError, match=named):
        t.validate_settings(tiny(**changes), 1)


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [({"train_batch_tokens": 96}, 2), ({"ttt_chunk_tokens": 96}, 2)],
)
def test_what_one_rank_can_share_out_more_may_not(changes, world_size):
    t.validate_settings(tiny(**changes), 1)
    with pytest.raises(t.UserError, match="ranks"):
        t.validate_settings(tiny(**changes), world_size)


def test_scoring_asks_nothing_of_the_batches_of_training():
    """An artifact that one rank has written can be scored by three."""
    settings = tiny(eval_only=True, train_batch_tokens=100, eval_mode="plain", ttt_enabled=False)
    t.validate_settings(settings, 3)
    with pytest.raises(t.UserError, match="TRAIN_BATCH_TOKENS=100 is not a multiple"):
        t.validate_settings(with_settings(settings, eval_only=False), 3)


@pytest.mark.parametrize("field", dataclasses.fields(t.Settings), ids=lambda field: field.name)
def test_no_single_value_gets_past_validation_as_another_exception(field):
    """Every setting at odd values: validation passes or raises UserError, and never divides by
    zero.
    """
    values = {
        int: (-1, 0, 1, 3, 10**30),
        float: (-0.5, 0.0, 1e-12, 1.5, 1e308),
        bool: (False, True),
    }
    with bounded():
        for value in values.get(type(field.default), ("", "none", "0", "x,y", "9")):
            try:
                t.validate_settings(with_settings(tiny(), **{field.name: value}), 1)
            except t.UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("name", t.PRESETS)
def test_what_help_says_of_a_preset_can_be_typed(name):
    """Line by line; switches as 0 and 1, as all the rest of --help has them."""
    lines = [line.strip() for line in t.describe_preset(name).splitlines()[1:]]
    typed = dict(line.split("=", 1) for line in lines if "=" in line)
    assert not {"True", "False"} & set(typed.values())
    settings, _ = t.read_own(typed)
    assert with_settings(settings, preset=name) == t.Settings(**t.PRESETS[name] | {"preset": name})


def test_help_lists_every_setting_with_its_default_and_every_preset():
    lines = t.help_text().splitlines()
    for field in dataclasses.fields(t.Settings):
        (line,) = (x for x in lines if x.split()[:1] == [field.name.upper()])
        default = int(field.default) if isinstance(field.default, bool) else field.default
        assert str(default) in line
        assert field.metadata["help"] in line
    for name in t.PRESETS:
        assert any(x.strip().startswith(f"PRESET={name}:") and len(x) > 20 for x in lines)


def test_presets_name_only_settings_that_exist():
    fields = {f.name: f for f in dataclasses.fields(t.Settings)}
    for values in t.PRESETS.values():
        for name, value in values.items():
            assert type(value) is type(fields[name].default), name


# ---- The process -------------------------------------------------------------------------------

# What stands in the process before and after the script is imported, and after prepare_torch().
LOOK = """
import json, os, signal, sys
import torch
sys.path.insert(0, sys.argv[1])
def look():
    cuda = torch.backends.cuda
    return {
        "environment": dict(os.environ),
        "kernels": [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
                    cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()],
        "signals": [str(signal.getsignal(number)) for number in (2, 10, 15)],
        "dtype": str(torch.get_default_dtype()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "random": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
    }
before = look()
import train_gpt
after = look()
train_gpt.prepare_torch()
prepared = look()
print(json.dumps([before, after, prepared]))
"""


def test_importing_the_script_changes_nothing_in_the_process():
    root = Path(t.__file__).parent
    bare = {"PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", LOOK, str(root)]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=PATIENCE)
    before, after, prepared = json.loads(done.stdout or "[]") or pytest.fail(done.stderr)
    assert after == before
    changed = {name for name in before if prepared[name] != before[name]}
    assert changed == {"environment", "kernels"}  # so looking shows what is changed
    assert prepared["kernels"] == [True, False, True, True]


def test_preparing_twice_is_preparing_once():
    t.prepare_torch()
    t.prepare_torch()
    assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch._dynamo.config.recompile_limit == 64
    assert not torch._inductor.config.triton.descriptive_names


TORCHRUN = {"LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, (0, 0, 1)),
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""}, (0, 0, 1)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 0, 1)),
        (TORCHRUN | {"WORLD_SIZE": "8", "RANK": "3"}, (3, 1, 8)),
    ],
)
def test_a_process_knows_its_place_among_the_ranks(environment, launch):
    assert t.read_launch(environment) == launch


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "two"}, 'WORLD_SIZE="two"'),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1"),
        ({"RANK": "1"}, "RANK=1"),
        ({"WORLD_SIZE": "2"}, "without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"WORLD_SIZE": "2"}, "without RANK: "),
        (TORCHRUN | {"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2"),
        ({"RANK": "x\n"}, "RANK="),
        ({"LOCAL_RANK": "1.5"}, 'LOCAL_RANK="1.5"'),
        ({"RANK": "9" * 5000}, "RANK="),
    ],
)
def test_an_impossible_place_among_the_ranks_is_one_line(environment, named):
    with pytest.raises(t.UserError, match=named) as caught:
        t.read_launch(environment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("port", ["x", "99999999", ""])
def test_ranks_that_cannot_meet_are_one_line(monkeypatch, port):
    launch = TORCHRUN | {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": port}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        t.UserError, match="cannot meet the other ranks|without MASTER_PORT"
    ) as caught:
        t.start_ranks(tiny(device="cpu"))
    assert str(caught.value).isprintable()


def test_such_a_mistake_ends_the_script_with_status_2_and_one_line():
    environment = process_environment({"PRESET": "tiny", "WORLD_SIZE": "2"})
    done = forked.run(
        [sys.executable, t.__file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("train_gpt.py: error: ")


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "0"}, {"RUN_ID": "first\r"}])
def test_so_do_others(monkeypatch, capsys, variables):
    monkeypatch.setattr(os, "environ", {"PRESET": "tiny"} | variables)
    monkeypatch.setattr(sys, "argv", [t.__file__])
    assert t.run() == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("train_gpt.py: error: ")


def test_help_is_there_without_docstrings(monkeypatch, capsys, tmp_path):
    """As python -OO, which compiles all of torch anew, leaves them out of the script."""
    path = tmp_path / "train_gpt.py"
    path.write_bytes(Path(t.__file__).read_bytes() + b"# another file, with operators of its own\n")
    module = types.ModuleType("train_gpt_without_docstrings")
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(path.read_bytes(), str(path), "exec", optimize=2), vars(module))
    assert module.__doc__ is None and module.Model.__doc__ is None
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    assert module.run() == 0
    assert "MODEL_DIM" in capsys.readouterr().out


PROGRAMS = [path for folder in ("tools", "bench", "data") for path in (ROOT / folder).rglob("*.py")]
# They say nothing that is not ASCII, or only to a program.
PLAIN = {"density.py", "hand_over.py", "make_venv.py", "watch.py", "guard.py", "enter.py"}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_other_programs_need_no_docstrings_and_no_console_that_shows_every_sign(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"__doc__[.\[]", text)
    if 'if __name__ == "__main__":' in text and path.name not in PLAIN:
        assert re.search(r"run_command\(|tolerate_consoles\(|\.reconfigure\(", text)


# ---- Text that would spoil a line or a header ---------------------------------------------------


@pytest.mark.parametrize("name", ["mamba_layers", "mlp_layers", "layer_order"])
def test_white_space_in_a_list_of_layers_is_gone_once_it_is_read(name):
    settings, _ = t.read_settings({"PRESET": "tiny", name.upper(): "0,\t1 , 2-3\r\n"})
    assert getattr(settings, name) == "0,1,2-3"
    t.validate_settings(dataclasses.replace(settings, mamba_layers="0,1,3"), 1)


@pytest.mark.parametrize("name", ["mamba_layers", "mlp_layers", "layer_order"])
@pytest.mark.parametrize("text", ["0 1,2,3", "0\n1", "0,1 -3", "0,1,2, ,3"])
def test_white_space_is_no_comma(name, text):
    settings, _ = t.read_settings({"PRESET": "tiny", name.upper(): text})
    with pytest.raises(t.UserError, match=rf"{name.upper()}=.*(: no layer |line break)"):
        t.validate_settings(settings, 1)


@pytest.mark.parametrize("name", ["run_id", "log_dir", "artifact", "data_path", "resume"])
@pytest.mark.parametrize("text", ["a\r", "a\nb", "a\x1b[2J", " a", "a  b", "a\u2028b"])
def test_what_does_not_print_is_refused_in_names_and_paths(name, text):
    settings, _ = t.read_settings({"PRESET": "tiny", name.upper(): text})
    with pytest.raises(t.UserError, match=f"{name.upper()}=") as caught:
        t.validate_settings(settings, 1)
    assert str(caught.value).isprintable()


def test_no_folder_is_empty():
    """An empty DATA_PATH or LOG_DIR was the current folder, without a word; what may be left out,
    lists of layers, and the tokenizer of what needs none, may be empty.
    """
    may_be = {"run_id", "artifact", "eval_nll_path", "sample_prompt", "mamba_layers", "mlp_layers"}
    for name in may_be | {"tokenizer_path"}:
        t.validate_settings(t.read_settings({"PRESET": "tiny", name.upper(): ""})[0], 1)
    folders = [field.name for field in t.fields(t.Settings) if field.metadata["unit"] == "folder"]
    assert {"data_path", "log_dir"} <= set(folders)
    for name in folders:
        settings, _ = t.read_settings({"PRESET": "tiny", name.upper(): ""})
        with pytest.raises(t.UserError, match=f"{name.upper()}= is empty"):
            t.validate_settings(settings, 1)


def test_a_path_may_hold_bytes_that_are_no_text_and_a_prompt_may_not():
    paths = {"DATA_PATH": "d\udce4t", "LOG_DIR": "l\udce4g", "RUN_ID": "r\udce4n a"}
    t.validate_settings(t.read_settings({"PRESET": "tiny"} | paths)[0], 1)
    settings, _ = t.read_settings({"PRESET": "tiny", "SAMPLE_PROMPT": "a\udce4"})
    with pytest.raises(t.UserError, match="SAMPLE_PROMPT="):
        t.validate_settings(settings, 1)


@pytest.mark.parametrize(
    ("launch", "problem"),
    [
        ("a/b", "one file name"),
        ("a\r", "does not print"),
        ("a" * 230, "230 bytes"),
        ("none", "needs a RUN_ID"),
        (None, "needs a RUN_ID"),
    ],
)
def test_a_run_id_of_torchruns_is_checked_as_ours_is(monkeypatch, tmp_path, launch, problem):
    environment = {"PRESET": "tiny", "LOG_DIR": str(tmp_path), "TORCHELASTIC_MAX_RESTARTS": "1"}
    environment |= {"TORCHELASTIC_RUN_ID": launch} if launch else {}
    with pytest.raises(t.UserError, match=problem):
        t.prepare_run(environment)


def test_a_warning_at_a_line_of_ours_is_an_error():
    """Here and in tools, so that no run warns; libraries may warn of themselves."""
    line = compile("import warnings; warnings.warn('a')", "line", "exec")
    for module in ("train_gpt", "tools.explore", "data.prepare", "bench.bench"):
        with pytest.raises(UserWarning):
            exec(line, {"__name__": module})
    with pytest.warns(UserWarning):
        exec(line, {"__name__": "library"})


# ---- What a run could not finish -----------------------------------------------------------------

FEW_LAYERS = {"num_layers": 2, "mamba_layers": "none", "mlp_layers": "0"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mlp_mult": 30.0, "num_layers": 5}, "numbers, but an artifact has at most"),
        ({"mlp_mult": 20.0, "num_layers": 5}, r"2.3 bits each on the coarsest grid .* has 2\.1"),
        ({"mlp_mult": 20.0, "num_layers": 5, "quantizer": "ternary"}, ""),
        ({"mlp_mult": 20.0, "num_layers": 5, "sdclip_most": 32.0}, ""),
        (FEW_LAYERS | {"model_dim": 16, "mlp_mult": 60_000.0}, "GB for Hessians, and there are"),
        (FEW_LAYERS | {"model_dim": 16, "mlp_mult": 60_000.0, "quantizer": "round"}, ""),
    ],
    ids=str,
)
def test_a_model_that_could_not_be_exported_is_refused_before_it_is_trained(changes, problem):
    settings = t.Settings(**t.PLAIN | {"mamba_layers": "none"} | changes)
    t.validate_settings(settings, 1)
    with pytest.raises(t.UserError, match=problem) if problem else contextlib.nullcontext():
        t.check_size(t.model_skeleton(settings), 15.7e6, 64e9)


@pytest.mark.parametrize("recipe", [{}, t.PLAIN], ids=["default", "plain"])
def test_the_quantizer_that_a_wide_layer_needs_is_named_with_all_that_it_needs(recipe):
    """Typed as they are said, these settings are not refused in their turn."""
    settings = t.Settings(**recipe | FEW_LAYERS | {"model_dim": 16, "mlp_mult": 60_000.0})
    with pytest.raises(t.UserError, match="GB for Hessians") as refused:
        t.check_size(t.model_skeleton(settings), 15.7e6, 64e9)
    _, remedy = str(refused.value).split(" or take ")
    assert remedy.startswith("QUANTIZER=round")
    for name, text in (part.split("=") for part in remedy.split()):
        kind = type(getattr(settings, name.lower()))
        settings = with_settings(settings, **{name.lower(): t.parse_value(name, text, kind)})
    t.validate_settings(settings, 1)
    t.check_size(t.model_skeleton(settings), 15.7e6, 64e9)


@pytest.mark.parametrize("case", bit_equal.CASES)
def test_the_cases_of_bit_equality_are_settings_that_go_together(case):
    t.read_settings(bit_equal.COMMON | bit_equal.CASES[case][0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], "show nobody:train_gpt.py: .*; give a commit of this repository"),
        (["HEAD", "--cases", "tiny,x"], "(no such case: x; there are tiny, .*|.*give a commit.*)"),
    ],
)
def test_what_bits_cannot_be_compared_with_is_told_in_a_line(monkeypatch, capsys, arguments, said):
    """A traceback told it."""
    monkeypatch.setattr(sys, "argv", ["bit_equal.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        bit_equal.main()
    *_, line = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert re.search(f"error: .*{said}$", line), line


def test_no_loop_leaves_its_variables_among_the_scripts_globals():
    """A local that is misspelt as such a global would be no error."""
    plain = str | int | float | tuple | list | dict | set | None
    left = [name for name, x in vars(t).items() if name.islower() and isinstance(x, plain)]
    assert {name for name in left if not name.startswith("__")} <= {"tqdm", "triton"}


def test_the_largest_settings_overflow_nothing():
    changes = {"model_dim": 2**16, "num_heads": 8, "mamba_expand": 2.0**16, "mlp_mult": 2.0**16}
    settings = t.Settings(**changes, bigram_vocab_size=2**20, bigram_dim=2**16, num_layers=9)
    t.validate_settings(settings, 1)
    with pytest.raises(t.UserError, match="numbers, but an artifact"):
        t.model_skeleton(settings)


def test_names_too_long_for_their_files_are_refused_before_training(tmp_path):
    settings = tiny(artifact=str(tmp_path / ("a" * 250)), log_dir=str(tmp_path))
    with pytest.raises(t.UserError, match="File name too long"):
        t.check_outputs(settings)
    t.check_outputs(dataclasses.replace(settings, artifact=str(tmp_path / ("a" * 240))))


def test_a_cpu_without_memory_is_one_line():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert t.explain_failure(caught.value).startswith("out of memory: ")
