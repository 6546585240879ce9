"""The checks: each asks one question of a submission and answers it in a sentence.

A check is a function of a Case. Its finding HOLDS, FAILS, or is OPEN if something that it needs is
not known here. For each check, a test in tests/test_audit.py plants the violation that it looks
for. What is proved from outside (the files, the scores of the script's own process, and what
happens to them when tokens change) is proved for any script. What the watched evaluation reports
counts only with the project's own script, and is OPEN with another one.
"""

import functools
import hashlib
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.audit", file=sys.stderr)
    sys.exit(2)

from tools import contradictions, known
from tools.audit import decoder, text
from tools.audit.case import Case
from tools.audit.observation import Observation
from tools.command import file_sha256

HOLDS = "holds"
FAILS = "FAILS"
OPEN = "open"

EXACT_DIGITS = 8  # of a score
NOISE_BPB = 1e-3  # between two runs on GPUs, two kinds of machine, or with epochs given up
PREFIX_CHUNKS = 3.5  # of test-time training, which most of the causality test reads
ROUND_TRIPS = 200  # documents that are decoded and encoded again
FEW_ROUND_TRIPS = 0.9  # of these must give their tokens back
SUMMED_CONTEXTS = 2  # places behind which every token's probability is asked for
FAR_FROM_ONE = 0.05  # a sum that no windows of other kinds explain
TWO_RUNS = 3.0  # times what two runs here differ by: so much may the log's differ from one here
LEAST_TWO_RUNS_BPB = 1e-5  # so much it may differ in any case, even if two runs here did not
HELD_OUT_BLOCK = 256  # targets, whose mean is one observation of how hard a text is
LEARNT, SUSPECT = 0.1, 0.01  # less than held-out text: the text was learnt; it may have been
SURE = 5.0  # standard errors between two texts
LEAKED = 0.6  # of a fresh text's BPB: a validation text that scores less was known

# Of one target, and of a sum of probabilities: in float32, and in a GPU's bfloat16.
CPU_NATS_ERROR = 2e-4
GPU_NATS_ERROR = 5e-2
CPU_SUM_ERROR = 1e-4
GPU_SUM_ERROR = 1e-2


class Finding(NamedTuple):
    """What a check comes to."""

    verdict: str  # HOLDS, FAILS or OPEN
    evidence: str


class Broken(Exception):
    """A check's condition does not hold, for the reason that the message gives."""


def expect(condition, message: str) -> None:
    """Ends a check unless its condition holds."""
    if not condition:
        raise Broken(message)


def judged(holds: bool, evidence: str) -> Finding:
    """A finding that is not open."""
    return Finding(HOLDS if holds else FAILS, evidence)


def run_check(check: Callable[[Case], Finding], case: Case) -> Finding:
    """A check's finding; one that cannot be carried through has failed."""
    try:
        return check(case)
    except Broken as reason:
        return Finding(FAILS, str(reason))
    except Exception as error:
        return Finding(FAILS, f"{type(error).__name__}: {error}")


def as_told(check: Callable[[Case], Finding]) -> Callable[[Case], Finding]:
    """A check of what the watched evaluation tells, which another script can tell as it likes."""

    @functools.wraps(check)
    def of_own_script(case: Case) -> Finding:
        verdict, evidence = check(case)
        if verdict == HOLDS and not case.identity.is_own:
            return Finding(OPEN, f"{evidence}; but that is what another script tells of itself")
        return Finding(verdict, evidence)

    return of_own_script


# ---- What is submitted -------------------------------------------------------------------------


def check_script(case: Case) -> Finding:
    """It is a script that this project has published."""
    return Finding(HOLDS if case.identity.is_own else OPEN, case.identity.evidence)


def check_isolation(case: Case) -> Finding:
    """It was loaded and run where the kernel refuses other files and the network.

    Which kernel feature does so, and which were not to be had, is the evidence.
    """
    looked_on = "; strace looks on" if case.strace else ""
    evidence = f"{case.isolation.evidence}{looked_on}"
    return Finding(HOLDS if case.isolation.is_isolated else OPEN, evidence)


def is_official(case: Case) -> bool:
    """Whether the tokenizer is one of the contest's."""
    return known.variant_of(file_sha256(case.tokenizer)) is not None


def check_bytes(case: Case) -> Finding:
    """Code, artifact and a tokenizer of one's own fit, as files on disk, and are the log's."""
    parts = {"code": case.script.stat().st_size, "model": case.artifact.stat().st_size}
    logged = sum(parts.values())
    if not is_official(case):
        parts["a tokenizer that is not the contest's"] = case.tokenizer.stat().st_size
    total = sum(parts.values())
    terms = " + ".join(f"{size:,} of {name}" for name, size in parts.items())
    found = [f"{terms} = {total:,} of {contradictions.CAP_BYTES:,} bytes"]
    if total > contradictions.CAP_BYTES:
        found.append(f"over the cap of {contradictions.CAP_BYTES:,}")
    if case.logs:
        found += log_of_others(case, logged)
    holds = len(found) == 1
    if holds and case.logs:
        hashed = contradictions.logged_hash(case.logs)
        by = ", its SHA-256 is the log's" if hashed else "; the log has no SHA-256 of the artifact"
        found.append(f"the log agrees, and holds this script{by}")
    return judged(holds, "; ".join(found))


def log_of_others(case: Case, total: int) -> list[str]:
    """Why the log is not of this script and this artifact."""
    log = case.logs.text
    found = []
    if log.total_bytes not in (None, total):
        found.append(f"the log says {log.total_bytes:,}")
    source = log.source
    ours = case.script.read_text(encoding="utf-8")
    # An earlier run's messages may stand before the script.
    if source != ours and not (f"\n{'=' * 100}\n" in source and source.endswith(f"\n{ours}")):
        found.append("the log was written by another script")
    return found + contradictions.other_artifact(case.logs, case.artifact)


