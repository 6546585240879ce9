"""Which script is audited: a commit's train_gpt.py, or one that differs from it in some lines.

Everything that a watched evaluation reports comes through the script. For the project's own script,
the tests show what that is worth; for another one, somebody has to read the lines that differ. A
script packed by tools.pack_script counts as what it unpacks to; it is unpacked without running it.
"""

import ast
import difflib
import functools
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.audit", file=sys.stderr)
    sys.exit(2)

from tools.command import UserError
from tools.pack_script import source_of, unpack

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = "train_gpt.py"
SHOWN_LINES = 3  # of those that differ


class Identity(NamedTuple):
    """What a script is."""

    sha256: str
    is_own: bool  # one that this project has published
    evidence: str


def git(*arguments: str) -> bytes | None:
    """What git says about this folder; None where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
    except OSError:
        return None
    return None if done.returncode else done.stdout


def commit_of(content: bytes) -> str:
    """The latest commit here whose train_gpt.py has this content; "" if none has."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found = git("log", f"--find-object={blob}", "--format=%h", "--", NAME)
    # A commit that takes a content away is named as well as the one that brings it.
    for name in (found or b"").decode().split():
        if git("rev-parse", "--verify", f"{name}:{NAME}") == f"{blob}\n".encode():
            return name
    return ""


def published() -> tuple[bytes, str]:
    """The project's newest script, and where it is from."""
    committed = git("show", f"HEAD:{NAME}")
    if committed is not None:
        return committed, "HEAD"
    return (ROOT / NAME).read_bytes(), "this folder (there is no git to name a commit)"


def identify(path: Path) -> Identity:
    """Compares a script, or the source that it packs, with the project's.

    Raises UserError if it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"no script at {path}: {error.strerror}") from None
    sha256 = hashlib.sha256(content).hexdigest()
    named = f"SHA-256 {sha256}"
    try:
        source = unpack(content)
    except UserError as error:
        return Identity(sha256, False, f"{named}; ANOTHER SCRIPT: not honestly packed: {error}")
    if source is not None:
        content = source
        named += f", packed; its source has SHA-256 {hashlib.sha256(content).hexdigest()}"
    if commit := commit_of(content):
        return Identity(sha256, True, f"{named}; equals {NAME} of commit {commit}")
    ours, where = published()
    if content == ours:
        return Identity(sha256, True, f"{named}; equals {NAME} of {where}")
    old, new = (text.decode(errors="replace").splitlines() for text in (ours, content))
    changed = [
        line
        for line in difflib.unified_diff(old, new, n=0, lineterm="")
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    shown = " / ".join(line.strip()[:80] for line in changed[:SHOWN_LINES])
    count = max(sum(line[0] == sign for line in changed) for sign in "+-")
    differs = f"ANOTHER SCRIPT: it differs in {count:,} lines from {NAME} of {where}"
    return Identity(sha256, False, f"{named}; {differs}; read them: {shown}")


def setting_names(path: Path) -> list[str]:
    """Names of a script's settings, in order, read from its text: nothing of it is run.

    Raises UserError for a file without them.
    """
    try:
        names = fields_of_settings(source_of(path.read_bytes()))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as a script: {error}") from None
    if names is None:
        raise UserError(f"{path} is not a train_gpt.py: it has no class Settings")
    return list(names)


@functools.lru_cache(maxsize=4)  # an audit asks for every cell, and to parse takes a moment
def fields_of_settings(source: bytes | str) -> tuple[str, ...] | None:
    """Names of the fields of the class Settings, in order; None without that class."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Settings":
            fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
            return tuple(one.target.id for one in fields if isinstance(one.target, ast.Name))
    return None
