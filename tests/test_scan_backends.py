"""Which backend computes the recurrence: what runs on a device with these layers, and why not."""

import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import torch

import train_gpt as t
from tests.support import SOLO, lines_of_compile_kernels, random_tokens, slow, tiny

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "kernels.txt"
LIMITS = {  # by compute capability
    "80": (80, 166_912),
    "86": (86, 101_376),
    "89": (89, 101_376),
    "90": (90, 232_448),
    "100": (100, 232_448),
    "120": (120, 101_376),
}
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


def test_only_what_an_installation_mends_is_asked_to_be_installed(monkeypatch):
    """Whatever its words: any other reason leaves auto what is slower."""
    reasons = iter([f"is not mended by {t.INSTALL}", t.LacksLibrary("is away")])
    monkeypatch.setattr(t, "why_not_fused", lambda settings: next(reasons))
    assert choose("cuda", mamba_version=1) == "parallel"
    with pytest.raises(t.UserError, match="SCAN_BACKEND=fused is away; what runs: parallel"):
        choose("cuda", mamba_version=1)


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
    sides = itertools.product((1, 2, 3), (8, 16, 256, 1024), (8, 16, 128), (8, 32, 256, 4096))
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


def refused(shape: tuple[int, ...], capability: str, monkeypatch) -> str:
    """Why the kernels are not taken for heads, channels, state and chunk."""
    heads, channels, state, chunk = shape
    monkeypatch.setattr(t, "kernel_limits", lambda device: LIMITS[capability])
    sizes = {"mamba_head_dim": channels, "mamba_d_state": state, "mamba_chunk_size": chunk}
    settings = tiny(model_dim=heads * channels, mamba_expand=1.0, **sizes)
    return t.why_not("triton", settings, torch.device("cuda"))


CORNERS = {  # heads, channels, state, chunk: what fits, what does not, what no compiler takes
    "90": ("2,16,16,16", "2,128,128,64", "2,8,64,64"),
}


@slow
@pytest.mark.parametrize("capability", CORNERS)
def test_what_is_taken_compiles_and_fits_and_what_is_refused_does_not(
    capability, monkeypatch, tmp_path
):
    printed = lines_of_compile_kernels(tmp_path, capability, *CORNERS[capability])
    lines = [json.loads(line) for line in printed]
    assert len(lines) == len(CORNERS[capability])
    for line in lines:
        runs = (line["shared"] or 1 << 30) <= LIMITS[capability][1]
        assert runs == (not refused(line["shape"], capability, monkeypatch)), line


def test_the_choice_is_that_of_the_table(monkeypatch):
    """Of what fits, nothing is refused but near the limit; and on 10.0 in chunks of 64."""
    rows = [line.split() for line in RESULTS.read_text().splitlines()]
    rows = [row for row in rows if row and row[0] in LIMITS]
    assert {row[0] for row in rows} == set(LIMITS)
    for capability, *cells in rows:
        reason = refused(tuple(map(int, cells[:4])), capability, monkeypatch)
        if "not" in cells or "spills" in cells:
            assert reason, (capability, cells)
        elif "of 32 or less" not in reason and int(cells[4]) < 0.75 * LIMITS[capability][1]:
            assert not reason, (capability, cells, reason)


SHARED = RESULTS.with_name("shared.txt")
ALIKE = {"86": ("80", "86", "89", "120"), "90": ("90", "100")}  # compiled for one, much the same


def test_nothing_is_taken_that_needs_more_shared_memory_than_there_is(monkeypatch):
    """The sum alone took 32 numbers a channel of 16 channels, with chunks of 256, on an H100, and
    1,024 with more than 16 heads: such a run ended with the error of a kernel.
    """
    rows = [line.split() for line in SHARED.read_text().splitlines() if line[:1].isdigit()]
    assert {row[0] for row in rows} == set(ALIKE)
    taken = set()
    for compiled_for, *numbers, kernel, found in rows:
        shape, needed = tuple(map(int, numbers)), int(found)
        for capability in ALIKE[compiled_for]:
            have = LIMITS[capability][1]
            if not refused(shape, capability, monkeypatch):
                assert needed <= have, (capability, shape, needed)
                taken.add((capability, kernel))
            elif capability == compiled_for and needed <= have:  # the sum alone says more
                first = max(least for least in t.SHARED_BYTES if least <= int(capability))
                assert t.shared_bytes_by_sum(*shape, first) > have, (capability, shape, needed)
        if compiled_for == "90" and needed > 100_000:
            assert t.scan_shared_bytes(*shape, 90) >= needed, (shape, needed)
    assert taken >= {("80", "scan_forward"), ("90", "scan_backward"), ("90", "tokens_forward")}


