"""Elements of a page. Text from a log is escaped when it goes into one, unless it is Html."""

import html
import re
import sys
from collections.abc import Iterable

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.report", file=sys.stderr)
    sys.exit(2)

from tools.command import need


class Html(str):
    """Text that is HTML already."""


def escaped(content) -> Html:
    """Anything as HTML: what is no Html yet shows as it is written."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def join(contents: Iterable) -> Html:
    """One after the other."""
    return Html("".join(map(escaped, contents)))


def element(tag: str, *contents, **attributes) -> Html:
    """An element; class_="x" gives it a class, since `class` is a word of Python's."""
    said = [f' {name.rstrip("_")}="{escaped(value)}"' for name, value in attributes.items()]
    return Html(f"<{tag}{''.join(said)}>{join(contents)}</{tag}>")


def table(header: list, rows: list[list]) -> Html:
    """A table whose first column names its rows; on a narrow screen it scrolls by itself."""
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    body = []
    for name, *cells in rows:
        first = element("th", name, scope="row")
        body.append(element("tr", first, *(element("td", cell) for cell in cells)))
    whole = element("table", element("thead", head), element("tbody", *body))
    return element("div", whole, class_="wide", tabindex="0")


def bar(name: str, parts: list[float], whole: float, told: str) -> Html:
    """A bar as long as `whole`, of which the parts are filled, one shade each, and what it tells.

    Parts that come to more than the whole fill it all, in the colour of what is wrong.
    """
    over = sum(parts) > whole
    fills = []
    for part in parts:
        percent = 100 * max(0.0, part) / max(whole, sum(parts), 1e-9)
        fills.append(element("i", style=f"width:{percent:.2f}%"))
    track = element("span", *fills, class_="track over" if over else "track")
    names = element("span", name, class_="name"), element("span", told, class_="told")
    return element("div", names[0], track, names[1], class_="bar")


ESCAPED_BAR = re.compile(r"(?<!\\)\|")  # what divides a row of Markdown; \| is a bar in a cell


def from_markdown(text: str) -> Html:
    """What tools.audit prints, as HTML: a table, lines beside it, and words in **bold**.

    Raises UserError if there is no table in it.
    """
    rows = []
    above = []
    below = []
    for line in text.splitlines():
        if line.startswith("|"):
            cells = ESCAPED_BAR.split(line.strip().removeprefix("|").removesuffix("|"))
            rows.append([cell.strip().replace("\\|", "|") for cell in cells])
        elif line.strip():
            (below if rows else above).append(element("p", strong(line)))
    need(len(rows) > 2, "--audit: there is no table in it; give what python -m tools.audit prints")
    header, _, *body = rows
    return join([*above, table(header, body), *below])


def strong(line: str) -> Html:
    """A line with its **bold** words."""
    parts = line.split("**")
    return join(element("strong", part) if place % 2 else part for place, part in enumerate(parts))
