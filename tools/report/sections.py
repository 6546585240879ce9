"""The page's sections, from result to sample, each a function of the runs.

A log may lack a section's data: its script is older, a setting was not given, or the run has not
come so far. The section then says so, of which runs, and names the setting that fills it; nothing
is shown as zero, or left out in silence. Of several runs, each has a column, in the order given.

Figures are those of the last record of each event (tools/runs.py), unrounded where a reviewer
compares them with the log. Nothing is judged here but lengths against limits: tools/audit and
tools/package.py judge.
"""

import re
from collections.abc import Callable

from tools.contradictions import CAP_BYTES, limit_of
from tools.logs import seconds_to_score, spread
from tools.report.markup import Html, bar, element, join, table
from tools.runs import Run, differing, text_of
from tools.summary import scored_text, way_of_scoring

SETTING = re.compile(r'([A-Z][A-Z0-9_]+=(?:"[^"]*"|\S*\w))')  # in a sentence
NONE = "—"  # in a cell whose run has no such figure
PHASES = {  # of a run's wall clock: each ends with its event, and begins where the one before ends
    "ready": "start and compiling",
    "trained": "training, GPTQ, packing",
    "after_quantization": "score after quantization",
    "final": "evaluation",
}
CURVES = "EVAL_ONLY=0 trains, and TRAIN_LOG_EVERY=50 writes a line after so many steps"
COUNTS = {  # of the data: event and key
    "validation shards": ("validation_data", "shards"),
    "validation documents": ("validation_data", "documents"),
    "validation tokens": ("validation_data", "tokens"),
    "of these scored": ("validation_data", "scored_tokens"),
    "their bytes": ("validation_data", "bytes"),
    "training shards": ("training_data", "shards"),
    "training tokens": ("training_data", "tokens"),
}
HASHES = {  # likewise
    "names and lengths of training shards": ("training_data", "digest"),
    "SHA-256 of the script": ("settings", "script_sha256"),
    "SHA-256 of the artifact": ("trained", "artifact_sha256"),
    "SHA-256 of the scored artifact": ("final", "artifact_sha256"),
}


def missing(what: str, remedy: str, lacking: list[Run] = (), runs: list[Run] = ()) -> Html:
    """That a section has no data, of which runs if it is not all of them, and what fills it.

    what: the data that is not there. remedy: a sentence, whose settings (NAME=value) stand out.
    """
    some = len(lacking) < len(runs)
    whose = f" of {', '.join(run.name for run in lacking)}" if some else ""
    pieces = SETTING.split(f"Not in the log{whose}: {what}. {remedy}.")
    marked = [element("code", one) if place % 2 else one for place, one in enumerate(pieces)]
    return element("p", *marked, class_="missing")


def comparison(runs: list[Run], rows: dict[str, Callable[[Run], object]]) -> Html:
    """A table with a column for each run; a row in which no run has a value is left out."""
    found = []
    for name, value in rows.items():
        cells = [value(run) for run in runs]
        if any(cell is not None for cell in cells):
            found.append([name, *(NONE if cell is None else cell for cell in cells)])
    return element("div", table(["", *(run.name for run in runs)], found), class_="runs")


def figure(event: str, key: str, form: str = "{:,}") -> Callable[[Run], str | None]:
    """What reads a number of the last record of an event, or None.

    form: how it is shown; by default whole, with commas between thousands.
    """

    def read(run: Run) -> str | None:
        value = run.events.get(event, {}).get(key)
        return None if value is None else form.format(value)

    return read


def code_hash(event: str, key: str) -> Callable[[Run], Html | None]:
    """What reads a hash, which may break across lines."""

    def read(run: Run) -> Html | None:
        value = run.events.get(event, {}).get(key)
        return value and element("code", value, class_="hash")

    return read


# ---- Result and clocks ---------------------------------------------------------------------------


