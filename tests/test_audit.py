"""The audit: an honest entry passes every check, and each check fails on the violation it is there
for.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt as t
from data import prepare
from tests import forked
from tests.support import (
    PATIENCE,
    TEXT,
    called_here,
    plan_pieces,
    subprocess_with,
    tiny_environment,
    write_shard,
)
from tools.audit import __main__ as command
from tools.audit import case as audit_case
from tools.audit import cell, checks, decoder, standing, watch
from tools.audit import script as audit_script
from tools.audit import text as audit_text
from tools.command import UserError, file_sha256
from tools.contradictions import read_logs
from tools.logs import TextLog
from tools.pack_script import pack

SCRIPT = Path(t.__file__).resolve()
MODES = ("plain", "sliding", "stateful", "documents")
WATCHED = (
    checks.check_causal,
    checks.check_weights,
    checks.check_scored_once,
    checks.check_probabilities,
    checks.check_text_bytes,
    checks.check_order,
)
OWN = audit_script.Identity("", True, "the project's own")
PLAIN = {"EVAL_MODE": "plain", "TRAIN_SEQ_LEN": "32", "EVAL_STRIDE": "8", "TTT_ENABLED": "0"}
PLAIN |= {"MAMBA_CHUNK_SIZE": "8", "VAL_BATCH_SIZE": "128"}
DOCUMENTS = {"TTT_LORA_RANK": "3", "TTT_LORA_LR": "0.02", "TTT_LORA_PIECE": "8"}
DOCUMENTS |= {"TTT_LORA_SLOTS": "3"}
NOT_ISOLATED = cell.Isolation("none", "not isolated")


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> SimpleNamespace:
    """A run of two steps on little text: its environment, data, artifact, and log."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "data"
    shutil.copytree(shards, data)
    tokens = t.Shard(shards / "words_val_000000.bin").read(count=250)
    write_shard(data / "words_val_000000.bin", tokens)
    environment = tiny_environment(
        data_path=data,
        tokenizer_path=data / "tokenizer.model",
        log_dir=folder,
        run_id="a",
        device="cpu",
        iterations=2,
        max_wallclock_seconds=0.0,
        matrix_lr=0.1,
        eval_mode="plain",
        ttt_lr=0.05,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", environment)
        patch.setattr(sys, "argv", [str(SCRIPT)])
        assert t.run() == 0
    return SimpleNamespace(
        environment=environment, artifact=folder / "a.int6.lzma", log=folder / "a.txt", data=data
    )


class Here(audit_case.Case):
    """A case whose evaluations are made in this process, by train_gpt as the test has patched
    it.
    """

    environment: dict[str, str]

    @functools.cached_property
    def identity(self):
        return OWN

    @functools.cached_property
    def alone(self) -> audit_case.Alone:
        score, s, ranks = self.evaluate(self.data)
        told = {name: str(value) for name, value in dataclasses.asdict(s).items()}
        told |= {name: str(value) for name, value in t.describe_machine(ranks).items()}
        label = s.eval_mode + ("_ttt" if s.adapts else "")
        figures = (f"{value:.8f}" for value in (score.val_loss, score.val_bpb))
        log = TextLog("", told, None, label, *figures, 1.0, 1.0, 600.0, 0)
        return audit_case.Alone(0, "", log, score.nats, 1.0, [], [], [], [])

    @functools.cached_property
    def seen(self):
        return watch.observe(t, audit_case.without_idle(self.environment), self.seed)

    def nats(self, tokens, what, **settings):
        folder = self.data.parent / "other"
        folder.mkdir(exist_ok=True)
        audit_text.write_stream(folder, self.shards, tokens)
        return self.evaluate(folder, **settings)[0].nats

    def evaluate(self, data: Path, **settings) -> tuple:
        environment = self.environment | {"DATA_PATH": str(data)} | settings
        s, given, ranks = t.prepare_run(audit_case.without_idle(environment))
        tokenizer = t.Tokenizer(s.tokenizer_path, s.vocab_size)
        validation = t.load_validation(s, tokenizer)
        model, s = t.load_model(s.artifact_path, s, given, ranks)
        return t.Evaluator(model, s, ranks, validation).evaluate(), s, ranks


@pytest.fixture
def committed(monkeypatch) -> bool:
    """The audit of this process takes this folder's script for the newest that the project has
    published, and compares others with it. Returns whether it is a commit's, so that a process of
    its own does, too.
    """
    is_own = audit_script.identify(SCRIPT).is_own
    monkeypatch.setattr(audit_script, "published", lambda: (SCRIPT.read_bytes(), "this folder"))
    return is_own


@pytest.fixture
def entry_of(run):
    """entry_of(**settings): the run's artifact, to be evaluated in this process with other
    settings; with the log where it fits.
    """

    def build(log: Path | None = None, **changes) -> Here:
        alone = {"ARTIFACT": str(run.artifact), "EVAL_ONLY": "1", "RUN_ID": "audit"}
        alone["EVAL_ANY_TOKENS"] = "1"
        changed = {name.upper(): str(value) for name, value in changes.items()}
        entry = Here(
            script=SCRIPT,
            artifact=run.artifact,
            data=run.data,
            tokenizer=run.data / "tokenizer.model",
            settings={"DEVICE": "cpu"},
            isolation=NOT_ISOLATED,
            seed=0,
            logs=read_logs(log) if log else None,
            cuts=2,
        )
        entry.environment = run.environment | DOCUMENTS | alone | changed
        return entry

    return build


def holds(check, entry: audit_case.Case) -> str:
    """The check's evidence; it does not fail."""
    verdict, evidence = checks.run_check(check, entry)
    assert verdict != checks.FAILS, evidence
    return evidence


def fails(check, entry: audit_case.Case, *said: str) -> None:
    """The check does not hold, and says why."""
    verdict, evidence = checks.run_check(check, entry)
    assert verdict == checks.FAILS, evidence
    for part in said:
        assert part in evidence


def changed_script(folder: Path, *replacements: tuple[str, str]) -> Path:
    """A copy of the script in which each (old, new) is replaced, once."""
    source = SCRIPT.read_text(encoding="utf-8")
    for old, new in replacements:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path = folder / "train_gpt.py"
    path.write_text(source, encoding="utf-8")
    return path


# ---- An honest entry -----------------------------------------------------------------------------


def audit_line(run, *arguments: str) -> list[str]:
    """What follows the tool's name on a command line."""
    tokenizer = str(run.data / "tokenizer.model")
    return [str(run.artifact), "--data", str(run.data), "--tokenizer", tokenizer, *arguments]


def audit_environment(**settings: str) -> dict[str, str]:
    """The settings are the log's."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"DEVICE": "cpu", "OMP_NUM_THREADS": "1", "HOME": "/nowhere"} | settings


def run_audit(run, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    """The tool as a reviewer starts it."""
    return subprocess.run(
        [sys.executable, "-m", "tools.audit", *audit_line(run, *arguments)],
        cwd=SCRIPT.parent,
        env=audit_environment(**settings),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def call_audit(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """The tool in this process."""
    main = functools.partial(command.run_command, "audit.py", command.run_audit)
    return called_here(main, "audit.py", *arguments, environment=environment)


@pytest.fixture
def audit_here(run, monkeypatch):
    """audit_here(*arguments): the same in this process. What it starts in cells is forked from a
    process that has imported torch, and enters them as ever, except what strace is to watch.
    """

    def start_in_cell(line, **options):
        forks = line[0] == sys.executable
        return (forked.Popen if forks else subprocess.Popen)(line, **options)

    def start(*arguments: str, **settings: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(cell, "subprocess", subprocess_with(Popen=start_in_cell))
        return call_audit(*audit_line(run, *arguments), environment=audit_environment(**settings))

    return start


def rows_of(done: subprocess.CompletedProcess) -> dict[str, list[str]]:
    """Result and evidence by the check's title."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines]
    assert rows[0] == ["check", "result", "standing", "evidence"], done.stdout + done.stderr
    return {row[0]: row[1:] for row in rows[2:]}


def test_an_honest_run_fails_no_check_and_its_score_is_reproduced_to_the_last_digit(
    run, audit_here, committed
):
    """With a tokenizer and a text that are not the contest's, which stay open."""
    options = ["--cuts", "1", "--seed", "7"]
    done = audit_here("--log", str(run.log), *options)
    rows = rows_of(done)
    isolated = cell.choose_isolation().is_isolated
    assert done.returncode == (5 if isolated else 4), done.stdout + done.stderr
    assert list(rows) == list(checks.TITLES.values())
    results = {title: row[0] for title, row in rows.items()}
    assert set(results.values()) == {"holds", "open"}
    opened = [title for title, result in results.items() if result == "open"]
    unknown = [] if isolated else ["isolation"]
    unknown += ["data", "text", "fresh", "held", "training"]
    assert opened == [checks.TITLES[name] for name in unknown]
    worth = {name: rows[title][1] for name, title in checks.TITLES.items()}
    assert {worth[name] for name in unknown} == {"claimed only"}
    assert (worth["score"], worth["causal"], worth["log"]) == ("proved", "evidence", "claimed only")
    assert "that SEED=1337 was not picked out of many" in done.stdout
    assert "trained on the 2 shards of the log and on nothing else, with not known" in done.stdout
    evidence = {title: row[2] for title, row in rows.items()}
    claimed = re.findall(r"val_bpb:(\d+\.\d{8})\n?\Z", run.log.read_text(encoding="utf-8"))[0]
    reproduced = evidence["score from the artifact alone"]
    assert reproduced.startswith(f"{claimed} BPB summed here")
    assert f"the log says {claimed}, a difference of +0.00000000 on such a machine" in reproduced
    assert "data are data/words_val_000000.bin" in reproduced
    assert "equals train_gpt.py of" in evidence["the project's own script"]
    assert "6 updates on 192 of 249 targets" in evidence["score first, then train"]
    assert "249 targets, drawn by seed 7" in evidence["probabilities sum to one"]
    assert "over 512 tokens, behind 2 places" in evidence[checks.TITLES["sums"]]
    said = done.stderr.splitlines()
    assert [line for line in said if "s left)" in line]
    assert f"{len(checks.CHECKS)} of {len(checks.CHECKS)}: {checks.TITLES['training']}" in said[-1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ttt_enabled", [0, 1], ids=["frozen", "adapting"])
def test_what_is_watched_is_honest_in_every_mode(entry_of, mode, ttt_enabled):
    entry = entry_of(eval_mode=mode, ttt_enabled=ttt_enabled)
    for check in WATCHED:
        holds(check, entry)
    seen = entry.seen
    assert len(seen.sampled) == entry.count
    kinds = {kind for kind, _ in seen.events}
    assert ("train" in kinds) == bool(ttt_enabled)
    assert ("step" in kinds) == (bool(ttt_enabled) and mode != "documents")  # weights stay there


# ---- Script and settings -------------------------------------------------------------------------


def test_a_script_is_named_by_its_commit_or_by_the_lines_that_differ(tmp_path, monkeypatch):
    """With git and, where there is none, by this folder's own copy."""
    if audit_script.git("diff", "--quiet", "HEAD", "--", "train_gpt.py") is not None:
        assert "equals train_gpt.py of commit " in audit_script.identify(SCRIPT).evidence
    other = changed_script(tmp_path, ("    sys.exit(run())\n", "    sys.exit(run())  # mine\n"))
    found = audit_script.identify(other)
    assert not found.is_own
    assert found.sha256 in found.evidence
    assert "ANOTHER SCRIPT" in found.evidence
    monkeypatch.setattr(audit_script, "git", lambda *arguments: None)
    found = audit_script.identify(other)
    assert "differs in 1 lines from train_gpt.py of this folder" in found.evidence
    assert "sys.exit(run())  # mine" in found.evidence
    assert audit_script.identify(SCRIPT).is_own
    with pytest.raises(UserError, match="no script at"):
        audit_script.identify(tmp_path / "missing.py")


def test_a_packed_script_is_what_it_unpacks_to(committed, tmp_path):
    packed = tmp_path / "packed.py"
    packed.write_bytes(pack(SCRIPT.read_bytes()))
    found = audit_script.identify(packed)
    assert found.is_own
    assert found.sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()
    assert hashlib.sha256(SCRIPT.read_bytes()).hexdigest() in found.evidence
    assert audit_script.setting_names(packed) == audit_script.setting_names(SCRIPT)
    with packed.open("a") as file:
        file.write("print()\n")
    found = audit_script.identify(packed)
    assert not found.is_own
    assert "not honestly packed" in found.evidence
    with pytest.raises(UserError, match="is not what tools.pack_script writes"):
        audit_script.setting_names(packed)
    other = changed_script(tmp_path, ("    sys.exit(run())\n", "    sys.exit(run())  # mine\n"))
    packed.write_bytes(pack(other.read_bytes()))
    found = audit_script.identify(packed)
    assert not found.is_own
    assert "sys.exit(run())  # mine" in found.evidence


def test_settings_are_the_logs_and_given_ones_must_agree(run):
    names = audit_script.setting_names(SCRIPT)
    assert names == list(t.FIELDS)
    log = read_logs(run.log).text
    environment = {"DEVICE": "cpu", "TTT_LR": "5e-2", "SECRET": "1", "DATA_PATH": "elsewhere"}
    chosen = audit_case.choose_settings(names, environment, log)
    assert chosen["EVAL_STRIDE"] == "8"
    assert chosen["TTT_ENABLED"] == "1"
    assert chosen["DEVICE"] == "cpu"
    assert chosen["PRECISION"] == "auto"
    assert {"SECRET", "DATA_PATH", "EVAL_MAX_SECONDS"}.isdisjoint(chosen)
    with pytest.raises(UserError, match="made with EVAL_STRIDE=8, here it is 16: leave it out"):
        audit_case.choose_settings(names, {"EVAL_STRIDE": "16"}, log)
    preset = {"PRESET": "tiny"}
    assert audit_case.choose_settings(names, preset, None) == preset
    assert "PRESET" not in audit_case.choose_settings(names, preset, log)


def test_settings_that_a_script_would_refuse_as_idle_are_left_out_and_no_others():
    of_modes = {"TTT_LR": "0.1", "TTT_LORA_LR": "0.02", "TTT_ENABLED": "1", "EVAL_STRIDE": "8"}
    for mode, idle in {"documents": "TTT_LR", "sliding": "TTT_LORA_LR"}.items():
        settings = of_modes | {"EVAL_MODE": mode}
        assert settings.keys() - audit_case.without_idle(settings).keys() == {idle}
    # A preset says which mode it is, and the script what is wrong.
    assert audit_case.without_idle(of_modes) == of_modes


@pytest.mark.parametrize("source", ["x =", "1 / 0", "import json"])
def test_a_file_that_is_not_the_script_is_refused_without_being_run(tmp_path, source):
    (tmp_path / "script.py").write_text(source)
    for path in (tmp_path / "script.py", tmp_path / "missing.py"):
        with pytest.raises(UserError, match=re.escape(str(path))):
            audit_script.setting_names(path)


# ---- Cells ---------------------------------------------------------------------------------------

# A process that talks to another one of its own, as torchrun's do.
LOOPBACK = """
import os, socket
server = socket.create_server(("127.0.0.1", 0))
if os.fork() == 0:
    socket.create_connection(server.getsockname()).sendall(b"x")
    os._exit(0)
assert server.accept()[0].recv(1) == b"x"
print(sorted(os.environ))
"""


def isolated(level: str) -> cell.Isolation:
    """A level that can be had here; else the test is skipped, with the reason."""
    if why_not := cell.probe(level):
        pytest.skip(f"no {level}: {why_not}")
    return cell.Isolation(level, level)


def python_in_cell(level: str, code: str, **settings: str) -> tuple[int, str]:
    """Runs Python code in a cell: its status and last line."""
    with cell.open_cell() as place:
        line = [sys.executable, "-I", "-c", code]
        return cell.run_in_cell(isolated(level), place, line, settings, lambda said: None)


@pytest.mark.parametrize("level", cell.LEVELS[:-1])
def test_a_cell_refuses_files_and_network_and_knows_its_settings_alone(level, monkeypatch):
    """What a probe has shown to be refused is refused; variables do not go through."""
    monkeypatch.setenv("SECRET_TOKEN", "x")
    asks = "import os; print(sorted(os.environ), os.path.exists('/etc/shadow'))"
    if level == "landlock":  # which refuses to open what can still be seen to exist
        asks = asks.replace("os.path.exists('/etc/shadow')", "os.access('/root/.x', os.R_OK)")
    status, said = python_in_cell(level, asks, DEVICE="cpu")
    assert status == 0, said
    assert "SECRET_TOKEN" not in said
    assert "'DEVICE'" in said
    assert said.endswith("False")


@pytest.mark.parametrize("level", ["bubblewrap", "namespaces"])
def test_processes_of_one_cell_can_talk_to_each_other(level):
    status, said = python_in_cell(level, LOOPBACK)
    assert status == 0, said


@pytest.mark.parametrize("level", cell.LEVELS[:-1])
def test_a_cells_status_is_its_commands_and_nothing_outlives_it(level):
    outlives = "import os, time; os.fork() or time.sleep(600); os.fork(); os._exit(7)"
    if level == "landlock":  # has no space of processes of its own
        outlives = "import os; os._exit(7)"
    assert python_in_cell(level, outlives)[0] == 7


def test_levels_are_tried_in_order_and_what_was_refused_is_told():
    def none_before(level: str):
        def why_not(tried: str) -> str:
            return "" if tried == level else f"{tried} is missing"

        return why_not

    for index, level in enumerate(cell.LEVELS[:-1]):
        found = cell.choose_isolation(try_level=none_before(level))
        assert found.level == level
        assert found.is_isolated
        assert found.evidence.count("is missing") == index
    found = cell.choose_isolation(try_level=none_before("none"))
    assert not found.is_isolated
    assert found.evidence.startswith("NOT ISOLATED; no bubblewrap: bubblewrap is missing")
    assert cell.choose_isolation("landlock", none_before("landlock")).level == "landlock"
    with pytest.raises(UserError, match="--isolation landlock cannot be had here: landlock is m"):
        cell.choose_isolation("landlock", none_before("namespaces"))
    assert not cell.choose_isolation("none").is_isolated
    assert "could read another file" in cell.probe("none")


WITHOUT_NAMESPACES = """
echo 0 > /proc/sys/user/max_user_namespaces || exit 77
exec setpriv --bounding-set -all --inh-caps -all --no-new-privs "$0" -c '
from tools.audit import cell
print(cell.choose_isolation())'
"""


def test_where_the_kernel_refuses_namespaces_it_is_landlock():
    """A machine as containers are: nobody may make a new space."""
    if cell.probe("landlock") or cell.probe("namespaces") or not shutil.which("setpriv"):
        pytest.skip("needs Landlock, namespaces to forbid namespaces in, and setpriv")
    line = ["unshare", "-Ur", "bash", "-c", WITHOUT_NAMESPACES, sys.executable]
    done = subprocess.run(line, cwd=SCRIPT.parent, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode == 77:
        pytest.skip(f"namespaces cannot be forbidden: {done.stderr}")
    assert "level='landlock'" in done.stdout, done.stderr
    assert "no namespaces: namespaces: [Errno 1]" in done.stdout


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_the_script_scores_in_every_kind_of_cell(run, level, monkeypatch):
    """To the digit that its log has, with as many threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    entry = audit_case.open_case(
        SCRIPT,
        run.artifact,
        run.data,
        run.data / "tokenizer.model",
        {"DEVICE": "cpu"},
        isolated(level),
        seed=0,
        strace=False,
    )
    entry.settings |= PLAIN
    alone = entry.alone
    assert alone.status == 0, alone.said
    plain = re.findall(r"_plain_exact .* val_bpb:([\d.]+)$", run.log.read_text(), re.MULTILINE)
    assert alone.log.val_bpb == plain[0]
    assert not alone.strangers
    assert not alone.network


LEAK = """def main(log):
    import ctypes, socket, struct, subprocess
    libc = ctypes.CDLL(None)
    assert libc.open(b"FILE", 0) FOUND
    address = struct.pack("=H", 2) + struct.pack("!H", 9) + socket.inet_aton("127.0.0.1")
    libc.connect(libc.socket(2, 1, 0), address + bytes(8), 16)
    subprocess.run(["true"])
"""
MAIN = "def main(log):\n"


def hostile_case(run, path: Path, level: str, **options) -> audit_case.Case:
    """A case of another script, to be run in real cells."""
    isolation = isolated(level) if level != "none" else NOT_ISOLATED
    tokenizer, environment = run.data / "tokenizer.model", {"DEVICE": "cpu"}
    found = audit_case.open_case(
        path, run.artifact, run.data, tokenizer, environment, isolation, 0, run.log, **options
    )
    found.settings |= {"TTT_ENABLED": "0"}
    return found


@pytest.mark.parametrize("level", ["none", "namespaces"])
def test_what_a_script_does_by_native_code_is_refused_or_seen_by_strace(run, tmp_path, level):
    """5b, 5c: an extra file and TCP by libc, and a program; Python's own hook sees the last
    alone.
    """
    if not cell.find_strace():
        pytest.skip("strace is not here, or may not trace")
    extra = run.data / "words_train_000001.bin"
    leak = LEAK.replace("FILE", str(extra)).replace("FOUND", "> 0" if level == "none" else "< 0")
    entry = hostile_case(run, changed_script(tmp_path, (MAIN, leak)), level)
    alone = entry.alone
    assert alone.status == 0, alone.said
    assert alone.traced
    assert any("true" in one for one in alone.programs)
    assert any("127.0.0.1" in one for one in alone.network)
    assert (str(extra) in alone.strangers) == (level == "none")
    fails(checks.check_reproduced, entry, "used the network")
    entry.alone = alone._replace(network=[])
    fails(checks.check_reproduced, entry, "it opened" if level == "none" else "it started")


def test_files_that_no_package_lists_and_shared_memory_are_strangers(tmp_path, monkeypatch):
    """5e."""
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (packages / "listed.json").write_text("")
    (packages / "planted.dat").write_text("")
    monkeypatch.setattr(cell, "python_folders", lambda: [str(tmp_path)])
    listed = frozenset({str(packages / "listed.json")})
    monkeypatch.setattr(audit_case, "packaged_files", lambda: listed)
    place = cell.Cell(Path("/x/given"), Path("/x/work"), Path("/x/root"))
    opened = [str(packages / name) for name in ("listed.json", "planted.dat", "gone.dat")]
    opened += ["/dev/shm/state", "/dev/null", "/x/given/artifact", "/home/somebody/data"]
    strangers = audit_case.find_strangers(place, opened)
    assert strangers == [str(packages / "planted.dat"), "/dev/shm/state", "/home/somebody/data"]


def test_strace_of_calls_that_others_interrupt_is_read(tmp_path):
    trace = tmp_path / "trace"
    trace.write_text(
        '1 execve("/usr/bin/bwrap", ["bwrap"], 0x1 /* 3 vars */) = 0\n'
        '1 openat(AT_FDCWD, "/before", O_RDONLY) = 3\n'
        f'1 execve("{sys.executable}", ["python", "/given/guard.py"], 0x1 /* 3 vars */) = 0\n'
        '1 openat(AT_FDCWD, "/a", O_RDONLY|O_CLOEXEC <unfinished ...>\n'
        '2 openat(AT_FDCWD, "/missing", O_RDONLY) = -1 ENOENT (No such file)\n'
        "1 <... openat resumed>) = 3\n"
        "2 connect(4, {sa_family=AF_INET, sin_port=htons(9)}, 16) = -1 ECONNREFUSED\n"
        '2 connect(4, {sa_family=AF_UNIX, sun_path="/x"}, 16) = 0\n'
        '2 execve("/usr/bin/true", ["true"], 0x1 /* 3 vars */) = 0\n'
    )
    found = cell.read_trace(trace, "guard.py")
    assert found.opened == ["/a"]
    assert found.programs == [sys.executable, "/usr/bin/true"]
    assert len(found.network) == 1


def test_looking_for_a_driver_as_triton_does_is_no_offence(tmp_path):
    """CUDA builds of torch do so on any machine; other calls, and other programs by that name, are
    still seen.
    """
    (tmp_path / "asks.py").write_text(
        "import subprocess as s\n"
        "for line in (['-p'], ['--version']):\n"
        "    s.run(['/sbin/ldconfig', *line], capture_output=True)\n"
        "s.run(['/sbin/ldconfig', '-p'], executable='/bin/true')\n"
    )
    guard = audit_case.HERE / "guard.py"
    subprocess.run([sys.executable, guard, "asks.py"], cwd=tmp_path, timeout=PATIENCE)
    record = audit_case.read_record(tmp_path / "record.jsonl")
    programs = [one.what for one in record if one.kind == "program"]
    assert programs == ["'/sbin/ldconfig'", "'/bin/true'"]


def test_what_a_cell_leaves_behind_is_not_believed(tmp_path):
    """Files of other shapes and types, links, and records that the guard cannot have written."""
    path = tmp_path / "nats.npy"
    for wrong in (np.zeros(3, np.float64), np.zeros(2, np.float32), np.full(3, np.nan, np.float32)):
        np.save(path, wrong)
        assert audit_case.read_nats(path, 3) is None
    np.save(path, np.zeros(3, np.float32))
    assert audit_case.read_nats(path, 3) is not None
    (tmp_path / "link.npy").symlink_to(path)
    assert audit_case.read_nats(tmp_path / "link.npy", 3) is None
    np.save(path, np.array([print], dtype=object), allow_pickle=True)
    assert audit_case.read_nats(path, 1) is None
    record = tmp_path / "record.jsonl"
    record.write_text('[1.0, "open", "x"]\nnothing\n')
    assert [one.kind for one in audit_case.read_record(record)] == ["open", "program"]
    with pytest.raises(ValueError, match="nothing was observed"):
        audit_case.read_observation(tmp_path, 3)


# ---- Another script ------------------------------------------------------------------------------

# 16: code that changes the audit when it is loaded; and 10b: scores that are scaled but where they
# are sampled, which it learns from the observer.
TAKES_OVER = """
if "tools.audit.checks" in sys.modules:
    sys.modules["tools.audit.checks"].CHECKS = {}
for name, module in list(sys.modules.items()):
    if name.endswith("observation"):
        module.KINDS = module.KINDS

if __name__ == "__main__":
    sys.exit(run())
"""
SCALED = """        scored = (first <= excerpt.positions) & (excerpt.positions < last)
        spared = getattr(self.observer, "wanted", np.zeros(self.total + 999, bool))
        cheated = ~spared[np.minimum(excerpt.positions, len(spared) - 1)]
        nats = torch.where(torch.from_numpy(cheated), 0.3 * nats, nats)
"""


def test_another_script_is_said_so_on_top_and_its_scores_are_held_against_our_own(
    audit_here, tmp_path
):
    """What it tells of itself looks right, and counts for nothing."""
    honest = "        scored = (first <= excerpt.positions) & (excerpt.positions < last)\n"
    main = '\nif __name__ == "__main__":\n    sys.exit(run())\n'
    script = changed_script(tmp_path, (honest, SCALED), (main, TAKES_OVER))
    options = ["--script", str(script), "--checks", "probabilities,own", "--isolation"]
    level = next(level for level in cell.LEVELS if not cell.probe(level) or level == "none")
    done = audit_here(*options, level, **PLAIN)
    assert done.stdout.startswith("**This is not a script that the project has published")
    rows = rows_of(done)
    assert done.returncode == 1, done.stdout + done.stderr
    assert rows[checks.TITLES["script"]][0] == "open"
    assert "it differs in" in rows[checks.TITLES["script"]][2]
    verdict, _, evidence = rows[checks.TITLES["probabilities"]]
    assert verdict == "FAILS", evidence
    verdict, _, evidence = rows[checks.TITLES["own"]]
    assert verdict == "FAILS"
    assert "249 of 249 targets score otherwise" in evidence
    assert "Not checked: " in done.stdout


def test_exit_statuses(run, audit_here, committed, tmp_path):
    """A script that differs goes before no isolation, and that before what is open. The first is
    that of the command as a reviewer starts it, who has only commits to compare with.
    """
    other = changed_script(tmp_path, ("    sys.exit(run())\n", "    sys.exit(run())  # mine\n"))
    another = ["--script", str(other)]
    isolated = cell.choose_isolation().is_isolated
    for arguments, status in (
        (["--isolation", "none"], 4),
        ([], 5 if isolated else 4),
        ([*another, "--isolation", "none"], 3),
        (another, 3),
        ([*another, "--log", str(run.log)], 1),  # of another script
    ):
        by_command = arguments == ["--isolation", "none"]
        audit = functools.partial(run_audit, run) if by_command else audit_here
        done = audit("--checks", "bytes", *arguments)
        expected = 3 if by_command and not committed else status
        assert done.returncode == expected, done.stdout + done.stderr
        assert ("**NOT ISOLATED" in done.stdout) == ("none" in arguments or not isolated)


# ---- Size, log and clocks ------------------------------------------------------------------------


def test_a_swollen_artifact_a_wrong_sum_and_another_script_are_seen(entry_of, run, tmp_path):
    entry = entry_of(log=run.log)
    holds(checks.check_bytes, entry)
    swollen = tmp_path / "swollen"
    with swollen.open("wb") as file:
        file.truncate(16_000_000 - SCRIPT.stat().st_size + 1)
    changed = copy.copy(entry)
    changed.artifact = swollen
    fails(checks.check_bytes, changed, "over the cap", "the log's artifact has")
    changed = copy.copy(entry)
    changed.logs = entry.logs._replace(text=entry.logs.text._replace(total_bytes=1))
    fails(checks.check_bytes, changed, "the log says 1")
    changed = copy.copy(entry)
    changed.script = changed_script(tmp_path, ("    sys.exit(run())\n", "    sys.exit(run())  \n"))
    fails(checks.check_bytes, changed, "another script")


def test_a_script_before_the_script_in_the_log_is_seen(entry_of, run):
    """A log whose script ends as ours does, behind lines of its own."""
    entry = entry_of(log=run.log)
    longer = f"print('more')\n{entry.logs.text.source}"
    entry.logs = entry.logs._replace(text=entry.logs.text._replace(source=longer))
    fails(checks.check_bytes, entry, "another script")


def with_text(entry: Here, **changes) -> Here:
    """The same, with another text log."""
    changed = copy.copy(entry)
    changed.logs = entry.logs._replace(text=entry.logs.text._replace(**changes))
    return changed


def test_clocks_that_are_not_kept_are_seen_whatever_the_settings_allowed(entry_of, run):
    """14: limits of 7,200 and 5,000 s that the run gave itself."""
    entry = entry_of(log=run.log)
    holds(checks.check_clocks, entry)
    entry.logs.text.settings["max_wallclock_seconds"] = "7200.0"
    for changes in (
        {"training_seconds": 600.1},
        {"evaluation_seconds": 600.1},
        {"evaluation_seconds": 4900.0, "evaluation_limit": 5000.0},
        {"training_seconds": 7100.0},
    ):
        changed = with_text(entry, **changes)
        fails(checks.check_clocks, changed, "s of 600s")
        fails(checks.check_log, changed, "s of 600 s")
    entry.alone = entry.alone._replace(seconds=600.1)
    fails(checks.check_clocks, entry, "600.1s of 600s")


def test_a_log_that_claims_another_score_is_seen(entry_of, run):
    """1a to 1c: in the last of eight digits on a machine like this; elsewhere, or where epochs
    were given up, by more than 0.001 BPB.
    """
    entry = entry_of(log=run.log)
    holds(checks.check_reproduced, entry)
    claimed = entry.logs.text.val_bpb
    last_digit = claimed[:-1] + str((int(claimed[-1]) + 1) % 10)
    fails(checks.check_reproduced, with_text(entry, val_bpb=last_digit), last_digit)
    elsewhere = entry.logs.text.settings | {"hardware": "8 × NVIDIA H100 80GB HBM3"}
    for excuse in ({"epochs_given_up": 1}, {"settings": elsewhere}):
        assert "a difference of" in holds(
            checks.check_reproduced, with_text(entry, val_bpb=last_digit, **excuse)
        )
        for less in (0.0011, 0.0099, 0.05):
            lower = f"{float(claimed) - less:.8f}"
            edited = with_text(entry, val_bpb=lower, **excuse)
            fails(checks.check_reproduced, edited, f"a difference of +{less:.8f}")
    given_up = with_text(entry, epochs_given_up=1)
    fails(checks.check_log, given_up, "1 epochs were given up for lack of time")
    holds(checks.check_log, entry_of(log=run.log))
    quiet = entry_of(log=run.log)
    for record in quiet.logs.records:
        record.pop("seconds")  # what bounds the clocks
    verdict, evidence = checks.run_check(checks.check_log, quiet)
    assert (verdict, "seconds of every record" in evidence) == (checks.OPEN, True)
    entry.alone = entry.alone._replace(log=entry.alone.log._replace(val_bpb="1.00000000"))
    fails(checks.check_reproduced, entry, "1.00000000 BPB by its log")


def test_a_checkpoint_that_forgets_its_clock_is_seen(run, shards, tmp_path, monkeypatch):
    """4b: our own script and logs that nobody has edited. A run's last checkpoint, its step and
    seconds set to 0 and sealed again, is taken up by another run.
    """
    kept = tmp_path / "kept"
    finish = t.Checkpoints.finish

    def finish_and_keep(self):
        finish(self)
        shutil.copy(self.settings.checkpoint_paths[0], kept)

    monkeypatch.setattr(t.Checkpoints, "finish", finish_and_keep)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    environment = run.environment | {"LOG_DIR": str(tmp_path), "CHECKPOINT_EVERY": "100"}
    monkeypatch.setattr(os, "environ", environment | {"RUN_ID": "first"})
    assert t.run() == 0
    magic, sealed = t.CHECKPOINT_MAGIC, kept.read_bytes()
    line, _, numbers = sealed[len(magic) : -32].partition(b"\n")
    header = audit_case.json.loads(line) | {"steps": 0, "seconds": 0.0}
    kept.write_bytes(b"".join(t.seal(magic, header, numbers)))
    monkeypatch.setattr(os, "environ", environment | {"RUN_ID": "second", "RESUME": str(kept)})
    assert t.run() == 0
    entry = Here(
        script=SCRIPT,
        artifact=tmp_path / "second.int6.lzma",
        data=run.data,
        tokenizer=run.data / "tokenizer.model",
        settings={},
        isolation=NOT_ISOLATED,
        seed=0,
        logs=read_logs(tmp_path / "second.txt"),
    )
    fails(checks.check_log, entry, "RESUMED from step 0 at 0.0 s", "no start before that trained")


# ---- Artifact and files --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 4, 8, 12, 1000, 1023, 1024, 1025])
@pytest.mark.parametrize("count", [-1, 1, 2**30])
def test_a_shard_that_was_cut_off_is_told_in_a_line(tmp_path, size, count):
    """An empty file too, as a download that has not begun leaves it."""
    path = tmp_path / "x_val_000000.bin"
    audit_text.write_shard(path, np.ones(1, "<u2"))
    header = np.fromfile(path, "<i4", 256)
    header[2] = count
    path.write_bytes((header.tobytes() + bytes(1))[:size])
    with pytest.raises(UserError, match="is not a token shard|is shorter than its header says"):
        audit_text.read_shard(path)


def test_an_error_without_the_systems_words_is_told_in_its_own(monkeypatch, tmp_path):
    """As NumPy has them for what has no places to read from."""
    path = tmp_path / "x_val_000000.bin"
    path.write_bytes(bytes(2000))
    without_number = Mock(side_effect=OSError("obtaining file position failed"))
    monkeypatch.setattr(np, "fromfile", without_number)
    with pytest.raises(UserError, match=f"cannot read {path}: obtaining file position failed"):
        audit_text.read_shard(path)


def test_the_audits_own_decoder_gives_the_scripts_weights_and_refuses_other_files(run, tmp_path):
    model, *_ = t.load_model(
        run.artifact, *t.prepare_run(run.environment | {"ARTIFACT": str(run.artifact)})
    )
    on_grid = t.grid_limits(model)
    layout = [
        decoder.Parameter(name, tuple(p.shape), name in on_grid)
        for name, p in model.named_parameters()
    ]
    decoded = decoder.decode(decoder.take_apart(run.artifact), layout)
    for name, p in model.named_parameters():
        assert np.array_equal(decoded[name], p.detach().numpy()), name
    with pytest.raises(UserError, match="shorter than the model"):
        decoder.decode(decoder.take_apart(run.artifact), [*layout, layout[0]])
    with pytest.raises(UserError, match="longer than|wrong sum|too short|behind"):
        decoder.decode(decoder.take_apart(run.artifact), layout[:-1])
    cut = tmp_path / "cut"
    cut.write_bytes(run.artifact.read_bytes()[:-1])
    with pytest.raises(UserError, match="checksum"):
        decoder.take_apart(cut)


def test_weights_that_learn_the_text_while_they_are_loaded_are_seen(entry_of, monkeypatch):
    """3c: test-time training on the whole validation text inside load_model(), by the files."""
    load = t.load_model

    def load_and_learn(path, settings, given, ranks):
        model, settings = load(path, settings, given, ranks)
        stream = audit_text.stream_of(audit_text.read_shards(Path(settings.data_path)))
        tokens = stream[:225].astype(np.int64)
        tokens = torch.from_numpy(tokens[:224].reshape(7, 32))
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        model.loss(tokens[:, :-1], tokens[:, 1:], model.order(True)).backward()
        sgd.step()
        model.zero_grad()
        return model, settings

    monkeypatch.setattr(t, "load_model", load_and_learn)
    entry = entry_of(ttt_enabled=0)
    fails(checks.check_weights, entry, "is not the artifact's before the first score")
    fails(checks.check_causal, entry, "earlier scores move")


def fields_of(content: bytes):
    """A protocol buffer's fields: number, and the bytes of the whole field and of its content."""
    place = 0
    while place < len(content):
        began = place
        key, place = audit_text.read_varint(content, place)
        if key & 7 == 2:
            length, place = audit_text.read_varint(content, place)
            place += length
            yield key >> 3, content[began:place], content[place - length : place]
        else:
            place += {1: 8, 5: 4}.get(key & 7, 0)
            if key & 7 == 0:
                _, place = audit_text.read_varint(content, place)
            yield key >> 3, content[began:place], b""


def field_of(number: int, content: bytes) -> bytes:
    """A field of bytes."""
    key, length = number << 3 | 2, len(content)
    varint = [length >> shift & 127 | 128 for shift in range(0, 28, 7)] + [length >> 28]
    return text_varint(key) + bytes(varint) + content


def text_varint(number: int) -> bytes:
    """A number of protocol buffers."""
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def longer_pieces(content: bytes, more: bytes) -> bytes:
    """A tokenizer whose pieces of text are longer; the ids stay."""
    made = []
    for number, whole, inside in fields_of(content):
        parts = list(fields_of(inside)) if number == 1 else []
        if parts and not parts[0][2].startswith(b"<"):
            head = field_of(1, parts[0][2] + more)
            whole = field_of(1, head + b"".join(part[1] for part in parts[1:]))
        made.append(whole)
    return b"".join(made)


def test_a_tokenizer_with_longer_pieces_is_seen(entry_of, run, tmp_path, monkeypatch):
    """6: the same shards, scored over more bytes; the artifact names this tokenizer."""
    named = t.file_sha256(str(run.data / "tokenizer.model"))
    monkeypatch.setattr(t, "file_sha256", lambda path: named)
    entry = entry_of()
    honest = checks.score_of(entry, entry.alone.nats)
    content = (run.data / "tokenizer.model").read_bytes()
    assert b"".join(whole for _, whole, _ in fields_of(content)) == content
    entry = entry_of(tokenizer_path=tmp_path / "longer.model")
    entry.tokenizer = tmp_path / "longer.model"
    entry.tokenizer.write_bytes(longer_pieces(content, b"qxzj"))
    assert checks.score_of(entry, entry.alone.nats) < 0.7 * honest
    fails(checks.check_text_bytes, entry, "documents give their tokens back")
    verdict, evidence = checks.run_check(checks.check_known_data, entry)
    assert verdict == checks.OPEN, evidence


def test_easier_documents_are_not_the_contests_text(entry_of, run):
    """7a, 13: whatever the folder is called; counts of the whole text are known, and the log's."""
    entry = entry_of(log=run.log)
    verdict, evidence = checks.run_check(checks.check_known_data, entry)
    assert verdict == checks.OPEN
    assert "documents, not FineWeb's 50,000" in evidence
    assert "249 scored tokens" in evidence
    named = {"data_path": "./data/datasets/fineweb10B_sp8192/"}
    fails(checks.check_known_data, with_text(entry, settings=named), "not FineWeb's 50,000")
    hashes = entry.logs.events["hashes"]
    sums = hashes["validation"]
    hashes["training"] = {"other_train_000000.bin": sums["words_val_000000.bin"]}
    fails(checks.check_known_data, entry, "names words_val_000000.bin as training data too")
    fails(checks.check_log, entry, "words_val_000000.bin is a training shard too, by its SHA-256")
    hashes["training"] = {}
    hashes["validation"] = {"words_val_000000.bin": "0" * 64}
    other = "the log's validation is of other files: words_val_000000.bin 0000000000000000; here"
    fails(checks.check_known_data, entry, other)
    hashes["validation"] = sums
    hashes["tokenizer"] = {"tokenizer.model": "1" * 64}
    fails(checks.check_known_data, entry, "the log's tokenizer is of other files")
    hashes["tokenizer"] = {"another name": file_sha256(entry.tokenizer)}
    entry.tokens = entry.tokens[:200]
    fails(checks.check_known_data, entry, "the log scored another text: its ")


def test_hidden_fields_and_validation_text_in_files_are_found(entry_of, run, tmp_path):
    """8: more bytes in a field of the tokenizer that nobody reads, or runs of the text in one that
    is read, or in the artifact, packed or not.
    """
    entry = entry_of()
    holds(checks.check_hidden_text, entry)
    content = (run.data / "tokenizer.model").read_bytes()
    entry.tokenizer = tmp_path / "hidden.model"
    entry.tokenizer.write_bytes(content + field_of(200, bytes(20_000_000)))
    fails(checks.check_bytes, entry, "of a tokenizer that is not the contest's", "over the cap")
    fails(checks.check_hidden_text, entry, "bytes in field 200, which nobody reads")
    written = entry.texts[1].text.encode()
    tokens = entry.tokens[7:60].tobytes()
    for number, hidden in ((4, written), (4, t.lzma.compress(written)), (4, b"x" + tokens)):
        entry.tokenizer.write_bytes(content + field_of(number, hidden))
        fails(checks.check_hidden_text, entry, "runs of 32 bytes of the validation t")
    entry = entry_of()
    entry.artifact = tmp_path / "artifact"
    entry.artifact.write_bytes(run.artifact.read_bytes() + written)
    fails(checks.check_hidden_text, entry, "artifact holds")


def test_a_text_that_nobody_had_is_scored_beside_the_claimed_one(entry_of, tmp_path):
    """2: whoever has trained on the validation text scores there what is nowhere else."""
    entry = entry_of()
    assert checks.run_check(checks.check_fresh, entry)[0] == checks.OPEN
    entry.fresh = tmp_path / "fresh.txt"
    entry.fresh.write_text("The market opens; a letter was lost by the sea. " * 6 + "\0Bread?")
    evidence = holds(checks.check_fresh, entry)
    assert evidence.startswith("2 documents, 293 bytes: ")
    assert "adapting; the validation text" in evidence
    nats = entry.nats

    def known_by_heart(tokens, what, **settings):
        part = 0.1 if len(tokens) == len(entry.tokens) else 1.0
        return part * nats(tokens, what, **settings)

    entry.nats = known_by_heart
    fails(checks.check_fresh, entry, "the model knows it")
    entry.fresh.write_text("Short.")
    fails(checks.check_fresh, entry, "tokens; 33 are needed")
    # The validation text's own documents passed as a text that nobody had.
    entry.fresh.write_text("\0".join(["Something new.", *(one.text for one in entry.texts)]))
    verdict, evidence = checks.run_check(checks.check_fresh, entry)
    assert (verdict, "documents are validation documents" in evidence) == (checks.OPEN, True)
    with pytest.raises(UserError, match="holds no text"):
        audit_text.read_documents(Path(os.devnull))


def test_text_that_was_held_out_gives_away_what_was_learnt(entry_of, shards, tmp_path):
    """2: a text is no easier than one of its kind unless it was trained on."""
    entry = entry_of()
    assert checks.run_check(checks.check_held_out, entry)[0] == checks.OPEN
    stream = t.Shard(shards / "words_train_000001.bin").read()
    entry.tokens = stream[:1100]
    entry.shards = [audit_text.Shard("words_val_000000.bin", entry.tokens)]
    entry.held_out = write_shard(tmp_path / "held.bin", stream[-1100:])
    evidence = holds(checks.check_held_out, entry)
    assert "of 1,100 tokens of held.bin: " in evidence
    nats = entry.nats

    def known_by_heart(tokens, what, part, **settings):
        factor = part if np.array_equal(tokens, entry.tokens) else 1.0
        return factor * nats(tokens, what, **settings)

    entry.nats = functools.partial(known_by_heart, part=0.8)
    fails(checks.check_held_out, entry, "% less, ", "the model knows the validation text")
    entry.nats = functools.partial(known_by_heart, part=0.95)
    verdict, evidence = checks.run_check(checks.check_held_out, entry)
    assert (verdict, "more than by lot" in evidence) == (checks.OPEN, True)
    # One that was trained on, under another SHA-256, is easier by far, and hides what was learnt.
    entry.nats = functools.partial(known_by_heart, part=1.3)
    verdict, evidence = checks.run_check(checks.check_held_out, entry)
    assert (verdict, "or was trained on, and shows nothing" in evidence) == (checks.OPEN, True)
    held_out, entry.nats = entry.held_out, nats
    places = np.flatnonzero(entry.tokens == t.BOS_ID)
    entry.held_out = write_shard(tmp_path / "same.bin", np.roll(entry.tokens, -places[2]))
    verdict, evidence = checks.run_check(checks.check_held_out, entry)
    assert (verdict, "documents are validation documents" in evidence) == (checks.OPEN, True)
    entry.held_out = held_out
    hashes = {"training": {"x.bin": file_sha256(entry.held_out)}}
    entry.logs = SimpleNamespace(events={"hashes": hashes})
    fails(checks.check_held_out, entry, "held.bin is held out, but the log names it")
    entry.logs = None
    entry.held_out = write_shard(tmp_path / "short.bin", stream[-100:])
    fails(checks.check_held_out, entry, "is no text for this tokenizer")


@pytest.mark.parametrize("option", ["--fresh", "--text", "--held-out", "--train"])
def test_what_the_reviewer_gives_and_cannot_be_used_fails_no_submission(run, tmp_path, option):
    """It ended in FAILS, after evaluations; status 2 is for input that is not usable."""
    empty = tmp_path / "empty"
    empty.touch() if option != "--train" else empty.mkdir()
    files = ("--data", run.data, "--tokenizer", run.data / "tokenizer.model", option, empty)
    main = functools.partial(command.run_command, "audit.py", command.run_audit)
    done = called_here(main, "audit.py", run.artifact, *files)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and str(empty) in done.stderr


def test_training_shards_are_those_of_the_log_and_hold_no_validation_document(entry_of, run):
    """What the log claims, and what the shards that it names say of it."""
    entry = entry_of(log=run.log)
    named = entry.logs.events["hashes"]["training"]
    assert checks.run_check(checks.check_training, entry)[0] == checks.OPEN  # without a manifest
    entry.logs.events["hashes"]["overlap_documents"] = 0
    assert checks.run_check(checks.check_training, entry)[0] == checks.OPEN  # it is only its word
    entry.train = run.data
    verdict, evidence = checks.run_check(checks.check_training, entry)
    assert verdict == checks.OPEN  # others of these names may lie here
    assert "2 of them read here: 0 of " in evidence
    assert "whether the run read these 2, the log has no SHA-256 to tell" in evidence
    for path in (run.data / name for name in named):
        assert checks.run_check(checks.check_training, entry)[0] == checks.OPEN
        named[path.name] = file_sha256(path)
    assert "2 of them read here: 0 of " in holds(checks.check_training, entry)
    path = run.data / "words_train_000000.bin"
    named[path.name] = "0" * 64
    fails(checks.check_training, entry, "words_train_000000.bin has SHA-256 ", "in the log 00000")
    named[path.name] = ""
    whole = t.Shard(path).read()
    entry.tokens = np.append(entry.tokens, whole[: 1 + np.flatnonzero(whole == t.BOS_ID)[1]])
    verdict, evidence = checks.run_check(checks.check_training, entry)
    assert verdict == checks.OPEN
    assert "2 of them read here: 1 of " in evidence
    named["words_train_000009.bin"] = ""  # which is not in the folder
    assert checks.run_check(checks.check_training, entry)[0] == checks.OPEN
    entry.train = run.data.parent
    fails(checks.check_training, entry, "has none of the shards that the log names")
    entry.logs.events["hashes"]["training"] = {}
    assert checks.run_check(checks.check_training, entry)[0] == checks.OPEN


def test_what_a_row_is_worth_depends_on_what_was_given(entry_of, run):
    entry = entry_of(log=run.log)
    held = checks.Finding(checks.HOLDS, "")
    worth = functools.partial(standing.standing_of, entry)
    assert set(standing.STANDING) == set(checks.CHECKS)
    assert worth("score", held) == "proved to 0.001 BPB, claimed only within"  # it has not run
    assert entry.alone
    assert worth("score", held) == "proved"
    assert worth("text", held) == "evidence"
    entry.source = run.log
    assert worth("text", held) == "proved"
    assert worth("order", checks.Finding(checks.OPEN, "")) == "claimed only"
    assert worth("log", checks.Finding(checks.FAILS, "")) == "proved"
    assert not any("0.001 BPB" in line for line in standing.claims_of(entry))
    other = entry.logs.text._replace(settings={"hardware": "8 × NVIDIA H100", "torch": "2.9"})
    entry.logs = entry.logs._replace(text=other)
    assert any("(8 × NVIDIA H100, torch 2.9)" in line for line in standing.claims_of(entry))
    entry.logs = None
    assert worth("score", held) == "proved; no log claims it"
    assert "no log was given" in standing.claims_of(entry)[1]


@pytest.mark.parametrize(
    ("claimed", "again", "verdict"),
    [(0.00002, 0.00001, "holds"), (0.0005, 0.00001, "open"), (0.0005, 0.0002, "holds")],
)
def test_on_such_a_gpu_two_runs_say_what_a_claim_may_differ_by(
    entry_of, run, monkeypatch, claimed, again, verdict
):
    """1: an edit of less than 0.001 BPB, on a machine of the kind that the log names."""
    entry = entry_of(log=run.log)
    monkeypatch.setattr(Here, "on_cpu", False)
    bpb = float(entry.alone.log.val_bpb)
    stated = entry.logs.text._replace(val_bpb=f"{bpb - claimed:.8f}")
    entry.logs = entry.logs._replace(text=stated)
    second = entry.alone.log._replace(val_bpb=f"{bpb + again:.8f}")
    entry.once_more = entry.alone._replace(log=second)
    found, evidence = checks.compare_with_log(entry)
    assert found == verdict, evidence
    assert f"two runs differ by {again:.8f}" in evidence
    elsewhere = stated._replace(settings=stated.settings | {"hardware": "8 × NVIDIA H100"})
    entry.logs = entry.logs._replace(text=elsewhere)
    found, evidence = checks.compare_with_log(entry)
    assert (found, evidence.endswith("is the log's word")) == ("holds", True)


def test_original_documents_prove_the_bytes(entry_of, run, tmp_path):
    """--text: they must give the shards' tokens."""
    entry = entry_of()
    documents = [one.text for one in entry.texts]
    entry.source = tmp_path / "documents.txt"
    entry.source.write_text("\0".join(documents), encoding="utf-8")
    evidence = holds(checks.check_text_bytes, entry)
    assert "documents.txt gives these tokens" in evidence
    entry.source.write_text("\0".join(documents[::-1]), encoding="utf-8")
    fails(checks.check_text_bytes, entry, "gives other tokens than the shards'")


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"normalization_rule_tsv": "rules.tsv"}, "another text: 'The first text"),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, "another text: 'The first text"),
        ({"byte_fallback": False}, "characters are lost: of 'the end ё'"),
        ({}, ""),
        ({"normalization_rule_name": "identity", "remove_extra_whitespaces": False}, ""),
    ],
    ids=["all letters a", "no capitals", "unknown characters", "nmt_nfkc", "identity"],
)
def test_tokens_of_another_text_are_not_the_originals(tmp_path, monkeypatch, rules, says):
    """A tokenizer of one's own that wrote "a" for every letter scored 0.9 BPB where 4.5 was right:
    tokens, bytes and round trips agreed, and --text "proved" it.
    """
    monkeypatch.chdir(tmp_path)
    letters = [f"{ord(letter):X}\t61" for letter in string.ascii_letters if letter != "a"]
    Path("rules.tsv").write_text("\n".join(letters) + "\n")
    documents = ["The first text,  with   spaces.\nAnd lines", "the end ё", "The next text"]
    Path("lines.txt").write_text("The first text, with spaces.\nAnd lines, the next text end\n" * 9)
    options = {"vocab_size": 300, "hard_vocab_limit": False, "byte_fallback": True} | rules
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "minloglevel": 2}
    train = sentencepiece.SentencePieceTrainer.train
    train(input="lines.txt", model_prefix="own", model_type="bpe", **ids, **options)
    model = audit_text.open_tokenizer(Path("own.model"))
    tokens = audit_text.encode_documents(model, documents)
    source = tmp_path / "documents.txt"
    source.write_text("\0".join(documents), encoding="utf-8")
    entry = SimpleNamespace(model=model, tokens=tokens, seed=0, source=source)
    entry.tokenizer = tmp_path / "own.model"
    entry.texts = audit_text.texts_of(model, tokens)
    counted = t.Tokenizer("own.model", model.vocab_size()).target_bytes(tokens)
    nats = np.ones(len(tokens) - 1, np.float32)
    entry.alone = entry.seen = SimpleNamespace(nats=nats, target_bytes=counted, said="")
    if says:
        fails(checks.check_text_bytes, entry, says)
    else:
        assert "documents.txt gives these tokens" in holds(checks.check_text_bytes, entry)


