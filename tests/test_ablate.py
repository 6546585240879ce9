"""Ablations: what runs, in which order and how often, what survives an interruption, and what the
table says.

Nearly all runs are of a stub that writes records as train_gpt.py does; its scores follow from
MATRIX_LR and the seed, with EVAL_ONLY=1 from the artifact and TTT_EPOCHS. TOKENIZER_PATH tells it
what to do.
"""

import hashlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy import stats

import train_gpt as t
from data import prepare
from tests import forked
from tests.support import subprocess_with, tiny_environment
from tools import ablate, halving

ROOT = Path(__file__).resolve().parent.parent

DRAW_PLOTS = ablate.draw_plots

STUB = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
env = os.environ
behaviour = env.get("TOKENIZER_PATH", "")
seed, rate = int(env["SEED"]), float(env.get("MATRIX_LR", 0))
journal = Path(__file__).with_name("journal.jsonl")

def note(event):
    gpus, pid = env.get("CUDA_VISIBLE_DEVICES"), os.getpid()
    record = {"event": event, "run": env["RUN_ID"], "time": time.time(), "pid": pid}
    record |= {"gpus": gpus, "argv": sys.argv, "artifact": env.get("ARTIFACT", "")}
    with journal.open("a") as file:
        file.write(json.dumps(record) + "\\n")

place = Path(env["LOG_DIR"]) / (env["RUN_ID"] + (".eval" if "EVAL_ONLY" in env else ""))
log = Path(f"{place}.jsonl").open("a", buffering=1)
def record(event, **values):
    log.write(json.dumps({"event": event, "seconds": 0.0, **values}) + "\\n")

note("start")
text = journal.with_name("text")
record("settings", settings={})
if text.exists():
    sums = {name: {"x": text.read_text()} for name in ("validation", "tokenizer")}
    record("hashes", **sums)
    record("training_data", digest="d")
if "EVAL_ONLY" in env:
    found = Path(env["ARTIFACT"]).read_bytes()
    epochs = int(env.get("TTT_EPOCHS", 0))
    gain = epochs * (0.1 + 0.001 * seed * seed)
    digest = hashlib.sha256(found).hexdigest()
    record("final", val_bpb=float(found.split()[0]) - gain, artifact_sha256=digest)
    note("end")
    sys.exit(0)
for step in range(1, 11):
    record("train", step=step, train_loss=9 / step, train_ms=100.0 * step, progress=step / 10)
if "wait" in behaviour and not journal.with_name("released").exists():
    time.sleep(60)
if "meet" in behaviour:  # goes on when so many runs have started
    deadline = time.time() + 20
    awaited = int(behaviour.split()[-1])
    while journal.read_text().count('"start"') < awaited and time.time() < deadline:
        time.sleep(0.02)
if "hang up" in behaviour:
    os.kill(os.getppid(), signal.SIGHUP)
    time.sleep(0.2)
if "own error" in behaviour:
    print("train_gpt.py: error: no *_train_*.bin shards in data | here", file=sys.stderr)
    print("a launcher's own words about it", file=sys.stderr)
    sys.exit(2)
if "bug" in behaviour:
    raise ZeroDivisionError("a bug")
if "silent" in behaviour:
    sys.exit(0)
score = 1 + rate + seed / 1000
artifact = Path(f"{place}.int6.lzma")
artifact.write_text(f"{score} {journal.stat().st_size}")  # another each time, of one score
size = {"bytes_total": 15_000_000 + seed, "bytes_code": 140_000}
size["artifact_sha256"] = hashlib.sha256(artifact.read_bytes()).hexdigest()
record("trained", val_bpb=score + 0.2, **size, steps=10, step_avg_ms=50.5)
if "kinds" in behaviour:
    record("quantization_loss", bpb_by_kind={"mamba": 0.002, "attention": 0.001})
record("after_quantization", val_bpb=score + 0.3)
if "late" in behaviour:
    print("train_gpt.py: error: no score in EVAL_MAX_SECONDS", file=sys.stderr)
    sys.exit(2)
record("final", val_bpb=score)
note("end")
"""

# As torchrun: the worker has a session of its own. Unlike torchrun it leaves the worker alone when
# it is stopped.
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, sys.argv[2]], start_new_session=True).returncode)
"""