def result(runs: list[Run]) -> Html:
    """The final score, large, and below it the figures on the way there."""
    cards = []
    # The contest's figure first: who reads on a phone sees nothing else at once.
    for run in runs:
        score = run.figures.get("final")
        told = way_of_scoring(run.events["settings"]["settings"])
        what = f"bits per byte; {told}" if score else run.state
        big = element("b", f"{score:.4f}" if score else "no score")
        cards.append(element("div", run.name, big, element("span", what), class_="card"))
    rows = {
        "state": lambda run: run.state,
        "bits per byte, final": figure("final", "val_bpb", "{:.8f}"),
        "before quantization, plain windows": figure("trained", "val_bpb", "{:.8f}"),
        "after quantization, plain windows": figure("after_quantization", "val_bpb", "{:.8f}"),
        "nats per token, final": figure("final", "val_loss", "{:.8f}"),
        "steps": figure("trained", "steps"),
        "milliseconds a step": figure("trained", "step_avg_ms", "{:.2f}"),
        "epochs given up for time": figure("final", "epochs_given_up"),
        "starts": figure("trained", "starts"),
    }
    return join([element("div", *cards, class_="cards"), seeds(runs), comparison(runs, rows)])


def seeds(runs: list[Run]) -> Html:
    """Mean and deviation of the final score, if the runs differ in their seeds alone.

    Runs of several settings have no common mean: nothing is said of them.
    """
    scores = [run.figures["final"] for run in runs if "final" in run.figures]
    if len(scores) < 2 or set(differing(runs)) - {"seed"}:
        return Html("")
    found = spread(scores)
    told = f"mean {found.mean:.5f}, sample standard deviation {found.std:.5f}"
    return element("p", f"{len(scores)} runs that differ in SEED alone: {told}.")


def clocks(runs: list[Run]) -> Html:
    """Training and evaluation against their limits, and where the whole time went."""
    return join(join([element("h3", run.name), clocks_of(run)]) for run in runs)


def clocks_of(run: Run) -> Html:
    """The bars of one run.

    The limit is the run's own, or the contest's where that is less. The evaluation's seconds are
    those on the wall up to its score, since no record holds its own clock.
    """
    settings = run.events["settings"]["settings"]
    bars = []
    clock = run.events.get("trained", {}).get("train_clock_seconds")
    if clock is None:
        remedy = "A run of today's script to the end of training with EVAL_ONLY=0 fills it"
        bars.append(missing("the training clock", remedy))
    else:
        limit = limit_of(settings["max_wallclock_seconds"])
        bars.append(bar("training", [clock], limit, f"{clock:.1f} s of {limit:g} s"))
    evaluation = seconds_to_score(run.records)
    if evaluation is None:
        bars.append(missing("a final score", "EVAL_ONLY=1 with the same RUN_ID takes it"))
    else:
        limit = limit_of(settings["eval_max_seconds"])
        told = f"{evaluation:.1f} s of {limit:g} s"
        bars.append(bar("evaluation", [evaluation], limit, told))
    return join([*bars, whole_time(run)])


def whole_time(run: Run) -> Html:
    """The wall clock from the start on, in its phases.

    A run that only scored, or has not come to its end, has fewer of them.
    """
    ends = {event: run.events[event]["seconds"] for event in PHASES if event in run.events}
    if not ends:
        return Html("")
    began = 0.0
    parts = {}
    for event, end in ends.items():
        parts[PHASES[event]] = end - began
        began = end
    told = "; ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
    whole = bar("on the wall", list(parts.values()), sum(parts.values()), f"{began:.1f} s in all")
    return join([whole, element("p", told, class_="quiet")])


# ---- Settings and machine ------------------------------------------------------------------------


