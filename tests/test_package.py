"""The submission folder: what it holds, what is refused in one line, and the test against a
baseline.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy import stats

import train_gpt as t
from tests.support import SOLO, train_tokenizer
from tools import evidence, known, pack_script, package, significance, summary
from tools.audit import checks as audit
from tools.logs import finished_run

ROOT = Path(__file__).resolve().parent.parent

FIELDS = [
    "author",
    "github_id",
    "name",
    "blurb",
    "date",
    "track",
    "val_loss",
    "val_bpb",
    "val_loss_std",
    "val_bpb_std",
    "seeds",
    "seed_results",
    "bytes_total",
    "bytes_code",
    "train_steps",
    "step_avg_ms",
    "hardware",
    "pytorch_version",
    "cuda_version",
]
FILES = {"train_gpt.py", "README.md", "submission.json", "requirements.txt"}
H100 = "8 × NVIDIA H100 80GB HBM3"
# FineWeb's validation text by the contest's tokenizer of 8,192 pieces.
FINEWEB = {"shards": 1, "documents": 50_000, "tokens": 40_540_803, "scored_tokens": 40_540_802}
FINEWEB |= {"bytes": 151_080_891}
SP8192 = known.variant_of("4e979c92754cc9d7bdebd9dfe5edf3fc0b41b38714b394e4297fa851e3afd516")
BYTES_PER_TOKEN = FINEWEB["bytes"] / FINEWEB["scored_tokens"]
RECORD = (11, 22, 33)  # seeds enough for one


@pytest.fixture(autouse=True)
def project(tmp_path_factory, monkeypatch) -> Path:
    """A project whose script is the beginning of ours, with its settings: short, so that the tests
    are fast.
    """
    folder = tmp_path_factory.mktemp("package") / "project"
    folder.mkdir()
    shutil.copy(ROOT / "requirements.txt", folder)
    beginning, found, _ = (ROOT / "train_gpt.py").read_text().partition("\nFIELDS = ")
    assert found
    (folder / "train_gpt.py").write_text(beginning + "\nLAST = 1\n")
    monkeypatch.setattr(package, "ROOT", folder)
    return folder


def bpb(loss: float, bytes_per_token: float = BYTES_PER_TOKEN) -> float:
    return loss / math.log(2) / bytes_per_token


def write_run(
    folder: Path,
    name: str,
    loss: float = 3.0,
    hardware: str = H100,
    evaluation: float = 400.0,
    bytes_per_token: float = BYTES_PER_TOKEN,
    trained: dict | None = None,
    machine: dict | None = None,
    script: Path | None = None,
    text: dict | None = None,
    training: dict | None = None,
    artifact: bool = False,
    resumed: tuple[int, float] | None = None,
    starts: int = 2,
    stopped: float = math.inf,
    **settings,
) -> Path:
    """Both logs of a finished run, through the classes that write real ones; returns the text log's
    path. trained, machine, text and training replace values of the records, keyword arguments are
    settings.
    artifact: of the right size, beside the log; a small one, which commands read several times.
    resumed: step and clock of the checkpoint. stopped: seconds of the clock after which nothing is
    logged any more.
    """
    script = script or package.ROOT / "train_gpt.py"
    s = t.Settings(**({"run_id": name, "log_dir": str(folder)} | settings))
    code_bytes = script.stat().st_size
    values = {"steps": 5000, "bytes_total": 1_900_000, "bytes_code": code_bytes}
    values |= {"val_loss": loss + 0.04, "val_bpb": bpb(loss + 0.04)}
    values |= {"train_clock_seconds": 599.0} | (trained or {})
    clock = values["train_clock_seconds"]
    values.setdefault("step_avg_ms", round(1000 * (clock - 9) / values["steps"], 2))
    about = {"python": "3.12.3", "torch": "2.9.0", "cuda": "12.8", "triton": "3.5.0"}
    about |= {"hardware": hardware} | (machine or {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "__file__", str(script))  # what Log writes first
        log = t.Log()
        log.open(s, SOLO, name)
    log.begin()

    def at(seconds: float) -> t.Log:
        log.started = time.perf_counter() - seconds
        return log

    log_start(at(0.0), s, about, text or {}, training or {})
    began = 0.0
    if resumed:
        began = resumed[1]
        record = {"step": resumed[0], "clock": began, "starts": starts}
        line = f"resumed {name}.checkpoint: step {resumed[0]}, {began:.1f}s"
        at(1.0)(line, "resumed", **record)
    at(50.0)("ready after 50.0s; training starts", "ready")
    for step in [1, 2, 3, 4, 5, *range(s.train_log_every, values["steps"] + 1, s.train_log_every)]:
        seconds = step * values["step_avg_ms"] / 1000
        if began <= seconds <= stopped:
            log_step(at(50 + seconds - began), s, step, seconds)
    if stopped == math.inf:
        now = 50 + max(0, clock - began)
        steps = f"{values['steps']} steps of {values['step_avg_ms']:.2f}ms"
        at(now)(f"Code size: {code_bytes} bytes; {steps}; peak GPU memory 16.5 GB")
        before = {"val_loss": values["val_loss"], "val_bpb": values["val_bpb"]}
        text = "val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} before quantization".format(**before)
        step = values["steps"]
        at(now + 5)(f"step:{step}/{s.iterations} {text}", "validation", step=step, **before)
        at(now + 9)(f"GPTQ at k=10.00; training clock {clock:.1f}s")
        log(f"Total submission size int6+lzma: {values['bytes_total']} bytes", "trained", **values)
        plain = t.replace(s, eval_mode="plain", ttt_enabled=False)
        after = score(loss + 0.05, bytes_per_token)
        report(at(now + 20), "after_quantization", plain, after)
        log("evaluation: attempt 1", "evaluation", attempt=1)
        took = f"evaluation took {evaluation:.1f}s of {s.eval_max_seconds:g}s"
        at(now + 20 + evaluation)(f"{took}; 0 epochs given up")
        if s.eval_nll_path:
            log(f"nats of 40,540,802 targets: {s.eval_nll_path}", "target_nats")
        final = score(loss, bytes_per_token)._replace(seconds=evaluation)
        report(log, "final", s, final)
    log.close()
    if artifact:
        write_artifact(s.artifact_path, s, values["bytes_total"] - code_bytes)
    return folder / f"{name}.txt"


def log_start(log: t.Log, s: t.Settings, about: dict, text: dict, training: dict | None):
    asked = dataclasses.asdict(s)
    line = "  ".join(f"{key}={value}" for key, value in (about | asked).items())
    log(line, "settings", machine=about, settings=asked)
    counts = FINEWEB | text
    line = "validation text: {tokens:,} tokens in {shards} shards, {documents:,} documents; "
    line += "scored are {scored_tokens:,} tokens, {bytes:,} bytes"
    log(line.format(**counts), "validation_data", **counts)
    hashes = {}
    if "tokens" not in text:  # else it is by a tokenizer of its own
        hashes["tokenizer"] = {"t.model": SP8192.tokenizer_sha256}
    hashes["validation"] = {"fineweb_val_000000.bin": "b" * 64}
    if training is not None:
        hashes["training"] = {"fineweb_train_000000.bin": "a" * 64, "fineweb_train_000001.bin": ""}
    for kind, files in hashes.items():
        log(f"SHA-256, {kind}: {', '.join(f'{n} {x}' for n, x in files.items() if x)}")
    overlap = "validation documents that are training documents too: not known"
    log(overlap, "hashes", **hashes, overlap_documents=None)
    if training is None:
        return  # a start that only evaluates opens no training shard
    data = {"shards": 2, "tokens": 8_000_000_000, "digest": "0123456789abcdef"} | training
    line = "training data: {tokens:,} tokens in {shards} shards (names and lengths {digest})"
    log(line.format(**data), "training_data", **data)


def log_step(log: t.Log, s: t.Settings, step: int, seconds: float):
    values = {"train_loss": 4.5, "train_ms": 1000 * seconds, "step_avg_ms": 1000 * seconds / step}
    text = "train_loss:{train_loss:.4f} train_time:{train_ms:.0f}ms step_avg:{step_avg_ms:.2f}ms"
    line = f"step:{step}/{s.iterations} {text.format(**values)} 1.0% 9 tokens/s 3s left"
    log(line, "train", step=step, **values)


def report(log: t.Log, event: str, s: t.Settings, found: t.Score):
    """A score as a run logs it, but for the tables of where its nats are: it has none."""

    def record(name: str, **values):
        if not name.endswith("_profile"):
            t.Log.record(log, name, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "record", record)
        patch.setattr(t, "profile", lambda *_: {})
        t.report(log, event, s, None, found)


def score(loss: float, bytes_per_token: float = BYTES_PER_TOKEN) -> t.Score:
    return t.Score(loss, bpb(loss, bytes_per_token), None, 0)


def write_artifact(path: Path, s: t.Settings, size: int, tokenizer: str = SP8192.tokenizer_sha256):
    """A file that looks like an artifact of this size from outside."""
    header = t.artifact_header(s, tokenizer)
    overhead = sum(map(len, t.seal(t.ARTIFACT_MAGIC, header)))
    path.write_bytes(b"".join(t.seal(t.ARTIFACT_MAGIC, header, bytes(size - overhead))))


def write_runs(folder: Path, losses=(3.00, 3.01, 3.02), **options) -> list[Path]:
    """A run for each loss, with seeds 11, 22, 33 ..."""
    return [
        write_run(folder, f"run{i}", loss, seed=11 * i, **options)
        for i, loss in enumerate(losses, 1)
    ]


def edit(path: Path, old: str, new: str, count: int = 1) -> Path:
    text = path.read_text()
    assert text.count(old) == count, (text.count(old), old)
    path.write_text(text.replace(old, new))
    return path


def pack(out: Path, *arguments, author: str = "A. Author") -> int:
    """Runs the command in this process."""
    return package.main(
        [*map(str, arguments), "--out", str(out), "--author", author, "--name", "Entry"]
    )


def packed(out: Path) -> tuple[dict, str]:
    """submission.json and README.md."""
    return json.loads((out / "submission.json").read_text()), (out / "README.md").read_text()


def refusal(out: Path, capsys, *arguments) -> str:
    """The one line of a refused command, which must leave no trace."""

    def state():
        return {path: path.stat().st_mtime_ns for path in out.parent.rglob("*") if path != out}

    before = state()
    assert pack(out, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("package.py: error: ")
    assert state() == before
    return printed.err.removeprefix("package.py: error: ").rstrip("\n")


# ============
# What the folder holds


def test_the_folder_holds_script_logs_requirements_and_results(tmp_path, project):
    logs, out = write_runs(tmp_path / "logs"), tmp_path / "new" / "entry"
    assert pack(out, *logs, "--github-id", "someone", "--blurb", "Short.") == 0
    copies = {f"train_seed{seed}{suffix}" for seed in RECORD for suffix in (".txt", ".jsonl")}
    assert {path.name for path in out.iterdir()} == FILES | copies
    assert list(out.parent.iterdir()) == [out]  # nothing temporary is left
    assert (out / "train_gpt.py").read_bytes() == (project / "train_gpt.py").read_bytes()
    assert (out / "requirements.txt").read_bytes() == (ROOT / "requirements.txt").read_bytes()
    for seed, log in zip(RECORD, logs, strict=True):
        for suffix in (".txt", ".jsonl"):
            assert (out / f"train_seed{seed}{suffix}").read_bytes() == log.with_suffix(
                suffix
            ).read_bytes()


def test_submission_json_has_the_contests_fields_means_and_deviations(tmp_path, project):
    sizes = (1_900_001, 1_900_003, 1_900_002)
    logs = [
        write_run(
            tmp_path,
            f"run{i}",
            loss,
            seed=seed,
            trained={"bytes_total": size, "steps": steps, "step_avg_ms": ms},
            artifact=True,
        )
        for i, (loss, seed, size, steps, ms) in enumerate(
            zip(
                (3.00, 3.01, 3.02),
                RECORD,
                sizes,
                (5000, 5010, 5041),
                (117.0, 118.0, 118.5),
                strict=True,
            )
        )
    ]
    assert pack(tmp_path / "out", *logs, "--github-id", "someone", "--blurb", "Short.") == 0
    entry, _ = packed(tmp_path / "out")
    assert list(entry) == FIELDS
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry.pop("date"))
    results = entry.pop("seed_results")
    assert list(results) == ["11", "22", "33"]
    assert results["22"] == {
        "val_loss": 3.01, "val_bpb": round(bpb(3.01), 8), "train_steps": 5010, "step_avg_ms": 118.0,
        "bytes_total": 1_900_003,
    }  # fmt: skip
    assert entry == {
        "author": "A. Author",
        "github_id": "someone",
        "name": "Entry",
        "blurb": "Short.",
        "track": "track_10min_16mb",
        "val_loss": 3.01,
        "val_bpb": round(bpb(3.01), 8),
        "val_loss_std": 0.01,
        "val_bpb_std": round(bpb(0.01), 8),  # of the sample: n - 1
        "seeds": [11, 22, 33],
        "bytes_total": 1_900_003,
        "bytes_code": (project / "train_gpt.py").stat().st_size,
        "train_steps": 5017,
        "step_avg_ms": 117.83,
        "hardware": H100,
        "pytorch_version": "2.9.0",
        "cuda_version": "12.8",
    }


def test_readme_has_a_row_per_seed_their_mean_and_their_deviation(tmp_path):
    assert pack(tmp_path / "out", *write_runs(tmp_path / "logs")) == 0
    rows = [
        line.strip("| ").split(" | ")
        for line in packed(tmp_path / "out")[1].split("## What was checked")[0].split("\n")
        if line.startswith("|")
    ]
    assert [row[0] for row in rows] == ["seed", "---", "11", "22", "33", "mean", "std"]
    assert len({len(row) for row in rows}) == 1
    second, mean, std = (
        dict(zip(rows[0], row, strict=True)) for row in (rows[3], rows[5], rows[6])
    )
    assert second["steps"] == "5,000"
    assert second["ms/step"] == "118.00"
    assert second["BPB before quantization"] == f"{bpb(3.05):.5f}"
    assert second["after"] == f"{bpb(3.06):.5f}"
    assert second["final"] == f"{bpb(3.01):.5f}"
    assert second["bytes"] == "1,900,000"
    assert (mean["final val_loss"], std["final val_loss"]) == ("3.01000", "0.01000")
    assert (mean["final"], std["final"]) == (f"{bpb(3.01):.5f}", f"{bpb(0.01):.5f}")
    assert std["bytes"] == "0"


def test_one_run_has_no_deviation(tmp_path):
    assert pack(tmp_path / "out", *write_runs(tmp_path / "logs", [3.0])) == 0
    entry, text = packed(tmp_path / "out")
    assert (entry["val_loss"], entry["val_loss_std"], entry["val_bpb_std"]) == (3.0, None, None)
    assert "±" not in text
    assert re.search(r"^\| std( \| –)+ \|$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("seeds", "options", "reason"),
    [
        (3, {}, None),
        (4, {"hardware": "8 × NVIDIA H100 SXM5 80GB"}, None),
        (3, {"data_path": "/elsewhere/fineweb10B_sp1024"}, None),
        (
            3,
            {"hardware": "4 × NVIDIA H100 80GB HBM3"},
            "the hardware is 4 × NVIDIA H100 80GB HBM3, not 8 × H100 SXM",
        ),
        (
            3,
            {"hardware": "8 × NVIDIA H100 PCIe"},
            "the hardware is 8 × NVIDIA H100 PCIe, not 8 × H100 SXM",
        ),
        (3, {"hardware": "8 × NVIDIA H1000"}, "the hardware is 8 × NVIDIA H1000, not 8 × H100 SXM"),
        (3, {"hardware": "8 × NVIDIA H200"}, "the hardware is 8 × NVIDIA H200, not 8 × H100 SXM"),
        (3, {"hardware": "18 × NVIDIA H100"}, "the hardware is 18 × NVIDIA H100, not 8 × H100 SXM"),
        (
            3,
            {"data_path": "x/fineweb10B_sp8192", "text": {"documents": 39}},
            "what was scored is not FineWeb's whole validation text",
        ),
        (3, {"artifact": False}, "the artifact of"),
        (2, {}, "2 seeds, not three or more"),
        (1, {}, "1 seed, not three or more"),
    ],
)
def test_what_is_not_three_seeds_of_fineweb_on_eight_h100_is_non_record(
    tmp_path, capsys, seeds, options, reason
):
    losses = [3.0 + i / 100 for i in range(seeds)]
    logs = write_runs(tmp_path / "logs", losses, **({"artifact": True} | options))
    capsys.readouterr()
    assert pack(tmp_path / "out", *logs) == 0
    entry, text = packed(tmp_path / "out")
    printed = capsys.readouterr().out
    if reason is None:
        assert entry["track"] == "track_10min_16mb"
        assert "non-record" not in (text + printed).lower()
    else:
        assert entry["track"] == "non-record"
        assert printed.count("\nnon-record: ") == 1
        assert f"\nnon-record: {reason}" in printed
        assert f"\n- {reason}" in text


@pytest.mark.parametrize(
    ("hardware", "settings"),
    [
        (H100, {}),
        (
            H100,
            {
                "matrix_lr": 0.03,
                "ttt_enabled": False,
                "max_wallclock_seconds": 590.5,
                "layer_order": "0-3,3-8",
            },
        ),
        (
            "2 × NVIDIA H200",
            {
                "preset": "short",
                "train_batch_tokens": 131_072,
                "tokenizer_path": 'it\'s $HOME; a "b"',
            },
        ),
        (
            "1 × CPU x86_64, 2 threads",
            {"preset": "tiny", "num_layers": 2, "mamba_layers": "0", "scalar_lr": 1e-5},
        ),
    ],
)
def test_the_readmes_command_asks_for_the_same_settings(tmp_path, hardware, settings):
    options = {"hardware": hardware, "evaluation": 60.0, "trained": {"train_clock_seconds": 110.0}}
    preset = t.PRESETS[settings.get("preset", "default")]
    logs = write_runs(tmp_path / "logs", [3.0, 3.1], **options, **(preset | settings))
    assert pack(tmp_path / "out", *logs) == 0
    loop = re.search(
        r"^for seed in 11 22; do\n    (.*)\ndone$", packed(tmp_path / "out")[1], re.MULTILINE
    )
    words = shlex.split(loop[1])
    given = list(itertools.takewhile(lambda word: "=" in word, words))
    ranks = hardware.split()[0]
    launch = (
        ["python"] if ranks == "1" else ["torchrun", "--standalone", f"--nproc_per_node={ranks}"]
    )
    assert words[len(given) :] == [*launch, "train_gpt.py"]
    assert given[0] == "SEED=$seed"
    assert {word.split("=")[0].lower() for word in given[1:]} == set(
        settings
    )  # no more than what differs
    read, _ = t.read_settings(dict(word.split("=", 1) for word in given[1:]) | {"SEED": "11"})
    ran = json.loads(logs[0].with_suffix(".jsonl").read_text().split("\n")[0])["settings"]
    assert dataclasses.asdict(read) | {"run_id": ran["run_id"], "log_dir": ran["log_dir"]} == ran


def test_the_last_of_several_runs_in_one_log_counts(tmp_path, project):
    older = tmp_path / "older.py"
    older.write_text("# another script\n" + (project / "train_gpt.py").read_text())
    write_run(tmp_path, "again", 3.5, seed=1, script=older)
    log = write_run(tmp_path, "again", 3.0, seed=2)
    assert pack(tmp_path / "out", log) == 0
    entry, _ = packed(tmp_path / "out")
    assert (entry["seeds"], entry["val_loss"]) == ([2], 3.0)


def test_author_and_name_come_from_submission_json_but_not_its_blurb(tmp_path, capsys, project):
    log, out = write_run(tmp_path / "logs", "a"), str(tmp_path / "out")
    assert package.main([str(log), "--out", out]) == 2
    assert "--author is missing" in capsys.readouterr().err
    known = {
        "author": "Known",
        "github_id": None,
        "name": "Known name",
        "blurb": "Of another run.",
        "val_bpb": 1.0,
    }
    (project / "submission.json").write_text(json.dumps(known))
    assert package.main([str(log), "--out", out, "--name", "New name"]) == 0
    entry, text = packed(tmp_path / "out")
    assert (entry["author"], entry["github_id"], entry["name"]) == ("Known", None, "New name")
    assert entry["val_bpb"] == round(bpb(3.0), 8)
    assert "Of another run" not in text + entry["blurb"]
    assert f"{bpb(3.0):.4f} bits per byte" in entry["blurb"]
    assert "github_id is empty" in capsys.readouterr().out
    (project / "submission.json").write_text("{")
    assert package.main([str(log), "--out", out, "--force"]) == 2
    assert capsys.readouterr().err == f"package.py: error: {project}/submission.json is not JSON\n"
    # What is no object was a traceback; what is no line of text went into the entry.
    for content, said in (
        ("[]", f"{project}/submission.json holds no fields of an entry"),
        ('{"author": "a", "name": NaN}', "--name: nan is no line of text"),
        ('{"author": ["a"], "name": "n"}', "--author: ['a'] is no line of text"),
        ('{"author": "a", "name": "n\\n| b"}', "--name: 'n\\n| b' is no line of text"),
    ):
        (project / "submission.json").write_text(content)
        assert package.main([str(log), "--out", out, "--force"]) == 2
        assert capsys.readouterr().err == f"package.py: error: {said}\n"


def test_the_repositorys_own_log(tmp_path):
    log = ROOT / "logs" / "h200-45s.txt"
    script = tmp_path / "script.py"
    script.write_text(log.read_text().split("\n" + "=" * 100 + "\n")[0])
    command = [
        sys.executable,
        "-m",
        "tools.package",
        str(log),
        "--script",
        str(script),
        "--out",
        "entry",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("entry: 1 run, val_bpb 1.36226, track non-record\n")
    entry, text = packed(tmp_path / "entry")
    assert (tmp_path / "entry" / "train_gpt.py").read_bytes() == script.read_bytes()
    assert list(entry) == FIELDS
    figures = (
        "val_loss",
        "val_bpb",
        "bytes_total",
        "bytes_code",
        "train_steps",
        "step_avg_ms",
        "hardware",
    )
    wanted = [3.47191322, 1.3622593, 15_636_376, 139_974, 554, 70.53, "1 × NVIDIA H200"]
    assert [entry[name] for name in figures] == wanted
    assert "| 1337 | 554 | 70.53 | 1.36672 | 1.36828 | 1.36226 | 3.47191 | 15,636,376 |" in text
    assert (
        "MAX_WALLCLOCK_SECONDS=45 EXPORT_RESERVE_SECONDS=6 EVAL_MAX_SECONDS=180 python train_gpt.py"
        in text
    )


# ============
# What is refused: every case writes logs, of which the first is sound, and names the line


def other_code(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    return [edit(log, "\nclass Settings:", "\nclass settings:")]


def shorter_code(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    return [edit(log, "\nLAST = 1\n\n===", "\n\n===")]


def other_code_in_the_second_run(folder: Path) -> list[Path]:
    write_run(folder, "b", seed=2)
    script = folder.parent / "changed.py"
    script.write_text("# new\n" + (package.ROOT / "train_gpt.py").read_text())
    return [write_run(folder, "b", seed=2, script=script)]


def other_code_size(folder: Path) -> list[Path]:
    return [write_run(folder, "b", seed=2, trained={"bytes_code": 1000})]


def without_text_score(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    lines = log.read_text().split("\n")
    log.write_text("\n".join(lines[:-3]) + "\n")
    return [log]


def without_recorded_score(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    records = log.with_suffix(".jsonl")
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:-1]))
    return [log]


def unfinished_second_run(folder: Path) -> list[Path]:
    """The first run's score must not stand for the second's, which stopped after its settings."""
    log = write_run(folder, "b", seed=2)
    settings = log.with_suffix(".jsonl").read_text().split("\n")[0]
    with log.open("a") as text, log.with_suffix(".jsonl").open("a") as records:
        text.write((package.ROOT / "train_gpt.py").read_text() + "\n" + "=" * 100 + "\nsettings\n")
        records.write(settings + "\n")
    return [log]


def scores_disagree(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    return [edit(log, "_exact val_loss:3.00000000", "_exact val_loss:2.99000000")]


def bpb_disagrees(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    edit(log.with_suffix(".jsonl"), f'"val_bpb": {bpb(3.0)}', f'"val_bpb": {bpb(2.99)}')
    return [log]


def score_is_nan(folder: Path) -> list[Path]:
    return [write_run(folder, "b", float("nan"), seed=2)]


def records_are_missing(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    log.with_suffix(".jsonl").unlink()
    return [log]


def records_are_broken(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    log.with_suffix(".jsonl").write_text('{"event": "settings"\n')
    return [log]


def event_is_no_text(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    edit(log.with_suffix(".jsonl"), '"event": "trained"', '"event": {}')
    return [log]


def record_is_missing(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    edit(log.with_suffix(".jsonl"), '"event": "trained"', '"event": "other"')
    return [log]


def text_is_binary(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    log.write_bytes(b"\xff\xfe")
    return [log]


def text_is_a_folder(folder: Path) -> list[Path]:
    (folder / "b.txt").mkdir()
    return [folder / "b.txt"]


def text_without_script(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    log.write_text(log.read_text().split("=" * 100 + "\n")[1])
    return [log]


# Edited logs: what is edited in both says one thing, what is edited in one contradicts the other.


def edited(folder: Path, text: dict[str, str], records: dict[str, str]) -> list[Path]:
    """A run whose logs had these patterns replaced, wherever they stand behind the script."""
    log = write_run(folder, "b", seed=2)
    for path, replacements in ((log, text), (log.with_suffix(".jsonl"), records)):
        code, separator, messages = path.read_text().rpartition("\n" + "=" * 100 + "\n")
        for pattern, new in replacements.items():
            messages, count = re.subn(pattern, new, messages)
            assert count, pattern
        path.write_text(code + separator + messages)
    return [log]


def other_hardware(folder: Path) -> list[Path]:
    return edited(folder, {}, {re.escape(json.dumps(H100)[1:-1]): "8 \\\\u00d7 NVIDIA H200"})


def other_clock_in_the_records(folder: Path) -> list[Path]:
    return edited(folder, {}, {r'"train_clock_seconds": 599.0': '"train_clock_seconds": 399.0'})


def other_steps_in_the_records(folder: Path) -> list[Path]:
    return edited(folder, {}, {r'"steps": 5000': '"steps": 5049'})


def other_size_in_the_text(folder: Path) -> list[Path]:
    return edited(folder, {"int6.lzma: 1900000": "int6+lzma: 1400000"}, {})


def other_loss_of_a_step(folder: Path) -> list[Path]:
    return edited(folder, {"(step:100/.* train_loss:)4": r"\g<1>3"}, {})


def other_limit_in_the_text(folder: Path) -> list[Path]:
    return edited(folder, {"max_wallclock_seconds=600.0": "max_wallclock_seconds=7200.0"}, {})


def other_text_in_the_records(folder: Path) -> list[Path]:
    return edited(folder, {}, {'"documents": 50000': '"documents": 50001'})


def no_training_clock(folder: Path) -> list[Path]:
    """Trained for 599 s, but both logs say 99 s for all."""
    clock = {"training clock 599.0s": "training clock 99.0s"}
    return edited(folder, clock, {'"train_clock_seconds": 599.0': '"train_clock_seconds": 99.0'})


def faster_steps(folder: Path) -> list[Path]:
    """The same, with the mean of a step to fit."""
    text = {"training clock 599.0s": "training clock 99.0s", "of 118.00ms": "of 18.00ms"}
    records = {'"train_clock_seconds": 599.0': '"train_clock_seconds": 99.0'}
    return edited(folder, text, records | {r'("trained".*"step_avg_ms": )118.0': r"\g<1>18.0"})


def many_steps(folder: Path) -> list[Path]:
    text = {"5000 steps of 118.00ms": "13000 steps of 881.00ms"}
    records = {r'("trained".*"steps": )5000': r"\g<1>13000"}
    return edited(folder, text, records | {r'("trained".*"step_avg_ms": )118.0': r"\g<1>881.0"})


def faster_clock(folder: Path) -> list[Path]:
    """Every step came earlier, by both logs, than its record was written."""
    log = write_run(folder, "b", seed=2)
    lines = [json.loads(line) for line in log.with_suffix(".jsonl").read_text().splitlines()]
    for line in lines:
        line["seconds"] *= 1.5
    log.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [log]


def shorter_evaluation(folder: Path) -> list[Path]:
    return edited(folder, {"evaluation took 400.0s": "evaluation took 300.0s"}, {})


def another_artifact_scored(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2, trained={"artifact_sha256": "1" * 64})
    return [edit_record(log, "final", artifact_sha256="2" * 64)]


def another_script_named(folder: Path) -> list[Path]:
    return [edit_record(write_run(folder, "b", seed=2), "settings", script_sha256="1" * 64)]


def edit_record(log: Path, event: str, **values) -> Path:
    """Changes the last record of an event; returns the log's path."""
    records = [json.loads(line) for line in log.with_suffix(".jsonl").read_text().splitlines()]
    [record for record in records if record["event"] == event][-1].update(values)
    text = "".join(json.dumps(record) + "\n" for record in records)
    log.with_suffix(".jsonl").write_text(text)
    return log


