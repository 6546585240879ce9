"""The packed script: its bytes, that it runs as the readable one does, and that neither its head
nor anything in it can be bent without tools/evidence.py noticing.
"""

import base64
import bz2
import hashlib
import importlib.util
import inspect
import os
import re
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

import train_gpt as t
from tests.support import SCRIPT, process_environment, run_environment, run_here, tiny_environment
from tools import evidence, pack_script
from tools.again import read_script
from tools.command import UserError
from tools.logs import last_run, split_text

# What may depend on the file that holds the code: classes by name, lines of code, __file__.
LITTLE = '''"""Parameter Golf, in little: it does what asks Python for names and lines."""

import dataclasses
import inspect
import multiprocessing
import pickle
import sys
from typing import NamedTuple


class Pair(NamedTuple):
    left: int


@dataclasses.dataclass
class Box:
    pair: "Pair"

    def fail(self):
        raise ValueError("on purpose")  # in Box.fail


def turn(box):
    return Box(Pair(-box.pair.left))


if __name__ == "__main__":
    box = pickle.loads(pickle.dumps(Box(Pair(5))))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (turned,) = pool.map(turn, [box])
    print(turned, turned == turn(box), __file__, __debug__, bool(__doc__), sys.argv[1:])
    print(inspect.getsource(turn), inspect.getsource(Box), sep="")
    box.fail()
'''
PLAIN = {"eval_mode": "plain", "ttt_enabled": False, "calibration_tokens": 64, "iterations": 2}


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """Ours, packed."""
    path = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    path.write_bytes(pack_script.pack(SCRIPT.read_bytes()))
    return path


@pytest.fixture(scope="module")
def module(script):
    """The packed script, imported."""
    spec = importlib.util.spec_from_file_location("packed_script", script)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    yield loaded
    del sys.modules[spec.name]


def start(*arguments, **options) -> subprocess.CompletedProcess:
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, **options)


# ---- Its bytes -----------------------------------------------------------------------------------


def test_it_holds_all_of_the_source_in_a_third_of_the_bytes(script):
    source = SCRIPT.read_bytes()
    content = script.read_bytes()
    assert pack_script.unpack(content) == source
    assert pack_script.unpack(source) is None
    assert pack_script.pack(source) == content  # the same, whenever it is made
    assert len(content) < 0.35 * len(source)
    assert content.isascii()
    assert max(map(len, content.splitlines())) <= 108  # the command that decodes it


def test_its_head_says_how_to_read_it_without_running_it_or_any_tool_of_ours(script):
    head = script.read_text()[:2000]
    (line,) = re.findall(r'^    (python3 -c ".*?\n.*?readable.py)\n', head, re.MULTILINE)
    line = line.replace("python3", sys.executable)
    # What the file itself would do, were it run.
    script.write_text(script.read_text() + "raise SystemExit('it was run')\n")
    try:
        subprocess.run(line, shell=True, check=True, cwd=script.parent)
    finally:
        script.write_bytes(pack_script.pack(SCRIPT.read_bytes()))
    source = script.with_name("readable.py").read_bytes()
    assert source == SCRIPT.read_bytes()
    assert head.count(hashlib.sha256(source).hexdigest()) == 2
    assert f"{len(source):,} bytes" in head


def test_the_command_packs_compares_and_writes_over_no_readable_file(tmp_path):
    source = tmp_path / "train_gpt.py"
    source.write_text(LITTLE)
    command = ["-m", "tools.pack_script", "--script", source]
    out = tmp_path / "new" / "train_gpt.py"
    assert start(*command, "--out", out, cwd=SCRIPT.parent).returncode == 0
    assert out.read_bytes() == pack_script.pack(source.read_bytes())
    done = start(*command, "--out", source, cwd=SCRIPT.parent)
    assert done.returncode == 2
    assert "is not a packed script" in done.stderr
    assert source.read_text() == LITTLE
    assert pack_script.checked(out, source)[0] == 0
    source.write_text(LITTLE + "\n")
    assert pack_script.checked(out, source)[0] == 1
    with pytest.raises(UserError, match="is not a script that"):
        pack_script.checked(source, source)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"\xff", "no Python"),
        (b"if", "no Python"),
        (b"", "the script is empty"),
        (b'"a\x0cb"\n', "ends otherwise"),
        (pack_script.FIRST.encode() + b'"""\n', "already"),
    ],
)
def test_a_source_that_would_not_run_as_it_stands_is_refused(source, reason):
    with pytest.raises(UserError, match=reason):
        pack_script.pack(source)


