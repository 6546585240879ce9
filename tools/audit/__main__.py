"""Proves what can be proved about a submission, and prints a Markdown table for its reviewers.

    python -m tools.audit ARTIFACT --data FOLDER --tokenizer FILE --log logs/RUN.txt
        [--script FILE] [--checks score,causal] [--fresh FILE] [--text FILE] [--held-out SHARD]
        [--train FOLDER] [--isolation LEVEL]

FOLDER contains the validation shards. Settings of the evaluation come from the log or from
environment variables, as for the script. Standard error says what is being done and how long it
will take. The script is never loaded into this process: every evaluation runs in a process of its
own, in a cell where the kernel refuses other files and the network (tools/audit/cell.py). Each row
says whether it is proved, evidence, or claimed only. What no row can show is said below the table
(tools/audit/standing.py).

Exit status:

    0   every check holds
    1   a check fails
    2   unusable input
    3   none fails, but this project has not published the script: what it says about itself is
        only claimed
    4   none fails, but the script was not isolated
    5   none fails, but something is open: unknown data, or checks that were left out

docs/guarantees.md says what each check proves, and what a hostile script can still do.
"""

import argparse
import os
import secrets
import sys
from pathlib import Path

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.audit", file=sys.stderr)
    sys.exit(2)

from tools.audit import cell, text
from tools.audit.case import Case, open_case
from tools.audit.checks import (
    ALWAYS,
    CHECKS,
    FAILS,
    HOLDS,
    OPEN,
    PREFIX_CHUNKS,
    TITLES,
    Finding,
    run_check,
)
from tools.audit.standing import claims_of, standing_of
from tools.command import Parser, need, run_command, table_cell

ROOT = Path(__file__).resolve().parent.parent.parent
FAILED, ANOTHER_SCRIPT, NOT_ISOLATED, SOMETHING_OPEN = 1, 3, 4, 5
WATCHED = {"weights", "once", "probabilities", "order", "text"}


def audit(case: Case, names: list[str]) -> dict[str, Finding]:
    """The findings of some checks, by name."""
    results = {}
    for number, name in enumerate(names, start=1):
        results[name] = run_check(CHECKS[name], case)
        case.progress.say(f"{number} of {len(names)}: {TITLES[name]}: {results[name].verdict}")
    return results


def planned_targets(case: Case, names: list[str]) -> int:
    """About how many targets the checks evaluate in all, to foretell how long they take."""
    whole = 1 + bool(WATCHED & set(names)) + (not case.identity.is_own)
    if case.fresh and "fresh" in names:
        whole += 1
    if case.held_out and "held" in names:
        whole += 2
    if "causal" in names:
        whole += case.cuts + 2 if case.count < 2 * PREFIX_CHUNKS * 32_768 else 2
    return whole * case.count


def status_of(results: dict[str, Finding]) -> int:
    """The exit status that findings come to."""
    verdicts = [finding.verdict for finding in results.values()]
    if FAILS in verdicts:
        return FAILED
    if results["script"].verdict != HOLDS:
        return ANOTHER_SCRIPT
    if results["isolation"].verdict != HOLDS:
        return NOT_ISOLATED
    return SOMETHING_OPEN if OPEN in verdicts or len(results) < len(CHECKS) else 0


def table(case: Case, results: dict[str, Finding]) -> str:
    """The results in Markdown; what was left out stands below."""
    rows = [["check", "result", "standing", "evidence"], ["---"] * 4]
    for name, (verdict, evidence) in results.items():
        cells = (TITLES[name], verdict, standing_of(case, name, results[name]), evidence)
        rows.append([" ".join(table_cell(one).split()) for one in cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    left_out = [TITLES[name] for name in CHECKS if name not in results]
    if left_out:
        lines += ["", f"Not checked: {'; '.join(left_out)}."]
    return "\n".join(lines)


def headline(case: Case, results: dict[str, Finding]) -> list[str]:
    """What must be read before the table."""
    lines = []
    if not case.identity.is_own:
        only = "what it tells of itself is only claimed: read the lines that differ"
        lines.append(f"**This is not a script that the project has published; {only}.**")
    if not case.isolation.is_isolated:
        lines.append("**NOT ISOLATED: the script could read and write anything here.**")
    return [*lines, ""] if lines else []


def read_arguments() -> argparse.Namespace:
    """The command line; UserError if it makes no sense."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m tools.audit", description=__doc__, formatter_class=form)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of validation shards")
    tokenizer = "SentencePiece model of the shards"
    parser.add_argument("--tokenizer", type=Path, required=True, help=tokenizer)
    script = "the submission's (this folder's train_gpt.py)"
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", help=script)
    parser.add_argument("--log", type=Path, help="LOG_DIR/RUN_ID.txt of the run")
    parser.add_argument("--checks", help=f"some of {', '.join(CHECKS)}; default: all of them")
    parser.add_argument("--fresh", type=Path, help="a text that nobody had before, scored as well")
    parser.add_argument("--text", type=Path, help="the documents that the shards were made from")
    parser.add_argument("--train", type=Path, help="folder of the training shards in the log")
    held_out = "a shard of similar text that was not trained on, from another split"
    parser.add_argument("--held-out", type=Path, metavar="SHARD", help=held_out)
    parser.add_argument("--isolation", choices=cell.LEVELS, help="use this level and no other")
    parser.add_argument("--cuts", type=int, default=4, help="cuts of the causality test")
    parser.add_argument("--seed", type=int, help="default: drawn at random, and printed")
    parser.add_argument("--no-strace", action="store_true", help="do not trace files")
    return parser.parse_args()


def chosen_checks(asked: str | None) -> list[str]:
    """Names of the checks to make, in their order. Raises UserError."""
    names = asked.split(",") if asked else list(CHECKS)
    for name in names:
        need(name in CHECKS, f"--checks: there is no {name}; there are {', '.join(CHECKS)}")
    return [name for name in CHECKS if name in (*names, *ALWAYS)]


def check_own_files(given: argparse.Namespace) -> None:
    """Raises UserError for what the reviewer has given besides and cannot be used.

    It would fail the submission, after evaluations that take their time.
    """
    for path in filter(None, (given.fresh, given.text)):
        text.read_documents(path)
    if given.held_out:
        text.read_shard(given.held_out)
    shards = given.train and any(given.train.glob("*.bin"))
    need(shards or not given.train, f"--train {given.train}: no shard lies there")


def run_audit() -> int:
    """Audits what the command line says; the process's exit status."""
    given = read_arguments()
    names = chosen_checks(given.checks)
    need(given.cuts > 0, "--cuts must be 1 or more")
    seed = secrets.randbelow(1 << 32) if given.seed is None else given.seed
    need(seed >= 0, "--seed must be 0 or more")
    check_own_files(given)
    case = open_case(
        given.script,
        given.artifact,
        given.data,
        given.tokenizer,
        dict(os.environ),
        cell.choose_isolation(given.isolation),
        seed,
        given.log,
        cuts=given.cuts,
        fresh=given.fresh,
        source=given.text,
        train=given.train,
        held_out=given.held_out,
        strace=not given.no_strace and bool(cell.find_strace()),
    )
    case.progress.targets = planned_targets(case, names)
    case.progress.say(f"isolation: {case.isolation.evidence}; --seed {seed}")
    results = audit(case, names)
    print("\n".join([*headline(case, results), table(case, results), *claims_of(case)]))
    return status_of(results)


if __name__ == "__main__":
    sys.exit(run_command("audit.py", run_audit))
