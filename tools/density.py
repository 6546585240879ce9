"""How densely the project's Python is written, and whether a reader's limits hold.

    python -m tools.density                  # every file that has limits; 1 if one is exceeded
    python -m tools.density --figures FILE   # the figures of some files, without a judgement

Operations are calls, arithmetic, subscripts, comparisons, conditional and boolean expressions,
lambdas and clauses of comprehensions. They are counted by statement, without those of the
statement's body, so that breaking a line changes nothing. Prose is docstrings and comments.
Exceptions are in pyproject.toml under [tool.density], each with its reason.
"""

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "train_gpt.py"
FOLDERS = ("tools", "bench", "data", "reference")

MOST_COLUMNS = 100
MOST_FUNCTION_LINES = 60
MOST_OPERATIONS = 10  # of one statement
MANY_OPERATIONS = 6  # of one statement; few may have more
MOST_MEAN_OPERATIONS = 1.6
MOST_PART_OVER_SIX = 0.015
FEW_OVER_SIX = 3  # of a small file
LEAST_PROSE = 25  # lines for 100 of code
MOST_PACKED = 30  # assignments such as `a, b = x, y` in the script
MOST_PACKED_ELSEWHERE = 15  # for 1,000 lines of code
MOST_LINES, MOST_BYTES = 4_600, 230_000  # of the script
FORMAT_PRAGMAS = ("fmt: " + "off", "fmt: " + "skip")

OPERATIONS = (
    ast.Call,
    ast.BinOp,
    ast.Subscript,
    ast.IfExp,
    ast.Compare,
    ast.BoolOp,
    ast.Lambda,
    ast.comprehension,
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (*FUNCTIONS, ast.ClassDef, ast.Module)
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Figures:
    """What is counted in one file. Lists hold the numbers of lines."""

    lines: int
    bytes: int
    code_lines: int  # lines that hold more than a comment or docstring
    prose_lines: int  # docstrings and comments
    statements: int  # without def and class
    operations: int  # of all statements
    over_six: list[int]  # statements with more than MANY_OPERATIONS
    over_ten: list[int]  # statements with more than MOST_OPERATIONS
    packed: list[int]  # assignments of several values to several names
    long_functions: list[str]  # names of those over MOST_FUNCTION_LINES
    wide_lines: list[int]  # lines over MOST_COLUMNS
    pragmas: list[int]  # lines that switch the formatter off

    @property
    def mean_operations(self) -> float:
        """Operations a statement."""
        return self.operations / max(1, self.statements)

    @property
    def prose(self) -> float:
        """Lines of prose for 100 of code."""
        return 100 * self.prose_lines / max(1, self.code_lines)


def own_operations(node: ast.AST) -> int:
    """Operations of a statement or expression, without the statements inside it."""
    total = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            continue
        total += isinstance(child, OPERATIONS) + own_operations(child)
    return total


def is_packed(node: ast.AST) -> bool:
    """Whether a statement assigns several values to several names at once."""
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)


def docstring_lines(tree: ast.Module) -> int:
    """Lines of all docstrings."""
    total = 0
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            text = node.body[0]
            total += text.end_lineno - text.lineno + 1
    return total


def length(function: ast.AST) -> int:
    """Lines from def to the end."""
    return function.end_lineno - function.lineno + 1


def count(source: str) -> Figures:
    """The figures of a file's text."""
    tree = ast.parse(source)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    nodes = list(ast.walk(tree))
    documented = docstring_lines(tree)
    comments = sum(token.type == tokenize.COMMENT for token in tokens)
    # A token of several lines, such as a string, is code in each of them.
    touched = set()
    for token in tokens:
        if token.type not in LAYOUT:
            touched.update(range(token.start[0], token.end[0] + 1))
    statements = {}
    for node in nodes:
        if isinstance(node, ast.stmt) and not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            statements[node] = own_operations(node)
    over_six = [node.lineno for node, n in statements.items() if n > MANY_OPERATIONS]
    over_ten = [node.lineno for node, n in statements.items() if n > MOST_OPERATIONS]
    packed = [node.lineno for node in nodes if is_packed(node)]
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    long_functions = [f.name for f in functions if length(f) > MOST_FUNCTION_LINES]
    lines = source.splitlines()
    wide_lines = [n for n, line in enumerate(lines, 1) if len(line) > MOST_COLUMNS]
    pragmas = [n for n, line in enumerate(lines, 1) if any(p in line for p in FORMAT_PRAGMAS)]
    return Figures(
        lines=len(lines),
        bytes=len(source.encode()),
        code_lines=len(touched) - documented,
        prose_lines=documented + comments,
        statements=len(statements),
        operations=sum(statements.values()),
        over_six=over_six,
        over_ten=over_ten,
        packed=packed,
        long_functions=long_functions,
        wide_lines=wide_lines,
        pragmas=pragmas,
    )