# Heads, channels, state and chunk where the sum said too little, on either side of a GPU's limit.
TOO_LITTLE = {
    "90": ("2,16,16,256", "2,16,32,256", "2,16,128,128", "24,16,1024,16", "200,16,16,128"),
    "86": ("3,16,512,32", "3,16,64,128", "24,16,256,64"),
}


@slow
@pytest.mark.parametrize("capability", TOO_LITTLE)
def test_the_script_wants_no_less_shared_memory_than_the_compiler(capability, tmp_path):
    printed = lines_of_compile_kernels(tmp_path, "shared", capability, *TOO_LITTLE[capability])
    lines = [line.split() for line in printed]
    assert len(lines) == len(TOO_LITTLE[capability])
    for _, *numbers, kernel, found in lines:
        shape = tuple(map(int, numbers))
        assert t.scan_shared_bytes(*shape, int(capability)) >= int(found), (shape, kernel)


def test_sizes_whose_kernels_do_not_fit_are_computed_by_chunks():
    """Of their own accord, and if the kernels were asked for with the reason."""
    narrow = {"mamba_head_dim": 16, "mamba_d_state": 32, "mamba_chunk_size": 256}
    assert choose("cuda", **narrow) == "chunked"
    assert choose("cuda", **narrow | {"mamba_chunk_size": 128}) == "triton"
    with pytest.raises(t.UserError, match="needs 243,844 bytes of shared memory, .* 232,448 .a sm"):
        choose("cuda", scan_backend="triton", **narrow)


@pytest.mark.parametrize("capability", ["86", "89", "120"])
def test_what_long_chunks_take_where_tiles_go_by_pointers(capability, monkeypatch):
    """On 8.6 the compiler says 122,888, 110,596 and 113,156 bytes, and of the last 90,120."""
    for shape in ((2, 32, 64, 128), (2, 16, 128, 128), (2, 128, 16, 64)):
        assert "shared memory" in refused(shape, capability, monkeypatch)
    assert not refused((2, 32, 32, 128), capability, monkeypatch)


def test_the_page_on_machines_names_every_capability_and_the_tables_figures():
    page = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
    assert [c for c in LIMITS if f"{int(c) / 10:.1f}" not in page] == []
    rows = [line.split() for line in RESULTS.read_text().splitlines()]
    (default,) = [row for row in rows if row[:5] == ["89", "16", "64", "64", "64"]]
    shared, local = int(default[5]), default[8]
    assert f"it keeps {local}," in page
    assert f"shared memory of {shared // 1000} kB" in page
    assert f"{t.MOST_SHARED_BYTES:,} bytes" in page


def test_gpus_without_bfloat16_are_refused(monkeypatch):
    monkeypatch.setitem(LIMITS, "75", (75, 65_536))
    assert "compute capability 8.0 or more" in refused((2, 16, 16, 16), "75", monkeypatch)


def test_many_heads_are_refused_where_a_chunk_of_all_does_not_fit(monkeypatch):
    assert not refused((64, 16, 16, 64), "90", monkeypatch)
    assert "shared memory" in refused((1024, 16, 16, 64), "90", monkeypatch)


def test_the_log_says_why_a_slower_backend_was_taken(monkeypatch):
    settings = tiny(mamba_d_state=8, mamba_layers="all")
    lines = []
    trainer = types.SimpleNamespace(
        model=t.build_model(settings, SOLO),
        settings=settings,
        ranks=t.Ranks(0, 1, torch.device("cuda")),
        target_bytes=1 << 20,
        micro_batch=1024,
        float8_products="none",
        log=lines.append,
    )
    t.Trainer.announce(trainer, t.model_skeleton(settings))
    assert "scan: chunked (triton needs MAMBA_D_STATE of 16 and more); attention" in lines[-1]


def test_a_kernel_that_does_not_run_after_all_is_one_line():
    class Kernel:
        __name__ = "scan_forward"
        arg_names = ()

        def __getitem__(self, grid):
            def run(**_):
                raise t.triton.OutOfResources(300_000, 232_448, "shared memory")

            return run

    with pytest.raises(t.UserError, match="scan_forward does not run here: .*SCAN_BACKEND=chunked"):
        t.launch(Kernel(), (1,), {})


@pytest.mark.parametrize("capability", LIMITS)
def test_the_defaults_run_where_they_are_known_to(capability, monkeypatch):
    monkeypatch.setattr(t, "kernel_limits", lambda device: LIMITS[capability])
    assert choose("cuda") == ("chunked" if capability == "100" else "triton")
    assert choose("cuda", mamba_chunk_size=32) == "triton"
    larger = choose("cuda", mamba_d_state=128)
    assert larger == ("triton" if capability in ("80", "90") else "chunked")