def concealed_resumption(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2, resumed=(2457, 290.0))
    records = log.with_suffix(".jsonl")
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(line for line in lines if '"resumed"' not in line))
    return [log]


def second_score(folder: Path) -> list[Path]:
    """Both logs go on with another end."""
    log = write_run(folder, "b", seed=2)
    ends = (
        log.read_text().splitlines()[-2:],
        log.with_suffix(".jsonl").read_text().splitlines()[-1:],
    )
    for path, lines in zip((log, log.with_suffix(".jsonl")), ends, strict=True):
        with path.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
    return [log]


def validation_out_of_turn(folder: Path) -> list[Path]:
    """It would excuse the time that passed between two steps."""
    log = write_run(folder, "b", seed=2)
    line = "step:100/20000 val_loss:3.0000 val_bpb:1.0000\n"
    edit(log, "step:150/", f"{line}step:150/")
    records = log.with_suffix(".jsonl")
    train = next(x for x in records.read_text().splitlines() if '"step": 150' in x)
    seconds = json.loads(train)["seconds"]
    record = {
        "event": "validation",
        "seconds": seconds,
        "step": 100,
        "val_loss": 3.0,
        "val_bpb": 1.0,
    }
    edit(records, train, f"{json.dumps(record)}\n{train}")
    return [log]


