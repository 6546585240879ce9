"""The benchmark command, as far as it goes without a GPU: arithmetic, reports, and its kernels and
steps on the CPU.
"""

import contextlib
import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from bench import bench, tune
from tests.support import SOLO, WallClockEvent, interpreted, random_model, tiny, with_settings
from tools.command import UserError

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = bench.Ceilings(bytes_per_second=4e12, flops_per_second=800e12)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Lets the GPU's code run on the CPU, each kernel a few times."""
    monkeypatch.setattr(bench, "milliseconds", partial(bench.milliseconds, seconds=0.01))
    monkeypatch.setattr(torch.cuda, "Event", WallClockEvent)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")


# ---- Launch configurations -----------------------------------------------------------------------


def test_the_layer_that_is_tuned_has_gradients_of_all_that_it_learns():
    projected, parameters, sizes = tune.random_layer(16, SOLO.device, batch=1, length=32)
    y, mean_square, _ = t.mamba_scan(projected, parameters, sizes, None, None, "chunked", 16)
    inputs = tune.learned(projected, parameters)
    gradients = torch.autograd.grad(y.float().sum() + mean_square.sum(), inputs)
    assert len(gradients) == 7
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


# ---- Floors and FLOPs ----------------------------------------------------------------------------


def test_a_floor_is_the_longer_of_memory_and_matmul():
    assert bench.floor(8e9, 800e9, CEILINGS) == (pytest.approx(2.0), "memory")
    assert bench.floor(8e9, 8000e9, CEILINGS) == (pytest.approx(10.0), "matmul")


def test_flops_of_a_known_step():
    """peer7 layer by layer; its matrices alone are known to take 158 TFLOP a step."""
    settings, _ = t.read_settings({"PRESET": "peer7", "SCAN_BACKEND": "chunked"})
    model = t.Model(settings, torch.device("cpu"))
    mamba = 512 * (2 * 1024 + 2 * 64 + 3 * 16 + 16) + 1024 * 512
    attention, mlp, output = 512 * (512 + 256 + 256 + 512), 2 * 512 * 1536, 8192 * 512
    matrices = 6 * (5 * mamba + 2 * attention + 7 * mlp + output)
    assert matrices * 1_048_576 == pytest.approx(158e12, rel=2e-3)
    causal_attention = 2 * 3 * (2 * 2 * 4096 * 512 / 2)
    scans = 5 * 3 * 16 * (2 * 64 * 64 / 2 + 2 * 64 * 64 / 2 + 2 * 64 * 64 + 2 * 64 * 64)
    assert bench.step_flops(model, 1_048_576) == 1_048_576 * (matrices + causal_attention + scans)


def test_layers_that_recur_count_each_time():
    once, twice = (
        random_model(tiny(bigram_vocab_size=0, layer_order=order, unet_skips=False))
        for order in ("all", "0,1,1,2")
    )
    entries = sum(m.weight.numel() for m in twice.blocks[1].modules() if isinstance(m, t.Linear))
    more = 6 * entries + 3 * bench.attention_flops(1, 32, 32)
    assert bench.step_flops(twice, 10) - bench.step_flops(once, 10) == 10 * more


def test_newton_schulz_flops():
    """Five steps: twice G = x x^T and x = Q x; five squares of G, and thrice P G P and P Q."""
    assert (
        bench.newton_schulz_flops(torch.Size((64, 16)), 5)
        == 4 * (2 * 16 * 16 * 64) + (5 + 9) * 2 * 16**3
    )


def test_an_operators_traffic():
    """Forward: inputs and output; backward: inputs, the output's gradient, and the gradients of x
    and the matrix.
    """
    x, mask = torch.randn(4, 8, requires_grad=True), torch.ones(4, 8)
    matrix = torch.randn(2, 8, requires_grad=True)

    def function(x, mask):
        return (x * mask) @ matrix.T

    both = bench.operator(function, (x, mask), (matrix,), forward_flops=128)
    forward = bench.operator(function, (x, mask), (matrix,), forward_flops=128, backward=False)
    inputs, output = 4 * (32 + 32 + 16), 4 * 8
    assert (forward.bytes_moved, forward.flops) == (inputs + output, 128)
    assert (both.bytes_moved, both.flops) == (2 * (inputs + output) + 4 * (32 + 16), 3 * 128)
    assert [g.shape for g in both.call()] == [x.shape, matrix.shape]
    assert not forward.call()[0].requires_grad


