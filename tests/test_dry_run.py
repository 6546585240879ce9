"""train_gpt.py --dry-run, --presets and the command line: sizes and memory against the logs of
finished runs, and what is printed, with the weights unknown and with those of a file.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt as t
from tests.make_former_files import FOLDER
from tests.support import (
    PATIENCE,
    SCRIPT,
    SOLO,
    document_stream,
    mistake,
    process_environment,
    run_environment,
    run_here,
    tiny,
    tiny_environment,
    validation_set,
    with_settings,
)
from tools import dry_run, fit_bytes, hand_over
from tools.command import UserError
from tools.logs import last_run, rank_count

ROOT = SCRIPT.parent


def published_logs() -> list[Path]:
    """The logs that git knows; all where it knows none, as in a copy of the tree.

    Whoever trains leaves others in logs/, of models that the table was not fitted to.
    """
    command = ["git", "ls-files", "-z", "logs/*.jsonl"]
    with contextlib.suppress(OSError):
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        if listed:
            return [ROOT / name for name in listed.rstrip("\0").split("\0")]
    return sorted((ROOT / "logs").rglob("*.jsonl"))


LOGS = published_logs()
RUNS = fit_bytes.finished_runs(LOGS)


@pytest.fixture
def dry(monkeypatch, capsys):
    """dry(environment, *arguments): what a dry run prints."""

    def start(environment: dict[str, str], *arguments: str) -> str:
        monkeypatch.setattr("os.environ", environment)
        assert dry_run.dry_run(list(arguments)) == 0
        return capsys.readouterr().out

    return start


def artifact_bytes(said: str) -> dict[float, int]:
    """The sizes in what a dry run has printed, by k."""
    found = re.findall(r"^artifact: ([\d,]+) bytes at k=([\d.]+)", said, re.MULTILINE)
    return {float(k): int(size.replace(",", "")) for size, k in found}


# ---- Against finished runs -----------------------------------------------------------------------


def test_there_are_finished_runs_to_compare_with():
    """Each log that has an artifact's size, but those of scripts that coded it otherwise."""
    logs = {path.stem for path in LOGS if '"trained"' in path.read_text()}
    assert logs - {run.name for run in RUNS} == {"h200-180s", "h200-45s"}
    assert len({run.settings.num_layers for run in RUNS}) > 1


def test_logs_of_other_quantizers_and_of_half_a_run_are_no_measurements(tmp_path):
    """A run of QUANTIZER=round in logs/ moved the table, and a log without settings ended it."""
    lines = (ROOT / "logs" / "web-seeds").glob("*.jsonl")
    log = next(path for path in sorted(lines) if path.stem in {run.name for run in RUNS})
    records = [json.loads(line) for line in log.read_text().splitlines()]
    other, half, odd = (tmp_path / f"{name}.jsonl" for name in ("other", "half", "odd"))
    for path, written in ((half, records[1:]), (other, records), (odd, records)):
        path.write_text("".join(json.dumps(record) + "\n" for record in written))
    other.write_text(other.read_text().replace('"quantizer": "gptq"', '"quantizer": "round"'))
    odd.write_text(re.sub(r'"sdclip_k": [\d.]+, "', '"sdclip_k": null, "', odd.read_text()))
    (tiny_run,) = fit_bytes.finished_runs([other, half, odd])
    assert (tiny_run.name, len(fit_bytes.finished_runs([log]))) == ("tiny", 2)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_an_artifacts_size_is_told_within_two_percent(run):
    """Nothing of a run but its settings and k is known to the dry run; SIZE_ERROR says how well."""
    error = abs(fit_bytes.error_of(run))
    assert error < 0.02
    most = dry_run.SHARED_ERROR if run.settings.shares_bits else dry_run.SIZE_ERROR
    assert error < most, "python -m tools.fit_bytes fits the table anew"


def test_the_table_is_what_the_tool_fits():
    bits, each = fit_bytes.fit(RUNS)
    assert bits == pytest.approx(dry_run.BITS_SAVED, abs=0.001)
    assert each == pytest.approx(dry_run.BYTES_SAVED, rel=0.02)