class Bench:
    """A folder with a settings file, the stub and the output of ablate.py."""

    def __init__(self, folder: Path):
        self.folder, self.file, self.out = folder, folder / "plan.toml", folder / "out"
        (folder / "stub.py").write_text(STUB)
        (folder / "launcher.py").write_text(LAUNCHER)

    def arguments(self, *more: str) -> list[str]:
        return [
            str(self.file),
            "--out",
            str(self.out),
            "--script",
            str(self.folder / "stub.py"),
            *more,
        ]

    def run(self, text: str = "", *more: str) -> int:
        """ablate.py in this process, on the text or the file as it was; returns the exit status."""
        if text:
            self.file.write_text(text)
        return ablate.run(self.arguments(*more))

    def start(self, text: str) -> multiprocessing.Process:
        """ablate.py in a copy of this process, which has imported all it needs; prints to
        printed.txt.
        """

        def work():
            with (self.folder / "printed.txt").open("w") as sys.stdout:
                status = self.run(text)
            os._exit(status)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        return process

    def journal(self, event: str) -> list[dict]:
        path = self.folder / "journal.jsonl"
        records = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        return [record for record in records if record["event"] == event]

    def started(self) -> list[str]:
        return [record["run"] for record in self.journal("start")]

    def wait_for_starts(self, count: int):
        deadline = time.monotonic() + 60
        while len(self.started()) < count:
            assert time.monotonic() < deadline, f"only {self.started()} started"
            time.sleep(0.05)

    @property
    def table(self) -> str:
        return (self.out / "table.md").read_text()

    def row(self, variant: str) -> list[str]:
        """Cells of the table's row that begins with the variant."""
        (line,) = (line for line in self.table.splitlines() if line.startswith(f"| {variant} |"))
        return [cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|")]

    def results(self) -> dict[str, dict]:
        """results.json by run."""
        runs = json.loads((self.out / "results.json").read_text())["runs"]
        return {f"{run['variant']}-{run['seed']}": run for run in runs}


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    # Each plan looks for misspelt settings among all variables.
    for name in os.environ.keys() - {"PATH", "HOME", "LD_LIBRARY_PATH", "PYTEST_CURRENT_TEST"}:
        monkeypatch.delenv(name)
    bench = Bench(tmp_path)
    # No launcher, and a Python that starts quickly.
    at_once = "import runpy, sys; runpy.run_path(sys.argv[2])"
    monkeypatch.setattr(ablate, "LAUNCHER", [sys.executable, "-I", "-S", "-c", at_once])
    monkeypatch.setattr(ablate, "visible_gpus", list)
    monkeypatch.setattr(ablate, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(ablate, "draw_plots", lambda *_: [])  # a second each
    return bench


TWO = """
seeds = [1, 2]
[base]
PRESET = "tiny"
[[variant]]
name = "high rate"
MATRIX_LR = 0.5
"""


# ---- What runs, and when -------------------------------------------------------------------------


def test_every_variant_runs_with_one_seed_before_the_next_seed_and_one_at_a_time(bench):
    assert bench.run(TWO) == 0
    assert bench.started() == ["base-1", "high-rate-1", "base-2", "high-rate-2"]
    ends = [record["time"] for record in bench.journal("end")]
    starts = [record["time"] for record in bench.journal("start")]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


def test_runs_go_on_side_by_side_but_no_more_than_asked(bench):
    text = "seeds = [1, 2, 3, 4, 5, 6]\nparallel = 3\n"
    text += '[base]\nPRESET = "tiny"\nTOKENIZER_PATH = "meet 3"\n'
    assert bench.run(text) == 0
    moments = [(r["time"], 1) for r in bench.journal("start")] + [
        (r["time"], -1) for r in bench.journal("end")
    ]
    running = [sum(change for _, change in sorted(moments)[: i + 1]) for i in range(len(moments))]
    assert max(running) == 3
    assert len(bench.journal("end")) == 6


def test_runs_side_by_side_have_gpus_of_their_own(bench, monkeypatch):
    monkeypatch.setattr(ablate, "visible_gpus", lambda: ["0", "3", "5", "6", "7"])
    text = (
        'seeds = [1, 2, 3, 4]\nprocesses = 2\n[base]\nPRESET = "tiny"\nTOKENIZER_PATH = "meet 2"\n'
    )
    assert bench.run(text) == 0
    ends, starts = ({r["run"]: r for r in bench.journal(event)} for event in ("end", "start"))
    assert {r["gpus"] for r in starts.values()} == {"0,3", "5,6"}
    assert all("--nproc_per_node=2" in r["argv"] for r in starts.values())
    for one in starts:  # those that overlap in time differ in GPUs
        for two in starts:
            overlap = (
                starts[two]["time"] < ends[one]["time"] and starts[one]["time"] < ends[two]["time"]
            )
            assert one == two or not overlap or starts[one]["gpus"] != starts[two]["gpus"]
    assert starts["base-2"]["time"] < ends["base-1"]["time"]


def test_more_runs_at_once_than_gpus_share_them_and_the_table_says_so(bench, monkeypatch):
    monkeypatch.setattr(ablate, "visible_gpus", lambda: ["0", "3", "5"])
    assert bench.run(TWO, "--parallel", "3") == 0
    assert "Runs shared GPUs" not in (bench.out / "table.md").read_text()
    plan = ablate.read_plan(bench.file, bench.out, t, parallel=5)
    assert ablate.share_gpus(plan) == [["0"], ["3"], ["5"], ["0"], ["3"]]
    more = TWO.replace("[1, 2]", "[1, 2, 3]")
    assert bench.run(more, "--parallel", "4") == 0
    assert bench.run(more, "--parallel", "3") == 0  # nothing left to do: it was so nevertheless
    assert "Runs shared GPUs" in (bench.out / "table.md").read_text()


def test_only_the_first_seeds_run_if_asked(bench):
    assert bench.run(TWO, "--seeds", "1") == 0
    assert bench.started() == ["base-1", "high-rate-1"]


def test_more_processes_than_gpus_are_refused(bench, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "visible_gpus", lambda: ["0", "1"])
    assert bench.run(TWO, "--processes", "4") == 2
    assert "only 2 GPUs" in capsys.readouterr().err
    assert not bench.out.exists()


def test_a_dry_run_lists_the_runs_and_changes_nothing(bench, capsys):
    assert bench.run(TWO, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "high rate, seed 2 (would run): SEED=2 PRESET=tiny MATRIX_LR=0.5" in printed
    assert "4 of 4 runs to do" in printed
    assert not bench.out.exists()
    assert not bench.started()


# ---- Restarts ------------------------------------------------------------------------------------


def test_complete_runs_are_not_repeated(bench, capsys):
    bench.run(TWO)
    table = bench.table
    assert bench.run() == 0
    assert len(bench.started()) == 4
    assert bench.table == table
    bench.run("", "--dry-run")
    assert "0 of 4 runs to do" in capsys.readouterr().out


def test_only_runs_whose_settings_changed_are_repeated(bench):
    bench.run(TWO)
    changed = (
        TWO.replace("0.5", "0.25").replace("[1, 2]", "[1, 2, 3]")
        + '[[variant]]\nname = "new"\nEMA_DECAY = 0.8\n'
    )
    assert bench.run(changed) == 0
    assert sorted(bench.started()[4:]) == [
        "base-3", "high-rate-1", "high-rate-2", "high-rate-3", "new-1", "new-2", "new-3",
    ]  # fmt: skip
    assert bench.results()["high rate-1"]["figures"]["bpb_final"] == pytest.approx(1.251)
    assert bench.run(changed.replace("0.25", "0.250")) == 0
    assert len(bench.started()) == 11  # the same number, written otherwise


def test_a_setting_of_the_environment_counts_as_a_setting(bench, monkeypatch):
    monkeypatch.setenv("MATRIX_LR", "0.125")
    bench.run(TWO)
    assert bench.results()["base-1"]["figures"]["bpb_final"] == pytest.approx(1.126)
    assert bench.results()["high rate-1"]["figures"]["bpb_final"] == pytest.approx(1.501)
    monkeypatch.setenv("MATRIX_LR", "0.25")
    bench.run()
    assert bench.started()[4:] == ["base-1", "base-2"]


def test_runs_of_several_calls_are_not_compared_if_their_folder_held_other_data(bench, tmp_path):
    """A new variant's lead over the base was that of an easier text, with a p of 0.0001."""
    (bench.folder / "text").write_text("one")
    assert bench.run(TWO) == 0
    assert "another" not in bench.table
    high = bench.row("high rate")
    assert high[3] != "–"
    (bench.folder / "text").write_text("two")
    assert bench.run(TWO + '[[variant]]\nname = "new"\nMATRIX_LR = 0.75\n') == 0
    assert "**Some runs found another validation in DATA_PATH=" in bench.table
    assert bench.row("high rate") == high
    assert bench.row("new")[3:5] == ["–", "–"]
    # Another folder may hold what it will: a variant's own tokenizer has made its shards.
    other = TWO + '[[variant]]\nname = "new"\nMATRIX_LR = 0.75\nDATA_PATH = "other"\n'
    assert bench.run(other) == 0
    assert "another" not in bench.table and bench.row("new")[3] != "–"


def test_failed_runs_are_repeated_on_a_restart(bench):
    text = TWO + 'TOKENIZER_PATH = "silent"\nseeds = [1]\n'
    assert bench.run(text) == 1
    (bench.folder / "stub.py").write_text(STUB.replace('"silent"', '"nothing"'))
    assert bench.run() == 0
    assert bench.started()[3:] == ["high-rate-1"]
    assert "2 versions of the script" in bench.table


HANGING = (
    'seeds = [1, 2, 3]\nparallel = 2\n[base]\nPRESET = "tiny"\n'
    '[[variant]]\nname = "slow"\nTOKENIZER_PATH = "wait"\n'
)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name
)
def test_an_interrupted_ablation_goes_on_where_it_stopped(bench, monkeypatch, number):
    monkeypatch.setattr(ablate, "LAUNCHER", [sys.executable, str(bench.folder / "launcher.py")])
    process = bench.start(HANGING)
    bench.wait_for_starts(4)  # base-1, slow-1, base-2, and then slow-2 beside slow-1
    hanging = [
        record["pid"] for record in bench.journal("start") if record["run"].startswith("slow")
    ]
    assert len(hanging) == 2
    os.kill(process.pid, number)
    process.join(30)
    if number == signal.SIGKILL:
        assert all(map(is_alive, hanging))  # nobody could stop them
    else:
        assert process.exitcode == 130
        assert "the same command continues" in (bench.folder / "printed.txt").read_text()
        assert "4 of 6 runs have not ended" in bench.table
        assert not any(map(is_alive, hanging))

    (bench.folder / "released").touch()
    start, left_over = ablate.Runner._start, []

    def look(runner, run):
        return (left_over.extend(filter(is_alive, hanging)), start(runner, run))

    monkeypatch.setattr(ablate.Runner, "_start", look)
    assert bench.run() == 0
    assert not left_over  # they would share the GPUs, and the folder, with the new runs
    assert sorted(bench.started()[4:]) == ["base-3", "slow-1", "slow-2", "slow-3"]
    assert {run["status"] for run in bench.results().values()} == {"complete"}
    records = (bench.out / "runs" / "slow-1" / "slow-1.jsonl").read_text()
    assert (
        records.count('"settings"') == 2
    )  # one record (its name and a field): nothing of the half run is left


@pytest.mark.parametrize(("before", "status"), [(signal.SIG_IGN, 0), (signal.SIG_DFL, 130)])
def test_a_lost_terminal_stops_it_unless_nohup_says_otherwise(bench, before, status):
    previous = signal.signal(signal.SIGHUP, before)
    try:
        assert (
            bench.run('seeds = [1]\n[base]\nPRESET = "tiny"\nTOKENIZER_PATH = "hang up"\n')
            == status
        )
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_one_that_may_not_hear_ctrl_c_is_stopped_by_sigterm(bench):
    """As a shell script starts it in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = bench.start('[base]\nPRESET = "tiny"\nTOKENIZER_PATH = "wait"\nseeds = [1]\n')
        bench.wait_for_starts(1)
        os.kill(process.pid, signal.SIGINT)
        process.join(0.3)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGTERM)
        process.join(30)
        assert process.exitcode == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_two_at_once_on_one_folder_are_refused(bench, capsys):
    bench.out.mkdir()
    with (bench.out / ".lock").open("w") as lock:
        ablate.fcntl.flock(lock, ablate.fcntl.LOCK_EX)
        assert bench.run(TWO) == 2
    assert "another ablate.py is at work" in capsys.readouterr().err
    assert not bench.started()
    assert bench.run() == 0


# ---- Variants that train nothing -----------------------------------------------------------------

SCORED = """
seeds = [1, 2, 3]
[base]
PRESET = "tiny"
[[variant]]
name = "high rate"
MATRIX_LR = 0.5
[[variant]]
name = "four epochs"
TTT_EPOCHS = 4
[[variant]]
name = "high rate, one epoch"
MATRIX_LR = 0.5
TTT_EPOCHS = 1
"""


def test_variants_that_differ_in_the_evaluation_alone_score_the_artifact_of_their_seed(bench):
    assert bench.run(SCORED) == 0
    artifacts = {record["run"]: record["artifact"] for record in bench.journal("start")}
    runs = bench.out / "runs"
    for seed in (1, 2, 3):
        assert not artifacts[f"base-{seed}"] and not artifacts[f"high-rate-{seed}"]
        path = runs / f"base-{seed}" / f"base-{seed}.int6.lzma"
        assert artifacts[f"four-epochs-{seed}"] == str(path)
        other = runs / f"high-rate-{seed}" / f"high-rate-{seed}.int6.lzma"
        assert artifacts[f"high-rate,-one-epoch-{seed}".replace(",", "")] == str(other)
        found = bench.results()[f"four epochs-{seed}"]
        assert (found["artifact"], found["artifact_of"]) == (str(path), "base")
        assert found["artifact_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    final = bench.results()["four epochs-3"]["figures"]
    assert final["bpb_final"] == pytest.approx(1.003 - 4 * 0.109)
    # What is known of the artifact is known from the run that wrote it.
    assert bench.row("four epochs")[5:] == bench.row("base (base)")[5:]
    owners = "These train nothing and score the artifacts of {}, seed by seed: {}."
    assert owners.format("base", "four epochs") in bench.table
    assert owners.format("high rate", "high rate, one epoch") in bench.table
    starts = len(bench.started())
    assert bench.run() == 0
    assert len(bench.started()) == starts == 12


def test_scores_of_the_bases_artifacts_are_compared_with_it_seed_by_seed(bench):
    bench.run(SCORED)
    rows = json.loads((bench.out / "results.json").read_text())["variants"]
    found = {row["variant"]: row for row in rows}
    paired = found["four epochs"]
    gains = [-4 * (0.1 + 0.001 * seed * seed) for seed in (1, 2, 3)]
    assert paired["test"] == "paired"
    assert paired["difference"] == pytest.approx(sum(gains) / 3)
    assert paired["p"] == pytest.approx(stats.ttest_1samp(gains, 0.0).pvalue)
    assert bench.row("four epochs")[4] == f"{paired['p']:.2g}, paired"
    # Other trainings' artifacts are other samples.
    other = found["high rate, one epoch"]
    scores = [1.5 + seed / 1000 - (0.1 + 0.001 * seed * seed) for seed in (1, 2, 3)]
    p = stats.ttest_ind(scores, [1.001, 1.002, 1.003], equal_var=False).pvalue
    assert (other["test"], other["p"]) == ("Welch", pytest.approx(p))
    assert "differences by seed (paired)" in bench.table


def test_a_failed_score_leaves_its_pair_out(bench):
    assert bench.run(SCORED) == 0
    (bench.out / "runs" / "four-epochs-1" / "outcome.json").write_text("{}")
    plan = ablate_plan(bench)
    runs = [ablate.describe_run(run, False) for run in plan.runs]
    row = ablate.compare(plan, runs, "four epochs")
    gains = [-4 * (0.1 + 0.001 * seed * seed) for seed in (2, 3)]
    assert row["difference"] == pytest.approx(sum(gains) / 2)
    assert row["p"] == pytest.approx(stats.ttest_1samp(gains, 0.0).pvalue)


def test_a_paired_p_is_left_out_where_it_is_undefined():
    assert ablate.paired_p([0.1]) is None
    assert ablate.paired_p([0.0, 0.0]) is None
    # Differences 1 and 3: t = 2 with 1 degree of freedom, where p = 1 - 2/π·atan(t).
    assert ablate.paired_p([1.0, 3.0]) == pytest.approx(1 - 2 / math.pi * math.atan(2))


def test_what_else_differs_trains_and_so_does_what_does_not_differ(bench):
    others = {"same": "", "compiled": 'COMPILE = "off"\n', "seed of its own": "seeds = [9]\n"}
    others["trains otherwise"] = "TTT_EPOCHS = 1\nEMA_DECAY = 0.5\n"
    text = "".join(f'[[variant]]\nname = "{name}"\n{rest}' for name, rest in others.items())
    bench.file.write_text(SCORED + text)
    plan = ablate_plan(bench)
    sources = {(run.variant, run.seed): run.source for run in plan.runs}
    assert all(sources[name, seed] is None for name, seed in sources if name in others)
    assert sources["four epochs", 2].title == "base, seed 2"
    assert plan.leaders == {"four epochs": "base", "high rate, one epoch": "high rate"}


def test_a_run_is_told_what_its_sources_log_would_say_otherwise(bench):
    text = 'seeds = [1]\n[base]\nPRESET = "tiny"\n'
    text += '[[variant]]\nname = "a"\nMATRIX_LR = 0.5\nEVAL_STRIDE = 32\nEVAL_MAX_SECONDS = 9\n'
    text += '[[variant]]\nname = "b"\nMATRIX_LR = 0.5\nTTT_LORA_RANK = 8\n'
    bench.file.write_text(text)
    first = ablate_plan(bench).runs[2]
    assert first.source.variant == "a"
    assert first.resolved.eval_mode == "documents"
    added = {"EVAL_MODE": "documents", "EVAL_MAX_SECONDS": "600.0"}  # EVAL_STRIDE is not read
    given = {"PRESET": "tiny", "MATRIX_LR": "0.5", "TTT_LORA_RANK": "8"}
    assert first.variables == given | added


def test_a_run_waits_for_its_source_while_others_go_on(bench):
    assert bench.run("parallel = 3\n" + SCORED) == 0
    starts, ends = ({r["run"]: r for r in bench.journal(event)} for event in ("start", "end"))
    for seed in (1, 2, 3):
        assert starts[f"four-epochs-{seed}"]["time"] >= ends[f"base-{seed}"]["time"]
    assert bench.started().index("base-2") < bench.started().index("four-epochs-1")


def test_runs_whose_source_failed_are_not_run_until_it_has_not(bench, capsys):
    broken = SCORED.replace('"tiny"', '"tiny"\nTOKENIZER_PATH = "late"')
    assert bench.run(broken, "--seeds", "1") == 1
    assert bench.started() == ["base-1", "high-rate-1"]
    reason = "not run: base, seed 1, whose artifact it would score, failed"
    assert bench.row("four epochs, seed 1")[1] == reason
    assert bench.results()["four epochs-1"]["status"] == "not run"
    assert f"four epochs, seed 1: {reason}" in capsys.readouterr().out
    (bench.folder / "stub.py").write_text(STUB.replace('"late"', '"nothing"'))
    bench.run("", "--seeds", "1", "--dry-run")
    assert "four epochs, seed 1 (would score the artifact of base" in capsys.readouterr().out
    assert bench.run("", "--seeds", "1") == 0
    assert len(bench.started()) == 6
    assert "not run" not in bench.table


def test_an_artifact_that_is_gone_or_replaced_is_never_scored(bench, capsys):
    more = SCORED + '[[variant]]\nname = "three epochs"\nTTT_EPOCHS = 3\n'
    assert bench.run(SCORED, "--seeds", "1") == 0
    artifact = bench.out / "runs" / "base-1" / "base-1.int6.lzma"
    kept = artifact.read_bytes()
    for damage, words in ((artifact.unlink, "No such file"), (artifact.touch, "not the artifact")):
        damage()
        bench.run(more, "--seeds", "1", "--dry-run")
        assert "three epochs, seed 1 (cannot run: " in capsys.readouterr().out
        assert bench.run("", "--seeds", "1") == 1
        problem = bench.row("three epochs, seed 1")[1]
        assert words in problem and f"remove {artifact.parent} to have it trained" in problem
        assert bench.row("four epochs")[1] == "1"  # it was scored before
    assert len(bench.started()) == 4
    artifact.write_bytes(kept)
    assert bench.run("", "--seeds", "1") == 0
    assert bench.started()[4:] == ["three-epochs-1"]


def test_a_base_that_is_trained_anew_is_scored_anew(bench):
    assert bench.run(SCORED, "--seeds", "1") == 0
    (bench.out / "runs" / "base-1" / "outcome.json").unlink()
    plan = ablate_plan(bench)
    stale = next(run for run in plan.runs if run.variant == "four epochs")
    assert ablate.describe_run(stale, False)["status"] == "waiting"
    assert bench.run("", "--seeds", "1") == 0
    assert bench.started()[4:] == ["base-1", "four-epochs-1"]
    # Also if it was trained while the file did not name them.
    (bench.out / "runs" / "base-1" / "outcome.json").unlink()
    assert bench.run(TWO, "--seeds", "1") == 0
    assert bench.run(SCORED, "--seeds", "1") == 0
    assert bench.started()[6:] == ["base-1", "four-epochs-1"]
    # A run that trained, and would now score another's, does so.
    before = bench.run(SCORED.replace("TTT_EPOCHS = 4", "TTT_EPOCHS = 4\nEMA_DECAY = 0.5"))
    assert before == 0
    count = len(bench.started())
    assert bench.run(SCORED) == 0
    assert sorted(bench.started()[count:]) == [f"four-epochs-{seed}" for seed in (1, 2, 3)]


def test_a_dry_run_says_what_is_scored_and_at_which_cost(bench, capsys):
    assert bench.run(SCORED, "--seeds", "1", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("at most about 840 GPU-seconds")
    # 45 s to start, 600 of evaluation, 75 around it.
    scores = "four epochs, seed 1 (would score the artifact of base, seed 1): SEED=1 PRESET=tiny"
    assert lines[2] == f"{scores} TTT_EPOCHS=4; at most about 720 GPU-seconds"
    assert lines[4].startswith("4 of 4 runs to do, of which 2 only score;")
    assert lines[5] == "to the end of all: at most about 3,120 GPU-seconds"
    without_clock = SCORED.replace('"tiny"', '"tiny"\nMAX_WALLCLOCK_SECONDS = 0')
    bench.run(without_clock, "--seeds", "1", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("cost unknown: no clock")
    assert lines[2].endswith("at most about 720 GPU-seconds")


# ---- A grid --------------------------------------------------------------------------------------

GRID = """
seeds = [1]
[base]
PRESET = "tiny"
MATRIX_LR = 0.01
[grid]
MATRIX_LR = [0.1, 0.01]
TIE_EMBEDDINGS = [true, false]
"""


def test_a_grid_has_every_combination_but_the_base(bench):
    bench.file.write_text(GRID)
    plan = ablate.read_plan(bench.file, bench.out, t)
    combinations = [
        f"MATRIX_LR={a}, TIE_EMBEDDINGS={b}" for a in (0.1, 0.01) for b in (True, False)
    ]
    assert plan.variants == ["base", *combinations[:2], combinations[3]]
    given = {run.variant: (run.settings["MATRIX_LR"], run.resolved) for run in plan.runs}
    assert given[combinations[1]][0] == 0.1
    assert not given[combinations[1]][1].tie_embeddings


# ---- A budget ------------------------------------------------------------------------------------

# Trains for 16 steps, whose loss is 3 + MATRIX_LR; SIGTERM has it leave its step and end.
PAUSING = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
env = os.environ
name, rate = env["RUN_ID"], float(env.get("MATRIX_LR", 0.9))
if "EVAL_ONLY" in env:
    digest = hashlib.sha256(Path(env["ARTIFACT"]).read_bytes()).hexdigest()
    final = {"event": "final", "val_bpb": 0.5 + rate, "artifact_sha256": digest}
    Path(env["LOG_DIR"], name + ".eval.jsonl").write_text(json.dumps(final))
    sys.exit(0)
checkpoint = Path(env["LOG_DIR"], name + ".checkpoint")
journal = Path(__file__).with_name("journal.jsonl")
log = Path(env["LOG_DIR"], name + ".jsonl").open("a", buffering=1)

def record(event, **values):
    log.write(json.dumps({"event": event, "seconds": 0.0, **values}) + "\\n")

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
text = journal.with_name("text")
record("settings", settings={})
if text.exists():
    sums = {name: {"x": text.read_text()} for name in ("validation", "tokenizer")}
    record("hashes", **sums)
    record("training_data", digest="d")
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
with journal.open("a") as file:
    file.write(json.dumps({"event": "start", "run": name, "step": step}) + "\\n")
if step:
    record("resumed", step=step)
if rate == 0.4 and step == 0 and not journal.with_name("mended").exists():
    sys.exit("train_gpt.py: error: too high")
while step < 16:
    record("train", step=step + 1, train_loss=3 + rate, train_ms=step, progress=step / 16)
    step += 1
    time.sleep(0.05)
    if stopped:
        checkpoint.write_text(str(step))
        sys.exit("train_gpt.py: error: stopped by SIGTERM")
artifact = Path(env["LOG_DIR"], name + ".int6.lzma")
artifact.write_text(name)
size = {"bytes_total": 2, "bytes_code": 1}
size["artifact_sha256"] = hashlib.sha256(artifact.read_bytes()).hexdigest()
record("trained", val_bpb=1.2, steps=16, step_avg_ms=1.0, **size)
record("after_quantization", val_bpb=1.3)
record("final", val_bpb=1 + rate)
"""

SWEEP = 'seeds = [1]\n[base]\nPRESET = "tiny"\n[grid]\nMATRIX_LR = [0.3, 0.1, 0.4, 0.2]\n'


@pytest.fixture
def sweep(bench, monkeypatch) -> Bench:
    (bench.folder / "stub.py").write_text(PAUSING)
    monkeypatch.setattr(ablate, "LOOK_SECONDS", 0.02)
    return bench


def test_a_budget_stops_the_worse_half_at_each_rung_and_the_rest_goes_on(sweep, monkeypatch):
    monkeypatch.setattr(ablate, "draw_plots", DRAW_PLOTS)
    (sweep.folder / "mended").touch()
    assert sweep.run(SWEEP, "--budget", "2500") == 0
    statuses = {name: run["status"] for name, run in sweep.results().items()}
    complete = {name for name, status in statuses.items() if status == "complete"}
    assert complete == {"base-1", "MATRIX_LR=0.1-1"}  # base has the highest loss of all
    assert set(statuses.values()) == {"complete", "stopped"}
    rungs = json.loads((sweep.out / "results.json").read_text())["rungs"]
    assert [rung["place"] for rung in rungs] == [0.25, 0.5]
    assert sorted(rungs[0]["stopped"]) == ["MATRIX_LR=0.3", "MATRIX_LR=0.4"]
    assert rungs[1]["stopped"] == ["MATRIX_LR=0.2"]
    reason = "stopped at 25.0% of its run: training loss 3.4000; MATRIX_LR=0.2, the last to go on,"
    assert reason in sweep.row("MATRIX_LR=0.4, stopped")[1]
    assert "of 2,500 GPU-seconds were spent" in sweep.table
    assert "Successive halving at 25.0% and 50.0% of the run" in sweep.table
    starts = [(record["run"], record["step"]) for record in sweep.journal("start")]
    assert len([name for name, step in starts if not step]) == 5  # nobody began again
    later = {name: step for name, step in starts if step}
    assert all(4 < step <= 14 for step in later.values())
    stopped = sweep.out / "runs" / "MATRIX_LR=0.4-1" / "MATRIX_LR=0.4-1.checkpoint"
    assert 4 < int(stopped.read_text()) < 12
    kept = next(run for run in ablate_plan(sweep).runs if run.variant == "MATRIX_LR=0.1")
    assert [record["step"] for record in ablate.read_curve(kept)] == list(range(1, 17))
    assert (sweep.out / "loss.png").stat().st_size > 5000
    # With what was stopped, a larger budget goes on from where it stood.
    before = len(starts)
    monkeypatch.setattr(ablate, "draw_plots", lambda *_: [])
    assert sweep.run("", "--budget", "5000") == 0
    assert {run["status"] for run in sweep.results().values()} == {"complete"}
    more = sweep.journal("start")[before:]
    assert len(more) == 3
    assert all(record["step"] > 4 for record in more)


def ablate_plan(bench: Bench) -> ablate.Plan:
    """The plan of the file as it stands."""
    return ablate.read_plan(bench.file, bench.out, t)


def test_a_failed_run_loses_and_a_spent_budget_ends_all(sweep, monkeypatch, capsys):
    assert sweep.run(SWEEP, "--budget", "2500", "--parallel", "5") == 1
    reason = "stopped at 25.0%: no run came so far with a finite loss"
    assert sweep.row("MATRIX_LR=0.4, stopped")[1] == reason
    assert sweep.row("MATRIX_LR=0.4, seed 1")[1].endswith("too high")
    # Side by side none was paused for another's sake.
    assert [record["step"] for record in sweep.journal("start")] == [0] * 5
    capsys.readouterr()
    monkeypatch.setattr(ablate.Sweep, "cost", lambda *_: 0.0)
    assert sweep.run(SWEEP.replace("[1]", "[2]"), "--budget", "0.4") == 1
    printed = capsys.readouterr().out
    assert "The budget is spent; the same command with a larger one goes on." in printed
    assert "5 of 5 runs have not ended" in printed


def test_with_a_budget_a_score_goes_on_or_stops_with_its_artifact(sweep, capsys):
    (sweep.folder / "mended").touch()
    variants = "".join(
        f'[[variant]]\nname = "{rate}, {epochs}"\nMATRIX_LR = {rate}\nTTT_EPOCHS = {epochs}\n'
        for rate in (0.3, 0.1)
        for epochs in (1, 2)
    )
    text = 'seeds = [1]\n[base]\nPRESET = "tiny"\n' + variants
    assert sweep.run(text, "--budget", "3500", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [  # two that train, two that score, and two halves of 120 s
        "to 50.0%: the base and 2 more, at most about 315 GPU-seconds",
        "to the end: the base and 1 more, at most about 2,280 GPU-seconds",
        "with --budget 3500: at most about 2,595 GPU-seconds",
    ]
    assert sweep.run("", "--budget", "3500") == 0
    statuses = {name: run["status"] for name, run in sweep.results().items()}
    stopped = {name for name, status in statuses.items() if status == "stopped"}
    assert stopped == {"0.3, 1-1", "0.3, 2-1"}
    assert set(statuses.values()) == {"complete", "stopped"}
    assert sweep.row("0.3, 2, stopped")[1].startswith("with 0.3, 1, which was stopped at 50.0%")
    assert sweep.results()["0.1, 2-1"]["figures"]["bpb_final"] == pytest.approx(0.6)
    assert sweep.run("", "--budget", "9999") == 0
    assert {run["status"] for run in sweep.results().values()} == {"complete"}


def test_with_a_budget_what_a_failed_run_should_have_written_is_not_waited_for(sweep):
    text = 'seeds = [1]\n[base]\nPRESET = "tiny"\nMATRIX_LR = 0.4\n'
    assert sweep.run(text + "[grid]\nTTT_EPOCHS = [1, 3]\n", "--budget", "9999") == 1
    assert [run["status"] for run in sweep.results().values()] == ["failed", "not run", "not run"]


def test_a_dry_run_with_a_budget_prints_legs_and_costs(sweep, capsys):
    assert sweep.run(SWEEP, "--budget", "2500", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    # 45 s to start, 120 of training, 600 of evaluation, 75 around them.
    assert lines[0] == "base, seed 1 (would run): SEED=1 PRESET=tiny; at most about 840 GPU-seconds"
    assert lines[-5:] == [
        "to the end of all: at most about 4,200 GPU-seconds",
        "to 25.0%: the base and 4 more, at most about 375 GPU-seconds",
        "to 50.0%: the base and 2 more, at most about 225 GPU-seconds",
        "to the end: the base and 1 more, at most about 1,560 GPU-seconds",
        "with --budget 2500: at most about 2,160 GPU-seconds",
    ]
    assert not sweep.out.exists()


@pytest.mark.parametrize(
    ("text", "budget", "message"),
    [
        (SWEEP, "100", "these runs may take 2160 GPU-seconds"),
        (SWEEP, "none", "none is not a number above 0"),
        (SWEEP.replace("MATRIX_LR", "SDCLIP_K"), "9999", "trains as 'base' does"),
        (SWEEP.replace("[grid]", "MAX_WALLCLOCK_SECONDS = 0\n[grid]"), "9999", "cost is unknown"),
        (SWEEP.replace("[grid]", 'RESUME = "never"\n[grid]'), "9999", "RESUME is what lets"),
        (SWEEP.replace("[0.3, 0.1, 0.4, 0.2]", "[0.3]"), "9999", "a list of several values"),
        # Names alone made variants that equal the base, none of which was run.
        (SWEEP.replace("MATRIX_LR", "name"), "9999", "[grid]: name is no setting to vary"),
        (SWEEP.replace("MATRIX_LR", "seeds"), "9999", "[grid]: seeds is no setting to vary"),
    ],
)
def test_a_budget_that_cannot_be_kept_or_compared_is_one_line(sweep, capsys, text, budget, message):
    assert sweep.run(text, "--budget", budget) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not sweep.out.exists()


def test_halving_takes_the_fewest_halvings_and_the_lowest_losses():
    assert [halving.kept_after(5, halvings) for halvings in range(4)] == [5, 3, 2, 1]
    assert halving.most_halvings(5) == 3
    assert halving.choose_halvings(5, 6.0, [9.0, 7.0, 6.0, 5.0].__getitem__) == 2
    losses = {"base": 9.0, "a": 3.0, "b": None, "c": 2.0, "d": 2.5}
    rung = halving.judge(0.5, losses, "base", 2)
    assert (rung.stopped, rung.worst_kept) == (["a", "b"], "d")


def test_a_loss_at_a_rung_is_that_of_the_last_quarter_before_it():
    curve = [{"progress": p / 20, "train_loss": float(p)} for p in range(20)]
    assert halving.loss_at(curve, 0.5) == pytest.approx(9.0)  # of 8, 9 and 10
    assert halving.loss_at(curve[:3], 0.5) == 2.0
    assert halving.loss_at([], 0.5) is None
    # A step that was skipped: its loss made the mean one that sorts anywhere, often as the least.
    odd = [record | {"train_loss": math.nan} for record in curve]
    assert halving.loss_at([*curve[:9], odd[9], *curve[9:]], 0.5) == pytest.approx(9.0)
    assert halving.loss_at(odd, 0.5) is None


def test_captions_say_which_comparison_is_fair(bench):
    bench.file.write_text(TWO)
    seconds, steps = ablate.loss_captions(ablate_plan(bench))
    assert "(fair" in seconds and "(fair" in steps
    bench.file.write_text(TWO.replace("MATRIX_LR = 0.5", "TRAIN_BATCH_TOKENS = 8192"))
    assert "not fair: steps differ in tokens" in ablate.loss_captions(ablate_plan(bench))[1]


# ---- Results -------------------------------------------------------------------------------------


def test_failed_runs_are_rows_that_say_why(bench, capsys):
    kinds = {"own": "own error", "bug": "bug", "silent": "silent", "late": "late"}
    rows = "".join(
        f'[[variant]]\nname = "{name}"\nTOKENIZER_PATH = "{text}"\n' for name, text in kinds.items()
    )
    assert bench.run('seeds = [1, 2]\n[base]\nPRESET = "tiny"\n' + rows) == 1
    assert bench.row("own")[1:4] == ["0 of 2", "–", "–"]
    error = "train_gpt.py: error: no *_train_*.bin shards in data / here"
    assert bench.row("own, seed 2")[1] == f"failed: {error}"
    assert bench.row("bug, seed 1")[1] == "failed: exit status 1: ZeroDivisionError: a bug"
    assert bench.row("silent, seed 1")[1] == "failed: exit status 0: no output"
    assert "no score in EVAL_MAX_SECONDS" in bench.row("late, seed 1")[1]
    late = bench.results()["late-1"]
    assert late["status"] == "failed"
    assert late["figures"]["bpb_before"] == pytest.approx(1.201)  # what it had come to
    assert bench.row("late")[5] == "–"  # but no mean is made of it
    assert (
        len(
            {
                len(line.replace("\\|", "").split("|"))
                for line in bench.table.splitlines()
                if "|" in line
            }
        )
        == 1
    )
    assert "no *_train_*.bin shards" in capsys.readouterr().out


def test_the_table_holds_means_deviations_and_the_test(bench):
    bench.run(TWO.replace("[1, 2]", "[1, 2, 6]"))
    heads = [
        "variant",
        "n",
        "BPB, final",
        "difference",
        "p",
        "before quantization",
        "after quantization",
    ]
    assert bench.row("variant") == [*heads, "artifact bytes, mean", "ms/step"]
    assert bench.row("base (base)") == [
        "base (base)",
        "3",
        "1.0030 ± 0.0026",
        "–",
        "–",
        "1.2030 ± 0.0026",
        "1.3030 ± 0.0026",
        "14,860,003",
        "50.5 ± 0.0",
    ]
    name, count, final, difference, p, *_ = bench.row("high rate")
    assert (name, count, final, difference) == ("high rate", "3", "1.5030 ± 0.0026", "+0.5000")
    expected = stats.ttest_ind([1.501, 1.502, 1.506], [1.001, 1.002, 1.006], equal_var=False).pvalue
    assert float(p) == pytest.approx(expected, rel=0.05)
    assert "2 of" not in bench.table


def test_results_hold_every_run_with_its_settings_and_figures(bench):
    bench.run(TWO)
    run = bench.results()["high rate-2"]
    assert run["settings"] == {"PRESET": "tiny", "MATRIX_LR": 0.5}
    assert run["status"] == "complete"
    wanted = {
        "bpb_before": 1.702,
        "bpb_after": 1.802,
        "bpb_final": 1.502,
        "artifact_bytes": 14_860_002,
    }
    assert run["figures"] == pytest.approx(wanted | {"steps": 10, "step_avg_ms": 50.5})
    assert set(bench.results()) == {"base-1", "base-2", "high rate-1", "high rate-2"}


def test_welchs_p_agrees_with_cases_computed_by_hand():
    # Equal variances 2 and means 4 apart: t = 4/√2 with 2 degrees of freedom, where p = 1 - t/√(2 +
    # t²) = 1 - 2/√5.
    assert ablate.welch_p([0.0, 2.0], [4.0, 6.0]) == pytest.approx(1 - 2 / math.sqrt(5))
    # Variances 2 and 0: t = 4 with 1 degree of freedom, where p = 1 - 2/π·atan(t). Student's test
    # would have 2.
    assert ablate.welch_p([0.0, 2.0], [5.0, 5.0]) == pytest.approx(1 - 2 / math.pi * math.atan(4))


def test_welchs_p_agrees_with_scipy_on_uneven_groups():
    one, two = [1.31, 1.35, 1.32, 1.40], [1.28, 1.29]
    means_and_spreads = (stats.tmean(one), stats.tstd(one), 4, stats.tmean(two), stats.tstd(two), 2)
    expected = stats.ttest_ind_from_stats(*means_and_spreads, equal_var=False).pvalue
    assert ablate.welch_p(one, two) == pytest.approx(expected)


def test_welchs_p_is_left_out_where_it_is_undefined():
    assert ablate.welch_p([1.0], [2.0, 3.0]) is None
    assert ablate.welch_p([1.0, 1.0], [1.0, 1.0]) is None


def test_plots_are_drawn_where_there_are_figures(bench, monkeypatch):
    monkeypatch.setattr(ablate, "draw_plots", DRAW_PLOTS)
    bench.run(TWO)
    assert sorted(path.name for path in bench.out.glob("*.png")) == ["bpb.png", "loss.png"]
    assert "QUANTIZATION_REPORT=1" in bench.table
    bench.run(TWO.replace('"tiny"', '"tiny"\nTOKENIZER_PATH = "kinds"'))
    pictures = {path.name: path.read_bytes() for path in bench.out.glob("*.png")}
    assert set(pictures) == {"bpb.png", "loss.png", "quantization_loss.png"}
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in pictures.values())
    assert "no run has a record" not in bench.table


# ---- Mistakes ------------------------------------------------------------------------------------

BASE = 'seeds = [1]\n[base]\nPRESET = "tiny"\n'
MISTAKES = {
    "a misspelt setting": (
        BASE + "MATRX_LR = 1\n",
        "[base]: MATRX_LR is not a setting; did you mean MATRIX_LR?",
    ),
    "a misspelt setting behind the mark that Windows puts before UTF-8": (
        "\ufeff" + BASE + "MATRX_LR = 1\n",
        "[base]: MATRX_LR is not a setting; did you mean MATRIX_LR?",
    ),
    "a setting in lower case": (
        BASE + "num_layers = 3\n",
        "num_layers is not a setting; did you mean NUM_LAYERS?",
    ),
    "a value of the wrong type": (
        BASE + "NUM_LAYERS = 3.5\n",
        'NUM_LAYERS="3.5" should be a whole number',
    ),
    "a list": (
        BASE + "MAMBA_LAYERS = [0, 1]\n",
        "MAMBA_LAYERS should be a string, a number, true or false",
    ),
    "an impossible value": (
        BASE + '[[variant]]\nname = "x"\nEMA_DECAY = 2\n',
        "variant 'x': EMA_DECAY=2.0 must be from 0 to below 1",
    ),
    "an unknown preset": (
        BASE.replace("tiny", "tny"),
        "PRESET=tny should be one of default, short",
    ),
    "a seed among the settings": (
        BASE + "SEED = 3\n",
        "SEED cannot be set here: write seeds = [...] instead",
    ),
    "one name twice": (
        BASE + '[[variant]]\nname = "x y"\n[[variant]]\nname = "X-y"\n',
        "has the same name as 'x y'",
    ),
    "the base's name": (BASE + '[[variant]]\nname = "base"\n', "has the same name as 'base'"),
    "no name": (BASE + "[[variant]]\nEMA_DECAY = 0.8\n", "None cannot be a variant's name"),
    "a name that breaks the table": (
        BASE + '[[variant]]\nname = "a|b"\n',
        "'a|b' cannot be a variant's name",
    ),
    "no base": ('seeds = [1]\n[[variant]]\nname = "x"\n', "there is no [base]"),
    "no seeds": ('[base]\nPRESET = "tiny"\n', "seeds should be a list of whole numbers"),
    "an empty list of seeds": (
        BASE.replace("[1]", "[]"),
        "seeds should be a list of whole numbers",
    ),
    "seeds that are no numbers": (
        BASE.replace("[1]", "[true]"),
        "seeds should be a list of whole numbers",
    ),
    "a seed twice": (BASE.replace("[1]", "[1, 1]"), "names a seed twice"),
    "a seed that no run takes": (
        BASE.replace("[1]", "[1, 100000000000000000000]"),
        "variant 'base': SEED=100000000000000000000 must be from 0 to",
    ),
    "a name too long for a run's files": (
        BASE + f'[[variant]]\nname = "{"é" * 115}"\n',
        "must be one file name, of at most 230 bytes",
    ),
    "a setting outside of base": ("NUM_LAYERS = 3\n" + BASE, "NUM_LAYERS is unknown here"),
    "variants": (
        BASE + '[[variants]]\nname = "x"\n',
        "variants is unknown here; did you mean variant?",
    ),
    "one variant": (
        BASE + '[variant]\nname = "x"\n',
        "variants are tables that begin with [[variant]]",
    ),
    "no processes": ("processes = 0\n" + BASE, "processes should be a whole number above 0"),
    "bad TOML": (BASE + "MATRIX_LR = = 1\n", "line 4"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_runs(bench, capsys, mistake):
    text, message = MISTAKES[mistake]
    assert bench.run(text) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ablate.py: error: ")
    assert message in line
    assert not bench.out.exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"EVAL_ONLY": "1"}, "unset EVAL_ONLY in the environment: ablate.py sets it for variants"),
        ({"MATRIX_LRS": "1"}, "environment: MATRIX_LRS is not a setting; did you mean MATRIX_LR?"),
    ],
)
def test_a_mistake_in_the_environment_is_one_line(bench, monkeypatch, capsys, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert bench.run(TWO) == 2
    assert message in capsys.readouterr().err
    assert not bench.out.exists()


@pytest.mark.parametrize("text", ["[]", "1", "null", "{"])
def test_an_outcome_that_is_none_is_of_a_run_to_be_made(bench, capsys, text):
    folder = bench.out / "runs" / "base-1"
    folder.mkdir(parents=True)
    (folder / "outcome.json").write_text(text)
    assert bench.run(TWO, "--dry-run") == 0
    assert "base, seed 1 (would run)" in capsys.readouterr().out


def test_missing_files_and_wrong_options_are_one_line(bench, capsys):
    assert bench.run() == 2
    assert ablate.run([]) == 2
    assert bench.run(TWO, "--parallel", "0") == 2
    assert bench.run(TWO, "--script", "none.py") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 2)[1] for line in lines] == ["error"] * 4
    messages = ("No such file", "FILE.toml", "--parallel", "no such program")
    for line, message in zip(lines, messages, strict=True):
        assert message in line


