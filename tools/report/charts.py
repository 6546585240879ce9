"""Curves: as data for plotly, which draws them in the browser, or drawn here as SVG.

Both show the same numbers, each run in one colour. Curves are drawn over several axes (step, second
of training, tokens), because runs with other batches or machines can only be compared over some of
them. In the browser the reader chooses one; a static page shows all. Losses and times are drawn as
logged. If there are more records than a page should hold, some are chosen at even distances.
"""

import io
import json
import math
import re
import statistics
import sys
from typing import NamedTuple

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.report", file=sys.stderr)
    sys.exit(2)

from tools.report.markup import Html, element, join
from tools.report.profiles import PROFILES, ROWS, chunks_of, rows_of, short_name
from tools.runs import FEW, REACH, Run, smoothed

COLOURS = (  # each stands out on white and on nearly black
    "#2f7de1",
    "#e8590c",
    "#2b9a66",
    "#c2389a",
    "#8a63d2",
    "#0d96a8",
    "#b08800",
    "#d6454f",
)
STEP_TIMES = "Time of a step, between two lines of the log"
MOST_RECORDS = 7_000  # of training, of all runs; an interactive page has a megabyte for them
MOST_RECORDS_STATIC = 800
INK = "#010203"  # what matplotlib draws lines and words in; becomes the page's own colour


class Curve(NamedTuple):
    """A line, with its places on each of its chart's axes."""

    name: str
    colour: str
    xs: dict[str, list[float]]  # by the axis's name
    y: list[float]
    faint: bool = False  # what another curve is the mean of
    dots: bool = False  # points, not a line


class Chart(NamedTuple):
    """Curves of several runs over the same axes, of which the reader chooses one."""

    title: str
    y_name: str
    curves: list[Curve]
    y_range: tuple[float, float] | None = None
    main: bool = False  # drawn over each axis on a static page, others over the first
    ticks: tuple[str, ...] = ()  # names of the places 0, 1, ... on the axis; else numbers


def thinned(records: list, most: int) -> list:
    """At most about so many of the records, evenly chosen, first and last among them."""
    each = math.ceil(len(records) / max(2, most))
    return records if each <= 1 else [*records[:-1:each], records[-1]]


def places(run: Run, records: list[dict]) -> dict[str, list[float]]:
    """Where the records of a run lie, by step, by second of training and by token."""
    batch = run.settings["train_batch_tokens"]
    steps = [record["step"] for record in records]
    seconds = [round(record["train_ms"] / 1000, 3) for record in records]
    tokens = [round(step * batch / 1e6, 3) for step in steps]
    return {"step": steps, "second of training": seconds, "million tokens": tokens}


def colour_of(run: Run, runs: list[Run]) -> str:
    """A run's colour: the same in every chart, whatever runs these leave out."""
    place = [other.name for other in runs].index(run.name)
    return COLOURS[place % len(COLOURS)]