def test_the_fitted_k_is_the_one_that_a_run_has_fitted():
    """By the prediction that a run makes of its trained weights, and with that run's target."""
    fitted = [run for run in RUNS if not run.settings.sdclip_k]
    assert len(fitted) > 10
    for run in fitted[::13]:  # of both depths, with and without shared tables
        skeleton = fit_bytes.skeleton_of(run.settings)
        told = t.predict_bytes(skeleton, run.settings, run.k)
        assert t.fit_sdclip(skeleton, run.settings, told + 1) == pytest.approx(run.k, rel=0.01)


def test_memory_is_told_within_a_tenth_of_what_gpus_had_taken():
    compared = 0
    for path in (ROOT / "logs").glob("*/[st]180-*.jsonl"):
        events = last_run(path)
        settings = fit_bytes.settings_of(events["settings"]["settings"])
        ranks = t.Ranks(0, rank_count(events["settings"]["machine"]), torch.device("cuda"))
        tokens = t.choose_micro_batch(settings, ranks, free=140e9)
        told = dry_run.state_bytes(t.model_skeleton(settings))
        told += tokens * t.token_bytes(settings, gpu=True)
        assert told == pytest.approx(events["trained"]["peak_bytes"], rel=0.1), path.name
        compared += 1
    assert compared > 3


def test_a_scan_without_a_fused_kernel_is_told_to_take_more_memory():
    """As counted by what a compiled layer saves: 83 kB a token, of which 4 are the residual's."""
    one, two = (
        t.Settings(scan_backend="chunked", num_layers=n, mamba_layers="all") for n in (1, 2)
    )
    mlp = (8 + 4 * one.mlp_mult) * one.model_dim - 4096
    layer = t.token_bytes(two, gpu=True) - t.token_bytes(one, gpu=True) - mlp
    assert layer == pytest.approx(83_442, rel=0.05)
    fused = t.Settings(num_layers=1, mamba_layers="all")
    assert t.token_bytes(fused, gpu=True) < t.token_bytes(one, gpu=True)
    assert t.token_bytes(fused, gpu=False) == t.token_bytes(one, gpu=False)


# ---- What it prints ------------------------------------------------------------------------------


def test_a_default_run_is_described_without_gpu_or_data(dry):
    environment = {"MLP_MULT": "3", "LAYER_ORDER": "0-8,7,8"}
    said = dry(environment, "--gpu-memory", "80", "--ranks", "8", "--step-ms", "90", "--k", "8")
    model = t.model_skeleton(t.Settings(mlp_mult=3.0, layer_order="0-8,7,8"))
    count = sum(p.numel() for p in model.parameters())
    assert f"in all{count:18,}; of these Adam" in said
    assert "\n  MLP_MULT=3.0, not 4.0\n" in said
    assert "they run as M0 M1 A2 M3 M4 M5 A6 M7 M8 M7 M8\n" in said
    assert "before 35% of the run as M0 M1 A2 M3 M4 M5 A6 M7 M8\n" in said
    assert "for 65,536 tokens at once; 80.0 GB in all, used and free, of a GPU" in said
    documents = "evaluation of a rank: about 35.3 GB for 64 documents that adapt at once, 2,048 "
    assert documents + "tokens of each\nclock:" in said
    assert said.startswith("settings that differ from PRESET=default: ")
    assert "clock: 6,577 steps, 3,448,242,176 tokens\n" in said
    fitted, coarse = artifact_bytes(said).items()
    assert fitted[1] <= 16_000_000 - SCRIPT.stat().st_size < coarse[1]
    assert coarse[0] == 8 < fitted[0]
    over = coarse[1] - (16_000_000 - SCRIPT.stat().st_size)
    assert f"(16,000,000 less the script): too large by {over:,}" in said


def test_an_evaluation_that_does_not_fit_at_once_is_told(dry):
    said = dry({}, "--gpu-memory", "24")
    assert "2,048 tokens of each; of fewer where memory ends, in more time\n" in said
    for changes in ({"TTT_ENABLED": "0"}, {"EVAL_MODE": "sliding"}):
        assert "evaluation of a rank" not in dry(changes, "--gpu-memory", "24")


