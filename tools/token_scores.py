"""Where is a lead, and where does it shrink? Reduces scores of single tokens to small tables.

    python -m tools.token_scores --ours logs/h-*.jsonl --twin logs/t-*.jsonl --out where.json

Logs are of finished runs of two kinds. Runs of a kind differ in MAX_WALLCLOCK_SECONDS and SEED, and
all wrote EVAL_NLL_PATH with EVAL_MODE=plain TTT_ENABLED=0: scores of their artifacts in windows
side by side, with frozen weights. That file is read where the run wrote it, or else beside the log.
Text and tokenizer are read where the runs had them, unless --data and --tokenizer say where they
are now. Scores whose mean is not the log's, and logs of other text, tokens or windows, are refused.

Each table divides the scored tokens, except for those that end a document (BOS), which are a row by
themselves:

    position    the token's number in its document, whose first one is BOS
    seen        how many tokens could be seen: of its document, in its window
    frequency   fifths of the scored tokens, by how often a token occurs in the training text
    copying     the longest piece, of up to three tokens, that ends with the token and that could
                be seen before: none (a new token), it alone, it after the same one, or the same two
    distance    tokens back to where the token could be seen last
    both        frequency, for tokens that could and that could not be seen before

For each clock (with several seeds, as means), a row has the nats a token of both kinds; the lead,
twin minus ours; the row's share of the whole lead; and the bits per byte that it adds to the lead,
with their change since the shortest clock. The leads and changes of a table's rows sum up to the
whole ones. After ± is the standard error with documents as units: what another text would change.
Where a clock has two seeds, a second ± gives what other seeds would change: the seeds' spread,
assumed to be the same at all clocks and for both kinds. Prints Markdown, where twin is ours plus
the lead; --out has all figures as JSON.
"""

import argparse
import json
import math
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

if not __package__:  # started by its path
    where = "in the repository's folder as python -m tools.token_scores"
    print(f"error: start it {where}", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from tools.command import Parser, UserError, need, need_place, run_command, write_whole
from tools.logs import (
    Kind,
    ended_by_steps,
    kind_of,
    last_run,
    number_in,
    refuse_other_data,
    refuse_other_runs,
)

POSITIONS = (64, 256, 1024, 2048)  # the last number of each row but one
DISTANCES = (16, 64, 256, 1024)
FIFTHS = 5
LONGEST_PIECE = 3  # tokens, of what may be copied
PIECES = ("new", "token before", "pair before", "three before")
END = "document's end"
BLOCK = 1 << 23  # tokens that are counted at once
WINDOWS = ("vocab_size", "train_seq_len", "document_reset", "document_scope")  # must agree
# What EVAL_ONLY does not take over from the run that trained, or may be given otherwise.
AFRESH = frozenset(n for n, group in t.FIELDS.items() if group in ("run", "evaluation", "sample"))


# ---- Runs ----------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A finished run that scored plain windows with frozen weights."""

    log: Path
    settings: dict
    val_loss: float
    val_bpb: float
    kind: Kind

    @property
    def scores(self) -> Path:
        """The file that it wrote, there or beside its log."""
        path = Path(self.settings["eval_nll_path"])
        return path if path.is_file() else self.log.with_name(path.name)

    @property
    def clock(self) -> float:
        """MAX_WALLCLOCK_SECONDS."""
        return self.settings["max_wallclock_seconds"]


def read_run(path: Path) -> Run:
    """What a log says. Raises UserError if it is not a finished run's, or has no such scores."""
    events = last_run(path)
    try:
        settings, final = events["settings"]["settings"], events["final"]
        mode, scores = final["mode"], settings["eval_nll_path"]
        scored = [number_in(final, name) for name in ("val_loss", "val_bpb")]
        run = Run(path, settings, *scored, kind_of(path, events))
        missing = {*WINDOWS, "seed"} - settings.keys()
        trained = run.clock > 0 and not ended_by_steps(events)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not the .jsonl log of a finished run") from None
    need(None not in scored, f"{path} has no score: its val_loss or val_bpb is no number")
    need(not missing, f"{path} is of another script: it does not say {' '.join(missing)}")
    need(scores, f"{path} kept no scores: it wants EVAL_NLL_PATH")
    need(mode == "plain", f"{path} scored {mode}, not EVAL_MODE=plain TTT_ENABLED=0")
    need(trained, f"{path} was not trained to the end of its clock, MAX_WALLCLOCK_SECONDS")
    return run


def refuse_mixture(runs: list[Run]) -> None:
    """Raises UserError for runs of other text or tokens than the first, or of other windows."""
    first = runs[0]
    refuse_other_data([run.kind for run in runs])
    for run in runs[1:]:
        for name in WINDOWS:
            here, there = run.settings[name], first.settings[name]
            differ = f"{run.log} has {name.upper()}={here}, but {first.log} {there}"
            need(here == there, f"{differ}: their windows show other tokens")


def read_nats(run: Run, targets: int) -> np.ndarray:
    """A run's scores, float32 (targets,). Raises UserError if the file holds something else."""
    path = run.scores
    try:
        with path.open("rb") as file:
            nats = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path} is no file of scores, as EVAL_NLL_PATH is") from None
    floats = isinstance(nats, np.ndarray) and nats.dtype == np.float32
    need(floats, f"{path} is no file of scores, as EVAL_NLL_PATH is")
    fits = nats.shape == (targets,)
    need(fits, f"{path} does not have a score for each of the text's {targets} targets")
    mean = float(nats.mean(dtype=np.float64))
    same = math.isclose(mean, run.val_loss, rel_tol=1e-9)
    need(same, f"{path} has the mean {mean:.8f}, but {run.log} {run.val_loss:.8f}: another run's")
    return nats