def wrong_artifact(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    write_artifact(folder / "b.int6.lzma", t.Settings(), 1_000_000)
    return [log]


def artifact_of_another_model(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    size = 1_900_000 - (package.ROOT / "train_gpt.py").stat().st_size
    write_artifact(folder / "b.int6.lzma", t.Settings(model_dim=384), size)
    return [log]


def artifact_with_another_sum(folder: Path) -> list[Path]:
    return [write_run(folder, "b", seed=2, artifact=True, trained={"artifact_sha256": "0" * 64})]


def broken_artifact(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2, artifact=True)
    with (folder / "b.int6.lzma").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"x")
    return [log]


def no_artifact_in_its_place(folder: Path) -> list[Path]:
    log = write_run(folder, "b", seed=2)
    (folder / "b.int6.lzma").write_text("no artifact")
    return [log]


PLANTED = [
    (
        other_hardware,
        "{b}.txt: .txt has HARDWARE 8 × NVIDIA H100 80GB HBM3, .jsonl 8 × NVIDIA H200",
    ),
    (other_clock_in_the_records, "{b}.txt: .txt has a clock of 599.0 s, .jsonl of 399.000 s"),
    (other_steps_in_the_records, "{b}.txt: .txt has 5000 118.00 of steps, .jsonl 5049 118.00"),
    (other_size_in_the_text, "{b}.txt: .txt has bytes_total 1400000, .jsonl 1900000"),
    (other_loss_of_a_step, "{b}.txt: .txt has 100 3.5000 11800 118.00 of a step of training, .jso"),
    (other_limit_in_the_text, "{b}.txt: .txt has MAX_WALLCLOCK_SECONDS 7200.0, .jsonl 600.0"),
    (other_text_in_the_records, "{b}.txt: .txt has 40,540,803 1 50,000 40,540,802 151,080,891 of"),
    (
        no_training_clock,
        "{b}.txt: 5000 steps of 118.00 ms take 590.0 s, but the training clock stood at 99.0 s",
    ),
    (
        faster_steps,
        "{b}.txt: step 5000 ended at 590.0 s of training, but the whole clock is 99.0 s",
    ),
    (many_steps, "{b}.txt: 13000 steps of 881.00 ms take 11453.0 s, but the training clock stood"),
    (faster_clock, "{b}.txt: 885.0 s passed while steps were logged, of which the training clock"),
    (shorter_evaluation, "{b}.txt: evaluation took 300.0 s while 400.0 s passed"),
    (
        concealed_resumption,
        "{b}.txt: one of .txt and .jsonl says that the run was resumed, the oth",
    ),
    (second_score, "{b}.txt: one start has 2 records of 'final'"),
    (validation_out_of_turn, "{b}.txt: a validation at step 100 is not one of VAL_LOSS_EVERY"),
    (another_artifact_scored, "{b}.txt: the artifact that was scored is not the one that was tra"),
    (another_script_named, "{b}.txt names its script by another SHA-256 than it has"),
    (wrong_artifact, "{b}.txt: the log's artifact has 1,8"),
    (artifact_of_another_model, "{b}.txt: {b}.int6.lzma has MODEL_DIM=384, the log 512"),
    (artifact_with_another_sum, "{b}.txt: {b}.int6.lzma is another file than the log's of SHA-256"),
    (broken_artifact, "{b}.int6.lzma is not a whole artifact: its checksum does not match"),
    (no_artifact_in_its_place, "{b}.int6.lzma is not an artifact: wrong magic number"),
    (
        other_code,
        "{b}.txt holds another script than {script}: line {changed} has 'class settings:', "
        "not 'class Settings:'",
    ),
    (
        shorter_code,
        "{b}.txt holds another script than {script}: line {last} has '', not 'LAST = 1'",
    ),
    (
        other_code_in_the_second_run,
        "{b}.txt holds another script than {script}: line 1 has '# new', not '\"\"\"Param",
    ),
    (other_code_size, "{b}.txt counts 1000 bytes of code, but its script has {size}"),
    (without_text_score, "{b}.txt has no final score: the run did not finish"),
    (without_recorded_score, "{b}.jsonl has no final score: the run did not finish"),
    (unfinished_second_run, "{b}.txt has no final score: the run did not finish"),
    (
        scores_disagree,
        "{b}.txt has the final score val_loss 2.99000000 and val_bpb {bpb}, "
        "but {b}.jsonl 3.00000000 and",
    ),
    (
        bpb_disagrees,
        "{b}.txt has the final score val_loss 3.00000000 and val_bpb {bpb}, "
        "but {b}.jsonl 3.00000000 and",
    ),
    (score_is_nan, "{b}.txt has no usable final score: val_loss nan"),
    (records_are_missing, "cannot read {b}.jsonl: No such file or directory"),
    (records_are_broken, "{b}.jsonl is not a run's .jsonl log"),
    (event_is_no_text, "{b}.jsonl is not a run's .jsonl log"),
    (record_is_missing, "{b}.jsonl is not a finished run's log: KeyError('trained')"),
    (text_is_binary, "cannot read {b}.txt: it is not UTF-8 text"),
    (text_is_a_folder, "cannot read {b}.txt: Is a directory"),
    (
        text_without_script,
        "{b}.txt is not a run's text log: no line of 100 = ends the script in it",
    ),
    (lambda folder: [folder / "b.txt"], "cannot read {b}.txt: No such file or directory"),
    (lambda folder: [folder / "b.jsonl"], "{b}.jsonl: give the run's .txt log"),
    (lambda folder: [folder / "a.txt"], "{a}.txt is given twice"),
]
# The same for runs that differ from the first in one thing.
DIFFERENT = [
    ({"seed": 1}, "{b}.txt has SEED=1 at 600 s, as {a}.txt has"),
    ({"seed": 1, "max_wallclock_seconds": 599.5}, "{b}.txt has MAX_WALLCLOCK_SECONDS=599.5, but"),
    ({"matrix_lr": 0.03}, "{b}.txt has MATRIX_LR=0.03, but {a}.txt has 0.014"),
    ({"unet_skips": False}, "{b}.txt has UNET_SKIPS=False, but {a}.txt has True"),
    ({"scan_backend": "chunked"}, "{b}.txt has SCAN_BACKEND=chunked, but {a}.txt has auto"),
    ({"eval_only": True}, "{b}.txt is of an EVAL_ONLY run: give the log of the run that trained"),
    (
        {"hardware": "8 × NVIDIA H200"},
        "{b}.txt ran with hardware 8 × NVIDIA H200, but {a}.txt with " + H100,
    ),
    ({"hardware": "H100"}, "{b}.jsonl is not a finished run's log: ValueError("),
    (
        {"trained": {"bytes_code": float("inf")}},
        "{b}.jsonl is not a finished run's log: OverflowError(",
    ),
    ({"eval_mode": "plain", "ttt_enabled": False}, "{b}.txt has EVAL_MODE=plain, but {a}.txt has"),
    ({"machine": {"torch": "2.10.0"}}, "{b}.txt ran with torch 2.10.0, but {a}.txt with 2.9.0"),
    (
        {"bytes_per_token": 3.8},
        "{b}.txt: the score is of 3.80000 bytes per token, the text has 3.72664",
    ),
    (
        {"bytes_per_token": 4.0, "text": {"scored_tokens": 40_540_800, "bytes": 162_163_200}},
        "{b}.txt scored another text or used another tokenizer: 4.00000 bytes per token there",
    ),
    ({"text": {"documents": 10_000}}, "{b}.txt has other validation data than {a}.txt"),
    (
        {"trained": {"bytes_total": 16_000_001}},
        "{b}.txt: code and artifact take 16,000,001 bytes, over the cap of 16,00",
    ),
    (
        {"trained": {"train_clock_seconds": 600.2}},
        "{b}.txt: training took 600.2 s, over MAX_WALLCLOCK_SECONDS=600",
    ),
    (
        {"trained": {"train_clock_seconds": float("nan"), "step_avg_ms": 118.0}},
        "{b}.jsonl is not a finished run's log: ValueError('train_seconds is nan')",
    ),
    (
        {"max_wallclock_seconds": 500.0},
        "{b}.txt: training took 599.0 s, over MAX_WALLCLOCK_SECONDS=500",
    ),
    (
        {"max_wallclock_seconds": 900.0, "trained": {"train_clock_seconds": 601.0}},
        "{b}.txt: training took 601.0 s, over the contest's 600 s",
    ),
    (
        {"max_wallclock_seconds": 0.0, "trained": {"train_clock_seconds": 601.0}},
        "{b}.txt: training took 601.0 s, over the contest's 600 s",
    ),
    ({"evaluation": 600.1}, "{b}.txt: evaluation took 600.1 s, over EVAL_MAX_SECONDS=600"),
    ({"eval_max_seconds": 300.0}, "{b}.txt: evaluation took 400.0 s, over EVAL_MAX_SECONDS=300"),
    (
        {"eval_max_seconds": 900.0, "evaluation": 601.0},
        "{b}.txt: evaluation took 601.0 s, over the contest's 600 s",
    ),
]


@pytest.mark.parametrize(("plant", "line"), PLANTED)
def test_an_unsound_log_is_refused_in_one_line(tmp_path, capsys, project, plant, line):
    logs, script = tmp_path / "logs", project / "train_gpt.py"
    sound, out = write_run(logs, "a", seed=1), tmp_path / "out"
    planted, code = plant(logs), script.read_text()
    facts = {
        "a": logs / "a",
        "b": logs / "b",
        "script": script,
        "size": len(code.encode()),
        "bpb": f"{bpb(3.0):.8f}",
    }
    facts |= {"changed": code.split("\n").index("class Settings:") + 1, "last": code.count("\n")}
    capsys.readouterr()  # what the runs printed
    assert refusal(out, capsys, sound, *planted).startswith(line.format(**facts))


@pytest.mark.parametrize(("options", "line"), DIFFERENT)
def test_runs_over_a_limit_or_of_other_settings_are_refused_in_one_line(
    tmp_path, capsys, options, line
):
    logs = tmp_path / "logs"
    runs = [write_run(logs, "a", seed=1), write_run(logs, "b", **({"seed": 2} | options))]
    capsys.readouterr()
    assert refusal(tmp_path / "out", capsys, *runs).startswith(
        line.format(a=logs / "a", b=logs / "b")
    )


def test_runs_at_the_limits_and_in_other_places_are_packaged(tmp_path):
    at_limit = {"bytes_total": 16_000_000, "train_clock_seconds": 600.0}
    places = {"data_path": "x/fineweb10B_sp8192", "tokenizer_path": "x/t.model", "artifact": "m"}
    one = write_run(tmp_path / "one", "same", seed=1, trained=at_limit, evaluation=600.0)
    two = write_run(tmp_path / "two", "same", 3.01, seed=2, eval_nll_path="nats.npy", **places)
    assert pack(tmp_path / "out", one, two) == 0
    assert packed(tmp_path / "out")[0]["bytes_total"] == 16_000_000


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required: LOG"),
        (["--out", "x"], "the following arguments are required: LOG"),
        (["a.txt"], "cannot read a.txt: No such file or directory"),
        (["a.txt", "--out", "x", "--sedd", "1"], "unrecognized arguments: --sedd 1"),
        (
            ["a.txt", "--out", "x", "--script", "none.py"],
            "cannot read none.py: No such file or directory",
        ),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(
    tmp_path, capsys, monkeypatch, arguments, line
):
    monkeypatch.chdir(tmp_path)
    assert package.main(arguments) == 2
    assert capsys.readouterr().err == f"package.py: error: {line}\n"


# ============
# What reviewers ask for


def rows(out: Path) -> dict[str, str]:
    """The README's table of what was checked: the answer to each question."""
    table = packed(out)[1].split("## What was checked\n")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in table.split("\n") if line.startswith("|")]
    return {question: answer for question, answer, _ in cells[2:]}


