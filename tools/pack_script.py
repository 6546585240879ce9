"""Packs train_gpt.py, as it is, into a third of its bytes: an optional step before a submission.

    python -m tools.pack_script                   # writes packed/train_gpt.py
    python packed/train_gpt.py                    # runs as train_gpt.py does, under torchrun, too
    python -m tools.pack_script --check FILE      # is FILE train_gpt.py, packed? 1 if not

The contest counts the script's bytes with the artifact's. This writes a Python file that contains
the whole readable source, comments included, and runs it in its own place: same settings, output
and weights, and tracebacks with the source's lines. Its first lines say how to read the source
without running anything. Read, change and run the readable file as before.

--check decodes FILE without running it. Apart from the compressed source, every byte must be what
this module writes, and the source must be --script's.

To train_gpt.py these are two scripts with different SHA-256: all ranks of one run must have the
same one, and EVAL_ONLY says so if the other one made the run. Checkpoints and artifacts fit both.
"""

import argparse
import base64
import bz2
import hashlib
import os
import sys
from pathlib import Path
from string import Template

if not __package__:  # started by its path
    hint = "start it in the repository's folder as python -m tools.pack_script"
    print(f"error: {hint}", file=sys.stderr)
    sys.exit(2)

from tools.command import Parser, UserError, need, need_place, run_command, write_whole

ROOT = Path(__file__).resolve().parent.parent
READABLE = "train_gpt_readable.py"  # the source in a submission's folder, beside what was run
COLUMNS = 100
LARGEST = 16_000_000  # bytes of a source that is decoded: more cannot be meant

# The logs' readers know a script by its first words: tools/logs.py.
FIRST = '"""Parameter Golf: train_gpt.py, packed.'
HEAD = Template('''${first} PACKED is its whole source, compressed.

The source, comments and all, has ${size} bytes and this SHA-256:
    ${sha256}
To read it, run nothing of this file. This decodes it, by Python's own library alone:

    python3 -c "import base64, bz2, sys; sys.stdout.buffer.write(bz2.decompress(base64.b85decode(
        ''.join(sys.stdin.read().split(chr(34) * 3)[3].split()))))" < train_gpt.py > readable.py
    sha256sum readable.py

This file does no more than that, and runs what it has decoded, in the lines above and below PACKED.
"""

import base64
import bz2
import hashlib
import linecache
import sys
import traceback

SHA256 = "${sha256}"
PACKED = """
''')
TAIL = Template('''
"""


def unpack_source():
    """The source as code. Whoever asks Python for lines of this file is shown the source's."""
${decode}
    if hashlib.sha256(source).hexdigest() != SHA256:
        raise ImportError(f"{__file__} is damaged: what it holds has another SHA-256 than it says")
    lines = source.decode().splitlines(keepends=True)
    linecache.cache[__file__] = (len(source), None, lines, __file__)
    return compile(source, __file__, "exec", dont_inherit=True)


if __name__ == "__main__" and sys.version_info < (3, 13):
    sys.excepthook = traceback.print_exception  # older Pythons' own reads lines from the disk
''')
DECODE = """\
    try:
        source = bz2.decompress(base64.b85decode("".join(PACKED.split())))
    except (OSError, ValueError):
        source = b""  # no such digits, or no such data"""
# What was packed before damaged data had the error of a damaged file is held to be packed, too.
FORMER_DECODE = """\
    source = bz2.decompress(base64.b85decode("".join(PACKED.split())))"""
LAST = """# Of this number the source has an empty line, so that tracebacks show none for this one.
exec(unpack_source(), globals())
"""


def render(source: bytes, compressed: bytes, decode: str = DECODE) -> bytes:
    """The packed file: all of it follows from the source, but how that is compressed.

    decode: the lines that make the source of PACKED.
    """
    sha256 = hashlib.sha256(source).hexdigest()
    head = HEAD.substitute(first=FIRST, size=f"{len(source):,}", sha256=sha256)
    digits = base64.b85encode(compressed).decode()
    rows = [digits[start : start + COLUMNS] for start in range(0, len(digits), COLUMNS)]
    text = head + "\n".join(rows) + TAIL.substitute(decode=decode)
    lines = source.decode().split("\n")
    number = (text + LAST).count("\n")  # of the last line
    while number <= len(lines) and lines[number - 1].strip():
        text += "\n"
        number += 1
    return (text + LAST).encode()