def test_without_a_reader_of_toml_the_line_says_what_to_install(bench, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "tomllib", None)
    assert bench.run(TWO) == 2
    assert (
        capsys.readouterr().err
        == "ablate.py: error: Python 3.10 cannot read TOML: pip install tomli\n"
    )


# ---- The ready files, and the real program -------------------------------------------------------


def test_help_shows_the_format():
    command = [sys.executable, "-m", "tools.ablate", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "[[variant]]" in done.stdout
    assert "--dry-run" in done.stdout


READY = sorted((ROOT / "tools" / "ablations").glob("*.toml"))


def test_there_are_ready_files():
    names = {"architecture", "grids", "quantization", "recurrence", "ttt"}
    assert names <= {path.stem for path in READY}


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
@pytest.mark.parametrize("processes", [1, 8])
def test_ready_files_are_valid_and_their_variants_differ(path, processes, bench):
    plan = ablate.read_plan(
        path, bench.out, t, processes
    )  # checks names and values as train_gpt.py does
    assert {run.settings["PRESET"] for run in plan.runs} <= {"short", "nemotron_hinge"}
    assert len(plan.runs) == 3 * len(plan.variants)
    settings = {run.variant: t.read_settings(run.variables)[0] for run in plan.runs}
    assert len(set(settings.values())) == len(plan.variants) > 3


def test_ready_files_name_the_tokenizers_that_their_commands_make(bench):
    made = {}
    for line in (ROOT / "tools" / "ablations" / "capitals.toml").read_text().splitlines():
        before, found, command = line.partition("python data/prepare.py ")
        if found:
            options = prepare.make_parser().parse_args(command.split())
            name = prepare.tokenizer_name(options.name, options.vocab_size, options.case)
            made[str(options.out)] = str(options.out / name)
    plan = ablate.read_plan(ROOT / "tools" / "ablations" / "capitals.toml", bench.out, t)
    named = {run.settings["DATA_PATH"]: run.settings["TOKENIZER_PATH"] for run in plan.runs}
    assert made == named
    assert len(made) == 2


def test_the_example_in_the_help_is_valid(bench):
    lines = ablate.__doc__.splitlines()
    first, last = (place for place, line in enumerate(lines) if line.startswith("    seeds"))
    bench.file.write_text("\n".join(lines[first : last + 1]))
    plan = ablate.read_plan(bench.file, bench.out, t)
    assert plan.variants == ["base", "no position in attention", "hinge, one pass"]
    assert [run.seed for run in plan.runs if run.variant == "hinge, one pass"] == [1337, 1338]
    assert plan.parallel == 8


@pytest.fixture(scope="module")
def real_sweep(tmp_path_factory, shards) -> Bench:
    """A sweep of train_gpt.py, one run at a time: each is paused at half of its run for the next,
    but for the last. Until then the base is under the real torchrun, later runs under a forked one.
    """
    bench = Bench(tmp_path_factory.mktemp("sweep"))
    paths = {"data_path": shards, "tokenizer_path": shards / "tokenizer.model"}
    clock = {"max_wallclock_seconds": 3.0, "export_reserve_seconds": 1.2, "train_log_every": 1}
    clock |= {"device": "cpu", "ttt_enabled": False, "eval_max_seconds": 60.0}
    settings = "".join(
        f'{name} = "{value}"\n' for name, value in tiny_environment(**clock, **paths).items()
    )
    text = "seeds = [7]\n[base]\n" + settings + "[grid]\nMATRIX_LR = [1e-9, 0.03]\n"
    text += '[[variant]]\nname = "adapts"\nTTT_ENABLED = true\nTTT_LR = 0.001\n'
    bench.file.write_text(text)

    runs = []

    def start(command: list[str], env: dict[str, str], **options):
        runs.append(env["RUN_ID"])
        begin = subprocess.Popen if runs == ["base-7"] else forked.Popen
        return begin(command, env=env, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(ablate, "LOOK_SECONDS", 0.05)
        patch.setattr(ablate, "draw_plots", lambda *_: [])
        patch.setattr(ablate, "subprocess", subprocess_with(Popen=start))
        assert ablate.run([str(bench.file), "--out", str(bench.out), "--budget", "687"]) == 0
    assert runs.count("base-7") == 2
    return bench


def read_records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_real_loser_leaves_a_checkpoint_and_the_survivor_resumes(real_sweep):
    statuses = {name: run["status"] for name, run in real_sweep.results().items()}
    assert sorted(statuses.values()) == ["complete", "complete", "complete", "stopped"]
    (loser,) = (name for name, status in statuses.items() if status == "stopped")
    assert statuses["base-7"] == statuses["adapts-7"] == "complete"
    assert (real_sweep.out / "runs" / loser / f"{loser}.checkpoint").is_file()
    log = read_records(real_sweep.out / "runs" / "base-7" / "base-7.jsonl")
    (resumed,) = (record for record in log if record["event"] == "resumed")
    before, after = (r for r in log if r["event"] in ("error", "trained"))
    assert "stopped by SIGTERM" in before["error"]
    assert after["starts"] == 2
    assert 0 < resumed["step"] < after["steps"]


def test_a_real_run(real_sweep):
    """train_gpt.py writes what ablate.py reads."""
    run = real_sweep.results()["base-7"]
    log = read_records(real_sweep.out / "runs" / "base-7" / "base-7.jsonl")
    assert log[0]["settings"]["seed"] == 7
    assert log[0]["machine"]["hardware"].startswith("1 ×")
    (final,) = (record for record in log if record["event"] == "final")
    (trained,) = (record for record in log if record["event"] == "trained")
    assert run["figures"]["bpb_final"] == final["val_bpb"] > 0
    artifact = real_sweep.out / "runs" / "base-7" / "base-7.int6.lzma"
    assert run["figures"]["artifact_bytes"] == artifact.stat().st_size
    assert run["figures"]["steps"] == trained["steps"] > 1

    scored = real_sweep.results()["adapts-7"]
    assert scored["artifact_sha256"] == run["artifact_sha256"]
    assert scored["figures"]["bpb_after"] == run["figures"]["bpb_after"]
    assert scored["figures"]["bpb_final"] != run["figures"]["bpb_final"]
    (scoring,) = (one for one in ablate_plan(real_sweep).runs if one.source)
    began = ablate.read_events(scoring)["settings"]["settings"]
    wanted = {name for name, group in t.FIELDS.items() if group == "evaluation"}
    assert {name: began[name] for name in wanted} == {
        name: getattr(scoring.resolved, name) for name in wanted
    }
    # Nothing trained.
    assert not (real_sweep.out / "runs" / "adapts-7" / "adapts-7.jsonl").exists()