def by_clock(runs: list[Run], targets: int) -> dict[float, np.ndarray]:
    """Nats of each target by each run, float32 (runs, targets), by the clock, shortest first."""
    found = {}
    for clock in sorted({run.clock for run in runs}):
        scores = [read_nats(run, targets) for run in runs if run.clock == clock]
        found[clock] = np.stack(scores).astype(np.float32)
    return found


# ---- Text ----------------------------------------------------------------------------------------


class Text(NamedTuple):
    """The scored text of N targets: tokens[p + 1] is predicted from tokens[seen[p] : p + 1]."""

    tokens: np.ndarray  # (N + 1,) int64
    target_bytes: np.ndarray  # (N,) int64
    begin: np.ndarray  # (N,) int64: where the document of tokens[p] begins
    document: np.ndarray  # (N,) int64: its number
    seen: np.ndarray  # (N,) int64

    @property
    def targets(self) -> np.ndarray:
        """(N,) int64."""
        return self.tokens[1:]


def describe_text(validation: t.ValidationSet, settings: t.Settings) -> Text:
    """What the script's own plans of documents and windows say of a text."""
    batches = t.plan_batches(validation.tokens, settings)
    facts = np.concatenate([np.hstack(batch) for batch in batches])
    facts = facts[facts[:, 1] > 0]  # empty ones fill the last batch
    begins, lengths = facts[facts[:, 0].argsort()].T
    begin = np.repeat(begins, lengths)
    # One rank's windows of the whole stream: side by side, in order.
    context, first, last = t.plan_windows(settings, 0, len(begin), 0, 1).T
    seen = np.repeat(context, last - first)
    if settings.confines_documents:
        seen = np.maximum(seen, begin)
    tokens = validation.tokens.astype(np.int64)
    document = np.repeat(np.arange(len(begins)), lengths)
    return Text(tokens, validation.target_bytes, begin, document, seen)