def check_known_data(case: Case) -> Finding:
    """What was scored is the contest's whole validation text, by the contest's tokenizer.

    Another text is no cheat unless it is passed off as FineWeb's: then this fails. Else it is open,
    as a score over it says nothing about the contest.
    """
    digest = file_sha256(case.tokenizer)
    sums = {}
    for shard in case.shards:
        sums[shard.name] = file_sha256(case.data / shard.name)
    counts = {
        "documents": int((case.tokens == text.BOS_ID).sum()),
        "tokens": len(case.tokens),
        "scored_tokens": case.count,
        "bytes": sum(one.bytes or 0 for one in case.texts),
    }
    compared = known.compare(counts, digest, sums)
    shown = "; ".join(f"{name} {value[:16]}" for name, value in sums.items())
    what = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts.items())
    evidence = f"tokenizer {digest[:16]}; {shown} (SHA-256, first 16 digits); {what}"
    contradicting = other_text_logged(case, counts, digest, sums)
    expect(not contradicting, f"{evidence}; {contradicting}")
    trained = training_shards(case).values()
    learnt = [name for name, value in sums.items() if value in trained]
    expect(not learnt, f"{evidence}; the log names {', '.join(learnt)} as training data too")
    if compared.differences:
        differ = f"{evidence}; not FineWeb's: {'; '.join(compared.differences)}"
        return Finding(FAILS if claims_fineweb(case) else OPEN, differ)
    if compared.unknown:
        lacking = f"not compared: {', '.join(compared.unknown)}"
        return Finding(OPEN, f"{evidence}; {compared.name}; {lacking}")
    return Finding(HOLDS, f"{evidence}; {compared.name}")


def training_shards(case: Case) -> dict[str, str]:
    """SHA-256, by name, of the training shards that the log names; "" of one that has none."""
    hashes = case.logs.events.get("hashes", {}) if case.logs else {}
    return contradictions.files_of(hashes, "training")


def claims_fineweb(case: Case) -> bool:
    """Whether the log, or the folder that was given, says that its text is the contest's."""
    folder = case.logs.text.settings.get("data_path", "") if case.logs else ""
    return "fineweb" in f"{folder} {case.data.name}".lower()


def other_text_logged(
    case: Case, counts: dict[str, int], tokenizer: str, shards: dict[str, str]
) -> str:
    """How the text that the log says was scored differs from the one here; "" if it does not.

    Its counts, and SHA-256 of tokenizer and shards.
    """
    if not case.logs:
        return ""
    logged = case.logs.events.get("validation_data", {})
    for name, value in counts.items():
        if logged.get(name) not in (None, "", value):
            return f"the log scored another text: its {name} are {logged[name]}, not {value}"
    others = contradictions.other_files(case.logs, "validation", shards)
    others += contradictions.other_files(case.logs, "tokenizer", {case.tokenizer.name: tokenizer})
    return "; ".join(others)


def check_training(case: Case) -> Finding:
    """What the log says that it was trained on holds no validation text.

    With --train, the shards that it names are read: their SHA-256 and their documents. Without,
    this is the word of a manifest.json, and open. That no others were trained on, nobody can see.
    """
    trained = training_shards(case)
    if not trained:
        return Finding(OPEN, "no log names the shards that were trained on")
    hashed = len(trained) - list(trained.values()).count("")
    overlap = contradictions.overlap_text(case.logs.events["hashes"])
    evidence = f"the log names {len(trained)} shards, {hashed} by SHA-256; by the log, which has "
    evidence += f"it from manifest.json, validation documents in them: {overlap}"
    if not case.train:
        return Finding(OPEN, f"{evidence}; --train FOLDER reads them")
    clean, told = compare_training(case, trained)
    return Finding(HOLDS if clean else OPEN, f"{evidence}; {told}")


def compare_training(case: Case, trained: dict[str, str]) -> tuple[bool, str]:
    """Whether --train has all shards that the log names by SHA-256, no validation document in
    them; in words.

    Raises Broken for a shard whose SHA-256 is not the log's. One that the log only names may be
    another of that name. A document that goes on in the next shard is not found.
    """
    wanted = text.document_digests(case.tokens)
    found = set()
    paths = [path for path in sorted(case.train.glob("*.bin")) if path.name in trained]
    expect(paths, f"--train {case.train} has none of the shards that the log names")
    for path in paths:
        case.progress.say(f"reading {path.name}")
        sha256 = file_sha256(path)
        other = f"{path.name} has SHA-256 {sha256[:16]}, in the log {trained[path.name][:16]}"
        expect(trained[path.name] in ("", sha256), other)
        found.update(set(wanted).intersection(text.document_digests(text.read_shard(path).tokens)))
    doubled = sum(digest in found for digest in wanted)
    told = f"{len(paths)} of them read here: {doubled:,} of {len(wanted):,} validation documents"
    told += " are in them, token for token"
    unknown = [path.name for path in paths if not trained[path.name]]
    if unknown:
        told += f"; whether the run read these {len(unknown)}, the log has no SHA-256 to tell"
    return not (doubled or unknown) and len(paths) == len(trained), told