def test_what_is_not_given_is_told_too(dry):
    """Nothing that differs, or layers that no list names; small sizes are in MB."""
    usual = dry({"PRESET": "tiny"})
    assert usual.startswith("nothing differs from PRESET=tiny: ")
    assert re.search(r"memory of a rank: \d\d MB for weights", usual)
    assert "finished runs of this depth and width are told within" in usual
    deeper = dry({"PRESET": "tiny", "NUM_LAYERS": "5"})
    assert "  layer 4: attention, as MAMBA_LAYERS=0,1,3 does not name it\n" in deeper
    assert "does not name it" not in dry({"PRESET": "tiny", "N_LAYER": "5", "MAMBA_LAYERS": "0"})
    assert "no finished run has this depth, width and k" in deeper
    assert "  TTT_ENABLED=0, not 1\n" in dry({"PRESET": "tiny", "TTT_ENABLED": "0"})


def test_the_runs_that_the_table_was_fitted_to_are_known():
    assert all(dry_run.fitted_to(run.settings, run.k) for run in RUNS)
    shared = [run for run in RUNS if run.settings.shared_tables]
    for run in shared:  # no run has them without steps that follow costs
        usual = with_settings(run.settings, sdclip_by_matrix=0.0, sdclip_by_row=0.0)
        assert not dry_run.fitted_to(usual, run.k)
    assert shared
    shapes = {(run.settings.num_layers, run.settings.model_dim) for run in RUNS}
    assert shapes == set(dry_run.FITTED_SHAPES)


def test_layers_are_a_table(dry):
    said = dry(tiny_environment(mlp_layers="0,1"))
    rows = re.findall(r"^ +(\d)  (\S+).*?([\d,]+) +([\d,]+)$", said, re.MULTILINE)
    assert [row[:3] for row in rows] == [
        ("0", "Mamba-3,", "96"),
        ("1", "attention,", "96"),
        ("2", "Mamba-3,", "0"),
    ]
    blocks = t.model_skeleton(tiny(mlp_layers="0,1")).blocks
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    assert [int(row[3].replace(",", "")) for row in rows] == counts