# ---- That it runs as the readable one does -------------------------------------------------------


@pytest.mark.parametrize("option", ["-B", "-OO"])
def test_names_lines_and_workers_are_those_of_the_source(tmp_path, option):
    said = []
    for content in (LITTLE.encode(), pack_script.pack(LITTLE.encode())):
        path = tmp_path / "little.py"
        path.write_bytes(content)
        said.append(start(option, path, "--x"))
    plain, packed = said
    assert plain.stdout.startswith("Box(pair=Pair(left=-5)) True")
    assert "in Box.fail" in plain.stdout
    assert packed.stdout == plain.stdout
    assert packed.returncode == plain.returncode == 1
    # The same but for one frame more, of which no line is shown: marks under a line are Python's.
    kept = [line for line in packed.stderr.splitlines() if "in <module>" not in line]
    wanted = [line for line in plain.stderr.splitlines() if "in <module>" not in line]
    marks = re.compile(r"\s*[\^~]+")
    assert [x for x in kept if not marks.fullmatch(x)] == [
        x for x in wanted if not marks.fullmatch(x)
    ]
    assert packed.stderr.count("in <module>") == 2
    assert 'raise ValueError("on purpose")  # in Box.fail' in packed.stderr


def test_imported_it_has_the_same_names_and_lines(module, script):
    # By the source: Triton's interpreter and torch.compile put names of theirs into a module.
    symbols = symtable.symtable(inspect.getsource(t), t.__file__, "exec").get_symbols()
    own = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    own &= set(vars(t))
    assert {"run", "Model", "mamba_scan", "REFUSALS", "torch"} <= own <= set(vars(module))
    assert module.__file__ == str(script)
    assert module.__doc__ == t.__doc__
    assert module.code_bytes() == script.stat().st_size
    for name in ("run", "Model", "mamba_scan"):
        assert inspect.getsource(getattr(module, name)) == inspect.getsource(getattr(t, name))
    if t.triton is not None:
        # As Triton does, which compiles what it reads.
        ours, theirs = (one.rotate_features.fn for one in (t, module))
        assert inspect.getsourcelines(theirs) == inspect.getsourcelines(ours)


def test_its_help_is_the_same(module, monkeypatch, capsys):
    assert run_here(monkeypatch, dict(os.environ), "--help") == 0
    text = capsys.readouterr().out
    assert module.run() == 0
    assert capsys.readouterr().out == text
    assert "MATRIX_LR" in text


def test_a_dry_run_counts_its_bytes_and_finds_what_is_given_from_the_users_folder(
    script, shards, tmp_path
):
    """Its tools are those above it, beside which the readable train_gpt.py is not the script.

    That scripts of other names are loaded by their paths, test_dry_run.py shows.
    """
    repository, user = tmp_path / "repository", tmp_path / "user"
    (repository / "packed").mkdir(parents=True)
    (repository / "tools").symlink_to(SCRIPT.parent / "tools")
    packed = repository / "packed" / "entry-1.py"
    packed.write_bytes(script.read_bytes())
    user.mkdir()
    (user / "data").symlink_to(shards)
    environment = process_environment(tiny_environment(data_path="data", target_mb=16))
    del environment["PYTHONPATH"]
    done = start(packed, "--dry-run", "--step-ms", "100", env=environment, cwd=user)
    assert (done.returncode, done.stderr) == (0, "")
    room = 16_000_000 - packed.stat().st_size
    assert f"of at most {room:,} (16,000,000 less the script)" in done.stdout
    assert " in DATA_PATH\n" in done.stdout


