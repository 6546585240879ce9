"""What a reviewer asks of a submission, and what its runs' logs, settings and files answer.

Each function answers one question with a Row: what was found, and what shows it. There are three
kinds of evidence. Files are read here and now. A log is the word of whoever trained: it was checked
for contradictions (tools/contradictions.py) but not proved. A test shows what the script does, if
it is this project's script. What a log does not say is "not in this log"; where it matters, that
keeps the runs from being a record.
"""

import ast
import contextlib
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.package", file=sys.stderr)
    sys.exit(2)

from tools import known
from tools.audit.script import NAME, ROOT, commit_of, identify
from tools.audit.text import altered, open_tokenizer
from tools.command import UserError, file_sha256, need
from tools.contradictions import (
    CAP_BYTES,
    LIMIT_SECONDS,
    changed_starts,
    counted_seconds,
    files_of,
    history,
    lost_parts,
    off_the_clocks,
    read_header,
    unprinted,
)
from tools.finished import Run
from tools.logs import MAY_DIFFER, attempts_at_evaluation, is_resumed, last_run, starts_of
from tools.manifest import Manifest
from tools.pack_script import READABLE, unpack

UNSAID = "not in this log"
EVALUATION = ("eval_", "ttt_", "document_")  # how the names of evaluation's settings begin
LONG_LITERAL = 1_000  # characters; a readable script has no longer text in quotes without spaces
LONG_WORDS = 40  # characters; nor one whose words are so long in the mean
RUNS_TEXT = {"exec", "eval", "compile", "__import__"}  # built-in functions that run packed code
BUILTINS = {"builtins", "__builtins__"}  # where they are, too


class Row(NamedTuple):
    """A question, the answer, what shows it, and why it keeps the runs from being a record."""

    question: str
    answer: str
    shown_by: str
    reasons: tuple[str, ...] = ()


def said(events: dict[str, dict], event: str) -> dict:
    """An event's record; an empty one if the log has none."""
    return events.get(event, {})


# ============
# Text and tokenizer


def tokenizer_sum(events: dict[str, dict], artifact: Path | None) -> str:
    """The tokenizer's SHA-256, from the artifact's header or the log; empty if neither has it."""
    in_header = read_header(artifact).get("tokenizer_sha256", "") if artifact else ""
    logged = list(files_of(said(events, "hashes"), "tokenizer").values())
    for event in ("validation_data", "settings", "trained"):
        logged.append(said(events, event).get("tokenizer_sha256", ""))
    for in_log in logged:
        if in_log:
            both = not in_header or in_header == in_log
            need(both, f"{artifact} was made with another tokenizer than its log")
            return in_log
    return in_header


def scored_text(events: dict[str, dict], tokenizer: str, manifest: Manifest | None) -> Row:
    """Whether the whole validation text was scored: its documents, tokens and bytes.

    What the folder is called says nothing.
    """
    question = "whole validation set"
    counts = said(events, "validation_data")
    if not counts:
        return Row(question, UNSAID, "–", ("the log does not say how much text was scored",))
    sums = files_of(said(events, "hashes"), "validation")
    sums = sums or (manifest.validation if manifest else {})
    found = known.compare(counts, tokenizer, sums)
    text = f"{counts['documents']:,} documents, {counts['tokens']:,} tokens, of which "
    text += f"{counts['scored_tokens']:,} are scored, {counts['bytes']:,} bytes: "
    text += found.name or f"not FineWeb's validation text ({'; '.join(found.differences)})"
    if found.unknown:
        text += f"; not compared: {', '.join(found.unknown)}"
    reasons = () if found.name else ("what was scored is not FineWeb's whole validation text",)
    return Row(question, text, "the log against data/known.json", reasons)


def overlap_row(events: dict[str, dict], manifest: Manifest | None) -> Row:
    """Whether training shards hold validation documents, which data/prepare.py counts by hash."""
    question = "no validation document in the training shards"
    overlap = said(events, "hashes").get("overlap_documents")
    shown_by = "the log, by manifest.json, which data/prepare.py wrote where the run was"
    if manifest is not None:
        overlap, shown_by = manifest.overlap, f"{manifest.path.name}, by data/prepare.py"
    if not isinstance(overlap, int):
        return Row(question, f"{UNSAID}, and there is no manifest.json of its shards", "–")
    text = f"{overlap:,} validation documents are in the training shards"
    return Row(question, f"{text}, by manifest.json", shown_by, (text,) if overlap else ())