def test_less_memory_runs_fewer_tokens_at_once(dry):
    given = {"SDCLIP_K": "8"}  # so that none is fitted
    large, small = (dry(given, "--gpu-memory", size) for size in ("80", "12"))
    assert "for 131,072 tokens at once" in large
    tokens = int(re.search(r"for ([\d,]+) tokens at once", small)[1].replace(",", ""))
    assert 2048 <= tokens <= 0.7 * 12e9 / t.token_bytes(t.Settings(), gpu=True)
    assert "a step of 524,288 tokens is" in small
    assert "does not fit" in dry(given, "--gpu-memory", "0.9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_its_gpus_a_run_is_not_judged_by_this_machines_memory(dry, monkeypatch):
    """But told how to name them; one for a CPU, as DEVICE may say, is judged."""
    monkeypatch.setattr(t, "device_memory", lambda device: 1e8)
    given = {"SDCLIP_K": "8"}  # so that none is fitted
    named = "--gpu-memory 80 --ranks 8 --step-ms MS"
    launched = {"WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}
    for launch in ({}, launched | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}):
        said = dry(given | launch)
        assert f"PRESET=default is for GPUs, and here is none; {named} stand for eight" in said
        assert "does not fit" not in said
    said = dry(given, *named.replace("MS", "90").split())
    assert "80.0 GB in all, used and free, of a GPU" in said
    assert "is for GPUs" not in said
    monkeypatch.setattr(t, "device_memory", lambda device: 3e8)
    assert "of this machine\n" in dry({"PRESET": "tiny"})
    assert "that does not fit: lower MICRO_BATCH_TOKENS" in dry(given | {"DEVICE": "cpu"})


def test_passes_over_the_data_are_told_where_there_are_some(dry, shards, tmp_path):
    environment = run_environment(shards, tmp_path, iterations=100)
    there = sum(shard.count for shard in t.open_shards(str(shards), "train"))
    said = dry(environment)
    assert f"clock: 100 steps, 12,800 tokens, {12_800 / there:.3g} times the {there:,} in" in said
    timed = dry(environment | {"MAX_WALLCLOCK_SECONDS": "20", "EXPORT_RESERVE_SECONDS": "10"})
    assert "clock: 10 s of training; --step-ms MS says" in timed


def test_an_artifacts_own_weights_tell_its_size(dry):
    path = ROOT / "data" / "tiny" / "tiny.int6.lzma"
    environment = {"PRESET": "tiny", "ARTIFACT": str(path), "TOKENIZER_PATH": ""}
    said = dry(environment, "--k", "9")
    size = path.stat().st_size
    assert f"the weights in {path}, a file of {size:,} bytes" in said
    sizes = artifact_bytes(said)
    size -= fit_bytes.FORMER_BYTES * fit_bytes.count_rows(t.Settings(**t.PRESETS["tiny"]))
    assert sizes[5.0] == pytest.approx(size, rel=0.005)
    assert sizes[9.0] < 0.9 * size


def checkpoint_environment(path: Path, **changes) -> dict[str, str]:
    """Variables of the run that wrote the older checkpoint, with changes."""
    header, _ = t.read_sealed(
        path, "checkpoint", t.CHECKPOINT_MAGIC, t.MOST_BYTES, t.Trainer.header(former_trainer())
    )
    values = {name: header[name] for name in t.TRAINING_FIELDS}
    environment = tiny_environment(**values | {"sdclip_k": 6.5} | changes)
    del environment["PRESET"]
    tied = "TIED_EMBED_LR" if values["tie_embeddings"] else "EMBED_LR HEAD_LR"
    for idle in {"TIED_EMBED_LR", "EMBED_LR", "HEAD_LR"} - set(tied.split()):
        del environment[idle]
    return environment


def test_a_checkpoints_own_weights_tell_the_size_of_what_it_would_export(dry):
    """Those of its average, which lie closer together than Gaussian ones, or wider."""
    path = FOLDER / "b6028ee.checkpoint"
    environment = checkpoint_environment(path, resume=path)
    said = dry(environment)
    assert f"the weights in {path}, after 3 steps" in said
    own = artifact_bytes(said)[6.5]
    unknown = artifact_bytes(dry(environment | {"RESUME": "auto"}))[6.5]
    assert own != unknown
    assert own == pytest.approx(unknown, rel=0.1)


def test_a_runs_own_checkpoint_is_taken_up_or_refused_before_a_pod_is_paid_for(dry, tmp_path):
    """As by the run, of which nothing is touched; an unusable one is told and left out."""
    older = FOLDER / "b6028ee.checkpoint"
    path = tmp_path / "a.checkpoint"
    run = checkpoint_environment(older, run_id="a", log_dir=tmp_path)
    assert f"start: RUN_ID=a has no checkpoint in LOG_DIR={tmp_path}\n" in dry(run)
    shutil.copy(older, path)
    said = dry(run)
    assert said.startswith(f"a run would go on: resumed {path}: step 3, 1.2s\n")
    assert "sizes by the weights in that checkpoint, after 3 steps" in said
    with pytest.raises(t.UserError, match=f"{path} has SEED=.*, not 77; RESUME=never starts anew"):
        dry(run | {"SEED": "77"})
    for fresh in ({"RESUME": "never"}, {"RUN_ID": "b"}, {"RUN_ID": ""}):
        said = dry(run | {"SEED": "77"} | fresh)
        assert "what finished runs' weights took" in said
        assert ("RUN_ID=b has no checkpoint" in said) == (fresh == {"RUN_ID": "b"})
    path.write_bytes(older.read_bytes()[:-1])
    said = dry(run)
    assert said.startswith(f"warning: {path} is not a usable checkpoint")
    assert "what finished runs' weights took" in said


def test_a_run_that_is_trained_or_has_its_score_is_told_and_keeps_its_files(dry, tmp_path):
    path = tmp_path / "a.checkpoint"
    shutil.copy(FOLDER / "b6028ee.checkpoint", path)
    run = checkpoint_environment(path, run_id="a", log_dir=tmp_path)
    (tmp_path / "a.int6.lzma").write_bytes(b"x")
    settings, _ = t.read_settings(run)
    records = [
        {"event": "settings", "settings": dataclasses.asdict(settings)},
        {"event": "ready"},
        {"event": "trained", "artifact_sha256": t.file_sha256(tmp_path / "a.int6.lzma")},
        {"event": "final"},
    ]
    log = tmp_path / "a.jsonl"
    log.write_text("".join(f"{json.dumps(record)}\n" for record in records[:3]))
    assert "a.int6.lzma is trained and has no score: a run only scores it\n" in dry(run)
    assert "start: OVERWRITE=1 trains RUN_ID=a anew\n" in dry(run | {"OVERWRITE": "1"})
    log.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    with pytest.raises(t.UserError, match="RUN_ID=a is finished, .* has its score"):
        dry(run)
    assert "start: OVERWRITE=1 trains RUN_ID=a anew\n" in dry(run | {"OVERWRITE": "1"})
    assert path.exists()


@pytest.mark.parametrize("name", ["run.checkpoint", "run.int6.lzma", "run.txt"])
def test_scores_in_another_outputs_place_are_refused(dry, tmp_path, name):
    environment = {"PRESET": "tiny", "RUN_ID": "run", "LOG_DIR": str(tmp_path / "logs")}
    environment["EVAL_NLL_PATH"] = str(tmp_path / "logs" / name)
    with pytest.raises(t.UserError, match="give each its own"):
        dry(environment)
    assert not (tmp_path / "logs").exists()  # nor is a folder made


def test_what_a_living_run_has_is_refused_until_it_ends(dry, tmp_path):
    """Its log, or its artifact under another name; a dry run makes no file and keeps no lock."""
    run = tiny_environment(run_id="a", log_dir=tmp_path, artifact=tmp_path / "x")
    del run["PRESET"]
    for name, setting in {"a.txt": "RUN_ID", "x.lock": "ARTIFACT"}.items():
        with (
            t.claim_file(tmp_path / name, setting),
            pytest.raises(t.UserError, match=f"{name} belongs to a run .* another {setting}"),
        ):
            dry(run)
        dry(run)  # of a run that was killed, files stay, unlocked
        t.claim_file(tmp_path / name, setting).close()
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "x.lock"}