def check_hidden_text(case: Case) -> Finding:
    """Neither artifact nor tokenizer holds runs of the validation text, or fields nobody reads.

    Both files are searched as they are and unpacked, for text and for tokens. Text that is packed
    or scrambled in a way of its own is not found so.
    """
    content = case.tokenizer.read_bytes()
    try:
        unknown = text.unknown_fields(content)
    except ValueError as error:
        raise Broken(f"the tokenizer is no protocol buffer: {error}") from None
    fields = ", ".join(f"{size:,} bytes in field {number}" for number, size in unknown.items())
    expect(not unknown, f"the tokenizer has {fields}, which nobody reads")
    written = "\n".join(one.text for one in case.texts).encode()
    generator = np.random.default_rng(case.seed)
    searched = 0
    for name, needle in (("text", written), ("tokens", case.tokens.tobytes())):
        wanted = text.needles(needle, generator)
        for path in (case.artifact, case.tokenizer):
            for layer in text.layers_of(path.read_bytes()):
                searched += len(layer)
                found = text.found_runs(layer, wanted)
                what = f"{path.name} holds {found} runs of {text.WINDOW} bytes of the validation"
                expect(not found, f"{what} {name}")
    runs = f"no run of {text.WINDOW} bytes of validation text or tokens"
    return Finding(HOLDS, f"{runs} in {searched:,} bytes of artifact and tokenizer")


@as_told
def check_weights(case: Case) -> Finding:
    """What scores are the artifact's weights, as decoded here, without the script."""
    seen = case.seen
    parts = decoder.take_apart(case.artifact)
    layout = [decoder.Parameter(one.name, one.shape, one.on_grid) for one in seen.weights]
    case.progress.say("decoding the artifact without the script")
    decoded = decoder.decode(parts, layout)
    for one in seen.weights:
        digest = hashlib.sha256(np.ascontiguousarray(decoded[one.name]).tobytes()).hexdigest()
        expect(digest == one.sha256, f"{one.name} is not the artifact's before the first score")
    numbers = sum(weights.size for weights in decoded.values())
    what = f"{numbers:,} numbers of {len(layout)} parameters, decoded here"
    return Finding(HOLDS, f"{what}, are those before the first score, to the bit")


# ---- Scores ------------------------------------------------------------------------------------


def bits_per_byte(nats: np.ndarray, count: int) -> float:
    """The nats, summed in float64, over ln 2, over so many bytes."""
    return float(nats.sum(dtype=np.float64)) / math.log(2) / count


def score_of(case: Case, nats: np.ndarray) -> float:
    """Bits per byte of the validation text, whose bytes are counted here."""
    return bits_per_byte(nats, total_bytes(case))


def total_bytes(case: Case) -> int:
    """Bytes of the validation text."""
    counts = [one.bytes for one in case.texts]
    expect(None not in counts, "the tokenizer's pieces contradict its text")
    return sum(counts)


def same_machine(case: Case) -> bool:
    """Whether the log comes from a machine like this."""
    theirs = case.logs.text.settings
    return all(theirs.get(name) == case.settled(name) for name in ("torch", "cuda", "hardware"))


def check_reproduced(case: Case) -> Finding:
    """The score follows from the artifact alone: elsewhere, without network and training data.

    The script hands over a number for each target; it is summed here, over bytes counted here.
    """
    alone = case.alone
    expect(not alone.network, f"it used the network: {', '.join(alone.network[:3])}")
    expect(not alone.strangers, f"it opened: {', '.join(alone.strangers[:3])}")
    expect(not alone.status, f"the script ended with status {alone.status}: {alone.said}")
    compiles = case.settled("compile") == "on" or not case.on_cpu  # which starts compilers
    expect(compiles or not alone.programs, f"it started {', '.join(alone.programs[:1])}")
    expect(alone.nats is not None, "it left no number for each target")
    ours = score_of(case, alone.nats)
    stated = alone.log.val_bpb
    sums = f"{stated} BPB by its log, {ours:.{EXACT_DIGITS}f} by its {case.count:,} nats"
    expect(f"{ours:.{EXACT_DIGITS}f}" == stated, sums)
    verdict, claim = compare_with_log(case)
    shards = ", ".join(path for path in alone.opened if path.startswith("data/"))
    seen_by = "strace and Python" if alone.traced else "Python"
    files = f"of {len(alone.opened)} files that {seen_by} saw opened, data are {shards}; no network"
    return Finding(verdict, f"{ours:.{EXACT_DIGITS}f} BPB summed here; {files}; {claim}")


def compare_with_log(case: Case) -> tuple[str, str]:
    """Whether the score is the one that the log claims, as a verdict, and by what it is told.

    To the last digit on a CPU like the log's; on a GPU like the log's, within what two runs here
    differ by, else it is open; within NOISE_BPB anywhere else.
    """
    if not case.logs:
        return HOLDS, "no log to compare with"
    claimed = case.logs.text
    found = case.alone.log
    difference = float(found.val_bpb) - float(claimed.val_bpb)
    says = f"the log says {claimed.val_bpb}, a difference of {difference:+.{EXACT_DIGITS}f}"
    if case.on_cpu and same_machine(case) and not claimed.epochs_given_up:
        holds = claimed.says_as(found)
        return HOLDS if holds else FAILS, f"{says} on such a machine: none is allowed"
    hardware = claimed.settings.get("hardware")
    where = f"on {hardware}, {claimed.epochs_given_up} epochs given up"
    if abs(difference) > NOISE_BPB:
        return FAILS, f"{says} ({where}); {NOISE_BPB} BPB are allowed"
    if not same_machine(case) or claimed.epochs_given_up:
        only = f"this is none such, so {NOISE_BPB} BPB are allowed, and what is claimed within them"
        return HOLDS, f"{says} ({where}); {only} is the log's word"
    again = case.once_more
    expect(again.log is not None, f"the script gave no score the second time: {again.said}")
    apart = abs(float(again.log.val_bpb) - float(found.val_bpb))
    most = max(TWO_RUNS * apart, LEAST_TWO_RUNS_BPB)
    told = f"{says} on such a machine, on which two runs differ by {apart:.{EXACT_DIGITS}f}"
    if abs(difference) > most:
        return OPEN, f"{told}: the log's by more than {TWO_RUNS:g} times that"
    return HOLDS, told