def provenance_row(events: dict[str, dict], settings: dict, manifest: Manifest | None) -> Row:
    """Which data a run read: folder, shards, sums, and where the text is from."""
    data = said(events, "training_data")
    parts = [f"folder {Path(settings['data_path']).name}"]
    if data:
        parts.append(f"{data['tokens']:,} training tokens in {data['shards']:,} shards")
        parts.append(f"digest of their names and lengths {data.get('digest', UNSAID)}")
    else:
        parts.append(f"training shards: {UNSAID}")
    hashes = said(events, "hashes")
    validation, train = (files_of(hashes, kind) for kind in ("validation", "training"))
    shown_by = "the log"
    if manifest is not None:
        parts.append(f"source {manifest.source}")
        validation, train = manifest.validation, manifest.train
        shown_by = "the log; manifest.json in this folder"
    computed = "validation" in (hashes.get("computed") or ())  # older scripts asked manifest.json
    source = "" if computed else " (perhaps by manifest.json)"
    parts += [f"{name} {sha256}{source}" for name, sha256 in validation.items()]
    lacking = list(train.values()).count("")
    if lacking or not train:
        parts.append(f"SHA-256 of {lacking or 'the'} training shards: {UNSAID}")
    else:
        # One sum over all: 80 of them say no more, and the log or manifest.json lies in the folder.
        listed = json.dumps(sorted(train.items())).encode()
        over_all = hashlib.sha256(listed).hexdigest()
        what = "SHA-256 over those of the training shards, by manifest.json,"
        parts.append(f"{what} {over_all}")
    return Row("provenance of the data", "; ".join(parts), shown_by)


def need_tokenizer(data: bytes, sha256: str, file: Path) -> None:
    """Raises UserError for the content of a file that is not the runs' tokenizer."""
    other = f"{file} is not the tokenizer of these runs: its SHA-256 is another"
    need(hashlib.sha256(data).hexdigest() == sha256, other)


def tokenizer_row(sha256: str, file: Path, bytes_total: int) -> Row:
    """The contest's tokenizer, or one of its own, whose file then counts against the cap.

    A tokenizer that everybody has costs nothing; text could be hidden in any other, and any other
    may make of all text one that is more easily foretold.
    """
    question = "tokenizer"
    if not sha256:
        return Row(question, UNSAID, "–", ("nothing says which tokenizer was used",))
    official = known.variant_of(sha256)
    if official:
        return Row(question, f"the contest's, {official.name}", "SHA-256 against data/known.json")
    name = f"one of its own, SHA-256 {sha256}"
    if not file.is_file():
        reason = f"the tokenizer is one of its own, and there is no {file}: give --tokenizer"
        return Row(question, f"{name}; its bytes are not counted", "–", (reason,))
    data = file.read_bytes()
    need_tokenizer(data, sha256, file)
    total = bytes_total + len(data)
    over = f"code, artifact and tokenizer take {total:,} bytes, over the cap of {CAP_BYTES:,}"
    need(total <= CAP_BYTES, over)
    answer = f"{name}; with its {len(data):,} bytes {total:,} in all; it lies in this folder"
    made = ""
    with contextlib.suppress(UserError):  # no script reads one that SentencePiece does not
        made = altered(open_tokenizer(file))
    reasons = (f"the tokenizer makes {made}: what was scored is another text",) if made else ()
    return Row(question, answer, "the file", reasons)


# ============
# Training


def documents_row(settings: dict) -> Row:
    """What of a document reaches the next one.

    A feature of the token before must not look over BOS; whether states do is a setting.
    """
    if not settings.get("document_reset"):
        text = "state, attention and convolutions go on from one document to the next; "
    elif settings.get("document_scope", "scans") == "all":
        text = "no layer carries anything from one document to the next; "
    else:
        text = "states end with a document, attention and convolutions do not; "
    text += "a pair of tokens ends at BOS"
    return Row("features of earlier tokens end at BOS", text, "tests/test_model.py")


