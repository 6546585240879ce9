"""Two cells of the table of ended runs; the others are made by hand: python -m tests.kill_table."""

import pytest

from tests import kill_table


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