def test_without_a_run_id_files_of_no_name_are_nobodys(dry, tmp_path):
    run = checkpoint_environment(FOLDER / "b6028ee.checkpoint", run_id="", log_dir=tmp_path)
    (tmp_path / ".checkpoint").write_bytes(b"x")
    (tmp_path / ".jsonl").write_text(
        '{"event": "settings"}\n{"event": "ready"}\n{"event": "final"}'
    )
    said = dry(run)
    assert "what finished runs' weights took" in said
    assert ".checkpoint" not in said


@pytest.mark.parametrize("what", ["resume", "artifact"])
def test_kernels_that_only_the_runs_machine_has_are_no_mistake_here(dry, what):
    """Whether weights are at hand or not: of them only sizes are told."""
    path = FOLDER / f"b6028ee.{'checkpoint' if what == 'resume' else 'artifact'}"
    header = json.loads(path.read_bytes()[8:].split(b"\n", 1)[0])
    former = {n: t.FORMER_DEFAULTS[n] for n in t.TRAINING_FIELDS if n in t.FORMER_DEFAULTS}
    taken = t.TRAINING_FIELDS if what == "resume" else t.MODEL_FIELDS
    values = {n: x for n, x in (former | header).items() if n in taken}
    kernels = {"scan_backend": "triton", "attention_backend": "cudnn", "float8_products": "mlp"}
    environment = tiny_environment(**values | kernels | {what: path, "sdclip_k": 6.5})
    for name in ("PRESET", "EMBED_LR", "HEAD_LR"):
        environment.pop(name, None)
    said = dry(environment)
    assert f"the weights in {path}" in said
    assert "SCAN_BACKEND=triton, not auto" in said


def former_trainer() -> t.Trainer:
    """One whose header has the fields of a checkpoint."""
    return t.Trainer(t.build_model(tiny(), SOLO), tiny(), SOLO, 64, 1e6, dry_run.quiet)


# ---- The command line ----------------------------------------------------------------------------


