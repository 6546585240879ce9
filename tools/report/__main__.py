"""Runs' logs as one page of HTML for a reviewer, which needs no network.

    python -m tools.report logs/first.jsonl --out report.html
    python -m tools.report logs/s1.jsonl logs/s2.jsonl logs/s3.jsonl --out report.html --static
    python -m tools.report logs/first.jsonl --audit audit.md --out report.html

The page shows result, clocks, curves, settings, bytes, machine, data and hashes, quantization, bits
by document and by place, test-time training chunk by chunk, and a sample; each of several runs has
a column. --audit adds what python -m tools.audit printed. Curves answer to the mouse: the page then
includes plotly (requirements-dev.txt), 5 MB. With --static they are drawings, and the page has less
than 300 kB. What a log says is the word of whoever trained.
"""

import argparse
import base64
import hashlib
import sys
from pathlib import Path

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.report", file=sys.stderr)
    sys.exit(2)

from tools.command import Parser, UserError, encoded, need, need_place, run_command, write_whole
from tools.logs import not_a_log
from tools.report import charts, sections
from tools.report.markup import Html, element, from_markdown, join
from tools.runs import Run, find_logs, read_run

HERE = Path(__file__).resolve().parent
MOST_BYTES = 6_000_000  # of a page
MOST_BYTES_STATIC = 300_000


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs, each with a name of its own: those of one name are called after their files."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    for place, path in enumerate(paths):
        if names.count(names[place]) > 1:
            runs[place] = runs[place]._replace(name=f"{names[place]} ({path})")
    return runs


def read_audit(path: Path | None) -> Html:
    """The audit's table; what makes one, without a file."""
    if path is None:
        command = "python -m tools.audit ARTIFACT --data FOLDER --tokenizer FILE --log LOG.txt"
        told = f"No audit was given: {command} > audit.md, and --audit audit.md here."
        return element("p", told, class_="missing")
    try:
        return from_markdown(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"--audit {path}: not a text") from None


def build_sections(runs: list[Run], given: argparse.Namespace) -> dict[str, Html]:
    """The page's sections by their titles, in the order in which they are read."""
    draw = charts.static if given.static else charts.interactive
    most = charts.MOST_RECORDS_STATIC if given.static else charts.MOST_RECORDS
    curves = [draw(chart) for chart in charts.training_charts(runs, most)]
    if given.static and curves:
        curves = [charts.legend(runs), element("div", *curves, class_="figures")]
    curves = curves or [sections.missing("losses and rates of training", sections.CURVES)]
    chunks = [draw(chart) for chart in charts.chunk_charts(runs, most)]
    if given.static and chunks:
        chunks = [charts.legend(runs), element("div", *chunks, class_="figures")]
    profiles = {name: draw(chart) for name, chart in charts.profile_charts(runs).items()}
    # What came of it, how it was made, what of, and what else is known of the model.
    found = {"Result": sections.result(runs), "Clocks": sections.clocks(runs)}
    found |= {"Curves": join(curves), "Settings": sections.settings(runs)}
    found |= {"Bytes": sections.sizes(runs), "Machine": sections.machine(runs)}
    found |= {"Data": sections.data(runs), "Quantization": sections.quantization(runs)}
    found["Where the bits are"] = sections.whereabouts(runs, profiles)
    found["Test-time training"] = sections.adaptation(runs, chunks)
    found |= {"Sample": sections.sample(runs), "Audit": read_audit(given.audit)}
    return found


def page(runs: list[Run], given: argparse.Namespace) -> str:
    """The whole document.

    Its policy lets nothing come from a network, and no script run but its own: not what a log
    might have smuggled in.
    """
    found = build_sections(runs, given)
    scripts = [] if given.static else [plotly(), (HERE / "draw.js").read_text(encoding="utf-8")]
    allowed = " ".join(f"'sha256-{digest(script)}'" for script in scripts) or "'none'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {allowed}"
    )
    title = f"Report of {', '.join(run.name for run in runs)}"
    links = [element("a", name, href=f"#{anchor(name)}") for name in found]
    body = [element("h1", title), element("nav", *links), element("p", claim(), class_="quiet")]
    for name, content in found.items():
        heading = element("h2", name)
        body.append(element("section", heading, content, id=anchor(name)))
    body += [element("script", Html(script)) for script in scripts]
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Html((HERE / "page.css").read_text(encoding="utf-8"))),
    ]
    whole = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!doctype html>\n{whole}\n"


def claim() -> str:
    """What a reviewer must know of all that follows."""
    return "All figures but the audit's are from the logs: the word of whoever trained."


def plotly() -> str:
    """The JavaScript of the installed package."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def digest(script: str) -> str:
    """A script's name in the page's policy."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def anchor(name: str) -> str:
    """A section's address in the page."""
    return name.lower().replace(" ", "-")


def main() -> int:
    """Reads the logs and writes the page."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help="runs' .jsonl, or folders of them")
    add("--out", required=True, type=Path, metavar="HTML")
    add("--static", action="store_true", help="drawings without plotly, under 300 kB")
    add("--audit", type=Path, metavar="FILE", help="what tools.audit printed")
    given = parser.parse_args()
    paths = find_logs(given.logs)
    inputs = [*paths, *(path.with_suffix(".txt") for path in paths)]
    need_place(given.out, *inputs, *([given.audit] if given.audit else []))
    runs = read_runs(paths)
    try:
        text = page(runs, given)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise not_a_log(", ".join(map(str, paths))) from None
    size = len(encoded(text))
    most = MOST_BYTES_STATIC if given.static else MOST_BYTES
    need(size <= most, f"the page would take {size:,} of {most:,} bytes: give fewer logs")
    write_whole(given.out, text)
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{given.out}: {size:,} bytes, {count}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("report.py", main))