def settings(runs: list[Run]) -> Html:
    """Those that were given first, the others folded; what differs is bold.

    A setting may differ without being given, by PRESET or by another script's default: those stand
    apart, for nobody would look for them among a hundred.
    """
    given = {name for run in runs for name in run.events["settings"].get("given", [])}
    all_names = dict.fromkeys(name for run in runs for name in run.events["settings"]["settings"])
    unlike = set(differing(runs))
    first = [name for name in all_names if name in given]
    others = [name for name in all_names if name not in given]
    untold = [run for run in runs if "given" not in run.events["settings"]]
    parts = []
    if untold:
        remedy = "Today's script says it of every run, such as PRESET=short"
        parts.append(missing("which settings were given", remedy, untold, runs))
    if first:
        parts.append(setting_rows(runs, first, unlike))
    told = f"{len(others)} others" if first else f"all {len(others)} settings"
    folded = element("summary", told), setting_rows(runs, others, unlike)
    changed = [name for name in others if name in unlike]
    if changed:
        title = "Not given, but different:" if first else "Different:"
        parts += [element("p", title), setting_rows(runs, changed, unlike)]
    return join([*parts, element("details", *folded)])


def setting_rows(runs: list[Run], names: list[str], unlike: set[str]) -> Html:
    """A row for each setting, in the script's order."""
    rows = []
    for name in names:
        cells = [run.events["settings"]["settings"].get(name) for run in runs]
        style = "differs" if name in unlike else "same"
        shown = [element("span", text_of(cell), class_=style) for cell in cells]
        rows.append([name.upper(), *shown])
    return table(["", *(run.name for run in runs)], rows)


def machine(runs: list[Run]) -> Html:
    """Versions and hardware, and the memory that training took."""
    names = dict.fromkeys(name for run in runs for name in run.events["settings"]["machine"])

    def of_machine(name: str) -> Callable[[Run], str | None]:
        return lambda run: run.events["settings"]["machine"].get(name)

    rows = {name: of_machine(name) for name in names}
    rows["peak GPU memory, bytes"] = figure("trained", "peak_bytes")
    return comparison(runs, rows)


# ---- Bytes and data ------------------------------------------------------------------------------


def sizes(runs: list[Run]) -> Html:
    """Code and model against the contest's cap.

    Both count: the script is part of a submission, and the first shade of the bar.
    """
    known = [run for run in runs if "bytes_total" in run.events.get("trained", {})]
    parts = []
    for run in known:
        trained = run.events["trained"]
        total = trained["bytes_total"]
        code = trained["bytes_code"]
        told = f"{total:,} of {CAP_BYTES:,} bytes"
        parts.append(bar(run.name, [code, total - code], CAP_BYTES, told))
        words = f"{code:,} code, {total - code:,} model, {CAP_BYTES - total:,} left"
        parts.append(element("p", words, class_="quiet"))
    lacking = [run for run in runs if run not in known]
    if lacking:
        remedy = "EVAL_ONLY=0 trains a model and packs it within TARGET_MB=16"
        parts.append(missing("bytes of code and model", remedy, lacking, runs))
    return join(parts)


def data(runs: list[Run]) -> Html:
    """How much text was trained on and scored, and hashes of what went in and came out.

    The artifact that was scored must be the one that training wrote: equal sums show it.
    """
    rows = {"validation": text_scored}
    rows |= {name: figure(*where) for name, where in COUNTS.items()}
    rows["tokens trained on"] = trained_tokens
    rows |= {name: code_hash(*where) for name, where in HASHES.items()}
    parts = [comparison(runs, rows)]
    lacking = [run for run in runs if "validation_data" not in run.events]
    if lacking:
        remedy = "Today's script counts the shards in DATA_PATH=folder"
        parts.append(missing("what was read", remedy, lacking, runs))
    return join(parts)


def text_scored(run: Run) -> str | None:
    """Whether the scored text is the contest's, if the log has its counts."""
    counts = run.events.get("validation_data")
    return counts and scored_text(counts)


def trained_tokens(run: Run) -> str | None:
    """Steps times batch, and how often that is the whole training text."""
    steps = run.events.get("trained", {}).get("steps")
    if steps is None:
        return None
    tokens = steps * run.settings["train_batch_tokens"]
    whole = run.events.get("training_data", {}).get("tokens")
    return f"{tokens:,}" + (f", {tokens / whole:.2f} times the text" if whole else "")