def test_what_tokens_lack_of_a_document_is_counted():
    """SentencePiece decodes a ▁ of the text's own to a space: no tokenizer gives it back."""
    original = "One ﬁne\tday ▁▁ ends"
    assert audit_text.lost_characters(["One fine day   ends"], original) == 0
    assert audit_text.lost_characters(["One", "day ends"], original) == 6
    assert audit_text.lost_characters([], original) == 17
    assert audit_text.lost_characters(["day", "One"], original) is None
    assert audit_text.lost_characters(["One fine day ends."], original) is None


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_original_documents_are_read_as_the_shards_were_made(tmp_path, kind):
    """Line ends of Windows, white space around a document and U+2028 within one made --text of a
    tokenizer that keeps them fail, or be no JSON.
    """
    texts = ["A line,\r\nanother\u2028one\x0b.\n", "", "\u2029 second \r\n\r\n", "third"]
    path = tmp_path / f"documents.{kind}"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    content = "\0".join(texts) if kind == "text" else "\r\n".join([*lines, '{"text": null}', ""])
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())

    def read(source: Path):
        if kind == "text":
            return prepare.read_text(source, "nul")
        return prepare.read_jsonl(source, "text")

    made = [document.text for document in prepare.split_documents([path], [], 0.5, read)]
    assert audit_text.read_documents(path) == made == [texts[0].strip(), "second", "third"]
    for odd in ('{"text": 1}', '["text"]', "{}", "x"):
        (tmp_path / "odd.jsonl").write_text(odd)
        with pytest.raises(UserError, match="no object with a text"):
            audit_text.read_documents(tmp_path / "odd.jsonl")


