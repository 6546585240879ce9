"""The counter of operations and prose: what it counts, and what it refuses."""

import textwrap

import pytest

from tools import density

SOURCE = '''
"""A module."""

import math


def area(radius):  # a comment
    """Of a circle,
    in two lines."""
    a, b = radius, math.pi
    return [a * a * b for _ in range(1)][0]
'''


def test_operations_prose_and_packed_assignments_are_counted():
    figures = density.count(SOURCE)
    assert figures.prose_lines == 4  # the module's line, two of the function's, one comment
    assert figures.code_lines == 4
    assert figures.operations == 5  # two products, a clause, a call and a subscript
    assert figures.packed == [10]
    assert figures.long_functions == []


def test_breaking_a_line_changes_nothing():
    broken = SOURCE.replace("a * a * b for", "a\n        * a\n        * b\n        for")
    assert density.count(broken).mean_operations == density.count(SOURCE).mean_operations


LONG = "def long():\n" + "    pass\n" * 60


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        (LONG, "function-lines"),
        ("x = f(g(h(1))) + f(g(h(2))) + f(g(h(3)))\n", "mean-operations"),
        ("x = f(g(h(1))) + f(g(h(2))) + f(g(h(3)))\n", "operations-over-ten"),
        ("x = 1\n" * 9 + "a, b = 1, 2\nc, d = 3, 4\n", "packed-assignments"),
        ("x = 1\n" * 9, "prose"),
        (f"# {'x' * 99}\n", "columns"),
        (f"x = [1]  # {density.FORMAT_PRAGMAS[0]}\n", "format-pragmas"),
    ],
)
def test_what_exceeds_a_limit_is_named(source, limit):
    assert limit in dict(density.exceeded("tools/some.py", density.count(source)))


def test_a_file_within_its_limits_is_not_named():
    source = textwrap.dedent(SOURCE).replace("a, b = radius, math.pi", "a = b = radius")
    assert dict(density.exceeded("tools/some.py", density.count(source))) == {}


def test_the_script_alone_has_a_size():
    figures = density.count("# a comment\n" * 5_000)
    assert dict(density.exceeded("train_gpt.py", figures)) == {"lines": "5000 of 4600"}
    assert dict(density.exceeded("tools/some.py", figures)) == {}


def test_exceptions_are_read_with_their_reasons(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text('[tool.density]\n"tools/x.py prose" = "why"\n\n[tool.other]\n"a b" = "c"\n')
    assert density.read_exceptions(path) == {"tools/x.py prose": "why"}


@pytest.mark.parametrize(
    ("found", "reason", "over"),
    [
        ("6001 of 4600", "6000: why", True),
        ("6000 of 4600", "6000: why", False),
        ("6001 of 4600", "why: so", False),
    ],
)
def test_an_exception_with_a_number_is_a_limit_of_its_own(found, reason, over):
    assert density.beyond(found, reason) == over


def test_the_projects_files_keep_their_limits(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["density.py"])
    assert density.main() == 0, capsys.readouterr().out