def warm_up_row() -> Row:
    """Whether warm-up steps changed anything: it is the script that shows it, not a log."""
    text = "steps of rate 0 on random tokens"
    return Row("warm-up changes nothing", text, "tests/test_checkpoint.py")


def calibration_row(events: dict[str, dict], settings: dict) -> Row:
    """On what text GPTQ was calibrated, how much of it, and how long that and GPTQ took.

    Text of the validation set may not be used, and the seconds count as training.
    """
    question = "calibration"
    if settings.get("quantizer", "gptq") in ("round", "ternary"):
        return Row(question, "none: this quantizer needs no text", "the settings")
    record = said(events, "calibration")
    if not record:
        return Row(question, UNSAID, "–")
    source = {"train": "training text", "self": "text that the model wrote"}.get(record["source"])
    text = f"{record['tokens']:,} tokens of {source or record['source']}, "
    text += f"{record['text_seconds']:.2f} s; "
    if "pass_seconds" in record:
        text += f"pass over it {record['pass_seconds']:.2f} s"
    else:  # an older script's log
        text += f"Hessians {record['hessian_seconds']:.2f} s"
    if "factor_seconds" in record:
        text += f"; factors {record['factor_seconds']:.2f} s"
    if "quantize_seconds" in said(events, "quantized"):
        text += f"; GPTQ {events['quantized']['quantize_seconds']:.2f} s"
    reasons = () if source else (f"calibration was on {record['source']}",)
    return Row(question, f"{text}; all within the training clock", "the log", reasons)


def machine_row(runs: list[Run]) -> Row:
    """Which machines ran it: hosts, GPUs by UUID, driver."""
    found = {}
    reasons = []
    for run in runs:
        machine = run.logs.events["settings"]["machine"]
        parts = [f"{name} {machine.get(name, UNSAID)}" for name in ("host", "gpus", "driver")]
        found.setdefault("; ".join(parts), []).append(str(run.seed))
        listed = set(re.findall(r"\w{8}-\w{4}-\w{4}-\w{4}-\w{12}", machine.get("gpus", "")))
        if "gpus" in machine and len(listed) < run.ranks:
            reasons.append(f"{run.path} names {len(listed)} GPUs by UUID, not {run.ranks}")
    told = "; ".join(f"seeds {', '.join(seeds)}: {text}" for text, seeds in found.items())
    hardware = runs[0].machine["hardware"]
    return Row("machine", f"{hardware}; {told}", "the log", tuple(reasons))


# ============
# Evaluation and source


def attempts_row(runs: list[Run]) -> Row:
    """Which runs were evaluated more than once, from one artifact, until one came to its score.

    An evaluation that was interrupted starts over with a new clock, so each is told.
    """
    question = "attempts at the evaluation"
    counts = {run.seed: attempts_at_evaluation(run.logs.records) for run in runs}
    repeated = {seed: count for seed, count in counts.items() if count > 1}
    told = [f"seed {seed}: {count}, each with a new clock" for seed, count in repeated.items()]
    return Row(question, "; ".join(told) or "one for every run", "the logs")


def evaluation_row(given: list[str]) -> Row:
    """Settings of the evaluation that differ from the preset's, as NAME=value."""
    differing = [text for text in given if text.lower().startswith(EVALUATION)]
    text = " ".join(differing) or "none differs from the preset's"
    # The script has then not compared the text that is scored with the tokenizer.
    unchecked = "EVAL_ANY_TOKENS=1" in given
    reasons = ("EVAL_ANY_TOKENS=1: the text's tokens were not checked",) if unchecked else ()
    return Row("settings of the evaluation", f"{text}; the same in all runs", "the log", reasons)


def evaluation_differences(ours: dict, theirs: dict) -> list[str]:
    """Settings of the evaluation that a baseline has otherwise."""
    differing = []
    for name, value in theirs.items():
        if name.startswith(EVALUATION) and ours.get(name, value) != value:
            differing.append(f"{name.upper()} {value} there, {ours[name]} here")
    return differing


