"""The page's sections, from result to sample, each a function of the runs.

A log may lack a section's data: its script is older, a setting was not given, or the run has not
come so far. The section then names the runs that lack it and the setting that fills it; nothing is
shown as zero or left out silently. Each of several runs has a column, in the order given.

Figures are those of the last record of each event (tools/runs.py), unrounded where a reviewer
compares them with the log. Here only lengths are compared with limits; tools/audit and
tools/package.py judge the rest.
"""

import math
import re
import sys
from collections.abc import Callable

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.report", file=sys.stderr)
    sys.exit(2)

from tools.contradictions import CAP_BYTES, limit_of
from tools.logs import seconds_to_score, spread
from tools.report.markup import Html, bar, element, join, table
from tools.report.profiles import PROFILES, chunks_of, row_name, rows_of
from tools.runs import Run, differing, text_of
from tools.summary import adapts, scored_text, way_of_scoring

SETTING = re.compile(r'([A-Z][A-Z0-9_]+=(?:"[^"]*"|\S*\w))')  # in a sentence
NONE = "—"  # in a cell whose run has no such figure
PHASES = {  # of a run's wall clock: each ends with its event, and begins where the one before ends
    "ready": "start and compiling",
    "trained": "training, GPTQ, packing",
    "after_quantization": "score after quantization",
    "quantization_loss": "score of each kind of layer",
    "sample": "sample",
    "final": "evaluation",
}
REST = "The rest: vectors, grid steps, tables of frequencies, the coder's states, the header."
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
        "attempts at evaluation": figure("evaluation", "attempt"),
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

    The limit is the run's own, or the contest's where that is less. An evaluation's parts are
    scoring, adapting, and loading and compiling; an older log has only what passed on the wall.
    """
    settings = run.events["settings"]["settings"]
    bars = []
    clock = run.events.get("trained", {}).get("train_clock_seconds")
    if clock is None:
        remedy = "A run of today's script to the end of training with EVAL_ONLY=0 fills it"
        if settings["eval_only"]:
            remedy = f"The log of the run that trained has it: {settings['run_id']}.jsonl"
        bars.append(missing("the training clock", remedy))
    else:
        limit = limit_of(settings["max_wallclock_seconds"])
        bars.append(bar("training", [clock], limit, f"{clock:.1f} s of {limit:g} s"))
    final = run.events.get("final", {})
    evaluation = final.get("evaluation_seconds", seconds_to_score(run.records))
    if evaluation is None:
        bars.append(missing("a final score", "EVAL_ONLY=1 with the same RUN_ID takes it"))
    else:
        limit = limit_of(settings["eval_max_seconds"])
        told = f"{evaluation:.1f} s of {limit:g} s"
        parts = evaluation_parts(run, evaluation)
        bars.append(bar("evaluation", list(parts.values()), limit, told))
        words = "; ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
        bars += [element("p", words, class_="quiet")] if len(parts) > 1 else []
    return join([*bars, evaluation_modes(run), whole_time(run)])


def evaluation_parts(run: Run, whole: float) -> dict[str, float]:
    """Seconds of the final score by what they went into; all together if the log does not say."""
    chunks = chunks_of(run, "final")
    if chunks is None or not chunks.epochs:
        return {"all": whole}
    parts = {"scoring": sum(chunks.score_seconds), "adapting": sum(chunks.adapt_seconds)}
    return parts | {"loading and the rest": max(0.0, whole - sum(parts.values()))}


def evaluation_modes(run: Run) -> Html:
    """The score and the clock of each mode in which the artifact was scored."""
    rows = []
    for event in ("after_quantization", "final"):
        told = run.events.get(event, {})
        if "evaluation_seconds" in told:
            mode = f"{told['mode'].replace('_ttt', ', adapting')}, {event.replace('_', ' ')}"
            rows.append([mode, f"{told['val_bpb']:.5f}", f"{told['evaluation_seconds']:.2f}"])
    return table(["mode", "bits per byte", "seconds"], rows) if rows else Html("")


def whole_time(run: Run) -> Html:
    """The wall clock from the start on, in its phases.

    A run that only scored, or has not come to its end, has fewer of them.
    """
    ends = {event: run.events[event]["seconds"] for event in PHASES if event in run.events}
    # A score after quantization that the evaluation told as well took no time of its own.
    begun = run.events.get("evaluation", {}).get("seconds", math.inf)
    ends = {event: end for event, end in ends.items() if end <= begun or event == "final"}
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
    """The settings: those that were given first, the others folded; what differs is bold.

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
    return join([*parts, sizes_by_kind(known)])


def sizes_by_kind(runs: list[Run]) -> Html:
    """What each kind of layer takes of the artifact, its rows of six and of eight bits apart."""
    parts = []
    lacking = [run for run in runs if "bytes_by_kind" not in run.events["trained"]]
    for run in [run for run in runs if run not in lacking]:
        kinds = run.events["trained"]["bytes_by_kind"]
        whole = max(1, sum(kinds.values()))
        most = max(kinds.values())
        parts.append(element("h3", f"{run.name}: bytes of the model by kind of layer"))
        for kind, size in kinds.items():
            parts.append(bar(kind, [size], most, f"{size:,}, {size / whole:.1%}"))
        parts.append(element("p", REST, class_="quiet"))
    if lacking:
        remedy = "EVAL_ONLY=0 with today's script counts them as it packs"
        parts.append(missing("bytes by kind of layer", remedy, lacking, runs))
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
    return join([*parts, file_hashes(runs)])