def test_a_run_gives_the_same_artifact_and_counts_the_packed_bytes(
    script, module, shards, tmp_path, monkeypatch, capsys, signal_handlers
):
    for name in ("readable", "packed"):
        settings = run_environment(shards, tmp_path, run_id=name, **PLAIN)
        if name == "readable":
            assert run_here(monkeypatch, settings) == 0
        else:
            monkeypatch.setattr(os, "environ", settings)
            monkeypatch.setattr(sys, "argv", [str(script)])
            assert module.run() == 0
    files = [tmp_path / f"{name}.int6.lzma" for name in ("readable", "packed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    readable, packed = (last_run(tmp_path / f"{name}.jsonl") for name in ("readable", "packed"))
    size = script.stat().st_size
    assert packed["trained"]["bytes_code"] == size
    assert packed["trained"]["bytes_total"] == size + files[0].stat().st_size
    assert packed["settings"]["script_sha256"] == hashlib.sha256(script.read_bytes()).hexdigest()
    assert packed["final"]["val_bpb"] == readable["final"]["val_bpb"]
    assert (tmp_path / "packed.txt").read_bytes().startswith(script.read_bytes())
    assert read_script(tmp_path / "packed.txt") == script.read_bytes()
    # The readable one scores what the packed one trained, and says that it was another.
    scoring = {"eval_only": True, "eval_mode": "plain", "ttt_enabled": False}
    settings = run_environment(shards, tmp_path, run_id="packed", **scoring)
    capsys.readouterr()
    assert run_here(monkeypatch, settings) == 0
    assert "packed.jsonl, of another train_gpt.py" in capsys.readouterr().out
    again = last_run(tmp_path / "packed.eval.jsonl")
    assert again["final"]["val_bpb"] == readable["final"]["val_bpb"]


# ---- What tools/evidence.py makes of it ----------------------------------------------------------


def judged(folder: Path, content: bytes, source: str = LITTLE) -> evidence.Row:
    """The row on a script's source, beside the readable one."""
    path = folder / "train_gpt.py"
    path.write_bytes(content)
    (folder / pack_script.READABLE).write_text(source)
    return evidence.source_row(path, content.decode())[0]


def test_a_packed_script_passes_beside_its_source(tmp_path):
    content = pack_script.pack(LITTLE.encode())
    row = judged(tmp_path, content)
    assert row.reasons == ()
    assert f"{len(content):,} bytes, packed of {len(LITTLE):,}: unpacked, it is" in row.answer
    assert "train_gpt_readable.py, byte for byte" in row.answer
    assert hashlib.sha256(content).hexdigest() in row.answer
    assert hashlib.sha256(LITTLE.encode()).hexdigest() in row.answer


def test_a_packed_script_passes_beside_ours_and_nothing_else(script, tmp_path):
    text = script.read_text()
    row, source = evidence.source_row(script, text)
    assert row.reasons == ()
    assert source == SCRIPT.read_bytes()
    row, source = evidence.source_row(script, text, tmp_path / "none.py")
    (reason,) = row.reasons or ("",)
    assert (source is None) == bool(reason)
    known = evidence.commit_of(SCRIPT.read_bytes())
    assert bool(known) == (not reason)  # a commit's is as good


def repacked(source: str, claimed: str = LITTLE, more: bytes = b"") -> bytes:
    """A file whose head speaks of one source and whose PACKED holds another, and more."""
    digits = base64.b85encode(bz2.compress(source.encode()) + more).decode()
    head, mark, _ = pack_script.pack(claimed.encode()).decode().partition('PACKED = """\n')
    tail = pack_script.TAIL.substitute(decode=pack_script.DECODE)
    return (head + mark + digits + tail + pack_script.LAST).encode()


HONEST = pack_script.pack(LITTLE.encode())
FORMER = pack_script.render(
    LITTLE.encode(), bz2.compress(LITTLE.encode()), pack_script.FORMER_DECODE
)
HOSTILE = LITTLE + "print('scores of my own')\n"
BENT = {
    "another source, honestly packed": pack_script.pack(HOSTILE.encode()),
    "a head that claims the readable source": repacked(HOSTILE),
    "a head that claims another length": HONEST.replace(b" bytes and this", b"0 bytes and this"),
    "code at the end": HONEST + b"print(1)\n",
    "an empty line at the end": HONEST + b"\n",
    "code before the run": HONEST.replace(b"exec(unpack", b"print(1); exec(unpack"),
    "code behind PACKED": HONEST.replace(b"\n\n\ndef", b"\nPACKED = evil()\n\ndef"),
    "an import of its own": HONEST.replace(b"import traceback", b"import traceback, evil"),
    "a second PACKED": HONEST.replace(b"\n\n\ndef", b'\nPACKED = """x"""\n\ndef'),
    "a second stream": repacked(LITTLE, more=bz2.compress(b"print(1)\n")),
    "bytes behind the stream": repacked(LITTLE, more=b"weights"),
    "other lines": repacked(LITTLE),
    "a file that is cut off": HONEST[:-500],
    "a PACKED that is cut off": re.sub(rb'(?s).{90}\n"""\n\n\ndef', b'\n"""\n\n\ndef', HONEST),
    "no PACKED": HONEST[:900],
    "another packer's head": HONEST.replace(b"train_gpt.py, packed", b"train_gpt.py"),
    "a source that packs another": pack_script.pack(b"exec('print(1)')\n"),
}


def test_a_head_of_another_source_is_caught_though_the_right_one_lies_beside(tmp_path):
    (reason,) = judged(tmp_path, repacked(HOSTILE), HOSTILE).reasons
    assert "line 3 is not what tools.pack_script writes" in reason


@pytest.mark.parametrize("content", BENT.values(), ids=BENT)
def test_what_is_bent_is_caught(tmp_path, content):
    assert content != HONEST
    assert judged(tmp_path, content).reasons


def test_a_source_that_runs_packed_code_is_caught_though_it_is_shown(tmp_path):
    source = LITTLE + "exec('print(1)')\n"
    (reason,) = judged(tmp_path, pack_script.pack(source.encode()), source).reasons
    assert reason.startswith(
        f"line {source.count(chr(10))} of the script runs or holds packed code"
    )


def test_text_that_is_packed_in_lines_is_told_from_prose(tmp_path):
    digits = base64.b85encode(os.urandom(3000)).decode()
    lines = "\n".join(digits[start : start + 80] for start in range(0, len(digits), 80))
    assert judged(tmp_path, f'CODE = """\n{lines}\n"""\n'.encode()).reasons
    assert judged(tmp_path, f'TEXT = """{"some words " * 400}"""\n'.encode()).reasons == ()


def test_a_damaged_file_does_not_run(tmp_path):
    path = tmp_path / "little.py"
    path.write_bytes(repacked(HOSTILE))
    done = start(path)
    assert "is damaged" in done.stderr
    assert "scores of my own" not in done.stdout


@pytest.mark.parametrize("mark", [b"!", b"\xc3\xa9", b"#", b""], ids=ascii)
def test_data_that_are_bent_are_told_as_damaged(tmp_path, mark):
    """They ended in the decoder's own error, "Invalid data stream"."""
    path = tmp_path / "little.py"
    start_of_digits = HONEST.index(b'PACKED = """\n') + len(b'PACKED = """\n') + 30
    path.write_bytes(HONEST[:start_of_digits] + mark + HONEST[start_of_digits + 1 :])
    done = start(path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: {path} is damaged: ")


def test_a_script_that_was_packed_as_it_was_done_before_is_packed():
    """Runs' text logs begin with such files, so that they are held against their source."""
    assert FORMER != HONEST
    assert pack_script.unpack(FORMER) == LITTLE.encode()
    log = SCRIPT.parent / "logs" / "web-packed" / "f-180-7.txt"
    script, _ = split_text(log, log.read_text(encoding="utf-8"))
    source = pack_script.unpack(script[script.index(pack_script.FIRST) :].encode())
    assert source.startswith(b'"""Parameter Golf')


def test_what_is_not_as_it_was_packed_is_shown_where_it_differs(tmp_path):
    with pytest.raises(UserError, match=r"its lines end by \\r\\n, those of a packed script"):
        pack_script.unpack(HONEST.replace(b"\n", b"\r\n"))
    with pytest.raises(UserError, match="line 1 is not .* compressed, and more"):
        pack_script.unpack(HONEST.replace(b"source, compressed.", b"source, compressed, and more."))


def test_no_device_is_read_or_written_over(tmp_path):
    """/dev/full was read without end."""
    source = tmp_path / "train_gpt.py"
    source.write_text(LITTLE)
    command = ["-m", "tools.pack_script", "--script", source, "--out", "/dev/full"]
    done = start(*command, cwd=SCRIPT.parent)
    assert done.returncode == 2
    assert "/dev/full is no ordinary file" in done.stderr