def source_row(path: Path, script: str, readable: Path = ROOT / NAME) -> tuple[Row, bytes | None]:
    """Whether the script is the readable source itself, or packs the one that lies beside it or is
    this project's; and whose it is. Beside the row: what a packed one unpacks to, if it passes.

    What tests show, they show of this project's script. Nothing of a packed one is run.
    """
    question = "readable source"
    name = f"train_gpt.py, {script.count(chr(10)):,} lines, {identify(path).evidence}"
    try:
        source = unpack(script.encode())
    except UserError as error:
        reason = f"the script says that it is packed by tools.pack_script, but {error}"
        return Row(question, f"{name}; {reason}", "the file", (reason,)), None
    if source is None:
        told, reasons = packed_code(script, "in it")
        return Row(question, f"{name}; {told}", "the file", tuple(reasons)), None
    whose, differs = compare_readable(path, source, readable)
    name += f"; {len(script.encode()):,} bytes, packed of {len(source):,}: {whose}"
    told, reasons = packed_code(source.decode(), "within")
    row = Row(question, f"{name}; {told}", "the file", (*differs, *reasons))
    return row, None if differs else source


def packed_code(script: str, where: str) -> tuple[str, list[str]]:
    """What a script holds that nobody can read, and what is wrong if there is any."""
    try:
        tree = ast.parse(script)
    except SyntaxError:
        return "it is not of this Python", []
    packed = [node.lineno for node in ast.walk(tree) if is_packed(node)]
    if not packed:
        return f"nothing {where} is packed", []
    line = min(packed)
    reason = f"line {line} of the script runs or holds packed code: unpack it and show the source"
    return f"packed code in line {line}", [reason]


def compare_readable(path: Path, source: bytes, readable: Path) -> tuple[str, list[str]]:
    """Which readable file a packed script's source equals, and what is wrong if there is none.

    That is the one beside it, as in a submission's folder; else this project's, as it is or was.
    """
    beside = path.with_name(READABLE)
    place = beside if beside.is_file() else readable
    if place.is_file() and place.read_bytes() == source:
        return f"unpacked, it is {place.name}, byte for byte", []
    commit = "" if beside.is_file() else commit_of(source)
    if commit:
        return f"unpacked, it is {NAME} of commit {commit}, byte for byte", []
    reason = f"the script is packed, and what it unpacks to is not {place}"
    return reason, [reason]


def is_packed(node: ast.AST) -> bool:
    """Whether a node of a script runs text as code, or is text that nobody can read.

    The functions that do so count under any name: they are found where they are called or named.
    """
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return node.id in RUNS_TEXT | BUILTINS
    if isinstance(node, ast.alias):
        return node.name in BUILTINS
    if not isinstance(node, ast.Constant) or not isinstance(node.value, (str, bytes)):
        return False
    words = node.value.split()
    # In one piece, or in lines.
    in_lines = len(node.value) > max(LONG_LITERAL, LONG_WORDS * len(words))
    return in_lines or max(map(len, words), default=0) > LONG_LITERAL


# ============
# Files and clocks


def artifact_row(runs: list[Run]) -> Row:
    """Whether the artifacts are there and are those that the logs speak of."""
    question = f"{CAP_BYTES:,} bytes"
    missing = [run for run in runs if run.artifact is None]
    if missing:
        reason = f"the artifact of {missing[0].path} is not there: give it with --artifacts"
        return Row(question, "as the logs say", "the logs", (reason,))
    sums = ", ".join(f"{run.seed}: {file_sha256(run.artifact)}" for run in runs)
    return Row(
        question, f"the artifacts' sizes are the logs'; SHA-256 by seed: {sums}", "the files"
    )


