"""docs/settings.md says what the script says."""

import dataclasses
import re

import train_gpt as t
from tools import experiments, settings_page


def test_the_page_is_what_the_script_says_now():
    """If not: python -m tools.settings_page"""
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.settings_page()


def test_the_page_has_a_row_for_each_setting_preset_and_name():
    page = settings_page.settings_page()
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    wanted = [field.name.upper() for field in dataclasses.fields(t.Settings)]
    wanted += [*t.PRESETS, *settings_page.CONTEST.read_text(encoding="utf-8").split()]
    assert {f"| `{name}`" for name in wanted} <= set(rows)


def test_the_recipe_has_a_reason_for_each_choice():
    """For all that the default has and PLAIN has not; reasons name rows that are there."""
    reasons = {name.lower(): why for name, why in settings_page.read_reasons().items()}
    assert t.PLAIN.keys() <= reasons.keys() <= t.FIELDS.keys()
    rows = {row["id"] for row in experiments.read_rows(experiments.DATA)}
    for why in reasons.values():
        for name in re.findall(r"`([ab]\d\d(?:-\d\d)?)`", why):
            assert any(row == name or row.startswith(f"{name}-") for row in rows), name


def test_an_outdated_page_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings_page, "PAGE", tmp_path / "settings.md")
    monkeypatch.setattr("sys.argv", ["settings_page"])
    assert settings_page.main() == 0
    monkeypatch.setattr("sys.argv", ["settings_page", "--check"])
    assert settings_page.main() == 0
    settings_page.PAGE.write_text("old", encoding="utf-8")
    assert settings_page.main() == 1
    assert capsys.readouterr().err.endswith("is out of date: python -m tools.settings_page\n")