def open_text(run: Run, data: str, tokenizer: str) -> tuple[Text, np.ndarray]:
    """A run's text, and how often each token occurs in its training text, int64 (vocabulary,).

    data and tokenizer are a folder and a file that the run's paths give way to, unless "". Raises
    UserError if what lies there is not what the run had. That is known best of one that trained.
    """
    names = (*WINDOWS, "data_path", "tokenizer_path", "eval_any_tokens")
    told = {name: run.settings[name] for name in names}
    told |= {"data_path": data} if data else {}
    told |= {"tokenizer_path": tokenizer} if tokenizer else {}
    settings = t.Settings(**told, eval_mode="plain", ttt_enabled=False, eval_only=True)
    model, folder = Path(settings.tokenizer_path), Path(settings.data_path)
    need(model.is_file(), f"no tokenizer at {model}, where {run.log} had it: give --tokenizer FILE")
    need_same(run, "tokenizer", [t.file_sha256(model)], f"{model}", "--tokenizer FILE")
    for kind in ("val", "train"):
        there = any(folder.glob(f"*_{kind}_*.bin"))
        need(there, f"no *_{kind}_*.bin in {folder}, where {run.log} had them: give --data FOLDER")
    opened = t.Tokenizer(settings.tokenizer_path, settings.vocab_size)
    validation = t.load_validation(settings, opened)
    sums = sorted(shard.sha256 for shard in validation.shards)
    need_same(run, "validation", sums, f"{folder}", "--data FOLDER")
    shards = t.open_shards(settings.data_path, "train")
    digest = t.summarize_shards(shards)["digest"]
    need_same(run, "training text", [digest], f"{folder}", "--data FOLDER")
    return describe_text(validation, settings), count_tokens(shards, settings.vocab_size)


def need_same(run: Run, kind: str, sums: list[str], where: str, option: str) -> None:
    """Raises UserError if what lies somewhere is not what the run had, where its log tells that."""
    same = run.kind.data.get(kind, sums) == sums
    need(same, f"{where}: {run.log} has another {kind}, by its digest: give {option}")


def count_tokens(shards: list[t.Shard], size: int) -> np.ndarray:
    """How often each token occurs in shards, int64 (size,)."""
    counts = np.zeros(size, np.int64)
    for shard in shards:
        for first in range(0, shard.count, BLOCK):
            tokens = shard.read(first, min(BLOCK, shard.count - first))
            t.check_token_range(tokens, size, "training")
            counts += np.bincount(tokens, minlength=size)
    return counts


# ---- Tables' rows --------------------------------------------------------------------------------


class Grouping(NamedTuple):
    """How a table parts the targets."""

    name: str
    rows: list[str]
    row_of: np.ndarray  # (N,) int64


def group_by_size(name: str, numbers: np.ndarray, ends: tuple[int, ...]) -> Grouping:
    """Rows of numbers from 1 to the first end, from the next to the second, and beyond the last."""
    firsts = [1] + [end + 1 for end in ends[:-1]]
    rows = [f"{first:,} to {end:,}" for first, end in zip(firsts, ends, strict=True)]
    rows.append(f"beyond {ends[-1]:,}")
    return Grouping(name, rows, np.searchsorted(ends, numbers))


def previous_place(keys: np.ndarray) -> np.ndarray:
    """The last place before each with the same key, int64; -1 where there is none."""
    order = np.argsort(keys, kind="stable")
    alike = keys[order[1:]] == keys[order[:-1]]
    previous = np.full(len(keys), -1)
    previous[order[1:][alike]] = order[:-1][alike]
    return previous


def piece_distance(text: Text, length: int) -> np.ndarray:
    """How far back the piece of so many tokens that ends with each target stood last, int64 (N,).

    0 if that piece, or a part of it, could not be seen.
    """
    count = len(text.tokens) - length + 1
    keys = np.zeros(count, np.int64)  # of pieces, by their first tokens
    for offset in range(length):
        keys = keys << 16 | text.tokens[offset : offset + count]  # tokens are of 16 bits
    # By the last tokens: the first pieces end beyond the first targets.
    before = np.pad(previous_place(keys), (length - 1, 0), constant_values=-1)[1:]
    own = np.arange(len(before)) + 2 - length  # where the target's own piece begins
    return np.where(before >= text.seen, own - before, 0)


