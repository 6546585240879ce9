"""Which backend computes the recurrence: what runs on a device with these layers, and why not."""

import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import train_gpt as t
from tests.support import PATIENCE, SOLO, random_tokens, tiny

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"90": (9, 232_448), "89": (8, 101_376), "80": (8, 166_912)}  # by compute capability
SIZES = {"mamba_d_state": 64, "mamba_head_dim": 64, "mamba_chunk_size": 64}


def choose(device: str, **changes) -> str:
    return t.choose_scan_backend(tiny(**(SIZES | changes)), torch.device(device))


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    """The device "cuda" is an H100 with compiled kernels, and without libraries."""
    if t.triton is None:
        pytest.skip("needs triton")
    monkeypatch.setattr(t, "kernel_limits", lambda device: LIMITS["90"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for module in ("causal_conv1d", "mamba_ssm"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails


@pytest.fixture
def installed(monkeypatch):
    """Both libraries, as far as importing them goes."""
    names = {"mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"}
    for name in names.union(*t.LIBRARIES.values()):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def test_auto_is_the_fastest_that_runs(installed):
    assert [choose("cuda", mamba_version=v) for v in (1, 2, 3)] == ["fused", "fused", "triton"]
    assert [choose("cpu", mamba_version=v) for v in (1, 2, 3)] == ["parallel", "chunked", "chunked"]
    assert choose("cuda", mamba_version=1, document_reset=True) == "parallel"
    assert choose("cuda", mamba_version=2, document_reset=True) == "fused"
    assert choose("cuda", mamba_decay="heavy_tail") == "chunked"


@pytest.mark.parametrize("version", t.SCAN_BACKENDS)
def test_what_is_asked_for_is_taken(version, installed):
    for name in t.SCAN_BACKENDS[version]:
        assert choose("cuda", mamba_version=version, scan_backend=name) == name


def test_without_libraries_auto_takes_chunks_for_mamba_2_and_says_what_the_first_mamba_lacks():
    assert choose("cuda", mamba_version=2) == "chunked"
    install = "pip install .* mamba-ssm causal-conv1d"
    for wanted in ("auto", "fused"):
        with pytest.raises(
            t.UserError, match=f"lacks a library .*{install}; what runs: parallel, sequential"
        ):
            choose("cuda", mamba_version=1, scan_backend=wanted)
    with pytest.raises(t.UserError, match=f"{install}; what runs: chunked, sequential"):
        choose("cuda", mamba_version=2, scan_backend="fused")
    assert choose("cuda", mamba_version=1, scan_backend="parallel") == "parallel"


def test_a_library_that_is_half_there_is_refused_in_one_line(installed, monkeypatch):
    """mamba_ssm may be built without the first Mamba's kernels, or for another triton."""
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    with pytest.raises(t.UserError, match="lacks a library .*selective_scan_cuda.*pip install"):
        choose("cuda", mamba_version=1)
    assert choose("cuda", mamba_version=2) == "fused"

    def fail(name):
        raise AttributeError("no attribute 'dot'\nin a kernel")

    monkeypatch.setattr(t.importlib, "import_module", fail)
    assert choose("cuda", mamba_version=2) == "chunked"
    with pytest.raises(t.UserError, match=r"lacks a library \(no attribute 'dot'\): pip") as error:
        choose("cuda", mamba_version=2, scan_backend="fused")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("window", "chunk"), [(8, 16), (32, 32), (40, 64), (4096, 1024)])
def test_a_chunk_is_no_longer_than_a_window(window, chunk):
    """What is padded to 1,024 tokens would take a thousand times the memory of 32."""
    settings = tiny(num_layers=1, mamba_layers="all", mamba_chunk_size=1024, train_seq_len=window)
    assert t.model_skeleton(settings).blocks[0].mixer.chunk_size == chunk


REFUSED = [  # device, changes, reason
    ("cpu", {"scan_backend": "triton"}, "triton needs a GPU; what runs: chunked, sequential"),
    ("cpu", {"scan_backend": "fused", "mamba_version": 1}, "fused needs a GPU"),
    ("cuda", {"scan_backend": "triton", "mamba_decay": "heavy_tail"}, "no other MAMBA_DECAY"),
    ("cuda", {"scan_backend": "triton", "mamba_head_dim": 8}, "needs MAMBA_HEAD_DIM of 16 and"),
    ("cuda", {"scan_backend": "triton", "mamba_d_state": 256}, "bytes of shared memory, this GPU"),
    ("cuda", {"scan_backend": "parallel"}, "parallel is no backend of MAMBA_VERSION=3"),
    ("cuda", {"scan_backend": "triton", "mamba_version": 2}, "no backend of MAMBA_VERSION=2"),
    ("cuda", {"scan_backend": "chunked", "mamba_version": 1}, "no backend of MAMBA_VERSION=1"),
    ("cuda", {"scan_backend": "fused", "mamba_version": 1, "document_reset": True}, "documents"),
    ("cuda", {"scan_backend": "fused", "mamba_version": 1, "mamba_d_state": 512}, "at most"),
    ("cuda", {"scan_backend": "chunked", "deterministic": True}, "DETERMINISTIC=1 excludes; what"),
    ("cuda", {"mamba_version": 2, "deterministic": True}, "DETERMINISTIC=1 excludes; .*: none"),
]


@pytest.mark.parametrize(("device", "changes", "reason"), REFUSED, ids=str)
def test_what_does_not_run_is_refused_with_the_reason(device, changes, reason, installed):
    with pytest.raises(t.UserError, match=f"^SCAN_BACKEND=.*{reason}"):
        choose(device, **changes)


def test_where_the_same_bits_are_wanted_what_gives_them_is_taken():
    assert choose("cuda", deterministic=True) == "triton"
    assert (
        choose("cuda", deterministic=True, mamba_version=1, scan_backend="parallel") == "parallel"
    )
    assert choose("cpu", deterministic=True, mamba_version=2) == "chunked"


def test_a_model_is_built_with_what_was_chosen_and_a_skeleton_needs_no_device(monkeypatch):
    settings = tiny(num_layers=1, mamba_layers="all")
    assert t.build_model(settings, SOLO).blocks[0].mixer.backend == "chunked"
    monkeypatch.setattr(t, "choose_scan_backend", None)
    assert t.model_skeleton(settings).blocks[0].mixer.backend == "sequential"


@pytest.mark.parametrize("capability", LIMITS)
def test_auto_finds_a_backend_for_every_size_that_is_accepted(capability, monkeypatch, installed):
    """Of any Mamba, on any GPU: what a fused backend cannot take, the next one computes."""
    monkeypatch.setattr(t, "kernel_limits", lambda device: LIMITS[capability])
    sides = itertools.product((1, 2, 3), (8, 16, 256, 1024), (8, 16, 128), (8, 64, 256, 4096))
    found = set()
    for version, state, head, chunk in sides:
        sizes = {"mamba_d_state": state, "mamba_head_dim": head, "mamba_chunk_size": chunk}
        settings = tiny(mamba_version=version, model_dim=64, **sizes)
        t.validate_settings(settings, 1)
        found.add((version, t.choose_scan_backend(settings, torch.device("cuda"))))
    usual = {
        (version, names[place]) for version, names in t.SCAN_BACKENDS.items() for place in (0, 1)
    }
    assert found == usual - {(2, "chunked")}


CORNERS_OF_LAYERS = [
    {"mamba_d_state": 8, "mamba_head_dim": 8, "mamba_chunk_size": 8, "mamba_d_conv": 2},
    {"mamba_d_state": 128, "mamba_head_dim": 64, "mamba_chunk_size": 65536},
    {"mamba_expand": 0.25, "mamba_head_dim": 8, "train_seq_len": 2},
]
CORNERS_OF_ATTENTION = [
    {"num_heads": 16, "num_kv_heads": 1, "rope_fraction": 0.0},
    {"num_heads": 1, "num_kv_heads": 1, "rope_fraction": 0.3},
    {"model_dim": 6, "num_heads": 3, "num_kv_heads": 3, "train_seq_len": 2},
]


@pytest.mark.parametrize("reset", [False, True], ids=["", "documents"])
@pytest.mark.parametrize(
    "changes",
    [{"mamba_version": v, "mamba_layers": "all"} | c for v in (1, 2, 3) for c in CORNERS_OF_LAYERS]
    + [{"mamba_layers": "none"} | changes for changes in CORNERS_OF_ATTENTION],
    ids=str,
)
def test_the_corners_of_what_is_accepted_train_and_generate(changes, reset):
    short = {"eval_stride": 1, "ttt_enabled": False}
    settings = tiny(num_layers=1, document_reset=reset, **short, **changes)
    t.validate_settings(settings, 1)
    model = t.build_model(settings, SOLO)
    tokens = random_tokens(2, settings.train_seq_len + 1, bos=True)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], model.order(True))
    loss.backward()
    assert 5 < loss.item() < 8
    assert t.generate(model, tokens[:, :1], 2).shape == (2, 2)