def exceeded(name: str, figures: Figures) -> Iterator[tuple[str, str]]:
    """The limits that a file does not keep: the limit's name, and what was found."""
    script = name == SCRIPT
    if figures.long_functions:
        yield "function-lines", f"over {MOST_FUNCTION_LINES}: {', '.join(figures.long_functions)}"
    if figures.mean_operations > MOST_MEAN_OPERATIONS:
        yield "mean-operations", f"{figures.mean_operations:.2f} of {MOST_MEAN_OPERATIONS}"
    # In a small file a part of its statements is none at all.
    allowed = int(MOST_PART_OVER_SIX * figures.statements)
    if not script:
        allowed = max(FEW_OVER_SIX, allowed)
    if len(figures.over_six) > allowed:
        found = f"{len(figures.over_six)} of {allowed}, in lines {figures.over_six}"
        yield "operations-over-six", found
    if figures.over_ten:
        yield "operations-over-ten", f"in lines {figures.over_ten}"
    # The script has one number; other files share theirs by length.
    packed = MOST_PACKED if script else MOST_PACKED_ELSEWHERE * figures.code_lines / 1_000
    if len(figures.packed) > max(1, packed):
        yield "packed-assignments", f"{len(figures.packed)} of {packed:.0f}: {figures.packed}"
    if figures.prose < LEAST_PROSE:
        yield "prose", f"{figures.prose:.0f} of {LEAST_PROSE} lines for 100 of code"
    if figures.wide_lines:
        yield "columns", f"over {MOST_COLUMNS} in lines {figures.wide_lines}"
    if figures.pragmas and not script:
        yield "format-pragmas", f"in lines {figures.pragmas}"
    if script and figures.lines > MOST_LINES:
        yield "lines", f"{figures.lines} of {MOST_LINES}"
    if script and figures.bytes > MOST_BYTES:
        yield "bytes", f"{figures.bytes} of {MOST_BYTES}"


def read_exceptions(path: Path) -> dict[str, str]:
    """Lines such as `"tools/x.py prose" = "why"` under [tool.density] in pyproject.toml.

    Python 3.10 has no reader of TOML, so the table is kept to such lines.
    """
    _, _, table = path.read_text(encoding="utf-8").partition("[tool.density]\n")
    table, _, _ = table.partition("\n[")
    # What is no such line, a comment say, is passed over.
    exceptions = {}
    for line in table.splitlines():
        key, equals, reason = line.partition(" = ")
        if equals:
            exceptions[key.strip('"')] = reason.strip('"')
    return exceptions


def beyond(found: str, reason: str) -> bool:
    """Whether what was found is over the number that an exception's reason may begin with.

    So an exception for a size does not let it grow: "6000: why it is not 4600".
    """
    most, colon, _ = reason.partition(":")
    return bool(colon) and most.isdecimal() and int(found.split()[0]) > int(most)


def limited_files() -> list[str]:
    """Files that have limits, from the repository's folder."""
    # Tests are left out: their prose is their names.
    found = [SCRIPT]
    for folder in FOLDERS:
        paths = sorted((ROOT / folder).rglob("*.py"))
        found += [str(path.relative_to(ROOT)) for path in paths]
    return found


def print_figures(name: str, figures: Figures) -> None:
    """One line."""
    over_six = 100 * len(figures.over_six) / max(1, figures.statements)
    print(
        f"{name}: {figures.lines} lines, {figures.bytes} bytes, "
        f"{figures.mean_operations:.2f} operations a statement, {over_six:.1f} % over 6, "
        f"{len(figures.over_ten)} over 10, {figures.prose:.0f} lines of prose for 100 of code, "
        f"{len(figures.packed)} packed assignments"
    )


def main() -> int:
    """Prints what exceeds its limit, and the script's figures; 1 if anything does.

    An exception that nothing needs counts too, so that the table of them only holds what is so.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figures", nargs="+", type=Path, metavar="FILE", default=[])
    files = parser.parse_args().figures
    for path in files:
        print_figures(str(path), count(path.read_text(encoding="utf-8")))
    if files:
        return 0
    exceptions = read_exceptions(ROOT / "pyproject.toml")
    unused = set(exceptions)
    problems = 0
    for name in limited_files():
        figures = count((ROOT / name).read_text(encoding="utf-8"))
        for limit, found in exceeded(name, figures):
            key = f"{name} {limit}"
            unused.discard(key)
            if key not in exceptions or beyond(found, exceptions[key]):
                problems += 1
                print(f"{name}: {limit}: {found}")
    for key in sorted(unused):
        problems += 1
        print(f"pyproject.toml: the exception {key!r} is not needed")
    print_figures(SCRIPT, count((ROOT / SCRIPT).read_text(encoding="utf-8")))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