def test_the_tool_that_the_script_hands_over_to_runs_in_any_folder(tmp_path):
    """Started as the tests below say that the script starts it; test_pack_script.py's does."""
    environment = process_environment({"PRESET": "tiny", "NUM_LAYERS": "5"})
    del environment["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, hand_over.__file__, "--dry-run", str(SCRIPT), "--k", "8"],
        env=environment, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "they run as M0 M1 A2 M3 A4" in done.stdout
    assert set(artifact_bytes(done.stdout)) == {5.0, 8.0}


def test_without_the_tools_that_is_one_line(monkeypatch, capsys, tmp_path):
    """They are looked for in the current folder, beside the script, and above it."""
    folder = tmp_path / "script's"
    folder.mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setattr(t, "__file__", str(folder / SCRIPT.name))
    said = mistake(monkeypatch, capsys, {}, "--k", "8", "--dry-run")
    places = f"{tmp_path / 'other'} or {folder} or {tmp_path}"
    assert f"--dry-run needs the repository's tools, which are not in {places}\n" in said


@pytest.mark.parametrize("found", ["current folder", "beside", "above"])
def test_the_first_tools_that_are_found_are_started_with_the_script(monkeypatch, tmp_path, found):
    folder = tmp_path / "repository" / "packed"
    folder.mkdir(parents=True)
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setattr(t, "__file__", str(folder / SCRIPT.name))
    places = {"current folder": Path.cwd(), "beside": folder, "above": folder.parent}
    for place in list(places.values())[list(places).index(found) :]:
        (place / "tools").mkdir()
        (place / "tools" / "hand_over.py").touch()
    started = []
    monkeypatch.setattr("os.execv", lambda *arguments: started.extend(arguments))
    t.hand_over("--dry-run", ["--k", "8"])
    tool = str(places[found] / "tools" / "hand_over.py")
    script = str(folder / SCRIPT.name)
    assert started == [sys.executable, [sys.executable, tool, "--dry-run", script, "--k", "8"]]


NAMES = ["train_gpt.v1.py", "script.txt", "train_gpt", "copy.py", "tools.py"]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_of_any_name_is_the_one_that_is_loaded(monkeypatch, tmp_path, name):
    """By its path: of other names, Python found another file, or none."""
    for other in NAMES:
        (tmp_path / other).write_text(f"read_settings = 'of {other}'\nimport copy\ncopy.deepcopy\n")
    (tmp_path / "train_gpt.py").write_text("raise SystemExit('beside it')\n")
    monkeypatch.setitem(sys.modules, "train_gpt", t)
    before = list(sys.path)
    hand_over.load(tmp_path / name)
    loaded = sys.modules["train_gpt"]
    assert (loaded.read_settings, loaded.__file__) == (f"of {name}", str(tmp_path / name))
    assert sys.path == before


@pytest.mark.parametrize("text", [None, "some words\n", "x = 1\n", "\0"], ids=repr)
def test_what_is_no_script_is_handed_over_in_one_line(tmp_path, text):
    path = tmp_path / "a.py"
    if text is not None:
        path.write_text(text)
    command = [sys.executable, hand_over.__file__, "--dry-run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ") and str(path) in done.stderr


@pytest.mark.parametrize("arguments", [("tiny",), ("--gpu-memory", "80")], ids=str)
def test_arguments_that_mean_nothing_are_one_line(monkeypatch, capsys, arguments):
    said = mistake(monkeypatch, capsys, {}, *arguments)
    assert f"{arguments[-1]} is no command: settings are environment variables; --help" in said


@pytest.mark.parametrize("wrong", ["--dryrun", "--dry_run", "--rehearsal", "--preset"])
def test_a_misspelt_command_is_told(monkeypatch, capsys, wrong):
    said = mistake(monkeypatch, capsys, {}, wrong)
    assert re.search(rf"{wrong} is no command; did you mean --(dry-run|rehearse|presets)\?", said)


@pytest.mark.parametrize(
    "arguments",
    [("--foo",), ("--k", "0"), ("--k", "1e300"), ("--k",), ("--step-ms", "nan"), ("--ranks", "0")],
    ids=str,
)
def test_wrong_arguments_of_a_dry_run_are_refused(arguments):
    with pytest.raises(UserError) as caught:
        dry_run.read_arguments(list(arguments))
    assert "\n" not in str(caught.value)


def test_what_a_run_would_refuse_is_refused(monkeypatch, capsys):
    wide = {"MLP_MULT": "20", "MAMBA_LAYERS": "none", "NUM_LAYERS": "5", "SDCLIP_MOST": "16"}
    monkeypatch.setattr("os.environ", wide)
    with pytest.raises(t.UserError, match="bits each on the coarsest grid"):
        dry_run.dry_run(["--gpu-memory", "80"])
    assert "at k=16.00, SDCLIP_MOST, of at most" in capsys.readouterr().out
    monkeypatch.setattr("os.environ", {"MLP_MULT": "7"})
    with pytest.raises(t.UserError, match="would be [34],.* bytes too large at k=20.00, the most"):
        dry_run.dry_run(["--gpu-memory", "80"])
    monkeypatch.setattr("os.environ", {"SDCLIP_K": "4"})  # export raises what is too small
    assert dry_run.dry_run(["--gpu-memory", "80"]) == 0
    monkeypatch.setattr("os.environ", {"TRAIN_SEQ_LEN": "1000"})
    with pytest.raises(t.UserError, match="TRAIN_BATCH_TOKENS"):
        dry_run.dry_run([])
    monkeypatch.setattr("os.environ", {"TTT_LR": "0.01", "TTT_LORA_LR": "0.001"})
    with pytest.raises(t.UserError, match="TTT_LR means nothing with EVAL_MODE=documents"):
        dry_run.dry_run([])


def test_what_yields_to_typed_settings_does_so_for_the_ranks_that_are_named(dry):
    said = dry({"PRESET": "tiny", "EVAL_OVERLAP": "156"}, "--ranks", "8")
    assert "\n  TTT_CHUNK_TOKENS=3200, not 4096\n" in said  # not 4000, which is no eight sequences


def test_of_several_ranks_one_speaks(dry):
    launch = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    said = dry({"PRESET": "tiny"} | launch | {"RANK": "0"})
    assert "for 2,048 tokens at once" in said  # of 4,096 in a step
    assert dry({"PRESET": "tiny"} | launch | {"RANK": "1"}) == ""


def test_presets_are_listed_with_a_line_each(monkeypatch, capsys):
    assert run_here(monkeypatch, {}, "--presets") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(t.PRESETS) == list(t.PRESET_USES)
    assert all(len(line.split()) > 4 for line in lines)
    assert set(t.FOR_CPUS) < set(t.PRESETS)
    assert run_here(monkeypatch, {}, "--presets", "tiny") == 0
    said = capsys.readouterr().out
    assert said == f"{t.describe_preset('tiny')}\n"
    assert "\n      TRAIN_SEQ_LEN=256\n" in said
    assert said in t.help_text()
    for arguments in (("x",), ("tiny", "x"), ("tiny", "--presets", "x")):
        assert run_here(monkeypatch, {}, "--presets", *arguments) == 2
        out, err = capsys.readouterr()
        line = "x: no preset is called so; --presets lists them"
        assert (out, err) == ("", f"train_gpt.py: error: {line}\n")


# ---- On a CPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "tokens"), [(64e9, 8192), (8e9, 2048), (1e9, 2048)])
def test_on_a_cpu_a_micro_batch_fits_its_memory(monkeypatch, memory, tokens):
    """Of the default preset, whose batch on a GPU is 131,072 tokens: 180 GB on a CPU."""
    monkeypatch.setattr(t, "device_memory", lambda device: memory)
    settings = t.Settings()
    assert t.choose_micro_batch(settings, SOLO) == tokens
    pair = t.Ranks(0, 2, SOLO.device)
    assert t.choose_micro_batch(settings, pair) <= tokens
    asked = dataclasses.replace(settings, micro_batch_tokens=32_768)
    assert t.choose_micro_batch(asked, SOLO) == 32_768


@pytest.mark.parametrize(("limit", "memory"), [("1073741824", 2**30), ("max", 2**40), ("", 2**40)])
def test_a_containers_memory_is_all_there_is(monkeypatch, tmp_path, limit, memory):
    monkeypatch.setattr(t.os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**28}.get)
    monkeypatch.setattr(t, "CONTAINER_MEMORY", tmp_path / "memory.max")
    if limit:
        t.CONTAINER_MEMORY.write_text(f"{limit}\n")
    assert t.device_memory(SOLO.device) == memory


