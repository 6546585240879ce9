"""docs/walkthrough.md: every name that it mentions is one, and its code runs.

What stands in backticks has one of the forms that the page names at its beginning. What has none
fails, so that no name escapes by being written in another way.
"""

import dataclasses
import functools
import lzma
import re
from pathlib import Path

import numpy as np
import pytest

import train_gpt as t
from tests.support import SOLO, random_model, tiny

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTINGS = {field.name.upper(): field for field in dataclasses.fields(t.Settings)}
WORDS = {"def NAME", "class NAME"}  # what a reader is told to search for
HAVE_TO_STAND_THERE = [
    "chunked_scan()",
    "sequential_scan()",
    "scan_terms()",
    "ScanState",
    "record_layout()",
    "float_type()",
    "exact_steps()",
    "Linear.dynamics_rows",
    "Evaluator._score_chunk()",
    "Evaluator._adapt()",
    "parameter_kind()",
    "FORMER_DEFAULTS",
]


def mentioned(page: str) -> list[str]:
    """What stands in backticks outside of code and formulas."""
    return sorted(set(re.findall(r"`([^`\n]+)`", FENCE.sub("", page))))


def look_up(name: str):
    """What a dotted name of train_gpt stands for; fields of a class count."""
    found = t
    for part in name.split("."):
        fields = getattr(found, "_fields", ())
        found = part if part in fields else getattr(found, part, None)
    return found


@functools.cache
def parameter_names() -> set[str]:
    """The parts of all Mambas' parameters' names."""
    names = set()
    for version in (1, 2, 3):
        model = t.model_skeleton(tiny(mamba_version=version))
        for name, _ in model.named_parameters():
            names |= set(name.split("."))
    return names


def is_setting(text: str) -> bool:
    """NAME, or NAME=value with a value that the setting may have."""
    name, _, value = text.partition("=")
    if name not in SETTINGS:
        return False
    return not value or value in SETTINGS[name].metadata["unit"].split("|")


def exists(text: str) -> bool:
    """Whether text names something, in one of the page's forms."""
    if text in WORDS or text in parameter_names():
        return True
    if re.fullmatch(r"[A-Z][A-Z0-9_]+(=\w+)?", text):
        return is_setting(text) or hasattr(t, text)
    if re.fullmatch(r"[\w./-]+\.(py|md|ipynb)", text):
        return (ROOT / text).is_file()
    if re.fullmatch(r"[\w.]+\(\)", text):
        return callable(look_up(text.removesuffix("()")))
    if re.fullmatch(r"[A-Z]\w+(\.\w+)*", text):
        return look_up(text) is not None
    return False


@pytest.mark.parametrize("text", mentioned(PAGE))
def test_what_the_walkthrough_names_exists(text):
    assert exists(text)


@pytest.mark.parametrize(
    "text",
    [
        "no_such_function()",
        "Evaluator.no_such_method()",
        "ScanInputs.no_such_field",
        "NO_SUCH_SETTING",
        "EVAL_MODE=psychic",
        "docs/no_such_page.md",
        "chunked_scan",
        "NoSuchClass",
    ],
)
def test_a_name_that_is_none_is_noticed(text):
    assert not exists(text)


@pytest.mark.parametrize("text", HAVE_TO_STAND_THERE)
def test_the_walkthrough_names_what_its_questions_are_about(text):
    assert text in mentioned(PAGE)


def run_code(page: str) -> dict:
    """The page's Python, run from top to bottom: the names that it leaves."""
    names = {}
    for language, code in FENCE.findall(page):
        if language == "python":
            exec(code, names)
    return names


def test_its_code_finds_the_step_size_rows_in_the_record(monkeypatch):
    found = run_code(PAGE)
    assert found["dtype"].base == np.float16

    # Of a small model, weights of the step size are doubled: the record changes there alone.
    settings = tiny()
    monkeypatch.setattr(t, "Settings", lambda: settings)
    found = run_code(PAGE)
    model = random_model(settings)
    before = decompressed_record(model)
    mixer = model.blocks[0].mixer
    groups = mixer.in_proj.weight.detach().split(list(mixer.sizes.columns().values()))
    rows = dict(zip(mixer.sizes.columns(), groups, strict=True))["step"]
    rows *= 2
    changed = np.flatnonzero(decompressed_record(model) != before)
    first = found["place_in_record"]
    assert first <= changed.min() < first + 2
    assert first + 2 * len(rows) - 2 <= changed.max() < first + 2 * len(rows)
    assert len(found["step_size_rows"]) == len(rows)
    limits = t.grid_limits(model)["blocks.0.mixer.in_proj.weight"].flatten()
    assert (limits[found["step_size_rows"]] == t.INT8_MAX).all()


def decompressed_record(model: t.Model) -> np.ndarray:
    """The bytes of the record in the model's artifact."""
    stored = t.quantize_model(model, model.settings, SOLO, {}, k=8.0)
    data = t.pack_artifact(model.settings, stored)
    record = lzma.LZMADecompressor().decompress(data[data.index(b"\n") + 1 :])
    return np.frombuffer(record, np.uint8)