def group_by_frequency(text: Text, counts: np.ndarray) -> Grouping:
    """Fifths of the targets, rarest tokens first; all of one token are in the same."""
    counted = text.targets[text.targets != t.BOS_ID]
    scored = np.bincount(counted, minlength=len(counts))
    order = np.argsort(counts, kind="stable")
    middle = np.cumsum(scored[order]) - scored[order] / 2
    fifth_of = np.zeros(len(counts), np.int64)
    fifth_of[order] = np.minimum(FIFTHS * middle / max(1, scored.sum()), FIFTHS - 1)
    million = counts / max(1, counts.sum()) * 1e6
    rows = []
    for fifth in range(FIFTHS):
        inside = million[(fifth_of == fifth) & (scored > 0)]
        least, most = (inside.min(), inside.max()) if len(inside) else (0.0, 0.0)
        rows.append(f"{least:,.1f} to {most:,.1f} in a million")
    return Grouping("frequency", rows, fifth_of[text.targets])


def group_by_distance(distance: np.ndarray) -> Grouping:
    """Rows of how far back a token could be seen last, and of those that could not be seen, 0."""
    grouping = group_by_size("distance", distance, DISTANCES)
    row_of = np.where(distance > 0, grouping.row_of, len(grouping.rows))
    return Grouping(grouping.name, [*grouping.rows, PIECES[0]], row_of)


def group(text: Text, counts: np.ndarray) -> list[Grouping]:
    """All tables' rows; what ends a document is the last row of each but the first."""
    place = np.arange(len(text.targets))
    distances = [piece_distance(text, length + 1) for length in range(LONGEST_PIECE)]
    before = distances[0] > 0
    # Where a piece could be seen, so could its end.
    longest = np.count_nonzero(distances, axis=0)
    frequency = group_by_frequency(text, counts)
    both = [f"{row}, {what}" for row in frequency.rows for what in ("new", "before")]
    tables = [
        group_by_size("position", place + 2 - text.begin, POSITIONS),
        group_by_size("seen", place + 1 - text.seen, POSITIONS[:-1]),
    ]
    tables += [frequency, Grouping("copying", list(PIECES), longest)]
    tables.append(group_by_distance(distances[0]))
    tables.append(Grouping("both", both, 2 * frequency.row_of + before))
    ends = text.targets == t.BOS_ID
    parted = [Grouping("all", ["all"], np.zeros(len(ends), np.int64))]
    for name, rows, row_of in tables:
        parted.append(Grouping(name, [*rows, END], np.where(ends, len(rows), row_of)))
    return parted


# ---- Figures -------------------------------------------------------------------------------------


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums above (D, R) over sums below (D, R) or (D, 1) of D documents, and standard errors, (R,).

    The errors are of a ratio of sums over documents that are drawn one by one (cluster-robust, by
    linearization): sqrt(D / (D - 1) · sum of (above - ratio · below)²) / sum of below. There is
    none, NaN, where fewer than two documents have something below.
    """
    total = below.sum(0)
    documents = np.count_nonzero(below, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = above.sum(0) / total
        spread = ((above - value * below) ** 2).sum(0)
        error = np.sqrt(spread * documents / (documents - 1)) / np.abs(total)
    return value, np.where(documents > 1, error, np.nan)


class Scores(NamedTuple):
    """Nats of each target by the runs of both kinds at a clock, float32 (runs, N)."""

    ours: np.ndarray
    twin: np.ndarray


class Sums(NamedTuple):
    """A table's sums over documents and rows, float64 (…, D, R)."""

    targets: np.ndarray  # (D, R)
    bits: np.ndarray  # (D, 1): ln 2 · bytes of the whole document, so that nats over it are BPB
    clocks: list[Scores]  # of nats, (runs, D, R)


def sum_up(text: Text, parted: Grouping, clocks: list[Scores]) -> Sums:
    """What a table's figures are made of."""
    rows = len(parted.rows)
    documents = text.document[-1] + 1
    cell = text.document * rows + parted.row_of

    def sums(numbers: np.ndarray | None) -> np.ndarray:
        """Of each document's targets in each row, (D, R); of None, how many there are."""
        return np.bincount(cell, numbers, documents * rows).reshape(documents, rows)

    bits = sums(text.target_bytes).sum(1, keepdims=True) * math.log(2)
    found = []
    for scores in clocks:
        kinds = (np.stack([sums(nats) for nats in kind]) for kind in scores)
        found.append(Scores(*kinds))
    return Sums(sums(None).astype(np.float64), bits, found)