# ---- Kernels, steps and start-up, on the CPU -----------------------------------------------------


def test_an_idea_is_tuned_beside_the_script_in_turn(tmp_path, monkeypatch, capsys):
    """Each turn finds its own functions; the last lines have the medians."""
    idea = tmp_path / "slower.py"
    idea.write_text("def install(script):\n    script.launch_scan = None\n")
    monkeypatch.setattr(t, "launch_scan", t.launch_scan)
    monkeypatch.setattr(tune, "kernel_times", lambda run: run() or dict.fromkeys(tune.KERNELS, ms))
    ms, turns = 0.0, iter((1.0, 5.0, 4.0, 2.0, 3.0))

    def run():
        nonlocal ms
        ms = next(turns) if t.launch_scan else 10.0

    tune.time_in_turn(run, idea)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-2]] == ["without", "slower"] * tune.TURNS
    count = len(tune.KERNELS)
    assert f"these {3.0 * count:.3f}, all kernels {3.0 * count:.3f} ms" in lines[-2]
    assert "slower, medians: tokens_forward 10.000" in lines[-1]


def test_an_idea_that_is_not_there_is_refused(capsys):
    for main, words in ((bench.main, ["scan"]), (tune.main, [])):
        assert main([*words, "--idea", "/nowhere/idea.py"]) == 2
        assert "/nowhere/idea.py: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", bench.kernel_makers(tiny(), SOLO))
def test_every_kernel_runs(name, pretended_gpu):
    make = bench.kernel_makers(tiny(scan_backend="chunked"), SOLO)[name]
    kernel = make()
    assert kernel.bytes_moved > 0
    assert (kernel.flops > 0) == ("residual" not in name)
    row = bench.time_kernel(make, CEILINGS)
    assert row["ratio"] == pytest.approx(row["ms"] / row["floor_ms"])
    # 4,300 and 3,003 GB/s.
    assert row["H100_bytes"] == pytest.approx(1.4319 * row["H200_bytes"], rel=1e-4)
    assert row["H200_bytes"] == pytest.approx(kernel.bytes_moved / 4.3e9)
    assert row["matmul_ms"] == pytest.approx(kernel.flops / 760e9)


@interpreted
def test_the_mlp_in_8_bits_runs_apart_where_its_kernels_do(pretended_gpu, monkeypatch):
    assert bench.float8_makers(tiny(), SOLO) == {}
    for name, (_, columns, _, stages) in t.FLOAT8_TILES.items():
        monkeypatch.setitem(t.FLOAT8_TILES, name, (16, columns, 16, stages))
    monkeypatch.setattr(t, "can_fuse_mlp", lambda *sizes: True)
    assert bench.float8_makers(tiny(model_dim=40), SOLO) == {}  # no whole tiles
    settings = tiny(model_dim=64, mlp_mult=4.0, train_batch_tokens=16, train_seq_len=16)
    makers = bench.float8_makers(settings, SOLO)
    assert len(makers) == 5 + 2 * 3
    matrices = 2 * 64 * 256
    flops = {}
    for name, make in makers.items():
        kernel = make()
        kernel.call()
        flops[name] = kernel.flops
        assert kernel.bytes_moved > 0
    assert flops == {
        "MLP, 8 bits": 6 * 16 * matrices,
        "MLP, 8 bits, forward operator": 2 * 16 * matrices,
        "MLP, 8 bits, backward operator": 4 * 16 * matrices,
        "MLP, 8 bits, size of rows": 0,
        "MLP, 8 bits, rows transposed": 0,
    } | {
        f"weight gradient {shape}{sums}": 16 * matrices
        for shape in ("64 × 256", "256 × 64")
        for sums in ("", ", 8 bits, fast sums", ", 8 bits, exact sums")
    }