def test_a_cpu_scores_and_adapts_to_as_many_tokens_at_once(monkeypatch):
    """Where VAL_BATCH_SIZE is a GPU's; by the shapes of what is read."""
    monkeypatch.setattr(t, "MOST_TOKENS_ON_A_CPU", 96)
    settings = tiny(val_batch_size=4096, ttt_chunk_tokens=256, ttt_epochs=1)
    model = t.build_model(settings, SOLO)
    read = {"on_read": [], "on_train": []}

    class Shapes(t.EvaluationObserver):
        def on_read(self, excerpt: t.Excerpt) -> None:
            read["on_read"].append(excerpt.tokens.numel())

        def on_train(self, excerpt: t.Excerpt) -> None:
            read["on_train"].append(excerpt.tokens.numel())

    text = validation_set(document_stream(600))
    t.Evaluator(model, settings, SOLO, text, observer=Shapes()).evaluate()
    assert max(read["on_read"]) == 96
    assert set(read["on_train"]) == {64}  # of the divisors of 8 windows of 32


@pytest.mark.parametrize(("preset", "warns"), [("default", True), ("short", True), ("tiny", False)])
def test_on_a_cpu_a_preset_for_gpus_warns(preset, warns):
    lines = []
    settings = tiny(preset=preset)

    def log(line: str, *_, **__) -> None:
        lines.append(line)

    trainer = t.Trainer(t.build_model(settings, SOLO), settings, SOLO, 64, 1e6, log)
    trainer.announce(t.model_skeleton(settings))
    warning = f"warning: PRESET={preset} is for GPUs; PRESET=tiny or laptop is for CPUs"
    assert (warning in lines) == warns