def reasons(out: Path) -> list[str]:
    text = packed(out)[1]
    return [] if "**Non-record**" not in text else re.findall(r"^- (.*)$", text, re.MULTILINE)


def test_every_question_of_a_reviewer_has_an_answer(tmp_path):
    assert pack(tmp_path / "out", *write_runs(tmp_path / "logs", artifact=True)) == 0
    assert reasons(tmp_path / "out") == []
    answers = rows(tmp_path / "out")
    assert list(answers) == [
        "16,000,000 bytes",
        "clocks and figures",
        "one run, whole",
        "whole validation set",
        "no validation document in the training shards",
        "provenance of the data",
        "tokenizer",
        "features of earlier tokens end at BOS",
        "warm-up changes nothing",
        "calibration",
        "machine",
        "seeds run",
        "significance",
        "attempts at the evaluation",
        "settings of the evaluation",
        "readable source",
    ]
    text = "50,000 documents, 40,540,803 tokens, of which 40,540,802 are scored, 151,080,891 bytes"
    assert answers["whole validation set"].startswith(
        f"{text}: FineWeb's validation text by its counts"
    )
    assert "(not known: table to fill, data/known.json)" in answers["whole validation set"]
    assert answers["tokenizer"] == "the contest's, sp8192"
    assert answers["one run, whole"] == "every run was trained in one start"
    assert answers["attempts at the evaluation"] == "one for every run"
    assert "8,000,000,000 training tokens in 2 shards" in answers["provenance of the data"]
    assert answers["calibration"] == "not in this log"
    assert answers["significance"] == "no baseline was given"
    assert "ANOTHER SCRIPT: it differs in" in answers["readable source"]  # only its beginning


