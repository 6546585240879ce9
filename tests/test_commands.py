"""The Makefile, tools/container_check.sh and the Dockerfile: what they name is there, `make help`
leaves nothing out, and a wrong start ends with one line.

`.ci/run` starts the script itself; no image is built in the tests.
"""

import fnmatch
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from tests.conftest import LONG_FILES
from tests.support import SCRIPT, called_here
from tools import make_venv, runs
from tools.audit.checks import CHECKS
from tools.command import UserError, need_place, run_command, write_whole

ROOT = SCRIPT.parent
CHECK = ROOT / "tools" / "container_check.sh"
DOCKERFILE = ROOT / "Dockerfile"
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def targets() -> list[str]:
    """The Makefile's targets that are no files."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (names,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    return [name for name in names.split() if name != "FORCE"]


def make(*arguments: str) -> subprocess.CompletedProcess:
    """As from a shell, also where the tests were started by make."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFL"))
    }
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)


# ---- The Makefile --------------------------------------------------------------------------------


@needs_make
def test_help_has_a_line_for_each_target_and_nothing_else_of_the_makefile():
    shown = make("--silent").stdout
    described = re.findall(r"^make (\w+) {2,}\S", shown, re.MULTILINE)
    assert sorted([*described, "help"]) == sorted(targets())
    assert shown == make("--silent", "help").stdout
    assert "stamp" not in shown and "Threads" not in shown


@needs_make
@pytest.mark.parametrize("target", targets())
def test_every_target_can_be_made(target):
    done = make("--dry-run", target)
    assert done.returncode == 0, done.stderr
    scripts = re.findall(r"(?:^|\s)((?:data|tools)/\S+\.(?:py|sh))", done.stdout)
    assert all((ROOT / name).is_file() for name in scripts)


@needs_make
def test_what_fails_ends_make_with_status_2():
    assert make("nonsense").returncode == 2
    done = make("demo", "PYTHON=false", "VENV_PYTHON=false", "--always-make")
    assert done.returncode == 2


def test_files_that_make_test_begins_with_are_there():
    there = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    assert {f"test_{name}" for name in LONG_FILES} <= there
    assert len(set(LONG_FILES)) == len(LONG_FILES)