# ---- Quantization, adaptation, sample ------------------------------------------------------------


def quantization(runs: list[Run]) -> Html:
    """The grid, what calibrated it, and what was lost, in all and by kind of layer.

    A kind's loss is measured with all other layers unquantized, so that kinds do not add up to all.
    """
    rows = {
        "quantizer": lambda run: run.settings.get("quantizer"),
        "k, where weights are clipped": figure("trained", "sdclip_k", "{:g}"),
        "seconds of it": figure("quantized", "quantize_seconds", "{:.2f}"),
        "calibration text": figure("calibration", "source", "{}"),
        "calibration tokens": figure("calibration", "tokens"),
        "seconds of its text": figure("calibration", "text_seconds", "{:.2f}"),
        "seconds of Hessians": figure("calibration", "hessian_seconds", "{:.2f}"),
        "bits per byte lost": lost,
    }
    parts = [comparison(runs, rows)]
    lacking = [run for run in runs if "quantization_loss" not in run.events]
    for run in [run for run in runs if run not in lacking]:
        title = f"{run.name}: bits per byte lost where one kind of layer alone is quantized"
        kinds = run.events["quantization_loss"]["bpb_by_kind"]
        parts += [element("h3", title), *loss_bars(kinds)]
    if lacking:
        remedy = "QUANTIZATION_REPORT=1 fills it"
        parts.append(missing("what each kind of layer loses alone", remedy, lacking, runs))
    return join(parts)


def loss_bars(kinds: dict[str, float]) -> list[Html]:
    """A bar for each kind of layer, the longest that of the most loss; a gain has none."""
    most = max([*kinds.values(), 1e-9])
    return [bar(kind, [loss], most, f"{loss:+.6f}") for kind, loss in kinds.items()]


def lost(run: Run) -> str | None:
    """BPB after quantization less that before."""
    moments = [run.events.get(event, {}) for event in ("trained", "after_quantization")]
    scores = [moment.get("val_bpb") for moment in moments]
    return None if None in scores else f"{scores[1] - scores[0]:+.6f}"


def adaptation(runs: list[Run], chart: Html) -> Html:
    """How much adapting gained and, where scores of single targets are given, chunk by chunk.

    chart: the curves of --nats, empty without it.
    """
    rows = {
        "windows": lambda run: way_of_scoring(run.events["settings"]["settings"]),
        "gain over plain windows, frozen": gain,
        "epochs given up for time": figure("final", "epochs_given_up"),
    }
    parts = [comparison(runs, rows)]
    if chart:
        return join([*parts, chart])
    remedy = (
        "TTT_ENABLED=1 EVAL_NLL_PATH=nats.npy keeps every score, and --nats nats.npy draws them"
    )
    return join([*parts, missing("nats chunk by chunk", remedy)])


def gain(run: Run) -> str | None:
    """BPB in plain windows after quantization less the final one."""
    before = run.figures.get("after")
    after = run.figures.get("final")
    return None if None in (before, after) else f"{before - after:.6f} bits per byte"


def sample(runs: list[Run]) -> Html:
    """What the models write, the prompt in bold."""
    parts = []
    for run in [run for run in runs if "sample" in run.events]:
        told = run.events["sample"]
        prompt = told["prompt"]
        text = told["sample"]
        rest = text.removeprefix(prompt)
        begun = element("strong", prompt) if rest != text else ""
        drawn = "{tokens} tokens, temperature {temperature}, top p {top_p}".format(**told)
        parts += [element("h3", run.name), element("div", begun, rest, class_="sample")]
        parts.append(element("p", drawn, class_="quiet"))
    lacking = [run for run in runs if "sample" not in run.events]
    if lacking:
        remedy = 'SAMPLE_PROMPT="The film begins" has the model go on from there'
        parts.append(missing("what the model writes", remedy, lacking, runs))
    return join(parts)