def test_a_log_that_does_not_say_it_is_no_record(tmp_path):
    """As older scripts' logs, and the text of one whose lines were deleted."""
    (log,) = write_runs(tmp_path / "logs", [3.0], artifact=True)
    records = log.with_suffix(".jsonl")
    lines = [line for line in records.read_text().split("\n") if "ation_data" not in line]
    records.write_text("\n".join(line for line in lines if "training_data" not in line))
    edit(log, f"Total submission size int6+lzma: {1_900_000} bytes\n", "")
    assert pack(tmp_path / "out", log) == 0
    assert rows(tmp_path / "out")["whole validation set"] == "not in this log"
    assert reasons(tmp_path / "out") == [
        "1 seed, not three or more",
        "the text logs do not say: validation text, training data, size",
        "the log does not say how much text was scored",
    ]


def test_calibrations_source_and_seconds_are_told(tmp_path, capsys):
    (log,) = write_runs(tmp_path / "logs", [3.0])
    records = log.with_suffix(".jsonl")
    record = {"event": "calibration", "seconds": 655.0, "source": "train", "tokens": 131_072}
    record |= {"text_seconds": 0.5, "hessian_seconds": 1.25}
    edit(records, '{"event": "trained"', json.dumps(record) + '\n{"event": "trained"')
    assert pack(tmp_path / "out", log) == 0
    told = "131,072 tokens of training text, 0.50 s; Hessians 1.25 s; all within the training clock"
    assert rows(tmp_path / "out")["calibration"] == told
    edit(records, '"hessian_seconds": 1.25', '"pass_seconds": 1.0, "factor_seconds": 0.25')
    assert pack(tmp_path / "out", log, "--force") == 0
    told = told.replace("Hessians 1.25 s", "pass over it 1.00 s; factors 0.25 s")
    assert rows(tmp_path / "out")["calibration"] == told
    edit(records, '"source": "train"', '"source": "validation"')
    assert pack(tmp_path / "out", log, "--force") == 0
    assert "calibration was on validation" in reasons(tmp_path / "out")
    edit(records, '"text_seconds": 0.5', '"text_seconds": null')
    capsys.readouterr()
    line = refusal(tmp_path / "out", capsys, log, "--force")
    assert line.startswith(f"{records} is not a finished run's log: TypeError(")


def test_a_seed_that_is_left_out_is_told_and_no_record(tmp_path):
    logs = write_runs(tmp_path / "logs", artifact=True)
    other = write_run(tmp_path / "logs", "other", 3.2, seed=99)
    write_run(tmp_path / "logs", "different", 3.2, seed=98, matrix_lr=0.03)
    write_run(tmp_path / "logs", "unfinished", 3.2, seed=97, stopped=300.0)
    for end in (".txt", ".jsonl"):  # a name of a byte that is no text
        named = other.with_suffix(end).rename(tmp_path / "logs" / f"other\udcff{end}")
    assert pack(tmp_path / "out", *logs) == 0
    told = f"packaged: 11, 22, 33; left out: 99 (val_bpb {bpb(3.2):.5f}, other\\udcff.jsonl); "
    told += "left out: 97 (without a score, unfinished.jsonl)"
    assert rows(tmp_path / "out")["seeds run"] == told
    place = str(named).replace("\udcff", "\\udcff")
    assert reasons(tmp_path / "out") == [f"SEED=99 was run too and is left out ({place})"]


def test_a_resumed_run_is_named_with_all_its_starts_and_what_they_trained(tmp_path):
    """Killed after 300 s, and taken up again from 290 s on."""
    logs = write_runs(tmp_path / "logs", [3.0, 3.01], artifact=True)
    write_run(tmp_path / "logs", "third", 3.02, seed=33, stopped=291.0)
    third = write_run(
        tmp_path / "logs", "third", 3.02, seed=33, resumed=(2457, 290.0), artifact=True
    )
    assert pack(tmp_path / "out", *logs, third) == 0
    told = "seed 33: RESUMED from step 2457 at 290.0 s; the log holds 1 starts before; "
    assert rows(tmp_path / "out")["one run, whole"].startswith(told + "2 starts trained 5")
    assert reasons(tmp_path / "out") == []


def test_a_run_that_another_machine_or_script_trained_in_part_is_no_record(tmp_path):
    """Sixteen GPUs, or a script that nobody has seen, came to the checkpoint: the last start's
    machine and script were taken for the whole run's.
    """
    logs = write_runs(tmp_path / "logs", [3.0, 3.01], artifact=True)
    sixteen = H100.replace("8", "16", 1)
    third = tmp_path / "logs", "third", 3.02
    write_run(*third, hardware=sixteen, seed=33, stopped=291.0)
    log = write_run(*third, seed=33, resumed=(2457, 290.0), artifact=True)
    own = hashlib.sha256((package.ROOT / "train_gpt.py").read_bytes()).hexdigest()
    records = log.with_suffix(".jsonl")
    for sha256 in (own, "0" * 64):  # of the last start, and of the first
        before, _, behind = records.read_text().rpartition('"event": "settings", "seconds"')
        records.write_text(
            f'{before}"event": "settings", "script_sha256": "{sha256}", "seconds"{behind}'
        )
    assert pack(tmp_path / "out", *logs, log) == 0
    assert reasons(tmp_path / "out") == [
        f"{log}: its starts had 2 machines: {sixteen}, then {H100}",
        f"{log}: its starts had 2 scripts, by their SHA-256: {'0' * 60}, then {own[:60]}",
    ]