def file_hashes(runs: list[Run]) -> Html:
    """Names and sums of the files that were read, folded: of training shards there may be many."""
    parts = []
    lacking = [run for run in runs if "hashes" not in run.events]
    for run in [run for run in runs if run not in lacking]:
        told = run.events["hashes"]
        rows = []
        for kind in ("tokenizer", "validation", "training"):
            for name, sum_ in told.get(kind, {}).items():
                shown = element("code", sum_, class_="hash") if sum_ else "not hashed"
                source = " (by manifest.json)" if kind == "training" and sum_ else ""
                rows.append([f"{kind}: {name}{source}", shown])
        overlap = told.get("overlap_documents")
        known = "not known" if overlap is None else f"{overlap:,} (by manifest.json)"
        words = f"validation documents that are training documents, too: {known}"
        title = element("summary", f"{run.name}: SHA-256 of {len(rows)} files; {words}")
        parts.append(element("details", title, table(["file", "SHA-256"], rows)))
    if lacking:
        remedy = "Today's script hashes the files of DATA_PATH=folder and TOKENIZER_PATH=file"
        parts.append(missing("hashes of the files that were read", remedy, lacking, runs))
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
        # Older scripts' logs, whose passes over it were two.
        "seconds of Hessians": figure("calibration", "hessian_seconds", "{:.2f}"),
        "seconds of the pass over it": figure("calibration", "pass_seconds", "{:.2f}"),
        "seconds of Hessians' factors": figure("calibration", "factor_seconds", "{:.2f}"),
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


def whereabouts(runs: list[Run], charts: dict[str, Html]) -> Html:
    """Bits per byte by length of the document, and by place in it and in a window.

    charts: of tools/report/profiles.py's tables, those that some run has. The numbers stand folded
    below each.
    """
    parts = []
    for name, (title, _) in PROFILES.items():
        lacking = [run for run in runs if not rows_of(run, name)]
        if name in charts:
            shown = [run for run in runs if run not in lacking]
            folded = element("summary", f"{title}: the numbers"), profile_table(shown, name)
            parts += [charts[name], element("details", *folded)]
        if lacking:
            remedy = "Today's script records it of every score"
            remedy += ", by place in a window of EVAL_MODE=plain" if "window" in name else ""
            filled = f"{remedy}; EVAL_ONLY=1 with the same RUN_ID scores again"
            parts.append(missing(f"bits {title[0].lower()}{title[1:]}", filled, lacking, runs))
    return join(parts)


def profile_table(runs: list[Run], name: str) -> Html:
    """A row's share of the text, which is the first run's, and each run's bits per byte there."""
    each = {run.name: {row.place: row for row in rows_of(run, name)} for run in runs}
    first = next(iter(each.values()))
    whole = sum(row.bytes for row in first.values())
    rows = []
    for key, row in first.items():
        bits = [of[key].bits_per_byte if key in of else None for of in each.values()]
        cells = [NONE if one is None else f"{one:.4f}" for one in bits]
        rows.append([row_name(key), f"{row.bytes / whole:.2%}", *cells])
    return element("div", table(["tokens", "of the bytes", *each], rows), class_="runs")


def adaptation(runs: list[Run], charts: list[Html]) -> Html:
    """How much adapting gained, what it took, and its course.

    charts: chunk by chunk, of the runs that have them.
    """
    rows = {
        "windows": lambda run: way_of_scoring(run.events["settings"]["settings"]),
        "gain over plain windows, frozen": gain,
        "epochs": epochs_made,
        "epochs given up for time": figure("final", "epochs_given_up"),
        "a chunk's nats, its last epoch less its first": gain_of_epochs,
    }
    parts = [comparison(runs, rows), *charts]
    chunks = [chunks_of(run, "final") for run in runs]
    lacking = [run for run, has in zip(runs, chunks, strict=True) if has is None]
    if lacking:
        remedy = "EVAL_ONLY=1 with today's script and the same RUN_ID scores again and records them"
        parts.append(missing("nats chunk by chunk", remedy, lacking, runs))
    # Of documents that adapt there are no epochs chunk by chunk: they are not frozen.
    pairs = zip(runs, chunks, strict=True)
    frozen = [run for run, has in pairs if has and not adapts(run.events["settings"]["settings"])]
    if frozen:
        remedy = "TTT_ENABLED=1 adapts to each chunk when it is scored"
        parts.append(missing("what adapting brought", remedy, frozen, runs))
    return join(parts)


def epochs_made(run: Run) -> str | None:
    """Epochs on all chunks together."""
    chunks = chunks_of(run, "final")
    return f"{sum(chunks.epochs):,.0f}" if chunks and chunks.epochs else None


def gain_of_epochs(run: Run) -> str | None:
    """The mean over the chunks that had more than one epoch."""
    chunks = chunks_of(run, "final")
    known = [gain for gain in chunks.learnt if gain is not None] if chunks else []
    return f"{-sum(known) / len(known):+.5f}" if known else None


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