def seed_variance(sums: Sums) -> np.ndarray:
    """The variance, from seed to seed, of a row's nats a byte over ln 2, float64 (R,).

    The sample variance around the mean of each kind at each clock, pooled over both kinds and all
    clocks; NaN if none has two seeds.
    """
    squares = np.zeros(sums.targets.shape[1])
    freedom = 0
    for scores in sums.clocks:
        for kind in scores:
            bpb = kind.sum(1) / sums.bits.sum()
            squares += ((bpb - bpb.mean(0)) ** 2).sum(0)
            freedom += len(bpb) - 1
    return squares / freedom if freedom else np.full_like(squares, np.nan)


def clock_figures(sums: Sums) -> list[dict[str, np.ndarray]]:
    """A table's figures at each clock, in order: by name, one for each of its rows, float64."""
    variance = seed_variance(sums)
    found = []
    first = first_parts = None
    for scores in sums.clocks:
        ours = scores.ours.mean(0)
        twin = scores.twin.mean(0)
        ahead = twin - ours
        parts = sum(1 / len(kind) for kind in scores)  # of the variance, in the lead's
        figures = {"ours": ratio(ours, sums.targets)[0], "twin": ratio(twin, sums.targets)[0]}
        figures["lead"], figures["lead_error"] = ratio(ahead, sums.targets)
        figures["share"], figures["share_error"] = ratio(ahead, ahead.sum(1, keepdims=True))
        figures["bpb"], figures["bpb_error"] = ratio(ahead, sums.bits)
        figures["bpb_seeds"] = np.sqrt(variance * parts)
        if first is None:
            first, first_parts = ahead, parts
        else:
            figures["change"], figures["change_error"] = ratio(ahead - first, sums.bits)
            figures["change_seeds"] = np.sqrt(variance * (parts + first_parts))
        found.append(figures)
    return found


def tabulate(text: Text, parted: Grouping, clocks: dict[float, Scores]) -> list[dict]:
    """A table's rows, those without a target left out: by name, numbers, one for each clock."""
    counts = np.bincount(parted.row_of, minlength=len(parted.rows))
    figures = clock_figures(sum_up(text, parted, list(clocks.values())))
    table = []
    for place, row in enumerate(parted.rows):
        if counts[place]:
            line = {"row": row, "targets": int(counts[place])}
            for name in figures[-1]:
                line[name] = [rounded(at[name][place]) for at in figures if name in at]
            table.append(line)
    return table


def rounded(number: float) -> float | None:
    """A number as JSON has it: None for what is not finite."""
    return round(float(number), 7) if math.isfinite(number) else None


# ---- Output --------------------------------------------------------------------------------------


def shown(number: float | None, *errors: float | None, digits: int) -> str:
    """A number with its standard errors, those that there are, as a table's cell."""
    if number is None:
        return "–"
    cell = f"{number:.{digits}f}"
    for error in errors:
        cell += "" if error is None else f" ± {error:.{digits}f}"
    return cell


def percent(part: float | None) -> str:
    """A share, as a table's cell."""
    return "–" if part is None else f"{100 * part:.1f}"


def cells_of(row: dict, name: str, digits: int) -> list[str]:
    """A figure with its standard errors over documents and, if known, over seeds."""
    columns = [row[key] for key in (name, f"{name}_error", f"{name}_seeds") if key in row]
    return [shown(*numbers, digits=digits) for numbers in zip(*columns, strict=True)]