def test_what_makes_an_environment_says_what_it_does():
    command = [sys.executable, "-m", "tools.make_venv"]
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout[:17]) == (0, "Makes .venv with ")
    done = subprocess.run([*command, "torch"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "takes no arguments" in done.stderr


@pytest.mark.parametrize(
    ("gpu", "wanted", "answers", "lines"),
    [
        (False, "", True, ["CPU index: torch"]),
        (False, "", False, ["CPU index: torch", "no CPU build", "pip: torch==2.13.0"]),
        (False, "torch==2", False, ["CPU index: torch==2", "no CPU build", "pip: torch==2"]),
        (False, "torch==2+cpu", False, ["CPU index: torch==2+cpu", "pip: torch==2+cpu"]),
        (True, "", False, ["there is an NVIDIA GPU", "pip: torch"]),
    ],
)
def test_gigabytes_are_announced_before_they_come(monkeypatch, capsys, gpu, wanted, answers, lines):
    """Where no index of CPU builds answered, make demo brought CUDA's libraries without a word."""

    def install(requirement, *options, **_) -> bool:
        print(f"{'CPU index' if options else 'pip'}: {requirement}")
        return answers or not options

    monkeypatch.setenv("TORCH", wanted)
    monkeypatch.setattr(make_venv, "prepare_venv", lambda may_share: None)
    monkeypatch.setattr(make_venv, "find_torch", lambda python: "")
    monkeypatch.setattr(make_venv, "output", lambda *command: "GPU 0" if gpu else "")
    monkeypatch.setattr(make_venv.shutil, "which", lambda name: name)
    monkeypatch.setattr(make_venv, "install", install)
    make_venv.main()
    said = capsys.readouterr().out.splitlines()
    assert [
        line.removeprefix("make_venv.py: ")[: len(x)] for line, x in zip(said, lines, strict=True)
    ] == lines
    for line in said:
        if line.startswith("make_venv.py: "):
            assert "gigabytes" in line and 'TORCH="torch==2.13.0+cpu"' in line


# ---- The script and the image --------------------------------------------------------------------


def test_the_script_names_files_modules_and_checks_that_exist():
    text = CHECK.read_text(encoding="utf-8")
    assert os.access(CHECK, os.X_OK)
    modules = set(re.findall(r"-m (tools\.\w+)", text))
    assert modules == {"tools.audit", "tools.convert", "tools.report", "tools.summary"}
    assert all(importlib.util.find_spec(name) for name in modules)
    for name in re.findall(r"\b(?:tests|data)/\w+\.py", text):
        assert (ROOT / name).is_file(), name
    (names,) = re.findall(r'--checks "([\w,]+)"', text)
    assert set(names.split(",")) <= set(CHECKS)
    (folder,) = re.findall(r"^data=(\S+)$", text, re.MULTILINE)
    (artifact,) = re.findall(r"^artifact=\$data/(\S+)$", text, re.MULTILINE)
    assert (ROOT / folder / artifact).is_file()


def test_the_script_is_bash_and_every_part_of_it_is_started():
    assert subprocess.run(["bash", "-n", CHECK]).returncode == 0
    text = CHECK.read_text(encoding="utf-8")
    functions = set(re.findall(r"^(\w+)\(\) \{$", text, re.MULTILINE)) - {"part"}
    started = set(re.findall(r'part "[^"]*" (\w+)$', text, re.MULTILINE)) | {"network"}
    chains = {"made_here", "published"}  # of parts
    assert functions == started | chains
    calls = re.findall(r"^ *(?:network|made_here|published)(?: &)?$", text, re.MULTILINE)
    assert sorted(line.strip() for line in calls) == [
        "made_here", "made_here &", "network", "published", "published",
    ]  # fmt: skip
    if checker := shutil.which("shellcheck"):
        done = subprocess.run([checker, CHECK], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("CHECK", "some", "should be quick or all"), ("PYTHON", "false", "lacks a package")],
)
def test_a_wrong_start_ends_with_one_line(variable, value, said):
    environment = os.environ | {variable: value}
    done = subprocess.run([CHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("container_check.sh: error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_image_is_public_and_runs_the_script_as_nobody_special():
    lines = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    words = [line.split() for line in lines if line and line[0] not in "# "]
    verbs = [line[0] for line in words]
    assert next(line[1] for line in words if line[0] == "ARG").startswith("IMAGE=pytorch/pytorch:")
    assert words[verbs.index("USER")][1] != "root"
    script = CHECK.relative_to(ROOT).as_posix()
    checked = next(i for i, line in enumerate(words) if script in line)
    assert verbs.index("USER") < checked
    assert "--network=none" in words[checked]
    assert words[-1] == ["CMD", f'["{script}"]']
    copied = [name for line in words if line[0] == "COPY" for name in line[1:-1]]
    assert all((ROOT / name).exists() for name in copied if not name.startswith("--"))


def left_out(path: str, patterns: list[str]) -> bool:
    """Whether Docker leaves a file out: the last pattern that names it, or a folder above, says."""
    names = [path, *map(str, PurePosixPath(path).parents)]
    ignored = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!").removeprefix("**/")
        anywhere = pattern.startswith("**/")
        tried = [PurePosixPath(name).name for name in names] if anywhere else names
        # A star of Docker's stops at a slash.
        depth = [name for name in tried if name.count("/") == wanted.count("/")]
        if any(fnmatch.fnmatchcase(name, wanted) for name in depth):
            ignored = not pattern.startswith("!")
    return ignored


def test_the_image_holds_what_the_repository_keeps_and_no_data_that_was_made_here():
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    folders = ("data", "data/tiny", "tests", "tests/data", "tools", "docs", "reference")
    kept = [path for folder in folders for path in (ROOT / folder).glob("*.*")]
    assert len(kept) > 50
    for path in kept:
        name = path.relative_to(ROOT).as_posix()
        made = path.is_dir() or "tiny_train" in name or name.endswith(".pyc")
        assert made or not left_out(name, patterns), name
    made_here = (
        "data/sample/manifest.json",
        "data/datasets/a/a_val_000000.bin",
        "logs/a.int6.lzma",
    )
    for name in (*made_here, "tools/__pycache__/a.pyc", ".venv/bin/python"):
        assert left_out(name, patterns), name
    assert not left_out(".git/HEAD", patterns)  # names the commit that a script equals


def test_a_reader_that_goes_away_ends_a_command_silently():
    """As "| head" does: nothing on stderr, and the status that a shell gives to SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tools.summary", "data/tiny/tiny.jsonl"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=SCRIPT.parent)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_audits_help_names_it_and_lists_its_statuses():
    """The usage begins as it is started, and no list is cut inside a word."""
    command = [sys.executable, "-m", "tools.audit", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent).stdout
    assert text.startswith("usage: python -m tools.audit ")
    assert "    5   none fails" in text
    # A list joined without spaces has only one place to be cut at: inside a name.
    assert f"some of {', '.join(CHECKS)};" in " ".join(text.split())


# In place of torch: it says which rule threads would wait by, if OpenMP were loaded now.
STAND_IN = "import os; print(os.environ.get('OMP_WAIT_POLICY'), flush=True); os._exit(0)\n"


def test_threads_of_a_run_sleep_while_they_wait_unless_told_otherwise(tmp_path):
    """Those of a program that imports the script wait as they did."""
    imported = [sys.executable, "-c", "import train_gpt"]
    started = [sys.executable, str(SCRIPT), "--presets"]
    tool = [sys.executable, "-m", "tools.explore", "--help"]
    usual = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    usual["OMP_DISPLAY_ENV"] = "verbose"

    def start(command, **changes) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command, env=usual | changes, capture_output=True, text=True, cwd=SCRIPT.parent
        )
        assert done.returncode == 0, done.stderr
        return done

    def spins(command) -> str:
        """How often a thread looks before it sleeps, as GNU's OpenMP shows it; or nothing."""
        return "".join(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", start(command).stderr))

    (tmp_path / "torch.py").write_text(STAND_IN)

    def policy(command, **changes) -> str:
        """The rule at the moment when torch is imported, which takes seconds."""
        return start(command, PYTHONPATH=str(tmp_path), **changes).stdout.strip()

    assert policy(imported) == "None"
    assert policy(started) == policy(tool) == "passive"
    for command in (started, imported):
        assert policy(command, OMP_WAIT_POLICY="active") == "active"
    by_default = spins(imported)
    if not by_default:
        pytest.skip("this torch has another OpenMP")
    assert spins(started) == "0" != by_default


PROGRAMS = [*(ROOT / "tools").glob("*.py"), *(ROOT / "bench").glob("*.py")]
FOLDERS = {"ablate.py", "board.py", "package.py"}  # whose --out is a folder


STARTED = [*(ROOT / "tools").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
STARTED += [
    path
    for path in (ROOT / "tests").glob("*.py")
    if f"python -m tests.{path.stem}" in path.read_text(encoding="utf-8")
]
OURS = re.compile("^(from|import) (tools|train_gpt|tests)", re.MULTILINE)
INSIDE = {"enter.py", "guard.py"}  # started by their paths, by the audit


ALONE = "if not __package__"  # begins what says so


@pytest.mark.parametrize("path", STARTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_that_is_started_by_its_path_says_how_it_is_meant(path, tmp_path):
    """One that is no command itself ended in a traceback. What imports nothing of ours can be
    started so. Starting all of them would take minutes: that is done with one of each folder.
    """
    text = path.read_text(encoding="utf-8")
    ours = OURS.search(text)
    if not ours and path.name not in INSIDE:
        assert ALONE not in text
        return
    if path.name not in INSIDE:
        assert text.index(ALONE) < ours.start()
    if path.name in {*INSIDE, "logs.py", "case.py", "charts.py", "tune.py", "fuzz.py"}:
        (tmp_path / "torch.py").touch()  # in place of torch, whose import takes seconds
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, path]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "start" in done.stderr and "python " in done.stderr


# ---- Files that commands write -------------------------------------------------------------------


def test_every_command_asks_for_its_files_place_before_it_works():
    for path in (*PROGRAMS, ROOT / "tools" / "report" / "__main__.py"):
        text = path.read_text(encoding="utf-8")
        if re.search(r"add(_argument)?\(\s*\"--(out|plot|csv|profile)\"", text):
            assert path.name in FOLDERS or "need_place(" in text, path
        assert not re.search(r"savefig\(\w+, dpi", text) or path.name == "command.py", path


def test_what_cannot_be_written_and_what_is_read_is_refused(tmp_path):
    source, link, new = (tmp_path / name for name in ("a.jsonl", "link.png", "new.png"))
    source.write_text("kept")
    link.symlink_to(source)
    for out, message in (
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "no ordinary file"),
        (tmp_path / "none" / "a.png", "none/a.png: No such file"),
        (source / "a.png", "a.jsonl/a.png: Not a directory"),
        (source, "would be written over"),
        (link, "would be written over"),
        (tmp_path / "a.pdfx", "a name that ends in .png"),
    ):
        with pytest.raises(UserError, match=message):
            need_place(out, source, tmp_path / "missing", ending=".png")
    need_place(new, source, ending=".png")
    assert sorted(tmp_path.iterdir()) == [source, link]


def test_a_full_disk_is_told_by_the_files_name_and_leaves_no_part_of_it(
    tmp_path, monkeypatch, capsys
):
    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")  # as write() has it: without a name

    monkeypatch.setattr(Path, "write_bytes", full)
    out = tmp_path / "a.txt"
    assert run_command("x.py", lambda: write_whole(out, "text")) == 2
    assert capsys.readouterr().err == f"x.py: error: {out}: No space left on device\n"
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_text_can_be_written(tmp_path):
    """Run and folder names may have any bytes; one of a log beside a submission's ended package."""
    out = tmp_path / "a.txt"
    write_whole(out, "b\udcff×\n")
    assert out.read_bytes() == "b\\udcff×\n".encode()


def test_what_is_written_does_not_go_through_a_link_in_its_way(tmp_path):
    other, out = tmp_path / "other", tmp_path / "a.txt"
    other.write_text("kept")
    for make in (Path.symlink_to, Path.hardlink_to):
        make(tmp_path / "a.txt.part", other)
        write_whole(out, "text")
        assert (out.read_text(), other.read_text()) == ("text", "kept")
        assert sorted(tmp_path.iterdir()) == [out, other]


def test_a_table_is_not_printed_before_its_file_is_refused(tmp_path):
    log = ROOT / "data" / "tiny" / "tiny.jsonl"
    kept = log.read_bytes()
    for option, out in (("--csv", log), ("--csv", tmp_path), ("--plot", tmp_path / "a.pdfx")):
        main = functools.partial(run_command, "runs.py", runs.main)
        done = called_here(main, "runs.py", log, option, out)
        assert done.returncode == 2
        assert done.stdout == "" and str(out) in done.stderr
    assert log.read_bytes() == kept