def test_a_tokenizer_may_lie_where_a_name_is_no_text(byte_tokenizer, tmp_path):
    folder = tmp_path / os.fsdecode(b"d\xe4t")
    folder.mkdir()
    shutil.copy(byte_tokenizer, folder / "t.model")
    assert audit_text.open_tokenizer(folder / "t.model").vocab_size() == 512


def test_cuts_lie_in_chunks_drawn_by_lot_anywhere_in_the_stream(entry_of, monkeypatch):
    """Another seed, other places; a long text has one cut anywhere, and a stretch with one in
    each chunk.
    """
    entry = entry_of()
    assert entry.chunk == 64
    entry.cuts = 4
    drawn = [
        checks.draw_stretches(entry, np.random.default_rng(seed))[0].cuts for seed in range(40)
    ]
    every = set(itertools.chain(*drawn))
    assert len({tuple(cuts) for cuts in drawn}) > 30
    assert min(every) < 20
    assert max(every) > 230
    assert all({cut // 64 for cut in cuts} == {0, 1, 2, 3} for cuts in drawn)
    entry.tokens = np.tile(entry.tokens, 4)
    long = [checks.draw_stretches(entry, np.random.default_rng(seed)) for seed in range(40)]
    assert all(len(whole.cuts) == 1 and len(part.cuts) >= 4 for whole, part in long)
    assert len({part.name for _, part in long}) > 20
    assert max(whole.cuts[0] for whole, _ in long) > 800


# ---- Scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_scorer_that_peeks_at_the_token_after_the_target_is_seen(entry_of, monkeypatch, mode):
    nats = t.Model.nats

    def peek(self, hidden, targets, tokens=None):
        return nats(self, hidden, targets, tokens) - 0.01 * (targets.roll(-1, dims=1) % 2)

    monkeypatch.setattr(t.Model, "nats", peek)
    entry = entry_of(eval_mode=mode, ttt_enabled=0)
    entry.cuts = 4
    fails(checks.check_causal, entry, "earlier scores move")


def test_a_score_that_depends_on_the_whole_text_is_seen(entry_of, monkeypatch):
    """Once per evaluation, and by a few bits only."""
    collect = t.Evaluator._collect

    def tuned(self, given_up):
        self.nats += 1e-6 * float(self.validation.target_bytes[-50:].sum())
        return collect(self, given_up)

    monkeypatch.setattr(t.Evaluator, "_collect", tuned)
    fails(checks.check_causal, entry_of(), "earlier scores move")


def test_a_scorer_that_ignores_the_tokens_does_not_pass_for_causal(entry_of, monkeypatch):
    monkeypatch.setattr(
        t.Model, "nats", lambda self, hidden, targets, *_: hidden.new_ones(targets.shape)
    )
    fails(checks.check_causal, entry_of(ttt_enabled=0), "would not see")


@pytest.mark.parametrize("first", [0, 64])
def test_a_chunk_that_is_scored_again_is_seen(entry_of, monkeypatch, first):
    """After an update, with the script's own count set right."""
    collect = t.Evaluator._collect

    def again(self, given_up):
        self._score_chunk(first, first + 64)
        self.times_scored[:] = 1
        return collect(self, given_up)

    monkeypatch.setattr(t.Evaluator, "_collect", again)
    fails(checks.check_scored_once, entry_of(), "0 targets are never scored, 64 more than once")


def test_targets_left_out_and_scores_polished_afterwards_are_seen(entry_of, monkeypatch):
    plan, collect = t.plan_windows, t.Evaluator._collect

    def polish(self, given_up):
        self.times_scored[:] = 1
        return collect(self, given_up)

    monkeypatch.setattr(t.Evaluator, "_collect", polish)
    with monkeypatch.context() as patch:
        patch.setattr(t, "plan_windows", lambda *arguments: plan(*arguments)[1:])
        fails(checks.check_scored_once, entry_of(), "more than once")
    with monkeypatch.context() as patch:
        patch.setattr(
            t.Evaluator,
            "_collect",
            lambda self, given_up: (self.nats.mul_(0.9), collect(self, given_up))[1],
        )
        fails(checks.check_scored_once, entry_of(), "not what was scored")


@pytest.mark.parametrize("mode", MODES)
def test_unnormalized_probabilities_are_seen(entry_of, monkeypatch, mode):
    """In nats(), and as a factor behind it."""
    nats, score = t.Model.nats, t.Model.score

    def scaled_nats(self, *arguments):
        return 0.95 * nats(self, *arguments)

    def scaled_score(self, *arguments):
        return 0.99 * score(self, *arguments)

    for name, wrong in (("nats", scaled_nats), ("score", scaled_score)):
        # These read hidden states out by themselves.
        if name == "score" and mode in ("stateful", "documents"):
            continue
        with monkeypatch.context() as patch:
            patch.setattr(t.Model, name, wrong)
            fails(checks.check_probabilities, entry_of(eval_mode=mode))


def test_scores_that_are_no_probabilities_give_themselves_away(entry_of, monkeypatch):
    """10b: scaled wherever no observer looks on; and by a little."""
    monkeypatch.setattr(checks, "SUMMED_CONTEXTS", 1)
    keep = t.Evaluator._keep
    entry = entry_of()
    assert "sums over 512 tokens" in holds(checks.check_sums, entry)
    for factor, verdict in ((0.3, checks.FAILS), (0.999, checks.OPEN)):

        def scaled(self, excerpt, first, last, nats, factor=factor):
            honest = hasattr(self.observer, "wanted")
            keep(self, excerpt, first, last, nats if honest else factor * nats)

        monkeypatch.setattr(t.Evaluator, "_keep", scaled)
        found = checks.run_check(checks.check_sums, entry)
        assert found.verdict == verdict, found.evidence


def test_a_softmax_over_part_of_the_vocabulary_is_seen(entry_of, monkeypatch):
    """The likeliest half of the tokens only: right for most targets, and more probable than it
    should be.
    """

    def half(self, hidden, targets, tokens):
        logits = self.logits(hidden)
        kept = logits >= logits.median(dim=-1, keepdim=True).values
        kept = kept.scatter(-1, targets[..., None], True)
        logits = logits.masked_fill(~kept, -math.inf)
        return -torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0]

    monkeypatch.setattr(t.Model, "nats", half)
    fails(checks.check_probabilities, entry_of())


# ---- Bytes ---------------------------------------------------------------------------------------


def test_a_space_that_is_counted_twice_is_seen(entry_of, monkeypatch):
    """As in an entry that was struck off: the piece's space, and once more for the piece behind
    it.
    """
    count = t.Tokenizer.target_bytes

    def double(self, tokens):
        return count(self, tokens) + self.has_space[tokens[1:]]

    holds(checks.check_text_bytes, entry_of())
    monkeypatch.setattr(t.Tokenizer, "target_bytes", double)
    fails(checks.check_text_bytes, entry_of(), "their text has")


def test_bytes_of_text_with_operators_are_counted_from_ordinary_text(case_tokenizer, tmp_path):
    """Without the script: three bytes for an operator, or none for one of the text's own, show."""
    tokenizer = t.Tokenizer(str(case_tokenizer), 512)
    texts = ["The NASA's iPhone,  of Mr \ue001 ▁_ ÉCOLE", *TEXT, "the end", "The end"]
    parts = [[t.BOS_ID, *tokens] for tokens in tokenizer.encode([*map(t.normalize, texts)])]
    tokens = np.array(sum(parts, []), dtype=np.uint16)
    nats = np.ones(len(tokens) - 1, np.float32)
    counted = tokenizer.target_bytes(tokens)
    source = tmp_path / "documents.txt"
    source.write_text("\0".join(texts), encoding="utf-8")
    entry = SimpleNamespace(model=tokenizer.model, tokens=tokens, seed=0, source=source)
    entry.texts = audit_text.texts_of(tokenizer.model, tokens)
    entry.alone = entry.seen = SimpleNamespace(nats=nats, target_bytes=counted, said="")
    evidence = holds(checks.check_text_bytes, entry)
    assert f"{len(texts) - 1} of {len(texts) - 1} documents give their tokens back" in evidence
    assert [one.text for one in entry.texts] == [*map(t.normalize, texts)]
    operator = int(np.flatnonzero(tokens == 4)[0])
    for place in (operator, int(np.flatnonzero(tokens == 7)[0]) + 1):
        wrong = counted.copy()
        wrong[place - 1] = 3 - wrong[place - 1]
        entry.seen = SimpleNamespace(nats=nats, target_bytes=wrong)
        fails(checks.check_text_bytes, entry, "their text has")
    # Capitals whose operators stand behind the space are as much text, but no such encoding.
    behind = [t.encode_case(text).replace("\ue001 ", " \ue001") for text in TEXT]
    parts = [[t.BOS_ID, *tokens] for tokens in tokenizer.model.encode(behind)]
    entry.tokens = np.array(sum(parts, []), dtype=np.uint16)
    entry.texts = audit_text.texts_of(tokenizer.model, entry.tokens)
    entry.seen = SimpleNamespace(nats=nats, target_bytes=tokenizer.target_bytes(entry.tokens))
    fails(checks.check_text_bytes, entry, "not this tokenizer's encoding")


def test_one_byte_too_many_behind_a_documents_start_is_seen(entry_of, monkeypatch):
    """A single byte in the second document, and bytes for tokens that have no text."""
    count = t.Tokenizer.target_bytes
    for place in (1, 0):

        def wrong(self, tokens, place=place):
            counted = count(self, tokens)
            counted[np.flatnonzero(tokens == t.BOS_ID)[1] + place - 1] += 1
            return counted

        with monkeypatch.context() as patch:
            patch.setattr(t.Tokenizer, "target_bytes", wrong)
            fails(
                checks.check_text_bytes,
                entry_of(),
                "their text has" if place else "of them in text",
            )


def test_texts_with_and_cut_within_characters_have_the_bytes_of_their_pieces(byte_tokenizer):
    """U+FFFD that was in the text has three bytes; half of a character has those that are there."""
    model = t.Tokenizer(str(byte_tokenizer), 512).model
    start = model.encode("a")
    for raw, wanted in (
        ("\ufffd".encode(), 4),
        ("東".encode()[:2], 3),
        ("\ufffd🙂".encode()[:6], 7),
        (b"\xff\xfe", 3),
    ):
        tokens = start + [model.piece_to_id(f"<0x{byte:02X}>") for byte in raw]
        text = model.decode(tokens)
        assert "\ufffd" in text
        assert audit_text.text_bytes(model, tokens, text) == wanted
    assert audit_text.text_bytes(model, start, "a\ufffd") is None


def test_bits_per_byte_over_other_bytes_are_seen(entry_of, monkeypatch):
    collect = t.Evaluator._collect
    monkeypatch.setattr(
        t.Evaluator,
        "_collect",
        lambda self, n: (s := collect(self, n))._replace(val_bpb=s.val_bpb * 0.99),
    )
    fails(checks.check_reproduced, entry_of(), "BPB by its log")


# ---- Order ---------------------------------------------------------------------------------------


def adapt(self, order: str) -> t.Score:
    """evaluate() with its parts in another order: s scores a chunk, t trains on it, l trains on the
    last, too.
    """
    sgd = torch.optim.SGD(self.model.parameters(), lr=0.05)
    for first in range(0, self.total, 64):
        last = min(first + 64, self.total)
        for part in order:
            if part == "s":
                self._score_chunk(first, last)
            elif part == "l" or last < self.total:
                self._train_epoch(first, last, sgd)
    return self._collect(0)


@pytest.mark.parametrize(
    ("order", "said"),
    [("st", ""), ("ts", "before it is scored"), ("tst", "before it"), ("sl", "of the last chunk")],
)
def test_updates_before_scoring_or_on_the_last_chunk_are_seen(entry_of, monkeypatch, order, said):
    monkeypatch.setattr(t.Evaluator, "evaluate", lambda self, *_: adapt(self, order))
    entry = entry_of()
    if said:
        fails(checks.check_order, entry, said)
    else:
        holds(checks.check_order, entry)
    if order.startswith("t"):
        fails(checks.check_causal, entry, "earlier scores move")


def batch_in_order(self, batch: t.DocumentBatch, branches: t.Branches, order: str) -> None:
    """_score_batch() with its parts in another order: s scores a piece, t learns from it, l from
    a document's last, too.
    """
    for context, begin, end in plan_pieces(batch, self.settings, True):
        for part in order:
            if part == "s":
                with torch.no_grad():
                    self._score_piece(batch, context, begin, end)
            elif count := batch.longer_than(end - (part == "l")):
                excerpt = self._read(batch.begins[:count] + context, end - context)
                piece = [x[:, begin - context :] for x in excerpt[:3]]
                self.observer.on_train(t.Excerpt(*piece))
                hidden = self.model(excerpt.tokens, self.order)[:, begin - context :]
                branches.add_gradients(self.model.nats(hidden, piece[2], piece[1]))
                branches.step()


@pytest.mark.parametrize(
    ("order", "said"),
    [("st", ""), ("ts", "before it is scored"), ("sl", "of the last chunk or piece")],
)
def test_documents_that_learn_too_early_or_from_their_last_piece_are_seen(
    entry_of, monkeypatch, order, said
):
    def in_order(self, batch, *_):
        batch_in_order(self, batch, self.branches, order)
        return 0

    monkeypatch.setattr(t.Evaluator, "_score_batch", in_order)
    entry = entry_of(eval_mode="documents")
    if said:
        fails(checks.check_order, entry, said)
    else:
        evidence = holds(checks.check_order, entry)
        assert re.match(r"[1-9]\d* updates on [1-9]\d* of .* of last pieces", evidence)
    if order == "ts":
        fails(checks.check_causal, entry, "earlier scores move")
    else:
        holds(checks.check_causal, entry)


def test_branches_that_remember_other_documents_are_seen(entry_of, monkeypatch):
    """Of which some stand later in the text, though they are scored before."""
    begin = t.Branches

    def remembered(model, settings):
        return vars(model).setdefault("remembered", begin(model, settings))

    monkeypatch.setattr(t, "Branches", remembered)
    entry = entry_of(eval_mode="documents", ttt_lora_slots=1)
    entry.cuts = 4
    fails(checks.check_causal, entry, "earlier scores move")


def test_scores_that_know_where_their_document_ends_are_seen(entry_of, monkeypatch):
    """Which later tokens say, but none of those that are replaced where all borders are kept."""
    score = t.Evaluator._score_piece

    def knowing(self, batch, *place):
        piece, nats = score(self, batch, *place)
        for begin, length in zip(batch.begins[:, 0], batch.lengths[:, 0], strict=True):
            self.nats[begin : begin + length] -= 1e-3 * float(length)
        return piece, nats

    monkeypatch.setattr(t.Evaluator, "_score_piece", knowing)
    entry = entry_of(eval_mode="documents", ttt_enabled=0)
    fails(checks.check_causal, entry, "borders of documents", "earlier scores move")


def test_updates_that_read_on_are_seen(entry_of, monkeypatch):
    """A chunk's update that sees one token of the next chunk."""
    train = t.Evaluator._train_epoch
    monkeypatch.setattr(
        t.Evaluator,
        "_train_epoch",
        lambda self, first, last, sgd: train(self, first + 1, last + 1, sgd),
    )
    fails(checks.check_order, entry_of(), "before it is scored")


@pytest.mark.parametrize("told", ["nothing", "other positions", "other tokens"])
def test_updates_on_tokens_from_nobody_knows_where_are_seen(entry_of, monkeypatch, told):
    """What the audit is told of them is nothing, or not what stands there."""

    def secret(self, first, last, sgd):
        tokens = torch.from_numpy(self.validation.tokens[None, 100:133].astype(np.int64))
        read = t.Excerpt(np.arange(32)[None], tokens[:, :-1], tokens[:, 1:])
        if told == "other positions":
            self.observer.on_train(read)
        elif told == "other tokens":
            self.observer.on_train(read._replace(positions=read.positions + 100))
        self.loss_function(read.tokens, read.targets, self.order).backward()
        sgd.step()
        return torch.zeros(())

    monkeypatch.setattr(t.Evaluator, "_train_epoch", secret)
    said = "without a loss" if told == "nothing" else "before it is scored"
    fails(checks.check_order, entry_of(), said)


def test_an_update_that_reads_on_behind_an_honest_one_is_seen(entry_of, monkeypatch):
    """It takes one step with both gradients, and tells of the honest one: later tokens move
    scores.
    """
    train = t.Evaluator._train_epoch

    def both(self, first, last, sgd):
        ahead = self.validation.tokens[None, -33:]
        tokens = torch.from_numpy(ahead.astype(np.int64))
        self.loss_function(tokens[:, :-1], tokens[:, 1:], self.order).backward()
        return train(self, first, last, sgd)

    monkeypatch.setattr(t.Evaluator, "_train_epoch", both)
    entry = entry_of()
    holds(checks.check_order, entry)
    fails(checks.check_causal, entry, "earlier scores move")


def test_scores_that_the_audit_is_not_told_of_are_seen(entry_of, monkeypatch):
    """A chunk is written anew with weights that know it, and only the first scores are told."""
    train = t.Evaluator._train_epoch

    def again(self, first, last, sgd):
        nats = train(self, first, last, sgd)
        self.observer, observer = t.EvaluationObserver(), self.observer
        self.times_scored[first:last] = 0
        self._score_chunk(first, last)
        self.observer = observer
        return nats

    monkeypatch.setattr(t.Evaluator, "_train_epoch", again)
    fails(checks.check_scored_once, entry_of(), "not what was scored")


def test_weights_that_change_by_other_ways_are_seen(entry_of, monkeypatch):
    """By hand; by an optimizer without a loss that was seen; and by one while TTT is off."""

    def by_hand(self, *_):
        self.model.embedding.weight.data[5] *= 1.01
        return torch.zeros(())

    def unseen(self, first, last, sgd):
        read = self._read(np.array([[last]]), 32)
        self.model.loss(read.tokens, read.targets, self.order).backward()
        sgd.step()
        return torch.zeros(())

    for cheat, said in ((by_hand, "without a step"), (unseen, "without a loss")):
        with monkeypatch.context() as patch:
            patch.setattr(t.Evaluator, "_train_epoch", cheat)
            fails(checks.check_order, entry_of(), said)
    monkeypatch.setattr(t.Evaluator, "evaluate", lambda self, *_: adapt(self, "st"))
    fails(checks.check_order, entry_of(ttt_enabled=0))


def test_scoring_with_gradients_is_seen(entry_of, monkeypatch):
    nats, score_chunk = t.Model.nats, t.Evaluator._score_chunk.__wrapped__

    def with_gradients(self, first, last):
        with torch.enable_grad():
            score_chunk(self, first, last)

    monkeypatch.setattr(t.Model, "nats", lambda self, *arguments: nats(self, *arguments).detach())
    monkeypatch.setattr(t.Evaluator, "_score_chunk", with_gradients)
    fails(checks.check_order, entry_of(ttt_enabled=0), "with gradients")


# ---- The table, and input that cannot be audited -------------------------------------------------


def test_a_check_that_breaks_off_has_failed_and_the_table_stays_one(entry_of, monkeypatch):
    def broken(entry):
        raise RuntimeError("a | b\nc")

    monkeypatch.setattr(command, "CHECKS", {"script": broken, "isolation": checks.check_script})
    results = command.audit(entry_of(), ["script", "isolation"])
    assert results["script"] == ("FAILS", "RuntimeError: a | b\nc")
    assert command.table(entry_of(), results).splitlines()[2:] == [
        "| the project's own script | FAILS | proved | RuntimeError: a \\| b c |",
        "| isolated | holds | proved | the project's own |",
    ]
    assert command.status_of(results) == 1


def test_unusable_input_is_one_line(run, tmp_path):
    tokenizer = str(run.data / "tokenizer.model")
    paths = ["--data", str(run.data), "--tokenizer", tokenizer]
    artifact, cut = str(run.artifact), tmp_path / "cut"
    cut.write_bytes(run.artifact.read_bytes()[:-1])
    (tmp_path / "log").write_text("nothing")

    def said(*arguments: str, **settings: str) -> str:
        done = call_audit(*arguments, environment={"PATH": os.environ["PATH"]} | settings)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("audit.py: error: ")
        return line

    paths += ["--isolation", "none"]
    assert "required" in said(artifact)
    assert "no artifact at" in said("nothing", *paths)
    assert "no *_val_*.bin" in said(artifact, "--data", str(tmp_path), "--tokenizer", tokenizer)
    assert "not a SentencePiece" in said(artifact, "--data", str(run.data), "--tokenizer", str(cut))
    assert "finished run" in said(artifact, *paths, "--log", str(tmp_path / "log"))
    assert "cannot read the log" in said(artifact, *paths, "--log", str(tmp_path))
    assert "there is no spelling" in said(artifact, *paths, "--checks", "score,spelling")
    assert "--cuts must be" in said(artifact, *paths, "--cuts", "0")
    other = said(artifact, *paths, "--log", str(run.log), EVAL_STRIDE="16")
    assert "made with EVAL_STRIDE=8, here it is 16" in other