def test_a_start_says_that_python_keeps_no_bytecode_of_torch(tmp_path):
    """As where PYTHONDONTWRITEBYTECODE is set and nothing was kept before."""
    code = """
import types, train_gpt as t
print(t.keeps_bytecode(t.torch), t.keeps_bytecode(types))
settings = t.Settings(**t.PRESETS["tiny"])
ranks = t.Ranks(0, 1, t.torch.device("cpu"))
model = t.build_model(settings, ranks)
trainer = t.Trainer(model, settings, ranks, 64, 1e6, lambda line, *_, **__: print(line))
trainer.announce(t.model_skeleton(settings))
"""
    said = {}
    for name, changes in (
        ("kept", {}),
        ("not kept", {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(tmp_path)}),
    ):
        command = [sys.executable, "-c", code]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""} | changes
        said[name] = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment
        ).stdout
    warning = "warning: Python keeps no bytecode of torch, so starts take longer: "
    warning += "unset PYTHONDONTWRITEBYTECODE, or name a folder by PYTHONPYCACHEPREFIX\n"
    assert said["kept"].startswith("True True\n") and warning not in said["kept"]
    assert said["not kept"].startswith("False False\n") and warning in said["not kept"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "about 581 s here, not EXPORT_RESERVE_SECONDS=8: raise that, or take QUANTIZER=round"),
        ({"sdclip_by_matrix": 0.0, "sdclip_by_row": 0.0, "trellis_states": 0}, "about 194 s here"),
        ({"quantizer": "round"}, ""),
        ({"max_wallclock_seconds": 0.0}, ""),
        ({"export_reserve_seconds": 594.0}, ""),
        (t.PRESETS["tiny"], ""),
        (t.PRESETS["laptop"], ""),
    ],
    ids=["default", "plain grids", "round", "no clock", "a larger reserve", "tiny", "laptop"],
)
def test_an_export_that_a_cpu_cannot_end_in_its_reserve_is_told_at_the_start(changes, told):
    """By one line; these tests have one thread."""
    lines = []
    settings = t.Settings(**changes)
    model = t.build_model(tiny(), SOLO)

    def log(line: str, *_, **__) -> None:
        lines.append(line)

    trainer = t.Trainer(model, tiny(), SOLO, 64, 1e6, log)
    trainer.settings = settings
    trainer.announce(t.model_skeleton(settings))
    found = [line for line in lines if "calibration alone takes" in line]
    assert len(found) == bool(told)
    assert told in "".join(found)