@interpreted
def test_a_forward_operator_is_timed_without_making_gradients(pretended_gpu, monkeypatch):
    for name, (_, columns, _, stages) in t.FLOAT8_TILES.items():
        monkeypatch.setitem(t.FLOAT8_TILES, name, (16, columns, 16, stages))
    settings = tiny(model_dim=64, mlp_mult=4.0, train_batch_tokens=16, train_seq_len=16)
    monkeypatch.setattr(t, "float8_gradient", pytest.fail)
    bench.float8_mlp_kernel(settings, SOLO, False)


def test_what_cannot_be_captured_is_launched_by_the_host_and_says_why(pretended_gpu, capsys):
    row = bench.time_kernel(lambda: bench.Kernel(lambda: None, 1.0, 1.0), CEILINGS)
    assert row["launched"] == "by the host"
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r" +launched by the host, since it cannot be captured: \w+: .+", line)


def test_a_captured_call_is_warm_before_and_replayed_after(pretended_gpu, monkeypatch):
    """The GPU is a list of what it was asked for."""
    did = []
    stream = SimpleNamespace(wait_stream=lambda other: did.append("wait"))
    graph = SimpleNamespace(replay=lambda: did.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)

    @contextlib.contextmanager
    def capturing(graph, stream, capture_error_mode):
        did.append("begin")
        yield
        did.append("end")

    monkeypatch.setattr(torch.cuda, "graph", capturing)
    call, problem = bench.captured(lambda: did.append("call"))
    assert problem == ""
    call()
    assert did == ["wait", *3 * ["call"], "begin", "call", "end", "replay", "replay"]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("backend", ["sequential", "parallel"])
def test_the_first_mambas_scans_run(backend, backward, pretended_gpu):
    settings = tiny(mamba_version=1)
    make = bench.scan_makers(settings, SOLO)[
        f"first Mamba, {backend}{'' if backward else ', forward only'}"
    ]
    sizes, *others = make.args
    assert (sizes.mamba_inner_dim, sizes.train_seq_len) == (48, 2048)
    shorter = with_settings(sizes, train_batch_tokens=512, train_seq_len=512)
    make = partial(make.func, shorter, *others)
    assert bench.time_kernel(make, CEILINGS)["bound"] == "memory"


