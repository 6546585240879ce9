"""What a row of the audit's table is worth: proved, evidence, or claimed only.

A row is proved if its reader need trust nobody but the audit's own machine. It is evidence if a
violation was looked for and not found: at random, at some places, or in two texts that may differ.
It is claimed only if just a log, or a script that is not the project's, says so. What no row can
show is said below the table.
"""

import sys

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.audit", file=sys.stderr)
    sys.exit(2)

from tools.audit.case import Case
from tools.audit.checks import FAILS, HOLDS, NOISE_BPB, Finding, is_official, same_machine
from tools.contradictions import files_of, overlap_text

PROVED = "proved"
EVIDENCE = "evidence"
CLAIMED = "claimed only"

# Of rows that hold.
STANDING = {
    # Files, measured and hashed here; a probe of the cell; sums of numbers that are made here.
    "script": PROVED,
    "isolation": PROVED,
    "bytes": PROVED,
    "data": PROVED,
    "score": PROVED,
    "own": PROVED,
    # The run's own words, which only must not contradict each other.
    "log": CLAIMED,
    "clocks": f"evaluation: {EVIDENCE}; training: {CLAIMED}",
    # Of the shards of --train, without which it is open.
    "training": f"of the shards named: {EVIDENCE}; that there are no others: {CLAIMED}",
    # At cuts and targets drawn by lot; in two places of a text that a script might know.
    "causal": EVIDENCE,
    "probabilities": EVIDENCE,
    "sums": EVIDENCE,
    # Of every weight, target and update, as the watched script tells it: with another script than
    # the project's own these rows do not hold, they are open.
    "weights": PROVED,
    "once": PROVED,
    "order": PROVED,
    # Copies that are not scrambled; texts that may differ in how hard they are; a tokenizer that
    # is not the contest's may say what it likes of its pieces.
    "text": EVIDENCE,
    "hidden": EVIDENCE,
    "fresh": EVIDENCE,
    "held": EVIDENCE,
}


def is_exact(case: Case) -> bool:
    """Whether the score was computed on a CPU like the log's, so that every digit counts."""
    ran = "alone" in vars(case) and case.alone.log is not None
    return ran and bool(case.logs) and case.on_cpu and same_machine(case)


def standing_of(case: Case, name: str, finding: Finding) -> str:
    """What a finding is worth; that something fails is always proved."""
    if finding.verdict != HOLDS:
        return PROVED if finding.verdict == FAILS else CLAIMED
    if name == "score" and not case.logs:
        return f"{PROVED}; no log claims it"
    if name == "score" and not is_exact(case):
        return f"{PROVED} to {NOISE_BPB} BPB, {CLAIMED} within"
    if name == "text" and (case.source or is_official(case)):
        return PROVED
    return STANDING[name]


def claims_of(case: Case) -> list[str]:
    """What only the log says, and no row of the table can show: lines below it."""
    if not case.logs:
        return ["", "Claimed only: nothing, as no log was given. How it was trained is unknown."]
    told = case.logs.text.settings
    hashes = case.logs.events.get("hashes", {})
    named = len(files_of(hashes, "training"))
    lines = [
        "",
        "**Claimed only**, whatever stands above:",
        "",
        f"- that training took {case.logs.text.training_seconds} s on {told.get('hardware')}: who "
        "edits all lines of both logs alike is believed;",
        f"- that it was trained on the {named or 'unnamed'} shards of the log and on nothing else, "
        f"with {overlap_text(hashes)} validation documents among them: learnt text shows in the "
        "rows on fresh and held-out text, where it was learnt more than a little;",
        f"- that SEED={told.get('seed')} was not picked out of many: a run of the reviewer's, with "
        "a seed of the reviewer's, shows what the others come to;",
    ]
    if not is_exact(case):
        lines.append(
            f"- the score's last {NOISE_BPB} BPB: only a machine of the kind that the log names "
            f"({told.get('hardware')}, torch {told.get('torch')}) tells them from noise;"
        )
    return [*lines, "- and all that a script not of the project's says of itself."]