def logs_row(runs: list[Run]) -> Row:
    """Whether the two logs say the same, and add up."""
    unsaid = dict.fromkeys(name for run in runs for name in unprinted(run.logs))
    text = "both logs of each run say the same, and steps, times and the seconds of the records "
    text += "add up"
    passed = [off_the_clocks(run.logs) for run in runs]
    if None not in passed:
        text += (
            f"; off the clocks (validation, packing) were at most {max(passed):.1f} s of training"
        )
    if not unsaid:
        return Row("clocks and figures", text, "the logs")
    names = ", ".join(unsaid)
    reason = f"the text logs do not say: {names}"
    return Row("clocks and figures", f"{text}; not in the text: {names}", "the logs", (reason,))


def parts_row(runs: list[Run]) -> Row:
    """Which runs were resumed, from which starts, and what these trained together.

    A checkpoint is a file that anybody can write: the log of every start must be there, and all
    that they trained counts, also what was lost.
    """
    texts = []
    reasons = []
    for run in runs:
        reasons += [f"{run.path}: {what}" for what in changed_starts(run.logs)]
        if not is_resumed(run.logs.records):
            continue
        starts = starts_of([*run.logs.earlier, run.logs.records])
        seconds = sum(counted_seconds(start) for start in starts)
        told = f"{history(run.logs)}; {len(starts)} starts trained {seconds:.1f} s together"
        texts.append(f"seed {run.seed}: {told}")
        lost = lost_parts(run.logs) + uncounted_starts(run)
        lost += ["the log of its first start is not there"] if is_resumed(starts[0]) else []
        reasons += [f"{run.path} was resumed: {why} (--parts LOG)" for why in lost[:1]]
        if seconds > LIMIT_SECONDS:
            reasons.append(f"the starts of {run.path} trained {seconds:.1f} s together")
    text = "; ".join(texts) or "every run was trained in one start"
    return Row("one run, whole", text, "the logs", tuple(reasons))


def uncounted_starts(run: Run) -> list[str]:
    """Whether the checkpoint knows of more starts than the logs hold."""
    count = said(run.logs.events, "resumed").get("starts", 0)
    held = len(run.logs.earlier) + 1
    return [f"it is start {count} of a run of which the logs hold {held}"] if count > held else []


# ============
# Seeds


class OtherRun(NamedTuple):
    """A run of the same script and settings that is not packaged."""

    path: Path
    seed: int
    val_bpb: float | None  # None: it has no score


def same_experiment(run: Run, file: Path) -> OtherRun | None:
    """The last run of a log if it is of the same script and settings; None for another.

    Of the script only the size is compared: the records do not hold it.
    """
    try:
        events = last_run(file)
        settings = events["settings"]["settings"]
        size = said(events, "trained").get("bytes_code", run.bytes_code)
        other = OtherRun(file, int(settings["seed"]), said(events, "final").get("val_bpb"))
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return None  # not a run's log
    names = {*settings, *run.settings} - MAY_DIFFER
    same = all(settings.get(name) == run.settings.get(name) for name in names)
    return other if same and size == run.bytes_code else None


def others_beside(runs: list[Run]) -> list[OtherRun]:
    """Repetitions of these runs, with other seeds, whose logs lie in the same folders."""
    packaged = {run.path.with_suffix(".jsonl").resolve() for run in runs}
    found = []
    for folder in dict.fromkeys(run.path.resolve().parent for run in runs):
        for file in sorted(folder.glob("*.jsonl")):
            other = same_experiment(runs[0], file)
            if other and file.resolve() not in packaged:
                found.append(other)
    return found


def seeds_row(runs: list[Run]) -> Row:
    """Which seeds were run: those packaged, and those whose logs lie beside theirs."""
    text = f"packaged: {', '.join(str(run.seed) for run in runs)}"
    reasons = []
    others = others_beside(runs)
    for other in others:
        scored = other.val_bpb is not None
        score = f"val_bpb {other.val_bpb:.5f}" if scored else "without a score"
        text += f"; left out: {other.seed} ({score}, {other.path.name})"
        # The best of many seeds is no measure of any; a run without a score was none of them.
        if scored:
            reasons.append(f"SEED={other.seed} was run too and is left out ({other.path})")
    if not others:
        text += "; no other run of this script and settings lies beside these logs"
    return Row("seeds run", text, "the logs' folders", tuple(reasons))
