"""Fixtures: data made once per session. Plain helpers are in support.py."""

import fcntl
import functools
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import train_tokenizer, write_data

ROOT = Path(__file__).resolve().parent.parent
# The models are too small to gain from more threads, and the machine may be shared.
torch.set_num_threads(1)

# The files whose tests take ten seconds and more, by the seconds they took on one core, most first:
# tests/test_audit.py, …
LONG_FILES_TEXT = """
    audit fused_scan run compiled_kernels checkpoint ablate evaluation export prepare documents
    steps_trained_again scan_backends trellis going_on model dry_run compiled_ahead
    document_adaptation rehearse report shares selective_scan pack_script package both_mixers
    gpu_checks generate fuzz settings names float8_products bench kill_table explore commands
    notebook precision impossible_pairs
"""
LONG_FILES = LONG_FILES_TEXT.split()


def pytest_configure(config):
    """pytest-xdist would hand out files by how many tests they have, however long those take."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    """Of several processes none is to begin a long file when the others are about to end."""
    if hasattr(config, "workerinput"):  # one of several
        ranks = {f"test_{name}": rank for rank, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def prepared_torch():
    """The choices for the whole process under which the script trains and scores."""
    import train_gpt

    train_gpt.prepare_torch()


@pytest.fixture(scope="session", autouse=True)
def language_replaced_once():
    """Triton's interpreter replaces the language's functions by its own before a kernel, and again
    before each function that a kernel calls: two fifths of its time. Here not again, as long as
    they are replaced.
    """
    import train_gpt

    with pytest.MonkeyPatch.context() as patch:
        if train_gpt.triton is not None and os.environ.get("TRITON_INTERPRET") == "1":
            replace_language_once(patch)
        yield


def replace_language_once(patch: pytest.MonkeyPatch) -> None:
    """Does so where this triton is made as that of requirements-dev.txt."""
    from triton.runtime import interpreter

    language = interpreter.tl
    if not {"_patch_lang", "_LangPatchScope"} <= vars(interpreter).keys():
        return
    replace = interpreter._patch_lang

    @functools.cache
    def seen_by(function) -> list:
        """What a kernel knows of the language: all, or as the library's functions its core."""
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return [module for module in (language, language.core) if module in modules]

    def replace_once(function):
        modules = seen_by(function)
        if modules and not any(language.core.is_builtin(module.load) for module in modules):
            return interpreter._LangPatchScope()  # which has nothing to restore
        return replace(function)

    patch.setattr(interpreter, "_patch_lang", replace_once)


@pytest.fixture(scope="session", autouse=True)
def signals_of_a_terminal():
    """The handlers that a program has which a person started, whatever started the tests: a shell
    script's `make test &` has SIGINT ignored, nohup SIGHUP, and processes inherit both.
    """
    handlers = dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL)
    handlers[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signal_handlers():
    """A run that fails leaves its own behind."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def explore_here(shards, tmp_path, signal_handlers):
    """explore_here(*arguments): tools/explore.py's status, the lines on its standard output as
    objects, and what else it said.
    """
    from tests.support import called_here, run_environment
    from tools import explore

    def start(*arguments: str):
        environment = run_environment(shards, tmp_path, train_log_every=1)
        done = called_here(explore.main, "explore.py", *arguments, environment=environment)
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    return start


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory) -> Path:
    """512 pieces, 256 of them bytes, so that nothing is unknown."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes.model", 512)


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory) -> Path:
    """200 pieces and no bytes: what it cannot spell is unknown."""
    path = tmp_path_factory.mktemp("tokenizer") / "plain.model"
    return train_tokenizer(path, 200, byte_fallback=False)


@pytest.fixture(scope="session")
def dummy_prefix_tokenizer(tmp_path_factory) -> Path:
    """Bytes, and a space put before every text, which decoding takes away again."""
    path = tmp_path_factory.mktemp("tokenizer") / "prefix.model"
    return train_tokenizer(path, 512, add_dummy_prefix=True)


@pytest.fixture(scope="session")
def case_tokenizer(tmp_path_factory) -> Path:
    """512 pieces: bytes, and operators for capitals as tokens 4 to 7, of texts that have them."""
    import train_gpt as t
    from tests.support import TEXT

    path = tmp_path_factory.mktemp("tokenizer") / "case.model"
    more = ("NASA and UNESCO met Ms McDonald, who has an iPhone and x_1 = __name__.",)
    texts = tuple(map(t.encode_case, TEXT + more))
    options = {"user_defined_symbols": [*t.CASE_OPERATORS], "required_chars": "▁"}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return train_tokenizer(path, 512, texts, **options)


@pytest.fixture(scope="session")
def shards(tmp_path_factory, byte_tokenizer) -> Path:
    """A data folder: two training shards, one validation shard, and tokenizer.model of 512
    pieces.
    """
    folder = tmp_path_factory.mktemp("shards")
    write_data(folder, byte_tokenizer)
    return folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """The sample corpus that data/prepare.py makes: sample_1024_bpe.model and two shards. Nobody
    writes there: all processes of pytest-xdist have the same, made by the first that asks.
    """
    from tests.support import PATIENCE

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, made = base / "sample", base / "sample.made"
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "sample", "--out", str(folder)]
    with (base / "sample.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            assert done.returncode == 0, done.stderr
            made.touch()
    return folder