def training_charts(runs: list[Run], most: int) -> list[Chart]:
    """Losses, rates and the time of a step, of the runs that logged any training.

    most: records of all runs together that are drawn; of more, every so many-th.
    """
    drawn = [run for run in runs if run.losses]
    if not drawn:
        return []
    losses = []
    rates = []
    times = []
    for run in drawn:
        colour = colour_of(run, runs)
        kept = thinned(run.losses, most // len(drawn))
        xs = places(run, kept)
        loss = [record["train_loss"] for record in kept]
        means = smoothed([record["train_loss"] for record in run.losses])
        mean = thinned([round(value, 5) for value in means], most // len(drawn))
        losses.append(Curve(run.name, colour, xs, loss, faint=True))
        losses.append(Curve(run.name, colour, xs, mean))
        losses += validation_curves(run, colour)
        if all("lr_factor" in record for record in kept):
            rates.append(Curve(run.name, colour, xs, [record["lr_factor"] for record in kept]))
        # A step's time belongs to the later of the two records that tell it.
        later = {name: values[1:] for name, values in xs.items()}
        times.append(Curve(run.name, colour, later, step_times(kept)))
    title = f"Training loss: the log's lines; from {FEW} on, the mean of {2 * REACH + 1} too"
    charts = [
        Chart(title, "nats a token", losses, lowest_part(losses), main=True),
        Chart("Learning rates, as a part of their height", "part", rates),
        Chart(STEP_TIMES, "milliseconds", times, usual_part(times)),
    ]
    return [chart for chart in charts if any(curve.y for curve in chart.curves)]


def profile_charts(runs: list[Run]) -> dict[str, Chart]:
    """Bits per byte by document and by place, of each table that some run has."""
    found = {}
    for name, (title, axis) in PROFILES.items():
        curves = []
        for run in runs:
            rows = rows_of(run, name)
            xs = {axis: [row.place for row in rows]}
            bits = [round(row.bits_per_byte, 5) for row in rows]
            curves += [Curve(run.name, colour_of(run, runs), xs, bits)] if rows else []
        if curves:
            ticks = tuple(map(short_name, range(ROWS)))
            found[name] = Chart(title, "bits a byte", curves, ticks=ticks)
    return found


def chunk_charts(runs: list[Run], most: int) -> list[Chart]:
    """The course of evaluation: scores, what an epoch brought, and seconds, chunk by chunk.

    most: chunks of all runs that are drawn, as in training_charts().
    """
    scores = []
    gains = []
    seconds = []
    for run in runs:
        colour = colour_of(run, runs)
        final = chunks_of(run, "final")
        plain = chunks_of(run, "after_quantization")
        each = most // len(runs)
        if plain:
            name = f"{run.name}: plain windows, frozen"
            scores.append(chunk_curve(name, colour, plain.nats, each, faint=True))
        if not final:
            continue
        scores.append(chunk_curve(run.name, colour, final.nats, each))
        if final.epochs:
            gains.append(chunk_curve(run.name, colour, final.learnt, each))
            pairs = zip(final.adapt_seconds, final.epochs, strict=True)
            adapted = [taken if epochs else None for taken, epochs in pairs]
            seconds.append(chunk_curve(run.name, colour, adapted, each))
            name = f"{run.name}: scoring"
            seconds.append(chunk_curve(name, colour, final.score_seconds, each, faint=True))
    charts = [
        Chart("Nats of each chunk, scored before it is learnt", "nats a token", scores),
        Chart("By how much a chunk's last epoch begins lower than its first", "nats", gains),
        Chart("Time of adapting to a chunk and, faint, of scoring it", "seconds", seconds),
    ]
    return [chart for chart in charts if chart.curves]


def chunk_curve(name: str, colour: str, values: list, most: int, faint: bool = False) -> Curve:
    """A curve over the numbers of chunks."""
    kept = thinned(list(enumerate(values, 1)), most)
    ys = [None if value is None else round(value, 6) for _, value in kept]
    return Curve(name, colour, {"chunk": [place for place, _ in kept]}, ys, faint)


def lowest_part(curves: list[Curve]) -> tuple[float, float]:
    """What of the losses is shown: the first ones are so high that nothing else could be told."""
    lowest = min(min(finite_ones(curve.y), default=math.inf) for curve in curves)
    lowest = lowest if math.isfinite(lowest) else 0.0  # a run that diverged at once
    return lowest - 0.1, lowest + 1.5


def usual_part(curves: list[Curve]) -> tuple[float, float]:
    """What of the times is shown: up to twice their median, or a single pause would flatten all."""
    return 0.0, 2 * statistics.median([1.0] + [y for curve in curves for y in curve.y])


def finite_ones(values: list[float]) -> list[float]:
    """The values but for NaN and infinity, which a run that diverges leaves."""
    return [value for value in values if math.isfinite(value)]


def step_times(records: list[dict]) -> list[float]:
    """Milliseconds of a step on the training clock, between each two records.

    The log's own figure is the mean since the start, in which a pause can no longer be seen.
    """
    times = []
    for before, after in zip(records, records[1:], strict=False):
        steps = max(1, after["step"] - before["step"])
        times.append(round((after["train_ms"] - before["train_ms"]) / steps, 3))
    return times


def validation_curves(run: Run, colour: str) -> list[Curve]:
    """The validation losses that a run took as it trained, and at its end, as dots."""
    known = []
    for record in [record for record in run.records if record["event"] == "validation"]:
        before = [loss for loss in run.losses if loss["step"] <= record.get("step", 0)]
        if before:
            clock = record["step"] * before[-1]["step_avg_ms"]  # this record has none
            known.append(record | {"train_ms": clock})
    if not known:
        return []
    scores = [record["val_loss"] for record in known]
    return [Curve(f"{run.name}: validation", colour, places(run, known), scores, dots=True)]


def finite(values: list[float | None]) -> list[float | None]:
    """The values with None for what is not finite, as JSON has no name for it: a gap in a curve."""
    return [value if value is not None and math.isfinite(value) else None for value in values]


def payload(chart: Chart) -> str:
    """A chart as JSON in which no sign can end a script's element.

    HTML reads a script's text as it stands: what is escaped for other elements would stay so.
    """
    curves = []
    for curve in chart.curves:
        xs = {name: finite(values) for name, values in curve.xs.items()}
        curves.append(curve._asdict() | {"xs": xs, "y": finite(curve.y)})
    text = json.dumps(chart._asdict() | {"curves": curves}, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def interactive(chart: Chart) -> Html:
    """A place that draw.js fills, and the data for it."""
    data = element("script", Html(payload(chart)), type="application/json")
    place = element("div", class_="plot")
    caption = element("figcaption", chart.title)
    return element("figure", caption, data, place, class_="chart")


def static(chart: Chart) -> Html:
    """The chart as SVG."""
    axes = list(chart.curves[0].xs)[: None if chart.main else 1]
    drawings = [element("div", svg(chart, axis), class_="svg") for axis in axes]
    caption = element("figcaption", chart.title)
    kind = "chart main" if chart.main else "chart"
    return element("figure", caption, element("div", *drawings, class_="row"), class_=kind)


def svg(chart: Chart, axis: str) -> Html:
    """One drawing, whose lines and words take the colour of the text around it.

    Words stay words, in the page's font, so that they can be searched and read aloud.
    """
    import matplotlib
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK)
    ink |= {"xtick.color": INK, "ytick.color": INK, "text.parse_math": False}
    # Equal logs give equal files. Parts are named after their drawing, for a page holds several.
    style = {"svg.fonttype": "none", "svg.hashsalt": chart.title + axis, "font.size": 9} | ink
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes = figure.subplots()
        # What is faint is behind a curve that tells more; drawn alone, it takes too many bytes.
        for curve in chart.curves:
            if curve.faint and chart.main:
                continue
            line = {"marker": "o", "markersize": 4} if curve.dots or chart.ticks else {}
            line |= {"linestyle": ""} if curve.dots else {}
            line["alpha"] = 0.4 if curve.faint else 1.0
            ys = [math.nan if y is None else y for y in curve.y]
            axes.plot(curve.xs[axis], ys, color=curve.colour, linewidth=1.2, **line)
        axes.set(xlabel=axis, ylabel=chart.y_name)
        if chart.y_range:
            axes.set_ylim(*chart.y_range)
        if chart.ticks:
            axes.set_xticks(range(ROWS), chart.ticks, rotation=60, fontsize=7)
            places = [place for curve in chart.curves for place in curve.xs[axis]]
            axes.set_xlim(min(places) - 0.5, max(places) + 0.5)
        axes.grid(alpha=0.2)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return Html(re.sub(r"<[^>]*>", rounded, text))


def rounded(tag: re.Match) -> str:
    """A tag's numbers to a tenth of a point: finer than a screen shows, and most of the file."""
    return re.sub(r"(\d+\.\d)\d+", r"\1", tag[0])


def legend(runs: list[Run]) -> Html:
    """Which colour is whose, for the drawings that have no words on their curves."""
    keys = []
    for run in runs:
        swatch = element("i", style=f"background:{colour_of(run, runs)}")
        keys.append(element("span", swatch, run.name))
    return element("p", join(keys), class_="legend")