def check_own_script(case: Case) -> Finding:
    """The project's own script gives the artifact the same scores, target by target.

    Then it matters little what else another script does: the scores are the artifact's.
    """
    if case.identity.is_own:
        return Finding(HOLDS, "it is the project's own script")
    ours = case.by_own_script
    theirs = case.alone
    expect(theirs.nats is not None, f"the script gave no scores: {theirs.said}")
    if ours.nats is None:
        cannot = f"the project's own script cannot read this artifact: {ours.said}"
        return Finding(OPEN, f"{cannot}; whoever reads the lines that differ must judge")
    apart = np.abs(ours.nats - theirs.nats)
    most = CPU_NATS_ERROR if case.on_cpu else GPU_NATS_ERROR
    difference = score_of(case, theirs.nats) - score_of(case, ours.nats)
    other = int((apart > most).sum())
    evidence = f"{other:,} of {case.count:,} targets score otherwise by more than {most:g} nats"
    evidence += f"; {difference:+.{EXACT_DIGITS}f} BPB beside the project's own script"
    return judged(not other and abs(difference) <= NOISE_BPB, evidence)


def check_log(case: Case) -> Finding:
    """The run's logs do not contradict each other, nor the clocks, nor the contest's limits.

    Resumed runs are named, and every start of theirs must stand in the log. See
    tools/contradictions.py.
    """
    if not case.logs:
        return Finding(OPEN, "no log was given: how it was trained is not even claimed")
    found = contradictions.contradictions(case.logs, case.artifact)
    told = contradictions.history(case.logs)
    if found:
        return Finding(FAILS, f"{'; '.join(found)}; {told}")
    if not case.logs.events:
        return Finding(OPEN, f"{told}; the .jsonl is missing, so there is little to compare")
    if changed := contradictions.changed_starts(case.logs):
        return Finding(OPEN, f"no contradiction; {told}; {'; '.join(changed)}")
    if lacking := contradictions.unprinted(case.logs):
        return Finding(OPEN, f"no contradiction; {told}; not in both logs: {', '.join(lacking)}")
    return Finding(HOLDS, f"no contradiction; {told}; that the log is true is the runner's word")


def check_clocks(case: Case) -> Finding:
    """Evaluation and training keep the contest's time, whatever the settings allowed.

    How long it takes here counts where no log says it, or where the log is of such a machine.
    """
    log = case.logs.text if case.logs else None
    limit = contradictions.LIMIT_SECONDS
    here = case.alone.seconds
    evidence = [f"evaluation here {here:.1f}s of {limit:g}s, on {case.settled('hardware')}"]
    kept = [True]
    if not log or same_machine(case):
        kept = [here <= limit]
    if log:
        allowed = contradictions.limit_of(log.evaluation_limit)
        evidence.append(f"in the log {log.evaluation_seconds}s of {allowed:g}s")
        kept.append(log.evaluation_seconds <= allowed)
    if log and log.training_seconds is not None:
        allowed = contradictions.limit_of(log.settings.get("max_wallclock_seconds", ""))
        evidence.append(f"training {log.training_seconds}s of {allowed:g}s")
        kept.append(log.training_seconds <= allowed)
    return judged(all(kept), "; ".join(evidence))


# ---- Causality ---------------------------------------------------------------------------------


class Stretch(NamedTuple):
    """A part of the validation text as a stream of its own, and places behind which all changes."""

    name: str
    tokens: np.ndarray
    cuts: list[int]


def draw_stretches(case: Case, generator: np.random.Generator) -> list[Stretch]:
    """What the causality test reads, by lot.

    A short text is read whole, with cuts in chunks drawn by lot. Of a long one, a cut anywhere in
    the whole text, and a stretch of PREFIX_CHUNKS chunks that begins anywhere, with a cut in each.
    """
    chunk = case.chunk
    count = case.count
    part = int(PREFIX_CHUNKS * chunk)
    if count <= 2 * part:
        return [Stretch("the whole text", case.tokens, draw_cuts(case, count, generator))]
    anywhere = int(generator.integers(1, count))
    start = int(generator.integers(0, count - part))
    tokens = case.tokens[start : start + part + 1]
    name = f"targets {start:,} to {start + part:,}"
    return [
        Stretch("the whole text", case.tokens, [anywhere]),
        Stretch(name, tokens, draw_cuts(case, part, generator)),
    ]


def draw_cuts(case: Case, count: int, generator: np.random.Generator) -> list[int]:
    """Cuts in chunks drawn by lot, anywhere in each, and around the end of one.

    Just before and behind the end of a chunk, as an update comes between.
    """
    chunk = min(case.chunk, count)
    firsts = np.arange(0, count, chunk)
    few = min(case.cuts, len(firsts))
    cuts = set()
    for first in generator.choice(firsts, few, replace=False).tolist():
        cuts.add(int(generator.integers(max(first, 1), min(first + chunk, count))))
    if len(firsts) > 1 and case.cuts > 1:
        end = int(generator.choice(firsts[1:]))
        cuts |= {end - 1, end}
    return sorted(cut for cut in cuts if 0 < cut < count)


