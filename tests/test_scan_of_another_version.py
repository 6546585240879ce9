"""tools/ideas/scan_of_another_version.py: what it takes, and that it is the other's scan."""

import sys
import types
from pathlib import Path

import pytest

import train_gpt as t
from tools.ideas import scan_of_another_version as idea

HERE = Path(t.__file__)


@pytest.fixture
def script(monkeypatch):
    """As much of train_gpt.py as an idea changes; what is imported is forgotten again."""
    monkeypatch.setitem(sys.modules, "another_version", None)
    return types.SimpleNamespace(need=t.need, __file__=t.__file__, triton_scan=t.triton_scan)


def test_the_scan_is_the_others(script, monkeypatch, tmp_path):
    other = tmp_path / "former.py"
    other.write_bytes(HERE.read_bytes() + b"\n# former\n")
    monkeypatch.setenv("IDEA_SCRIPT", str(other))
    idea.install(script)
    assert script.triton_scan.__module__ == "another_version"
    assert script.triton_scan.__code__.co_filename == str(other)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file"),
        (HERE.read_text(encoding="utf-8"), "is the present version"),
        ("mamba_scan = 1\n", "has no triton_scan()"),
    ],
)
def test_what_is_no_other_version_is_refused(text, reason, script, monkeypatch, tmp_path):
    other = tmp_path / "former.py"
    if text is not None:
        other.write_text(text, encoding="utf-8")
    monkeypatch.setenv("IDEA_SCRIPT", str(other))
    with pytest.raises(t.UserError, match="IDEA_SCRIPT=.*") as caught:
        idea.install(script)
    assert reason in str(caught.value)
