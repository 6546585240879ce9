"""Commands, settings and files that documents, docstrings and comments name.

Nobody runs all of these commands: many want a GPU, hours or a corpus. Here each goes as far as the
parser of its own program, and the variables before it as far as a run reads them.
"""

import argparse
import contextlib
import dataclasses
import functools
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

import train_gpt as t
from tests import bit_equal, gpu_checks
from tests.support import SCRIPT
from tools import dry_run, explore, rehearse
from tools.audit.checks import CHECKS
from tools.ideas import document_adaptation

ROOT = SCRIPT.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/NOTES.md", "logs/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "data" / "tiny" / "README.md",
]
PROGRAMS = [
    *(path for name in ("tools", "bench", "data", "docs") for path in (ROOT / name).rglob("*.py")),
    *(path for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_")),
    *(ROOT / "tools" / "ablations").glob("*.toml"),
    *(ROOT / name for name in ("train_gpt.py", "Makefile", "Dockerfile")),
    *(ROOT / name for name in ("tools/container_check.sh", "requirements-cuda.txt")),
]
# What takes its arguments as they come, without a parser, and what stands for other names.
NO_PARSER = {"docs/figures.py", "data/tiny/make.py", "tools/audit/watch.py", "tools/hand_over.py"}
NO_PARSER |= {"tests/compile_kernels.py"}
ANY_NAME = re.compile(r"\w+\.(NAME|MODULE)|MODULE|guard\.py|enter\.py")
ANY_FILE = {"tools/ideas/my_idea.py"}
GONE = {"bench.weight_gradients", "tools/ideas/rotation_in_scans.py"}  # as the page itself says
OTHERS_SETTINGS = re.compile(r"(OMP|TRITON|TORCH|CUDA|IDEA|PYTHON|SLOW)[A-Z_]*")
# A value that stands for others, as LR=… or MATRIX_LR=$lr, and what stands for a number.
ANY_VALUE = re.compile(r"…|\$|\{|^(FILE)?$")
IN_CAPITALS = {"STATE": "64", "PHASE": "start", "LEVEL": "none", "N": "2"}
COMMAND = re.compile(r"(?P<given>(?:[A-Z]\w*=\S* +)*)(?P<start>python3?|torchrun) (?P<rest>.*)")
ASSIGNED = re.compile(r"[A-Z]\w*=\S+")
SCRIPTS = ("train_gpt.py", "packed/train_gpt.py")


class Command(NamedTuple):
    """A command as it is written somewhere."""

    environment: dict[str, str]
    program: str  # a module or a file
    arguments: list[str]
    cut: bool  # by an ellipsis, so that arguments that are required may be missing


def lines_of(path: Path) -> list[str]:
    """A file's lines without signs of comments and tables, and what it has in backticks.

    A command that goes on in the next line is one.
    """
    text = re.sub(r"\\+\n[ #]*", "", path.read_text(encoding="utf-8"))
    text = re.sub(r"\n[ #]*(?=\[--)", " ", text)
    lines = [re.sub(r"^[ #|>]*(export )?", "", line) for line in text.splitlines()]
    fence = re.compile(r"^[ #]*```.*?^[ #]*```", re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", fence.sub("", text))
    if path.suffix == ".py":  # what a program says, if it is not the beginning of a sentence
        spans += [span for span in re.findall(r'"([^"{\n]+)"', text) if " --" in span]
    return [*lines, *(re.sub(r"\s+(# *)?", " ", span) for span in spans)]


def read_command(line: str) -> Command | None:
    """The command of ours that a line begins with, if it does."""
    found = COMMAND.match(line)
    if not found:
        return None
    text = re.sub(r"\$\([^)]*\)", "1", found["rest"])  # what another command prints
    text = re.split(r"`| {3,}| && | [|>] |;| 2>", text)[0]  # what it is for, and what follows it
    cut = "…" in text or "..." in text
    try:
        words = [word.strip("[]") for word in shlex.split(text, comments=True)]
    except ValueError:  # a sentence with an apostrophe
        return None
    words = [IN_CAPITALS.get(word, word) for word in words if word not in ("", "…", "...")]
    places = [i for i, word in enumerate(words) if word == "-m" or word.endswith(".py")]
    if not places or (found["start"] == "python" and places[0] > 1):
        return None
    place = places[0] + (words[places[0]] == "-m")
    given = dict(word.split("=", 1) for word in found["given"].split())
    return Command(given, words[place], words[place + 1 :], cut)


def commands() -> list[Command]:
    """All that are written, those that say the same once."""
    found = {}
    for path in [*PAGES, *PROGRAMS]:
        for line in lines_of(path):
            command = read_command(line)
            if command and not ANY_NAME.fullmatch(command.program):
                found.setdefault(str(command), command)
    return [command for command in found.values() if command.program not in GONE]


@functools.cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser that a program asks when it is started, which goes no further here."""
    found = []

    class Asked(BaseException):
        """What no program catches."""

    def parse_args(self, *_):
        found.append(self)
        raise Asked

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Asked):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [program])
        if program in ("--dry-run", "--rehearse"):
            (dry_run.dry_run if program == "--dry-run" else rehearse.main)()
        elif program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # it was imported before
                runpy.run_module(program, run_name="__main__")
    (parser,) = found
    return parser


def file_of(program: str) -> str:
    """The path of a program, a file or a module, in the repository."""
    if program.endswith(".py"):
        return program
    path = program.replace(".", "/")
    return f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"


def read_environment(environment: dict[str, str]) -> None:
    """Raises UserError for what a run would refuse; values that stand for others are left out."""
    names = [name for name in environment if not OTHERS_SETTINGS.fullmatch(name)]
    for name in names:
        assert name.lower() in t.FIELDS, name
    given = {name: environment[name] for name in names if not ANY_VALUE.search(environment[name])}
    settings, typed = t.read_settings(given)
    t.validate_settings(settings, 1)
    t.refuse_idle(settings, typed)


def check(command: Command, capsys) -> None:
    """Fails unless the command's program is there and would take what it is given."""
    read_environment(command.environment)
    program, arguments = command.program, command.arguments
    if program in SCRIPTS:
        if not arguments or set(arguments) <= {"--help", "--presets", *t.PRESETS}:
            return
        program, *arguments = arguments
        assert program in ("--dry-run", "--rehearse")
    elif program != "pytest":
        assert (ROOT / file_of(program)).is_file()
    for word in [*arguments, *command.environment.values()]:
        ours = re.match(r"(tools|bench|tests|docs|reference|data/tiny)/", word)
        assert not ours or (ROOT / word).exists() or word in ANY_FILE, word
    # A name by itself is no command, but says which one is meant.
    if not arguments or program == "pytest" or file_of(program) in NO_PARSER:
        return
    try:
        given = parser_of(program).parse_args(arguments)
    except (SystemExit, Exception) as error:
        said = f"{error} {capsys.readouterr().err}"
        short = len(arguments) == 1 or command.cut
        assert short and re.search("required|expected one argument", said), said
        return
    if program == "data/prepare.py" and given.command == "text":
        # A file is a document: of two or three, by lot, none may be for validation.
        assert given.val or given.separator or "*" in str(arguments), arguments
    if program == "tests.gpu_checks":
        gpu_checks.choose_parts(given.parts)
    if program == "tests/bit_equal.py":
        assert set((given.cases or "tiny").split(",")) <= set(bit_equal.CASES)
    if program == "tools.audit" and given.checks:
        assert set(given.checks.split(",")) <= set(CHECKS)
    if program in ("tools.explore", "tools.ideas.document_adaptation"):
        check_variants(program, given, {"PRESET": "short"} | command.environment)


def check_variants(program: str, given: argparse.Namespace, environment: dict[str, str]) -> None:
    """Fails unless each variant is one, all of whose changes change something."""
    if program == "tools.explore":
        texts = [*given.variants, *given.requantize]
        read = functools.partial(explore.read_variant, environment=environment)
    else:
        texts = given.variant
        settings, _ = t.read_settings(environment | {"EVAL_MODE": "documents"})
        read = functools.partial(document_adaptation.read_variant, settings=settings)
    _, base = read("base:")
    for text in texts:
        _, changed = read(text)
        fields = [field.name for field in dataclasses.fields(base)]
        differ = [name for name in fields if getattr(base, name) != getattr(changed, name)]
        assert len(differ) >= len(text.partition(":")[2].split()), f"{text} changes {differ} alone"


@pytest.mark.parametrize("command", commands(), ids=lambda c: f"{c.program} {len(c.arguments)}")
def test_a_command_that_is_written_is_one_that_its_program_takes(command, capsys):
    check(command, capsys)


# ---- Settings ------------------------------------------------------------------------------------

# What pages call refused, and what is for a model of another depth.
REFUSED = {"DEVICE=mps", "LAYER_ORDER=0,0", "EVAL_STRIDE=64 TTT_LORA_RANK=8"}


def assignments(path: Path) -> set[str]:
    """What a page has in backticks, or on a line, that is nothing but NAME=VALUE."""
    lines = [line.split(" # ")[0].split() for line in lines_of(path)]
    return {" ".join(words) for words in lines if words and all(map(ASSIGNED.fullmatch, words))}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_settings_that_a_page_gives_are_settings_with_values_that_they_may_have(path):
    """settings.md is made from the script; many of its values are in the middle of a reason."""
    if path.name == "settings.md":
        return
    for text in assignments(path) - REFUSED:
        given = dict(word.split("=", 1) for word in text.split())
        read_environment(given)


# ---- Files ---------------------------------------------------------------------------------------

ENDING = re.compile(r"\.(py|md|toml|json|jsonl|txt|png|sh|ipynb)$|/$")
OUR_FOLDERS = re.compile(r"(bench|results|docs|tools|tests|logs|reference)/|data/tiny/")
FOLDERS = ("bench", "bench/results", "docs", "data", "tools", "tools/ablations", "tests", "logs")
FOLDERS += ("logs/web-180s", "logs/web-clocks", "logs/web-ideas", "logs/web-scan")  # said before
# What commands write and a reader has, by the names that the pages call it.
MADE = re.compile(
    r"logs/(first|one|two|tiny|ideas|demo|recurrence|x|y|s\d|(h|t|lr)-\S*|RUN\w*)[./]\S*"
    r"|(some|books|packed|(\./)?data/(sample|datasets))/\S*"
    r"|(RUN_ID|NAME|FILE|model|first|tests/test_X|train_gpt_readable|bench/results/NAME)\.\S*"
    r"|NAME_val_\S*|(manifest|table|results|loss|sweep|docs|val|all)\.\w+"
)


def named_files(path: Path) -> set[str]:
    """The files and folders that a page names in backticks and links, its commands' left out."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`([^`\s]+)`", text)
    found += re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    return {
        name
        for name in found
        if re.fullmatch(r"(\.{1,2}/)*\w[\w./*-]*", name)
        and (ENDING.search(name) or OUR_FOLDERS.match(name))
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_are_there(path):
    for name in named_files(path) - GONE:
        places = [path.parent, ROOT, *(ROOT / folder for folder in FOLDERS)]
        there = any((place / name).exists() for place in places)
        there = there or any(any(place.glob(name + end)) for place in places for end in ("", ".*"))
        assert there or MADE.fullmatch(name), name


# ---- Errors --------------------------------------------------------------------------------------

# What a program puts together of several texts, or another program prints.
PUT_TOGETHER = {"should be one of auto", "no *_train_*.bin shards in", "tokens other bytes than"}
PUT_TOGETHER |= {".bin gives", "but TOKENIZER_PATH has", "or choose another RUN_ID"}
PUT_TOGETHER |= {"out of GPU memory", "Failed to find C compiler", "kernels compiled ahead"}
PUT_TOGETHER |= {"updates compiled ahead", "average and attention compiled ahead"}
# Between the words of a line that is quoted: values, signs, and what stands for another word.
VALUES = re.compile(r"…|\b[A-Z_0-9]+=\S*|[:;,()]|\b[XYNx]\b|\[?\d+\]?")


def test_lines_that_the_page_on_trouble_quotes_are_lines_that_programs_print():
    """Whoever searches the page for an error has to find it as it was printed."""
    paths = [SCRIPT, ROOT / "data" / "prepare.py", *(ROOT / "tools").rglob("*.py")]
    printed = "".join(path.read_text(encoding="utf-8") for path in paths)
    printed = re.sub(r'"\s*\n\s*f?"', "", printed)  # texts side by side are one
    rows = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    quoted = [line.split("|")[1] for line in rows if line.startswith("|")]
    quotes = re.findall(r"`([^`]+)`", "\n".join(quoted))
    parts = {part.strip() for quote in quotes for part in VALUES.split(quote)}
    parts = {part for part in parts if len(part.split()) > 1}
    assert len(parts) > 80
    assert {part for part in parts if part not in printed} == PUT_TOGETHER


# ---- Figures -------------------------------------------------------------------------------------


def named_commits(path: Path) -> set[str]:
    """The commits that a page names, by seven digits of which one is a letter, or behind the word.

    Sums of files are named by eight and more.
    """
    found = re.findall(r"\b(commit )?([0-9a-f]{7})\b", path.read_text(encoding="utf-8"))
    return {name for behind, name in found if behind or not name.isdigit()}


def git(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commits_that_a_page_names_are_in_the_history(path):
    """What a figure was measured with can be looked at."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no repository")
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no whole history")
    assert [
        name
        for name in named_commits(path)
        if git("cat-file", "-e", f"{name}^{{commit}}").returncode
    ] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_figure_is_of_a_script_that_nobody_has(path):
    """A page that says so of a figure claims what cannot be shown."""
    text = " ".join(path.read_text(encoding="utf-8").split())
    assert not re.search(r"scripts? (that|which) [^.]*not in the repository", text)
