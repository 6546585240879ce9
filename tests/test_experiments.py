"""The experiments' data: its tables are made from it, and what the digest cites is there."""

import re

import pytest

from tools import experiments
from tools.command import UserError

DIGEST = experiments.ROOT / "docs" / "experiments.md"
LIMIT = 120  # lines that a reader still reads


def test_the_tables_are_those_of_the_data():
    text = experiments.render(experiments.read_rows(experiments.DATA))
    assert experiments.TABLES.read_text(encoding="utf-8") == text


def test_the_digest_is_short_and_cites_rows_that_exist():
    text = DIGEST.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LIMIT
    ids = [row["id"] for row in experiments.read_rows(experiments.DATA)]
    cited = re.findall(r"`([ab]\d\d(?:-\d\d)?)`", text)
    assert cited
    for name in cited:
        assert any(row == name or row.startswith(f"{name}-") for row in ids), name


def test_open_rows_have_what_a_claim_needs():
    for row in experiments.read_rows(experiments.DATA):
        if row["verdict"] == "planned":  # written down before it runs
            assert row["predicted"] and not row["found"], row["id"]
        elif row["corpus"] != experiments.CLOSED:
            assert row["log"] and row["found"] and row["hardware"], row["id"]


def test_rows_that_ran_elsewhere_say_so_themselves():
    """A table's heading holds for all of its rows; what differs has a column."""
    alike = dict.fromkeys(experiments.COLUMNS, "x")
    here = {**alike, "id": "b01-01", "script": "aaaaaaa", "hardware": "one H200"}
    there = {**here, "id": "b01-02", "script": "bbbbbbb"}
    page = experiments.block([here, there], "##")
    assert page[3] == "x; x, x split, one H200."
    assert page[5].endswith("| script |")
    assert [line.split(" | ")[-1] for line in page[7:]] == ["aaaaaaa |", "bbbbbbb |"]
    assert experiments.block([here], "##")[3] == "x, script aaaaaaa; x, x split, one H200."


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a01-01,,,,,,,,,,,,", "other columns"),
        ("x,,,,,,,,,,,,,\nx,,,,,,,,,,,,,", "stands there twice"),
        ("x,,,,,,,,,,,,,logs/none.txt", "which is not there"),
    ],
)
def test_other_data_is_refused(tmp_path, line, said):
    path = tmp_path / "data.csv"
    path.write_text(",".join(experiments.COLUMNS) + "\n" + line + "\n")
    with pytest.raises(UserError, match=said):
        experiments.read_rows(path)