def pack(source: bytes) -> bytes:
    """A source's packed file, always the same. Raises UserError for what would run otherwise."""
    try:
        text = source.decode()
        compile(source, "the script", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"the script is no Python: {error}") from None
    need(text.strip(), "the script is empty")
    need(not source.startswith(FIRST.encode()), "the script is packed already")
    # Python's lines and those of str.splitlines(), which tracebacks show, must be the same.
    need(text.splitlines(keepends=True) == python_lines(text), "a line ends otherwise than by \\n")
    packed = render(source, bz2.compress(source))
    assert unpack(packed) == source
    return packed


def python_lines(text: str) -> list[str]:
    """Lines with the \\n at their ends, of a text that ends with one."""
    return [line + "\n" for line in text.removesuffix("\n").split("\n")]


def unpack(content: bytes) -> bytes | None:
    """The source in a packed file, of which nothing is run; None for a file that is none.

    Raises UserError for one that differs in any byte from what pack() writes around such a source:
    that says what it does not hold, or does more than to unpack it.
    """
    if not content.startswith(FIRST.encode()):
        return None
    # An editor, or Git on Windows, may have changed every line.
    need(b"\r" not in content, "its lines end by \\r\\n, those of a packed script by \\n alone")
    parts = content.split(b'"""')  # "", the docstring, imports, the compressed source, code
    need(len(parts) > 4, "it says that it is packed, and holds no PACKED")
    decoder = bz2.BZ2Decompressor()
    try:
        compressed = base64.b85decode(b"".join(parts[3].split()))
        source = decoder.decompress(compressed, LARGEST)
        source.decode()
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"its PACKED cannot be decoded: {error}") from None
    whole = decoder.eof and not decoder.unused_data
    need(whole, "its PACKED is cut off, or holds more than a source")
    expected = render(source, compressed)
    if content not in (expected, render(source, compressed, FORMER_DECODE)):
        raise UserError(first_difference(content, expected))
    return source


def source_of(content: bytes) -> bytes:
    """What unpack() finds in a packed file; another file is its own source."""
    source = unpack(content)
    return content if source is None else source


def first_difference(content: bytes, expected: bytes) -> str:
    """Where a packed file is not what pack() writes, in words."""
    found, wanted = (data.decode("ascii", "replace").split("\n") for data in (content, expected))
    pairs = enumerate(zip(found, wanted, strict=False), 1)
    shorter = min(len(found), len(wanted)) + 1
    number = next((number for number, (one, other) in pairs if one != other), shorter)
    one, other = (lines[number - 1 : number] or ["nothing"] for lines in (found, wanted))
    start = len(os.path.commonprefix([*one, *other])) // 40 * 40  # where they still are the same
    shown = one[0][start : start + 80]
    return f"its line {number:,} is not what tools.pack_script writes: {shown!r}"


def checked(path: Path, script: Path) -> tuple[int, str]:
    """The exit status of --check FILE, and what it says."""
    source = unpack(path.read_bytes())
    need(source is not None, f"{path} is not a script that tools.pack_script has packed")
    if source != script.read_bytes():
        sha256 = hashlib.sha256(source).hexdigest()
        return 1, f"{path} holds another source than {script}, of SHA-256 {sha256}"
    return 0, f"{path} is {script}, packed: {len(source):,} bytes, equal byte for byte"


def main() -> int:
    """Packs, or compares, as the command line asks; returns the exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser("pack_script.py", description=__doc__, formatter_class=layout)
    script = ROOT / "train_gpt.py"
    out = Path("packed", "train_gpt.py")
    parser.add_argument("--script", type=Path, default=script, metavar="FILE", help="what to pack")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help=f"default: {out}")
    check = "only say whether FILE is that script, packed"
    parser.add_argument("--check", type=Path, metavar="FILE", help=check)
    given = parser.parse_args()
    if given.check:
        status, line = checked(given.check, given.script)
        print(line)
        return status
    source = given.script.read_bytes()
    packed = pack(source)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    need_place(given.out)
    # A readable script, perhaps the one that is packed, is nothing to write over.
    other = given.out.exists() and not given.out.read_bytes().startswith(FIRST.encode())
    need(not other, f"{given.out} is there already and is not a packed script: give another --out")
    write_whole(given.out, packed.decode())
    saved = len(source) - len(packed)
    print(f"{given.out}: {len(packed):,} bytes, {saved:,} fewer than {given.script} has")
    print(f"SHA-256 {hashlib.sha256(packed).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("pack_script.py", main))