def test_steps_are_those_of_training(pretended_gpu):
    settings = tiny(train_batch_tokens=256, micro_batch_tokens=128)
    row, kernels = bench.time_steps(settings, SOLO, 3, CEILINGS, profile=False)
    assert kernels == []
    assert 0 < row["fastest_ms"] <= row["step_ms"]
    assert row["tokens_per_s"] == round(256e3 / row["step_ms"])
    assert (row["batch"], row["micro_batch"], row["peak_GB"]) == (256, 128, 3.0)
    flops_per_second = bench.step_flops(random_model(settings), 256) / row["step_ms"] * 1e3
    assert row["MFU_datasheet"] == pytest.approx(flops_per_second / 989e12)
    assert row["MFU_measured"] == pytest.approx(flops_per_second / 800e12)


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "NVIDIA H200 NVL"])
def test_the_datasheets_rate_is_for_the_gpus_it_names(name, pretended_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    row, _ = bench.time_steps(tiny(), SOLO, 1, CEILINGS, profile=False)
    assert row["MFU_datasheet"] == "unknown"


def test_the_first_step_of_a_process(pretended_gpu, monkeypatch, capsys):
    monkeypatch.setenv("DEVICE", "cpu")
    started = time.time()
    settings = {"PRESET": "tiny", "TRAIN_BATCH_TOKENS": "256", "NUM_LAYERS": "1"}
    bench.first_step(settings | {"MAMBA_LAYERS": "0"}, started)
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    compiler = row.pop("compiler")
    assert list(row) == ["imported", "model made", "warmed up", "step done"]
    assert 0 <= row["imported"] < row["model made"] < row["warmed up"] < row["step done"]
    assert row["step done"] < time.time() - started
    assert isinstance(compiler, str)


def test_startup_uses_the_folders_caches_and_tells_a_failure(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys, time\n"
        "cache = os.environ['TRITON_CACHE_DIR']\n"
        "if os.path.exists(cache): sys.exit('the caches are warm')\n"
        "os.makedirs(cache)\n"
        "print('noise')\n"
        "print(json.dumps({'step done': time.time() - float(sys.argv[1])}))\n"
    )
    monkeypatch.setattr(bench, "FIRST_STEP", [sys.executable, str(child)])
    row = bench.time_startup(str(tmp_path / "caches"))
    assert row.keys() == {"step done"}  # and not what was printed before
    assert 0 < row["step done"] < 60
    with pytest.raises(RuntimeError, match="the caches are warm"):
        bench.time_startup(str(tmp_path / "caches"))
    child.write_text("")
    with pytest.raises(RuntimeError, match="it printed nothing"):
        bench.time_startup(str(tmp_path / "caches"))


def test_an_idea_is_in_place_before_the_ranks_of_a_first_step_start(monkeypatch, tmp_path, capsys):
    """So are the processes that compile ahead, which are forked: nobody may have asked CUDA for
    anything. A benchmark that starts no run has none.
    """

    def end_ahead(log):
        log("updates compiled ahead: none")
        log("kernels compiled ahead: 2 in 1.0s")

    idea = tmp_path / "idea.py"
    idea.write_text(
        "def install(script):\n"
        "    start_ranks = script.start_ranks\n"
        "    script.start_ranks = lambda settings: print('idea') or start_ranks(settings)\n"
    )
    monkeypatch.setattr(t, "start_ranks", lambda settings: print("ranks"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not print("asked"))
    monkeypatch.setattr(t, "compile_ahead", lambda settings: print("ahead"))
    monkeypatch.setattr(bench, "run_parts", lambda options: print("parts") or 0)
    log = bench.SilentLog()
    trainer = SimpleNamespace(log=log, warm_up=lambda: end_ahead(log), run=lambda *_: log("step"))
    monkeypatch.setattr(bench, "make_trainer", lambda *_: (trainer, 8))
    monkeypatch.setattr(bench, "RandomBatches", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert bench.main(["--first-step", "1.0", "--idea", str(idea)]) == 0
    *order, row = capsys.readouterr().out.splitlines()
    assert order == ["ahead", "idea", "ranks"]
    told = "updates compiled ahead: none; kernels compiled ahead: 2 in 1.0s"
    assert json.loads(row)["ahead"] == told
    assert bench.main(["startup", "--idea", str(idea)]) == 0
    assert capsys.readouterr().out.splitlines() == ["parts"]


# ---- The profile ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matmul"),
        (
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute",
            "matmul",
        ),
        ("triton_tem_fused__to_copy_mm_3", "matmul"),
        ("scan_backward", "mamba"),
        ("rotate_features", "mamba"),
        ("sum_turns", "mamba"),
        ("tokens_forward", "mamba"),
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x64",
            "attention",
        ),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", "attention"),
        ("triton_red_fused__log_softmax_div_mul_tanh_7", "cross-entropy"),
        ("triton_poi_fused_leaky_relu_pow_2", "elementwise"),
        ("triton_per_fused__fused_rms_norm_add_mul_5", "elementwise"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "elementwise",
        ),
        ("void at_cuda_detail::cub::DeviceScanKernel<...>", "elementwise"),
        (
            "void at::native::(anonymous namespace)::"
            "multi_tensor_apply_kernel<...FusedAdamMathFunctor...>",
            "optimizer",
        ),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_grouped_by_name(name, kind):
    assert bench.kernel_kind(name) == kind


def test_the_profile_counts_kernels_once_and_adds_up(tmp_path):
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def average(key, microseconds, count, device_type=cuda, is_user_annotation=False):
        return SimpleNamespace(
            key=key, self_device_time_total=microseconds, count=count, device_type=device_type,
            is_user_annotation=is_user_annotation,
        )  # fmt: skip

    kernels = bench.gpu_time_by_kernel(
        [
            average("triton_poi_fused_add_1", 1000.0, 8),
            average("nvjet_a", 4000.0, 10),
            average("nvjet_b", 3000.0, 2),
            average("cudaLaunchKernel", 9000.0, 99, cpu),
            average("Optimizer.step#AdamW.step", 9000.0, 1, cuda, True),
        ]
    )
    assert kernels == [
        ("nvjet_a", 4.0, 10),
        ("nvjet_b", 3.0, 2),
        ("triton_poi_fused_add_1", 1.0, 8),
    ]
    kinds = bench.time_by_kind(kernels)
    assert list(kinds) == ["matmul", "elementwise"]
    assert kinds["matmul"] == {"ms": 7.0, "share": 7 / 8, "launches": 12}
    table = bench.profile_table("one step", kernels, rows=2)
    assert re.search(r"7\.000 +87\.5% +12 +matmul\n", table)
    assert "nvjet_b" in table
    assert "triton_poi" not in table


# ---- Reports and the command ---------------------------------------------------------------------


def failing_row():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 99 GiB.")


def test_a_report_survives_a_failure_and_a_round_trip(tmp_path, capsys):
    file = tmp_path / "out.json"
    report = bench.Report(str(file), quiet=False)
    report.add("ceilings", "copy", {"GB_per_s": 4321.0})
    report.measure("kernels", "MLP", failing_row)
    report.add("scan", "mamba_ssm", {"skipped": "mamba_ssm is not installed"})
    report.measure(
        "kernels", "scan", lambda: {"ms": 1.25, "floor_ms": 0.5, "ratio": 2.5, "bound": "memory"}
    )
    assert bench.load(str(file)) == report.results
    assert report.results["kernels"]["scan"]["ms"] == 1.25
    assert report.failures == 1
    lines = capsys.readouterr().out.splitlines()
    assert [
        line
        for line in lines
        if "MLP" in line and line.endswith("FAILED: OutOfMemoryError: CUDA out of memory.")
    ]
    assert [
        line
        for line in lines
        if line.startswith("scan ") and "skipped: mamba_ssm is not installed" in line
    ]
    assert ["scan", "1.250", "0.500", "2.500", "memory"] in [line.split() for line in lines]


def test_compare_prints_ratios_and_what_only_one_has(tmp_path, capsys):
    before = {
        "machine": {"hardware": "1 × X", "torch": "2.11"},
        "kernels": {"scan": {"ms": 2.0, "ratio": 4.0}, "MLP": {"error": "OutOfMemoryError"}},
        "steps": {"peer7": {"step_ms": 650.0, "tokens_per_s": 1_613_193, "peak_GB": 29.9}},
    }
    after = {
        "machine": {"hardware": "1 × Y", "torch": "2.11"},
        "kernels": {"scan": {"ms": 1.0, "ratio": 2.0}, "MLP": {"ms": 3.0}},
        "startup": {"cold": {"imported": 4.0, "step done": 20.0, "compiler": "a 1.0"}},
    }
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    for file, report in zip(files, (before, after), strict=True):
        file.write_text(json.dumps(report))
    assert bench.main(["--compare", *map(str, files)]) == 0
    text = capsys.readouterr().out
    assert "1 × X | 1 × Y" in text
    rows = {
        line.rsplit(maxsplit=3)[0]: line.split()[-3:] for line in text.splitlines() if ": " in line
    }
    assert rows == {
        "kernels: scan: ms": ["2.000", "1.000", "0.500"],
        "kernels: MLP: ms": ["failed", "3.000", "-"],
        "steps: peer7: step_ms": ["650.0", "-", "-"],
        "steps: peer7: tokens_per_s": ["1,613,193", "-", "-"],
        "steps: peer7: peak_GB": ["29.9", "-", "-"],
        "startup: cold: imported": ["-", "4.000", "-"],
        "startup: cold: step done": ["-", "20.0", "-"],
    }


def test_no_part_of_a_saved_report_is_left_out_of_a_comparison(capsys):
    """The start-up's stages and the profile's kinds were."""
    for file in ("startup.json", "two-ranks.json"):
        path = str(ROOT / "bench" / "results" / file)
        assert bench.main(["--compare", path, path]) == 0
        text = capsys.readouterr().out
        for part, rows in json.loads(Path(path).read_text()).items():
            for name in rows if part != "machine" else ():
                assert f"\n{part}: {name}: " in text


def test_other_results_are_refused_in_one_line(tmp_path, capsys):
    three = tmp_path / "three.json"
    three.write_text('{"machine": {}, "startup": 3}')
    text = tmp_path / "text.json"
    text.write_text('{"machine": {}, "steps": {"peer7": {"ms": [1]}}}')
    results = ROOT / "bench" / "results"
    others = [results / f"{name}.json" for name in ("steps-ideas", "weight-gradients")]
    good = str(results / "startup.json")
    for other in (*others, ROOT / "logs" / "web-clocks" / "tables.json", three, text):
        for files in ((good, str(other)), (str(other), good)):
            assert bench.main(["--compare", *files]) == 2
            said = capsys.readouterr()
            assert said.out == "" and said.err.count("\n") == 1
            assert f"{other} holds other results" in said.err


def test_a_file_without_results_is_one_line(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    assert (
        bench.main(["--compare", str(tmp_path / "broken.json"), str(tmp_path / "missing.json")])
        == 2
    )
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    command = [sys.executable, "-m", "bench.bench", "kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"bench\.py: error: needs an NVIDIA GPU.*\n", done.stderr)


def test_arguments(monkeypatch):
    assert bench.parse_arguments([]).parts == ["kernels", "scan", "steps", "startup"]
    assert bench.parse_arguments(["scan", "--steps", "3"]).parts == ["scan"]
    for wrong in (["skan"], ["--steps", "0"], ["--compare", "one.json"]):
        with pytest.raises(UserError):
            bench.parse_arguments(wrong)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench.parse_arguments([]).parts == ["steps"]
    with pytest.raises(UserError, match="only the part steps"):
        bench.parse_arguments(["kernels"])


def test_settings_in_the_environment_win(monkeypatch):
    monkeypatch.setenv("TRAIN_SEQ_LEN", "1024")
    settings = bench.read_settings(bench.STEP_CASES["peer7"])
    assert (settings.preset, settings.train_batch_tokens, settings.train_seq_len) == (
        "peer7",
        1_048_576,
        1024,
    )


@pytest.mark.skipif(t.triton is None, reason="needs triton")
def test_a_product_with_the_activation_in_its_kernel():
    """In Triton's interpreter, in float32: more tiles than programs, several steps of depth,
    forward and backward.
    """
    tiles = (16, 32, 16, 4, 2, 2)
    x, up, activation = (
        torch.randn(48, 32),
        torch.randn(64, 32),
        lambda x: torch.nn.functional.leaky_relu(x, 0.5).square(),
    )
    hidden, out = torch.full((48, 64), torch.nan), torch.full((48, 64), torch.nan)
    bench.fused_mlp_product(x, up, hidden, out, False, tiles)
    assert torch.allclose(hidden, x @ up.T, atol=1e-5)
    assert torch.allclose(out, activation(hidden), atol=1e-5)

    gradient, down = torch.randn(48, 32), torch.randn(32, 64)
    leaf = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(activation(leaf), leaf, gradient @ down)
    bench.fused_mlp_product(gradient, down, hidden, out, True, tiles)
    assert torch.allclose(out, expected, atol=1e-4)


def test_every_large_product_has_a_row():
    """peer7's: in_proj, out_proj, the MLP's two, and the output matrix; not the small ones of
    attention.
    """
    settings, _ = t.read_settings({"PRESET": "peer7"})
    products = [name for name in bench.product_makers(settings, SOLO) if "LeakyReLU" not in name]
    assert sorted(products) == [
        "product 1,024 × 512",
        "product 1,536 × 512",
        "product 512 × 1,536",
        "product 512 × 2,240",
        "product 512 × 8,192",
    ]