def check_causal(case: Case) -> Finding:
    """No score moves when all tokens behind its target are replaced, in the files on disk.

    Whatever a scorer may do, and whatever it may tell of it: it is what follows that is compared,
    by a new process for each text. On a CPU, not a single bit may move.
    """
    expect(case.alone.nats is not None, f"the script gave no scores: {case.alone.said}")
    generator = np.random.default_rng(case.seed)
    stretches = draw_stretches(case, generator)
    tried = [test_stretch(case, stretch, generator) for stretch in stretches]
    mode = f"{case.settled('eval_mode')}, {'with' if case.adapts else 'without'} TTT"
    return Finding(HOLDS, f"{'; '.join(tried)}; {mode}, seed {case.seed}")


def test_stretch(case: Case, stretch: Stretch, generator: np.random.Generator) -> str:
    """What changing a stretch behind each of its cuts does; raises Broken if a score moves.

    On a GPU, by more than two runs on the same tokens differ. That most of the scores behind a cut
    move shows that the test can see a dependence at all.
    """
    whole = len(stretch.tokens) == len(case.tokens)
    count = len(stretch.tokens) - 1
    before = case.alone.nats if whole else case.nats(stretch.tokens, f"of {stretch.name}")
    noise = 0.0
    if not case.on_cpu:  # gradients differ from run to run by rounding
        again = case.nats(stretch.tokens, f"of {stretch.name}, once more")
        noise = 4 * float(np.abs(again - before).max())
    moved = []  # part of the scores behind each cut
    for cut in stretch.cuts:
        what = f"with other tokens from {cut + 1} on"
        other = replaced_behind(case, stretch.tokens, cut, generator)
        after = case.nats(other, what)
        expect_still(before, after, cut, noise, what)
        moved.append(float((after[cut:] != before[cut:]).mean()))
    if case.by_document:
        other_borders(case, stretch, before, generator)
    least = f"{min(moved):.0%}"
    blind = "the test would not see a dependence"
    expect(min(moved) >= 0.5, f"only {least} of the scores behind a cut move: {blind}")
    bound = "by a single bit"
    if noise:
        bound = f"by more than {noise:.1g} nats, the noise of two runs being a quarter"
    places = ", ".join(map(str, stretch.cuts))
    tried = f"{stretch.name}, {count:,} targets, cut at {places}"
    if case.by_document:
        tried += f" (and {stretch.cuts[-1]}, with other documents' borders behind it)"
    return f"{tried}: no score up to a cut moves {bound}, {least} or more behind it do"


def expect_still(before: np.ndarray, after: np.ndarray, cut: int, noise: float, what: str) -> None:
    """Raises Broken if a score up to the cut has moved by more than the noise."""
    still = np.abs(after[:cut] - before[:cut]) <= noise  # false for NaN too
    wrong = np.flatnonzero(~still)
    first = wrong.min(initial=cut) + 1
    expect(still.all(), f"{what}, {len(wrong)} earlier scores move, first that of {first}")


def other_borders(
    case: Case, stretch: Stretch, before: np.ndarray, generator: np.random.Generator
) -> None:
    """Cuts once more, where documents' borders change with the tokens; raises Broken.

    Documents are then read in another order, beside others: scores may move by rounding.
    """
    cut = stretch.cuts[-1]
    what = f"with other tokens and borders of documents from {cut + 1} on"
    other = replaced_behind(case, stretch.tokens, cut, generator, keep_borders=False)
    noise = CPU_NATS_ERROR if case.on_cpu else GPU_NATS_ERROR
    expect_still(before, case.nats(other, what), cut, noise, what)


def replaced_behind(
    case: Case,
    tokens: np.ndarray,
    cut: int,
    generator: np.random.Generator,
    keep_borders: bool = True,
) -> np.ndarray:
    """A stream with the same targets of positions before the cut, and all others different.

    keep_borders: of documents that are scored by themselves, so that each is read beside the same
    others, and not a bit may move: BOS stays, and becomes of nothing else.
    """
    vocab_size = int(case.settled("vocab_size"))
    other = tokens.astype(np.int64)
    behind = len(tokens) - (cut + 1)
    other[cut + 1 :] += generator.integers(1, vocab_size, behind)
    other %= vocab_size
    if case.by_document and keep_borders:
        other[other == text.BOS_ID] = text.BOS_ID + 1
        kept = tokens == text.BOS_ID
        other[kept] = text.BOS_ID
    return other.astype(tokens.dtype)


# ---- What was watched --------------------------------------------------------------------------


def seen_of(case: Case) -> Observation:
    """What was watched, which must be what the script does elsewhere."""
    seen = case.seen
    alone = case.alone
    expect(alone.nats is not None, f"the script gave no scores: {alone.said}")
    if not np.array_equal(alone.nats, seen.nats):
        noise = 0.0 if case.on_cpu else NOISE_BPB
        bpb = score_of(case, alone.nats)
        there = f"{bpb:.{EXACT_DIGITS}f} BPB there, {seen.val_bpb:.{EXACT_DIGITS}f} when watched"
        expect(abs(bpb - seen.val_bpb) < noise, there)
    return seen


@as_told
def check_scored_once(case: Case) -> Finding:
    """Every target gets one score, which is the one that counts."""
    seen = seen_of(case)
    never = int((seen.times_written == 0).sum())
    again = int((seen.times_written > 1).sum())
    expect(not never and not again, f"{never} targets are never scored, {again} more than once")
    same = np.array_equal(seen.written, seen.nats)
    expect(same, "what is summed is not what was scored")
    loss = float(seen.written.mean(dtype=np.float64))
    holds = math.isclose(loss, seen.val_loss, rel_tol=1e-9) and (seen.written >= 0).all()
    count = len(seen.written)
    evidence = f"{count:,} targets, each written once; their mean is {loss:.8f} nats"
    return judged(bool(holds), evidence)