@pytest.mark.parametrize(
    ("first", "checkpoint", "reason"),
    [
        (None, (2457, 290.0), "was resumed: it was resumed at step 2457 and 290.0 s, and the log"),
        (
            None,
            (0, 0.0),
            "was resumed: it was resumed at step 0 and 0.0 s, and the log has no start",
        ),
        (300.0, (0, 0.0), "was resumed: it was resumed at step 0 and 0.0 s, to which no start"),
        (300.0, (2457, 0.0), "was resumed: it was resumed at step 2457 and 0.0 s; by then 28"),
        (300.0, (1000, 118.0), "trained 776.1 s together"),
    ],
)
def test_a_resumed_run_whose_starts_do_not_account_for_it_is_no_record(
    tmp_path, first, checkpoint, reason
):
    """No log of the start before; checkpoints with the clock or the steps set back; and time that
    was trained twice.
    """
    options = {"seed": 33, "artifact": True}
    if first:
        write_run(tmp_path / "logs", "a", seed=33, stopped=first)
    step, clock = checkpoint
    if (step, clock) == (2457, 0.0):  # what such a run would log: 2,543 steps in all of the time
        options["trained"] = {"step_avg_ms": 118.0}
    log = write_run(tmp_path / "logs", "a", resumed=checkpoint, **options)
    assert pack(tmp_path / "out", log) == 0
    assert any(reason in told for told in reasons(tmp_path / "out")), reasons(tmp_path / "out")
    assert "RESUMED" in rows(tmp_path / "out")["one run, whole"]


def test_a_run_whose_text_was_not_checked_is_no_record(tmp_path):
    (log,) = write_runs(tmp_path / "logs", [3.0], eval_any_tokens=True)
    assert pack(tmp_path / "out", log) == 0
    unchecked = "EVAL_ANY_TOKENS=1: the text's tokens were not checked"
    assert unchecked in reasons(tmp_path / "out")


def test_an_evaluation_that_was_interrupted_is_named_but_is_a_record(tmp_path):
    """Its start belongs to the run, whose starts of training are none more."""
    logs = write_runs(tmp_path / "logs", artifact=True)
    last = t.Settings(run_id="run3", log_dir=str(tmp_path / "logs"), seed=33)
    *begin, took, final = logs[2].read_text().splitlines(keepends=True)
    logs[2].write_text("".join(begin))
    path = logs[2].with_suffix(".jsonl")
    *kept, _ = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "__file__", str(package.ROOT / "train_gpt.py"))
        log = t.Log()
        log.open(last, SOLO, "run3")
    first = json.loads(kept[0])
    log_start(log, last, first["machine"], {}, None)
    log("x is trained and has no score: evaluation starts over", "evaluation_again")
    log.begin()
    log("evaluation: attempt 2", "evaluation", attempt=2)
    log.started -= 400
    log(took.rstrip())
    report(log, "final", last, score(3.02)._replace(seconds=400.0))
    log.close()
    assert pack(tmp_path / "out", *logs) == 0
    found = rows(tmp_path / "out")
    assert found["attempts at the evaluation"] == "seed 33: 2, each with a new clock"
    assert found["one run, whole"] == "every run was trained in one start"
    assert reasons(tmp_path / "out") == []


def test_a_checkpoint_knows_how_many_starts_there_were(tmp_path):
    write_run(tmp_path / "logs", "a", seed=33, stopped=291.0)
    options = {"seed": 33, "resumed": (2457, 290.0), "starts": 3, "artifact": True}
    log = write_run(tmp_path / "logs", "a", **options)
    assert pack(tmp_path / "out", log) == 0
    reason = f"{log} was resumed: it is start 3 of a run of which the logs hold 2 (--parts LOG)"
    assert reason in reasons(tmp_path / "out")


def test_the_start_before_may_have_another_name(tmp_path):
    part = write_run(tmp_path / "logs", "before", seed=33, stopped=291.0)
    log = write_run(tmp_path / "logs", "a", seed=33, resumed=(2457, 290.0), artifact=True)
    assert pack(tmp_path / "out", log, "--parts", part) == 0
    assert reasons(tmp_path / "out") == ["1 seed, not three or more"]
    assert (tmp_path / "out" / "part1.txt").read_bytes() == part.read_bytes()


def test_a_tokenizer_of_ones_own_is_counted_and_lies_in_the_folder(tmp_path, capsys):
    file = tmp_path / "own.model"
    file.write_bytes(b"o" * 99_000)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    trained = {"bytes_total": 15_900_000}
    (log,) = write_runs(tmp_path / "logs", [3.0], text={"tokens": 40_540_805}, trained=trained)
    size = 15_900_000 - (package.ROOT / "train_gpt.py").stat().st_size
    s = t.Settings(run_id="run1", log_dir=str(log.parent))
    write_artifact(s.artifact_path, s, size, digest)
    capsys.readouterr()

    assert pack(tmp_path / "out", log) == 0
    assert any("give --tokenizer" in reason for reason in reasons(tmp_path / "out"))
    assert pack(tmp_path / "out", log, "--force", "--tokenizer", file) == 0
    assert reasons(tmp_path / "out") == ["1 seed, not three or more"]
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == file.read_bytes()
    told = "one of its own, SHA-256 " + digest + "; with its 99,000 bytes 15,999,000 in all"
    assert rows(tmp_path / "out")["tokenizer"].startswith(told)
    capsys.readouterr()

    other = tmp_path / "other.model"
    other.write_bytes(b"o" * 98_000)
    line = refusal(tmp_path / "next", capsys, log, "--tokenizer", other)
    assert line == f"{other} is not the tokenizer of these runs: its SHA-256 is another"
    digest = hashlib.sha256(b"o" * 101_000).hexdigest()
    file.write_bytes(b"o" * 101_000)
    write_artifact(s.artifact_path, s, size, digest)
    line = refusal(tmp_path / "next", capsys, log, "--tokenizer", file)
    assert line == "code, artifact and tokenizer take 16,001,000 bytes, over the cap of 16,000,000"


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf"])
def test_a_tokenizer_that_makes_another_text_is_no_records(tmp_path, rule):
    """Without capitals, text of as many bytes takes fewer nats."""
    file = train_tokenizer(tmp_path / "own.model", 340, normalization_rule_name=rule)
    (log,) = write_runs(tmp_path / "logs", [3.0], text={"tokens": 40_540_805})
    size = 1_900_000 - (package.ROOT / "train_gpt.py").stat().st_size
    s = t.Settings(run_id="run1", log_dir=str(log.parent))
    write_artifact(s.artifact_path, s, size, hashlib.sha256(file.read_bytes()).hexdigest())
    assert pack(tmp_path / "out", log, "--tokenizer", file) == 0
    told = "the tokenizer makes 'a' of 'A': what was scored is another text"
    folded = [told] if rule.endswith("_cf") else []
    assert reasons(tmp_path / "out") == ["1 seed, not three or more", *folded]


@pytest.mark.parametrize("option", ["--artifacts", "--parts", "--tokenizer", "--manifest"])
def test_a_file_that_is_given_and_not_there_is_refused(tmp_path, capsys, option):
    (log,) = write_runs(tmp_path / "logs", [3.0], artifact=True)
    capsys.readouterr()
    none = tmp_path / "none"
    line = refusal(tmp_path / "next", capsys, log, option, none)
    assert line == f"{option} {none}: there is no such file"


def test_a_file_that_is_given_is_of_these_runs_or_refused(tmp_path, capsys):
    """Artifacts of other names passed, as did any file beside runs with a known tokenizer."""
    (log,) = write_runs(tmp_path / "logs", [3.0], artifact=True)
    capsys.readouterr()
    (artifact,) = log.parent.glob("*.int6.lzma")
    other = tmp_path / "other.int6.lzma"
    other.write_bytes(artifact.read_bytes())
    another = Path(package.__file__)
    out = tmp_path / "next"
    line = refusal(out, capsys, log, "--artifacts", artifact, other)
    assert line.startswith(f"--artifacts {other} is none of these runs'")
    line = refusal(out, capsys, log, "--tokenizer", another)
    assert line == f"{another} is not the tokenizer of these runs: its SHA-256 is another"
    out.mkdir()
    kept = out / artifact.name
    kept.write_bytes(artifact.read_bytes())
    line = refusal(out, capsys, log, "--force", "--artifacts", kept)
    assert line == f"--out {out} would replace {kept}"


def test_a_log_whose_line_ends_were_changed_is_told(tmp_path, capsys):
    (log,) = write_runs(tmp_path / "logs", [3.0], artifact=True)
    capsys.readouterr()
    log.write_bytes(log.read_bytes().replace(b"\n", b"\r\n"))
    line = refusal(tmp_path / "next", capsys, log)
    assert line.startswith(f"{log}: its lines end by \\r\\n")


def write_manifest(folder: Path, overlap: int = 0, tokens: int = 100) -> tuple[Path, str]:
    """As data/prepare.py leaves it beside shards; and the digest that a run logs of these."""
    lengths = {"fineweb_train_000000.bin": tokens, "fineweb_train_000001.bin": 50}
    shards = {
        name: {"split": "train", "tokens": length, "sha256": "a" * 64}
        for name, length in lengths.items()
    }
    shards["fineweb_val_000000.bin"] = {"split": "val", "tokens": 1, "sha256": "b" * 64}
    found = {"shards": shards, "splits": {"val": FINEWEB}, "overlap": {"documents": overlap}}
    found |= {"tokenizer": {"sha256": SP8192.tokenizer_sha256}, "source": {"hub": "somewhere"}}
    folder.mkdir(exist_ok=True)
    path = folder / "manifest.json"
    path.write_text(json.dumps(found))
    digest = hashlib.sha256(ascii(sorted(lengths.items())).encode()).hexdigest()
    return path, digest[:16]


