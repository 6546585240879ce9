"""What commands share: one line and status 2 for a user's mistake, files that are written whole."""

import argparse
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

BROKEN_PIPE = 128 + 13  # the status of a program that SIGPIPE ended, as a shell tells it


class UserError(Exception):
    """A mistake the user can mend: a command prints it as one line."""


def need(condition, message: str) -> None:
    """Raises UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


class Parser(argparse.ArgumentParser):
    """Raises UserError for wrong arguments."""

    hint = ""  # behind the message

    def error(self, message: str):
        """What argparse calls for a mistake, in place of printing the usage and ending."""
        raise UserError(message + self.hint)


def need_place(out: Path, *inputs: Path, ending: str = "") -> None:
    """Raises UserError unless a command may write the file out: asked before it works for that.

    Nothing is written over a folder, a device or an input. The name ends as its kind is written.
    """
    need(not out.is_dir(), f"{out} is a folder: give a file's name")
    need(out.is_file() or not out.exists(), f"{out} is no ordinary file: give another name")
    for path in inputs:
        lost = out.exists() and path.exists() and out.samefile(path)
        need(not lost, f"{out} would be written over, and is read: give another name")
    need(out.suffix.lower() == ending or not ending, f"{out}: a name that ends in {ending} is due")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from None


def encoded(text: str) -> bytes:
    """A text as UTF-8. Bytes of a file's name that are no text are escaped, as in a log."""
    return text.encode(errors="backslashreplace")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that no reader, and no interruption, ever leaves half of it.

    What cannot be written leaves nothing; the error has the file's name, as a full disk's has not.
    """
    temporary = path.with_name(path.name + ".part")
    data = encoded(content) if isinstance(content, str) else content
    try:
        temporary.unlink(missing_ok=True)  # or a link would lead what is written to another file
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def file_sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def write_picture(path: Path, figure, dpi: int = 150) -> None:
    """Writes a figure of matplotlib's as PNG, as write_whole() does."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    write_whole(path, picture.getvalue())


def table_cell(text: str) -> str:
    """A text inside a Markdown table, where a bar would end the cell."""
    return text.replace("|", "\\|")


def environment_value(value) -> str:
    """A setting's value as it is given in the environment: 0 or 1 for no and yes."""
    return str(int(value) if isinstance(value, bool) else value)


def tolerate_consoles() -> None:
    """Has a console show a question mark for a sign that its encoding lacks, as cp1251 lacks ×.

    What is written to a stream that was closed from the start, as by >&-, goes nowhere.
    """
    for name in ("stdin", "stdout", "stderr"):  # by the numbers that they get
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run_command(name: str, command: Callable[[], int], *mistakes: type[Exception]) -> int:
    """The exit status of a command: what it returns, or 2 for a mistake, told in one line.

    A file that cannot be read or written, and a package that is missing, are mistakes too, and so
    are other exceptions that a command names, such as train_gpt.py's own UserError.
    """
    tolerate_consoles()
    try:
        status = command()
        sys.stdout.flush()  # what is still held back may find its reader gone
        return status
    except BrokenPipeError:  # as in "| head", which has read what it wanted
        # What Python would write at its end goes nowhere, so that it does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (UserError, *mistakes) as error:
        message = str(error)
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: pip install -r requirements-dev.txt"
    except RecursionError:
        message = "a file is nested too deeply to be read"
    except OSError as error:
        # A stream that is full has no name: of files, write_whole() tells it.
        message = f"{error.filename or 'what it prints or writes'}: {error.strerror or error}"
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2