def markdown(name: str, table: list[dict], clocks: list[float], targets: int) -> list[str]:
    """A table's lines."""
    times = [f"{clock:g} s" for clock in clocks]
    heads = [name, "targets, %", f"nats a token, ours, {' → '.join(times)}"]
    heads += [f"lead, {time}" for time in times]
    heads += ["share of the lead, %", f"BPB of the lead, {times[0]}"]
    heads += [f"changed by {time}" for time in times[1:]]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in table:
        ours = [shown(number, digits=3) for number in row["ours"]]
        cells = [row["row"], percent(row["targets"] / targets), " → ".join(ours)]
        cells += cells_of(row, "lead", 4)
        cells.append(" → ".join(percent(part) for part in row["share"]))
        cells.append(cells_of(row, "bpb", 5)[0])
        if len(clocks) > 1:
            cells += cells_of(row, "change", 5)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def describe_runs(kinds: dict[str, list[Run]]) -> list[dict]:
    """What the tables are of, by the clock: BPB of both kinds, as their logs say, and seeds."""
    lines = []
    for clock in sorted({run.clock for run in kinds["ours"]}):
        line = {"clock": clock}
        for name, runs in kinds.items():
            chosen = [run for run in runs if run.clock == clock]
            bpb = np.mean([run.val_bpb for run in chosen])
            line[name] = {"bpb": rounded(bpb), "seeds": [run.settings["seed"] for run in chosen]}
        lines.append(line)
    return lines


def read_kinds(ours: list[Path], twin: list[Path]) -> dict[str, list[Run]]:
    """The runs of both kinds. Raises UserError unless they can be compared, clock by clock."""
    kinds = {"ours": [read_run(path) for path in ours], "twin": [read_run(path) for path in twin]}
    runs = kinds["ours"] + kinds["twin"]
    refuse_mixture(runs)
    paths = {run.log.resolve() for run in runs}
    need(len(paths) == len(runs), "a log is given twice")
    for found in kinds.values():
        refuse_other_runs([run.kind for run in found], AFRESH)
    clocks = {name: sorted({run.clock for run in found}) for name, found in kinds.items()}
    told = [f"{name}: {' '.join(f'{x:g}' for x in found)}" for name, found in clocks.items()]
    need(clocks["ours"] == clocks["twin"], f"the kinds have other clocks, {'; '.join(told)}")
    return kinds


def main() -> int:
    """Reads logs, scores and text, prints the tables and writes them."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ours", nargs="+", type=Path, required=True, metavar="LOG", help="runs' .jsonl")
    add("--twin", nargs="+", type=Path, required=True, metavar="LOG", help="runs to compare with")
    add("--data", default="", metavar="FOLDER", help="folder of the runs' shards, if it was moved")
    add("--tokenizer", default="", metavar="FILE", help="the runs' tokenizer, if it was moved")
    add("--out", type=Path, required=True, metavar="JSON")
    given = parser.parse_args()
    kinds = read_kinds(given.ours, given.twin)
    runs = kinds["ours"] + kinds["twin"]
    model = Path(given.tokenizer or runs[0].settings["tokenizer_path"])
    need_place(given.out, *(path for run in runs for path in (run.log, run.scores)), model)
    trained = [run for run in runs if "training text" in run.kind.data]  # whose digest is known
    text, counts = open_text((trained or runs)[0], given.data, given.tokenizer)
    targets = len(text.targets)
    nats = {name: by_clock(runs, targets) for name, runs in kinds.items()}
    clocks = {clock: Scores(ours, nats["twin"][clock]) for clock, ours in nats["ours"].items()}
    runs = describe_runs(kinds)
    facts = {"targets": targets, "bytes": int(text.target_bytes.sum())}
    facts |= {"documents": int(text.document[-1] + 1), "runs": runs, "tables": {}}
    print("{targets:,} targets, {bytes:,} bytes, {documents:,} documents".format(**facts))
    for run in runs:
        scores = [f"{name} {run[name]['bpb']:.4f} (seeds {run[name]['seeds']})" for name in kinds]
        print(f"{run['clock']:g} s: BPB {', '.join(scores)}")
    for parted in group(text, counts):
        table = tabulate(text, parted, clocks)
        facts["tables"][parted.name] = table
        print("\n" + "\n".join(markdown(parted.name, table, list(clocks), targets)))
    write_whole(given.out, json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("token_scores.py", main, t.UserError))