@as_told
def check_probabilities(case: Case) -> Finding:
    """Scores are -log of probabilities that sum to one over the vocabulary."""
    sampled = seen_of(case).sampled
    most_nats = CPU_NATS_ERROR if case.on_cpu else GPU_NATS_ERROR
    most_sum = CPU_SUM_ERROR if case.on_cpu else GPU_SUM_ERROR
    # All of them: NaN, which compares as false, must not hide behind a maximum.
    nats = np.array([abs(one.nats - one.expected) for one in sampled])
    total = np.array([abs(one.total - 1) for one in sampled if one.total is not None])
    exact = (nats <= most_nats).all() and (total <= most_sum).all()
    kept = np.array([abs(one.nats - case.alone.nats[one.position]) for one in sampled])
    handed_over = (kept <= most_nats).all()
    holds = len(sampled) > 0 and exact and handed_over
    vocabulary = f"{int(case.settled('vocab_size')):,} tokens"
    sums = f"{len(total):,} sums over {vocabulary} within {total.max(initial=0.0):.1e} of 1"
    scores = f"scores within {nats.max(initial=0.0):.1e} nats of -log softmax in float64"
    where = f"{len(sampled):,} targets, drawn by seed {case.seed}"
    return judged(bool(holds), f"{where}: {sums}, {scores}")


def check_sums(case: Case) -> Finding:
    """Probabilities sum to one, without asking the script for any but a target's.

    A text is made in which a place of the validation text comes once for each token, and that token
    behind it: in plain windows, with frozen weights, their probabilities belong to one context. A
    script whose windows know more than themselves has sums that are only near one.
    """
    window = min(int(case.settled("train_seq_len")), max(64, int(case.settled("mamba_chunk_size"))))
    vocabulary = int(case.model.vocab_size())
    generator = np.random.default_rng(case.seed)
    starts = generator.integers(0, len(case.tokens) - window, SUMMED_CONTEXTS)
    made = np.concatenate([every_next(case.tokens[s : s + window], vocabulary) for s in starts])
    plain = {"EVAL_MODE": "plain", "TTT_ENABLED": "0", "TRAIN_SEQ_LEN": str(window)}
    plain |= {"EVAL_STRIDE": str(window), "EVAL_OVERLAP": "0", "VAL_BATCH_SIZE": "16384"}
    tokens = np.append(made, made[:1]).astype(np.uint16)
    nats = case.nats(tokens, "in which every token comes next", **plain)
    chosen = nats[window - 1 :: 2 * window].astype(np.float64)
    sums = np.exp(-chosen).reshape(SUMMED_CONTEXTS, vocabulary).sum(axis=1)
    apart = np.abs(sums - 1).max()
    shown = ", ".join(f"{one:.6f}" for one in sums)
    evidence = f"over {vocabulary:,} tokens, behind {SUMMED_CONTEXTS} places by seed {case.seed}"
    evidence = f"sums {evidence}: {shown}"
    expect(apart <= FAR_FROM_ONE, f"{evidence}: these are no probabilities")
    exact = apart <= (CPU_SUM_ERROR if case.on_cpu else GPU_SUM_ERROR)
    return Finding(HOLDS if exact else OPEN, evidence)


def every_next(context: np.ndarray, vocabulary: int) -> np.ndarray:
    """Windows in pairs, one for each token: the context, and one that begins with the token."""
    pairs = np.tile(context, (vocabulary, 2, 1))
    pairs[:, 1, 0] = np.arange(vocabulary)
    return pairs.ravel()


@as_told
def check_order(case: Case) -> Finding:
    """Score first: updates see only targets that are scored, and none sees the last chunk.

    A step of an optimizer needs a loss before it whose targets are known, and weights change by
    steps alone.
    """
    seen = seen_of(case)
    count = len(seen.times_written)
    last = last_targets(case, count)
    # Of documents, the pass that scores a piece is that whose gradient is taken afterwards.
    graded = case.by_document and case.adapts
    expect(graded or not seen.with_gradients, "a score was computed with gradients")
    trained, steps = follow_events(seen, last)
    if graded:  # branches take no optimizer's steps: one on each loss, as the observer hears
        steps = sum(kind == "train" for kind, _ in seen.events)
    expect(case.adapts or not steps, "weights are updated although TTT is off")
    if not steps:
        return Finding(HOLDS, f"{count:,} targets scored, weights never changed")
    updates = f"{steps} updates on {trained:,} of {count:,} targets"
    how = "each scored before" if graded else "each scored before, without gradients"
    where = "last pieces of documents" if graded else "the last chunk"
    return Finding(HOLDS, f"{updates}, {how}; none on the {int(last.sum()):,} of {where}")


def last_targets(case: Case, count: int) -> np.ndarray:
    """Which of so many targets may not be trained on, as no later score could gain, (count,) bool.

    They are the last chunk, or each document's last piece; all, where nothing is trained.
    """
    place = np.arange(count)
    if not case.adapts:
        return place >= 0
    if not case.by_document:
        chunk = int(case.settled("ttt_chunk_tokens"))
        return place >= (count - 1) // chunk * chunk
    begins = np.union1d(0, np.flatnonzero(case.tokens == text.BOS_ID))
    lengths = np.diff(begins, append=count)
    begins, lengths = (np.repeat(x, lengths) for x in (begins, lengths))
    piece = min(int(case.settled("ttt_lora_piece")), int(case.settled("train_seq_len")))
    return place - begins >= (lengths - 1) // piece * piece