@pytest.mark.parametrize("overlap", [0, 3])
def test_the_manifest_of_the_data_tells_overlap_and_sums(tmp_path, overlap):
    path, digest = write_manifest(tmp_path / "data", overlap)
    training = {"digest": digest}
    logs = write_runs(tmp_path / "logs", training=training, artifact=True)
    assert pack(tmp_path / "out", *logs) == 0
    answers = rows(tmp_path / "out")
    shown = answers["no validation document in the training shards"]
    assert shown.startswith("not in this log")
    arguments = ("--force", "--manifest", path)
    assert pack(tmp_path / "out", *logs, *arguments) == 0
    answers = rows(tmp_path / "out")
    told = f"{overlap} validation documents are in the training shards"
    shown = answers["no validation document in the training shards"]
    assert shown == f"{told}, by manifest.json"
    assert "training shards, by manifest.json, " in answers["provenance of the data"]
    assert reasons(tmp_path / "out") == ([told] if overlap else [])
    assert "fineweb_val_000000.bin " + "b" * 64 in answers["provenance of the data"]
    assert '"hub": "somewhere"' in answers["provenance of the data"]
    assert (tmp_path / "out" / "manifest.json").read_bytes() == path.read_bytes()


def test_a_manifest_that_contradicts_the_logs_hashes_is_refused(tmp_path, capsys):
    """By name: a shard of another SHA-256 than the log's, of which the log had one."""
    path, digest = write_manifest(tmp_path / "data", 0)
    log = write_runs(tmp_path / "logs", training={"digest": digest}, artifact=True)[0]
    found = json.loads(path.read_text())
    found["shards"]["fineweb_train_000001.bin"]["sha256"] = "c" * 64  # not hashed in the log
    path.write_text(json.dumps(found))
    assert pack(tmp_path / "out", log, "--manifest", path) == 0
    found["shards"]["fineweb_train_000000.bin"]["sha256"] = "c" * 64
    path.write_text(json.dumps(found))
    capsys.readouterr()
    line = refusal(tmp_path / "next", capsys, log, "--manifest", path)
    assert line == f"{path} has another SHA-256 of fineweb_train_000000.bin than the log"


def test_a_manifest_of_other_data_is_refused_if_it_is_given_and_not_used_if_it_is_found(
    tmp_path, capsys
):
    path, _ = write_manifest(tmp_path / "data")
    (log,) = write_runs(tmp_path / "logs", [3.0], data_path=str(path.parent))
    capsys.readouterr()
    line = refusal(tmp_path / "out", capsys, log, "--manifest", path)
    assert line == f"{path} is of other training shards than the log"
    whole = json.loads(path.read_text())
    for splits in ({"val": []}, {"val": {"tokens": 1}}, {}, None):
        path.write_text(json.dumps(whole | {"splits": splits}))
        line = refusal(tmp_path / "out", capsys, log, "--manifest", path)
        assert line == f"{path} is not a manifest of data/prepare.py"
    for count in (-1, True, float("nan"), "0"):  # "-1 validation documents" were told
        path.write_text(json.dumps(whole | {"overlap": {"documents": count}}))
        line = refusal(tmp_path / "out", capsys, log, "--manifest", path)
        assert line == f"{path} is not a manifest of data/prepare.py"
    assert pack(tmp_path / "out", log) == 0
    shown = rows(tmp_path / "out")["no validation document in the training shards"]
    assert shown.startswith("not in this log")


def test_gpus_are_told_by_uuid_and_must_be_as_many_as_claimed(tmp_path):
    uuids = [f"NVIDIA H100 {i:08x}-1111-2222-3333-444444444444" for i in range(8)]
    machine = {"host": "pod", "gpus": ", ".join(uuids), "driver": "570.1"}
    logs = write_runs(tmp_path / "logs", machine=machine, artifact=True)
    assert pack(tmp_path / "out", *logs) == 0
    assert reasons(tmp_path / "out") == []
    told = rows(tmp_path / "out")["machine"]
    assert told.startswith(f"{H100}; seeds 11, 22, 33: host pod; gpus NVIDIA H100 00000000-1111")
    assert told.endswith("driver 570.1")
    machine["gpus"] = ", ".join([uuids[0]] * 8)
    logs = write_runs(tmp_path / "one", machine=machine, artifact=True)
    assert pack(tmp_path / "next", *logs) == 0
    assert f"{logs[0]} names 1 GPUs by UUID, not 8" in reasons(tmp_path / "next")


@pytest.mark.parametrize(
    "line",
    [
        "exec(code)",
        'CODE = "' + "A" * 2000 + '"',
        "__import__('os')",
        "run = exec",
        "import builtins as b",
        "__builtins__['exec'](x)",
    ],
    ids=len,
)
def test_packed_code_is_no_record(tmp_path, project, line):
    script = project / "train_gpt.py"
    script.write_text(script.read_text() + line + "\n")
    assert pack(tmp_path / "out", *write_runs(tmp_path / "logs", artifact=True)) == 0
    (reason,) = reasons(tmp_path / "out")
    number = script.read_text().count("\n")
    assert reason.startswith(f"line {number} of the script runs or holds packed code")


def test_a_packed_script_is_packaged_with_its_source_and_both_sizes(tmp_path, project, capsys):
    readable = project / "train_gpt.py"
    source = readable.read_bytes()
    script = tmp_path / "packed" / "train_gpt.py"
    script.parent.mkdir()
    script.write_bytes(pack_script.pack(source))
    settings = {"script": script, "artifact": True, "matrix_lr": 0.03}
    logs = write_runs(tmp_path / "logs", **settings)
    capsys.readouterr()
    line = refusal(tmp_path / "out", capsys, *logs)
    assert line.endswith("it was packed by tools.pack_script: --script names that file")
    assert pack(tmp_path / "out", *logs, "--script", script) == 0
    assert reasons(tmp_path / "out") == []
    assert (tmp_path / "out" / "train_gpt.py").read_bytes() == script.read_bytes()
    assert (tmp_path / "out" / pack_script.READABLE).read_bytes() == source
    entry, page = packed(tmp_path / "out")
    size = script.stat().st_size
    assert entry["bytes_code"] == size
    assert f"`train_gpt.py` ({size:,} bytes, which count) is what was run" in page
    assert f"`train_gpt_readable.py` ({len(source):,} bytes), packed" in page
    assert "MATRIX_LR=0.03 torchrun" in page  # its defaults were read
    assert "NUM_LAYERS" not in page
    told = rows(tmp_path / "out")["readable source"]
    assert told.endswith("train_gpt.py, byte for byte; nothing within is packed")
    # The folder stands by itself; a readable file that is another one is told.
    readable.write_text("LAST = 2\n")
    assert pack(tmp_path / "again", *logs, "--script", tmp_path / "out" / "train_gpt.py") == 0
    assert reasons(tmp_path / "again") == []
    assert pack(tmp_path / "other", *logs, "--script", script) == 0
    (reason,) = reasons(tmp_path / "other")
    assert reason == f"the script is packed, and what it unpacks to is not {readable}"
    assert not (tmp_path / "other" / pack_script.READABLE).exists()


def test_nothing_in_our_own_script_is_packed():
    path = ROOT / "train_gpt.py"
    row, source = evidence.source_row(path, path.read_text())
    assert row.reasons == ()
    assert source is None


def test_an_entry_lies_where_the_contest_wants_it_and_has_what_its_validator_reads(
    tmp_path, monkeypatch
):
    logs = write_runs(tmp_path / "logs", artifact=True)
    monkeypatch.chdir(tmp_path)
    names = ["--author", "A", "--name", "Mamba-3: a hybrid!"]
    assert package.main([*map(str, logs), *names]) == 0
    assert package.main([str(logs[0]), *names]) == 0
    for track in ("track_10min_16mb", "track_non_record_16mb"):
        (folder,) = (tmp_path / "records" / track).iterdir()
        entry, _ = packed(folder)
        assert folder.name == f"{entry['date']}_Mamba-3_a_hybrid"
        assert isinstance(entry["val_bpb"], float)
        compile((folder / "train_gpt.py").read_text(), "train_gpt.py", "exec")
        assert any(folder.glob("train_seed*.txt"))


def test_evaluation_settings_that_differ_are_listed(tmp_path):
    ours = write_runs(tmp_path / "ours", eval_stride=256, matrix_lr=0.03)
    theirs = write_runs(tmp_path / "theirs", [3.1, 3.2], eval_stride=512, ttt_epochs=1)
    assert pack(tmp_path / "out", *ours, "--baseline", *theirs) == 0
    answers = rows(tmp_path / "out")
    assert answers["settings of the evaluation"] == "EVAL_STRIDE=256; the same in all runs"
    differing = (
        "Evaluated differently: EVAL_STRIDE 512 there, 256 here, TTT_EPOCHS 1 there, 2 here."
    )
    assert answers["significance"].endswith(differing)


def test_a_summary_says_how_much_text_was_scored(tmp_path):
    log = write_run(tmp_path, "a")
    events = finished_run(log.with_suffix(".jsonl"))
    scored = "Scored: 40,540,802 tokens, 151,080,891 bytes of 50,000 documents, "
    whole = "FineWeb's validation text by its counts alone, sp8192"
    assert scored + whole in summary.summary(events)
    events["validation_data"]["documents"] = 39
    part = scored.replace("50,000", "39") + "not FineWeb's validation text"
    assert part in summary.summary(events)
    del events["validation_data"]
    assert "The log does not say how much text was scored." in summary.summary(events)


def test_the_conditions_name_rows_that_there_are(tmp_path):
    assert pack(tmp_path / "out", *write_runs(tmp_path / "logs")) == 0
    text = (ROOT / "docs" / "conditions.md").read_text()
    table = text.split("| question |")[1].split("\n\n")[0]
    for title in re.findall(r'package, "([^"]*)"', table):
        assert any(row.startswith(title.removesuffix(" …")) for row in rows(tmp_path / "out")), (
            title
        )
    for cell in re.findall(r"audit, (.*?)[;|:]", text):
        assert set(re.findall(r'"([^"]*)"', cell)) <= set(audit.TITLES.values())


# ============
# The folder is written whole or not at all


