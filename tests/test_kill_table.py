"""Two cells of the table of ended runs; the others are made by hand: python -m tests.kill_table."""

import time
from collections import Counter
from types import SimpleNamespace

import pytest

from tests import held_run, kill_table
from tests.support import run_ranks


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return kill_table.Table(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(
    ("phase", "name", "left", "resumed"),
    [
        ("artifact", "SIGKILL", "a.int6.lzma.part", "step 20"),
        ("evaluation, documents, adapting", "SIGTERM", "a.int6.lzma", "the artifact"),
    ],
)
def test_a_run_that_is_ended_goes_on_to_the_same_result(table, phase, name, left, resumed):
    """By a process of its own, in the midst of the phase."""
    cell = table.fill(kill_table.Cell(phase, 1, name))
    assert cell.faults == []
    assert cell.resumed == resumed
    assert left in cell.left.split(", ")
    assert cell.steps_lost == 0


def test_ranks_whose_validation_is_slow_score_equally_often(tmp_path, monkeypatch):
    """Or one waits for the others in another collective than they do, which ends them all."""
    monkeypatch.setattr(held_run, "SLOW_SECONDS", 0.1)
    scored = Counter()

    def score(settings, ranks):
        scored[ranks.rank] += 1
        time.sleep(0.02 * ranks.rank)  # their clocks differ

    script = SimpleNamespace(plain_score=score)
    held_run.Run(script, tmp_path / "held").slow_validation()
    run_ranks(2, lambda ranks: script.plain_score(None, ranks))
    assert scored[0] == scored[1] > 1