def follow_events(seen: Observation, last: np.ndarray) -> tuple[int, int]:
    """How many targets were trained on, in how many steps; raises Broken where one came early.

    Events come in their order. last: last_targets(), on which nothing is trained.
    """
    count = len(seen.times_written)
    scored = np.zeros(count, dtype=bool)
    trained = np.zeros(count, dtype=bool)
    steps = 0
    gradient = False  # of a loss on scored targets, not yet used
    for kind, targets in seen.events:
        if kind == "score":
            scored[targets] = True
        elif kind == "train":
            early = targets[~scored[targets]].min(initial=count)
            expect(early == count, f"an update sees target {early} before it is scored")
            latest = targets[last[targets]].max(initial=-1)
            expect(latest < 0, f"an update sees target {latest}, of the last chunk or piece")
            trained[targets] = True
            gradient = True
        elif kind == "step":
            expect(gradient, "an optimizer steps without a loss on scored targets")
            steps += 1
            gradient = False
        else:
            raise Broken("weights changed without a step of an optimizer")
    return int(trained.sum()), steps


# ---- Bytes -------------------------------------------------------------------------------------


def check_text_bytes(case: Case) -> Finding:
    """The bytes in bits per byte are those of the text, document by document.

    Shards are read and decoded here, without the script, and compared with its target_bytes; the
    decoded text gives the tokens back. With --text, text and bytes are the original documents'.
    """
    seen = seen_of(case)
    counted = np.concatenate([[0, 0], np.cumsum(seen.target_bytes)])  # [i]: of tokens[:i]
    total = 0
    for first, last, decoded, truth in case.texts:
        ours = int(counted[last] - counted[first])
        what = f"tokens {first} to {last - 1} count as {ours} bytes; their text has {truth}"
        expect(truth == ours, f"{what}: {decoded[:40]!r}")
        total += ours
    everything = int(seen.target_bytes.sum())
    expect(total == everything, f"{everything:,} bytes are counted, {total:,} of them in text")
    evidence = f"{len(case.texts):,} documents, {total:,} bytes of decoded text"
    evidence += f"; {check_round_trips(case)}"
    if case.source:
        return Finding(HOLDS, f"{evidence}; {compare_source(case)}")
    if not is_official(case):
        of_its_own = "decoded by a tokenizer that is not the contest's: --text proves its bytes"
        return Finding(OPEN, f"{evidence}, {of_its_own}")
    return Finding(HOLDS, evidence)


def check_round_trips(case: Case) -> str:
    """Decodes documents, by lot, and encodes them again; raises Broken unless most come back.

    Pieces that say more than the text had do not spell themselves. A few documents may spell
    otherwise: BPE need not be its own inverse.
    """
    generator = np.random.default_rng(case.seed)
    whole = [one for one in case.texts if is_whole(case, one)]
    if not whole:
        return "no document is whole, so none can be encoded again"
    drawn = generator.choice(len(whole), min(ROUND_TRIPS, len(whole)), replace=False)
    kept = 0
    for index in drawn:
        one = whole[index]
        kept += text.encode(case.model, one.text) == case.tokens[one.first : one.last].tolist()
    trips = f"{kept} of {len(drawn)} documents give their tokens back"
    lost = "the shards are not this tokenizer's encoding of a text"
    expect(kept >= FEW_ROUND_TRIPS * len(drawn), f"only {trips}: {lost}")
    return trips


def is_whole(case: Case, one: text.Text) -> bool:
    """Whether a text is a document from its beginning to its end, without unknown tokens."""
    last = len(case.tokens)
    inside = one.first > 0 and one.last < last
    return inside and case.tokens[one.first - 1] == case.tokens[one.last] == text.BOS_ID


def compare_source(case: Case) -> str:
    """Encodes the original documents; raises Broken unless they give the shards' tokens."""
    documents = text.read_documents(case.source)
    tokens = text.encode_documents(case.model, documents)
    same = np.array_equal(tokens, case.tokens)
    expect(same, f"{case.source} gives other tokens than the shards'")
    check_nothing_is_lost(case, documents)
    original = sum(len(one.encode()) for one in documents)
    bpb = bits_per_byte(case.alone.nats, original)
    text_of = f"{case.source.name} gives these tokens and has {original:,} bytes"
    return f"{text_of}, over which it is {bpb:.{EXACT_DIGITS}f} BPB"


def check_nothing_is_lost(case: Case, documents: list[str]) -> None:
    """Raises Broken unless the tokens decode to the original documents.

    A tokenizer brings its own normalizer. One that writes "a" for every letter makes a text that is
    easily foretold, and tokens, bytes and round trips agree with each other: of another text. What
    a tokenizer does not know is lost, too, which the contest has allowed its own.
    """
    parts: list[list[str]] = [[] for _ in documents]
    begins = np.flatnonzero(case.tokens == text.BOS_ID)
    for one in case.texts:
        parts[int(np.searchsorted(begins, one.first)) - 1].append(one.text)
    for original, found in zip(documents, parts, strict=True):
        lost = text.lost_characters(found, original)
        told = f"{original[:40]!r} in {case.source}, whose tokens say {' ... '.join(found)[:40]!r}"
        expect(lost is not None, f"what is scored is another text: {told}")
        expect(not lost or is_official(case), f"characters are lost: of {told}")