def test_in_the_interpreter_kernels_take_any_size(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("cpu", scan_backend="triton", mamba_d_state=8, mamba_chunk_size=256) == "triton"
    assert choose("cpu") == "chunked"  # unasked, a CPU interprets none


# ---- Sizes, against the compiler -----------------------------------------------------------------

CORNERS = {  # channels, state, chunk: what fits, what just does not, what no compiler takes
    "90": ((16, 16, 16), (128, 64, 64), (128, 128, 64), (8, 64, 64)),
    "89": ((32, 32, 32),),
    "80": ((16, 16, 16),),
}


@pytest.mark.parametrize("capability", CORNERS)
def test_what_is_taken_compiles_and_fits_and_what_is_refused_does_not(
    capability, monkeypatch, tmp_path
):
    monkeypatch.setattr(t, "kernel_limits", lambda device: LIMITS[capability])
    shapes = [",".join(map(str, shape)) for shape in CORNERS[capability]]
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", capability, *shapes],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    for line in map(json.loads, done.stdout.splitlines()):
        runs = line.get("shared", 1 << 30) <= LIMITS[capability][1]
        sizes = {"mamba_head_dim": line["channels"], "mamba_d_state": line["state"]}
        reason = t.why_not(
            "triton", tiny(**sizes, mamba_chunk_size=line["chunk"]), torch.device("cuda")
        )
        assert runs == (reason == ""), (line, reason)
    assert len(done.stdout.splitlines()) == len(shapes)


@pytest.mark.parametrize("capability", LIMITS)
def test_the_defaults_fit_where_they_are_known_to(capability, monkeypatch):
    monkeypatch.setattr(t, "kernel_limits", lambda device: LIMITS[capability])
    assert choose("cuda") == "triton"
    assert choose("cuda", mamba_d_state=128) == "triton"
