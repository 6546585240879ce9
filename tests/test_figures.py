"""The pictures that docs/figures.py draws use the letters of the texts beside them."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("README.md", "docs/mamba3.ipynb", "train_gpt.py")
GREEK = {"λ": "lambda", "θ": "theta", "angle_rate": "rate"}  # as train_gpt.py says it


def letters(text: str) -> set[str]:
    """What has a token's number t in a text: {"dt", "lambda"} of "λ_t dt_t"."""
    found = re.findall(r"([A-Za-zΑ-ω]+(?:_rate)?)_(?:t\b|\{t)", text)
    return {GREEK.get(name, name) for name in found}


def test_the_picture_of_a_layer_has_the_letters_of_the_texts():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    figure, axes = figures.canvas(11.2, 7.0)
    figures.draw_mamba(axes, 8.65)
    drawn = letters(" ".join(text.get_text() for text in axes.texts))
    figures.pyplot.close(figure)
    texts = {name: letters((ROOT / name).read_text(encoding="utf-8")) for name in BESIDE}
    assert {"y", "S", "k", "v", "q", "A", "dt", "lambda"} <= drawn & texts["README.md"]
    for name in ("docs/mamba3.ipynb", "train_gpt.py"):
        assert drawn <= texts[name], name