def check_fresh(case: Case) -> Finding:
    """A text that nobody had, beside the claimed one: frozen, and as it adapts.

    Two texts differ in how hard they are. But weights that have learnt the validation text by heart
    need far less for it than for any other.
    """
    if not case.fresh:
        return Finding(OPEN, "no --fresh FILE was given: that the text was not trained on is open")
    documents = text.read_documents(case.fresh)
    tokens = text.encode_documents(case.model, documents)
    if shared := shared_documents(case, tokens):
        return Finding(OPEN, f"{case.fresh} is no text that nobody had: {shared}")
    size = sum(len(one.encode()) for one in documents)
    needed = int(case.settled("train_seq_len")) + 1
    expect(len(tokens) > needed, f"{case.fresh} has {len(tokens)} tokens; {needed} are needed")
    frozen = bits_per_byte(case.nats(tokens, "of the fresh text, frozen", TTT_ENABLED="0"), size)
    known_text = case.nats(case.tokens, "of the validation text, frozen", TTT_ENABLED="0")
    claimed = score_of(case, known_text)
    evidence = f"{len(documents)} documents, {size:,} bytes: {frozen:.5f} BPB frozen"
    if case.adapts:
        adapting = bits_per_byte(case.nats(tokens, "of the fresh text, adapting"), size)
        evidence += f", {adapting:.5f} adapting"
    evidence += f"; the validation text {claimed:.5f} frozen, "
    evidence += f"{score_of(case, case.alone.nats):.5f} as claimed"
    least = f"{LEAKED:.0%} of a fresh text's: the model knows it"
    expect(claimed >= LEAKED * frozen, f"{evidence}; validation takes less than {least}")
    return Finding(HOLDS, evidence)


def check_held_out(case: Case) -> Finding:
    """The validation text beside text of the same kind that was not trained on: --held-out SHARD.

    In plain windows, with frozen weights: a text that was learnt by heart, or a few times over,
    takes fewer nats than one that is as hard. What one reading in a hundred leaves is too little.
    """
    if not case.held_out:
        return Finding(OPEN, "no --held-out SHARD, of such text as was not trained on, was given")
    name, tokens = text.read_shard(case.held_out)
    learnt = file_sha256(case.held_out) in training_shards(case).values()
    expect(not learnt, f"{name} is held out, but the log names it as training data")
    if shared := shared_documents(case, tokens):
        return Finding(OPEN, f"{name} is no text beside the validation text: {shared}")
    tokens = tokens[: len(case.tokens)]
    known_ids = int(tokens.max(initial=0)) < case.model.vocab_size()
    expect(known_ids and len(tokens) > 2 * HELD_OUT_BLOCK, f"{name} is no text for this tokenizer")
    frozen = {"EVAL_MODE": "plain", "TTT_ENABLED": "0"}
    held = block_means(case.nats(tokens, "of the held-out text", **frozen))
    ours = block_means(case.nats(case.tokens, "of the validation text", **frozen))
    less = held.mean() - ours.mean()
    error = math.sqrt(held.var(ddof=1) / len(held) + ours.var(ddof=1) / len(ours))
    part, sure = less / held.mean(), less > SURE * error
    evidence = f"{ours.mean():.4f} nats a token of the validation text, {held.mean():.4f} of "
    evidence += f"{len(tokens):,} tokens of {name}: {part:.2%} less, {less / error:.1f} standard"
    evidence += " errors"
    expect(not sure or part < LEARNT, f"{evidence}: the model knows the validation text")
    if sure and part > SUSPECT:
        return Finding(OPEN, f"{evidence}: more than by lot, if both are of one kind")
    if part < -LEARNT and less < -SURE * error:
        easier = "it is of an easier kind, or was trained on, and shows nothing"
        return Finding(OPEN, f"{evidence}: {easier}")
    return Finding(HOLDS, evidence)


def shared_documents(case: Case, tokens: np.ndarray) -> str:
    """How many documents of a text are the validation text's, in words; "" if none is.

    Whoever audits may have it from the contestant, or take the wrong file.
    """
    documents = text.document_digests(tokens.astype(np.uint16))
    shared = len(set(documents) & set(text.document_digests(case.tokens)))
    told = f"{shared:,} of its {len(documents):,} documents are validation documents"
    return told if shared else ""


def block_means(nats: np.ndarray) -> np.ndarray:
    """Means of HELD_OUT_BLOCK nats each, float64: neighbours are not independent."""
    whole = len(nats) // HELD_OUT_BLOCK
    expect(whole > 1, "the text is too short to be held against another")
    return nats[: whole * HELD_OUT_BLOCK].reshape(whole, -1).mean(axis=1, dtype=np.float64)


CHECKS: dict[str, Callable[[Case], Finding]] = {
    "script": check_script,
    "isolation": check_isolation,
    "bytes": check_bytes,
    "data": check_known_data,
    "score": check_reproduced,
    "own": check_own_script,
    "log": check_log,
    "clocks": check_clocks,
    "causal": check_causal,
    "weights": check_weights,
    "once": check_scored_once,
    "probabilities": check_probabilities,
    "sums": check_sums,
    "order": check_order,
    "text": check_text_bytes,
    "hidden": check_hidden_text,
    "fresh": check_fresh,
    "held": check_held_out,
    "training": check_training,
}
ALWAYS = ("script", "isolation")  # which no choice of checks leaves out

# What each asks, in the table.
TITLES = {
    "script": "the project's own script",
    "isolation": "isolated",
    "bytes": "16,000,000 bytes",
    "data": "the contest's validation text",
    "score": "score from the artifact alone",
    "own": "same scores by the project's own script",
    "log": "logs without contradiction",
    "clocks": "clocks",
    "causal": "causal",
    "weights": "weights are the artifact's",
    "once": "scored exactly once",
    "probabilities": "probabilities sum to one",
    "sums": "they do, by its scores alone",
    "order": "score first, then train",
    "text": "bytes are those of the text",
    "hidden": "no validation text in the files",
    "fresh": "a text that nobody had",
    "held": "no harder a text that was held out",
    "training": "no validation text in the training shards",
}