def test_a_folder_with_contents_is_replaced_only_by_force(tmp_path, capsys):
    log, out = write_run(tmp_path / "logs", "a"), tmp_path / "out"
    out.mkdir()
    assert pack(out, log) == 0  # it was empty
    (out / "mine.txt").write_text("keep")
    capsys.readouterr()
    assert refusal(out, capsys, log) == f"{out} is not empty: --force replaces it"
    assert (out / "mine.txt").read_text() == "keep"
    edit(log, "_exact val_loss:3.00000000", "_exact val_loss:2.99000000")
    assert "has the final score" in refusal(out, capsys, log, "--force")
    edit(log, "_exact val_loss:2.99000000", "_exact val_loss:3.00000000")
    assert pack(out, log, "--force") == 0
    assert not (out / "mine.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "out"}


@pytest.mark.parametrize("failing", ["write_bytes", "rename"])
def test_a_failure_leaves_the_old_folder_and_nothing_half_made(
    tmp_path, capsys, monkeypatch, failing
):
    log, out = write_run(tmp_path / "logs", "a"), tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    original = getattr(Path, failing)

    def fail(path: Path, *arguments):
        if path.name in ("README.md", "new"):
            raise OSError(28, "No space left on device")
        return original(path, *arguments)

    monkeypatch.setattr(Path, failing, fail)
    capsys.readouterr()
    assert refusal(out, capsys, log, "--force") == f"cannot write {out}: No space left on device"
    assert (out / "old.txt").read_text() == "old"


def test_force_never_replaces_what_is_being_read(tmp_path, capsys, monkeypatch, project):
    log, file = write_run(tmp_path / "logs", "a"), tmp_path / "file"
    file.touch()
    capsys.readouterr()
    assert (
        refusal(tmp_path / "logs", capsys, log, "--force")
        == f"--out {log.parent} would replace {log}"
    )
    assert (
        refusal(project, capsys, log, "--force")
        == f"--out {project} would replace {project}/train_gpt.py"
    )
    assert refusal(file, capsys, log, "--force") == f"{file} is not a folder"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert refusal(tmp_path / "here", capsys, log, "--force").startswith(
        f"--out {tmp_path / 'here'} would replace"
    )


# ============
# The baseline


def hand_computed_p(t_value: float) -> float:
    """P(T < t) of Student's distribution with 4 degrees of freedom, in closed form."""
    square = t_value**2 / (1 + t_value**2 / 4)
    return 0.5 + 3 / 8 * math.copysign(math.sqrt(square), t_value) * (1 - square / 12)


@pytest.mark.parametrize(
    ("baseline_mean", "p", "holds"), [(3.045, 0.01066, False), (3.046, 0.00958, True)]
)
def test_the_test_agrees_with_one_done_by_hand(tmp_path, capsys, baseline_mean, p, holds):
    """Both samples have deviation 0.01 and n = 3: Welch's degrees of freedom are 4, the standard
    error is 0.01·sqrt(2/3), and t = (3.01 + 0.005 - the baseline's mean) / that.
    """
    t_value = (3.01 + 0.005 - baseline_mean) / (0.01 * math.sqrt(2 / 3))
    assert hand_computed_p(t_value) == pytest.approx(p, abs=5e-6)
    losses = [baseline_mean - 0.01, baseline_mean, baseline_mean + 0.01]
    assert significance.welch([3.00, 3.01, 3.02], losses, 0.005) == pytest.approx(
        (t_value, hand_computed_p(t_value)), rel=1e-6
    )

    ours, theirs = write_runs(tmp_path / "ours"), write_runs(tmp_path / "baseline", losses)
    assert pack(tmp_path / "out", *ours, "--baseline", *theirs) == 0
    sentence = packed(tmp_path / "out")[1].split("## Against the baseline\n\n")[1].split("\n")[0]
    assert f"difference {3.01 - baseline_mean:+.5f} nats" in sentence
    assert f"t = {t_value:.3f}, p = {p:.3g}" in sentence
    assert ("nats holds at p < 0.01" in sentence) == holds
    assert ("does NOT hold" in sentence) != holds
    t_value = (3.01 - baseline_mean) / (0.01 * math.sqrt(2 / 3))
    p = hand_computed_p(t_value)
    assert f"a gain at all holds at p < 0.25 (t = {t_value:.3f}, p = {p:.3g})" in sentence
    assert "The baseline's seeds: 11, 22, 33." in sentence
    assert sentence[1:] in capsys.readouterr().out


def test_the_test_is_welchs_one_sided_with_unequal_sizes_and_spreads():
    ours, baseline = [2.991, 2.987, 2.995, 2.989], [3.012, 2.999, 3.025]
    a, b = statistics.variance(ours) / 4, statistics.variance(baseline) / 3
    t_value = (statistics.fmean(ours) + 0.005 - statistics.fmean(baseline)) / math.sqrt(a + b)
    p = stats.t.cdf(t_value, (a + b) ** 2 / (a**2 / 3 + b**2 / 2))
    assert significance.welch(ours, baseline, 0.005) == pytest.approx((t_value, p), rel=1e-9)
    assert (
        significance.welch(baseline, ours, 0.005)[1] > 0.9
    )  # a worse result is no gain, however clear the difference


def test_means_and_deviations_are_scipys():
    values = [3.0123, 2.9987, 3.0451, 3.0002]
    assert package.spread(values) == pytest.approx(
        (stats.tmean(values), stats.tstd(values)), rel=1e-12
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        ([3.0], [3.1, 3.2], "that takes two runs or more on each side"),
        ([3.0, 3.1], [3.2], "that takes two runs or more on each side"),
    ],
)
def test_too_few_runs_cannot_be_tested(tmp_path, ours, theirs, why):
    ours, theirs = write_runs(tmp_path / "ours", ours), write_runs(tmp_path / "theirs", theirs)
    assert pack(tmp_path / "out", *ours, "--baseline", *theirs) == 0
    text = packed(tmp_path / "out")[1]
    assert f"cannot be tested: {why}." in text
    assert " p = " not in text


def test_one_run_is_not_two_seeds(tmp_path, capsys):
    """A run's logs were packaged as those of three seeds once SEED was edited in both."""
    logs = tmp_path / "logs"
    first, other = write_run(logs, "a", seed=1), write_run(logs, "b", 3.01, seed=2)
    copy = write_run(logs, "c", seed=3)
    capsys.readouterr()
    line = refusal(tmp_path / "out", capsys, first, other, copy)
    assert line == f"{copy} has the score of {first}, to the last digit: one run is not two seeds"
    for path in (first, other):  # whose artifact is the same, whatever their scores
        records = path.with_suffix(".jsonl")
        edit(records, '"event": "trained", ', '"event": "trained", "artifact_sha256": "6f", ')
    line = refusal(tmp_path / "out", capsys, first, other)
    assert line == f"{other} has the artifact of {first}, by its SHA-256: one run is not two seeds"

    lines = "other_exact val_loss:3.2 val_bpb:{}\n"
    theirs = [tmp_path / f"{number}.log" for number in range(3)]
    for path, loss in zip(theirs, (3.2, 3.21, 3.2), strict=True):
        path.write_text(lines.format(f"{bpb(loss):.8f}").replace("3.2 ", f"{loss} "))
    line = refusal(tmp_path / "out", capsys, copy, "--baseline", *theirs)
    assert line == f"{theirs[2]} is a copy of {theirs[0]}"


def test_a_baseline_may_be_another_scripts_log(tmp_path):
    theirs = []
    for i, loss in enumerate((3.1, 3.11)):
        theirs.append(tmp_path / f"theirs{i}.log")
        lines = [
            "some code",
            f"other_exact val_loss:9.9 val_bpb:{bpb(9.9):.8f}",
            f"ttt_exact val_loss:{loss:.8f} ",
        ]
        theirs[-1].write_text("\n".join(lines) + f"val_bpb:{bpb(loss):.8f}\nbye\n")
    assert pack(tmp_path / "out", *write_runs(tmp_path / "ours"), "--baseline", *theirs) == 0
    text = packed(tmp_path / "out")[1]
    assert "the baseline's 3.10500 (n=2: 3.10000, 3.11000)" in text
    assert "The baseline's seeds: not in the log, not in the log." in text


def test_an_unsound_baseline_is_refused_in_one_line(tmp_path, capsys):
    ours, logs, out = write_runs(tmp_path / "ours"), tmp_path / "logs", tmp_path / "out"
    other_text = write_run(logs, "text", 3.1, seed=1, bytes_per_token=3.2)
    same_seed = [write_run(logs, "c", 3.1, seed=1), write_run(logs, "d", 3.2, seed=1)]
    unfinished = without_recorded_score(logs)[0]
    empty = logs / "empty.log"
    empty.write_text("nothing\n")
    zero = logs / "zero.log"
    zero.write_text("_exact val_loss:0.0 val_bpb:0.0\n")
    capsys.readouterr()

    def refused(*baseline):
        return refusal(out, capsys, *ours, "--baseline", *baseline)

    assert refused(other_text).startswith(
        f"{other_text} scored another text or used another tokenizer: 3.20000 bytes"
    )
    assert refused(*same_seed) == f"{same_seed[1]} has SEED=1, as another run of the baseline has"
    assert refused(unfinished).startswith(f"{logs}/b.jsonl has no final score")
    assert refused(empty) == f"{empty} has no final score"
    assert refused(zero) == f"{zero} has no usable final score: val_loss 0.0, val_bpb 0.0"
    assert refused(logs / "none.txt") == f"cannot read {logs}/none.txt: No such file or directory"
    assert refused(ours[0]) == f"{ours[0]} is given twice"


def test_without_scipy_a_baseline_is_refused_and_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    ours, theirs = write_runs(tmp_path / "ours"), write_runs(tmp_path / "theirs", [3.1, 3.2])
    capsys.readouterr()
    line = refusal(tmp_path / "out", capsys, *ours, "--baseline", *theirs)
    assert line == "--baseline needs SciPy: pip install scipy"
    assert pack(tmp_path / "out", *ours) == 0
