"""The text that is scored: shards read and written, bytes counted, known files, hidden text.

Nothing here uses the script. SentencePiece reads the tokenizer, except for the reader of the fields
of its file, which works without it.
"""

import contextlib
import functools
import hashlib
import json
import lzma
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.audit", file=sys.stderr)
    sys.exit(2)

from tools.command import UserError, need

BOS_ID = 1
MAGIC, VERSION = 20_240_520, 1
HEADER_BYTES = 1024

# A tokenizer file's fields (sentencepiece_model.proto): what else stands in it, nobody reads.
FIELDS = {1: "pieces", 2: "trainer", 3: "normalizer", 4: "self test", 5: "denormalizer"}


# ---- Shards ------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """A file of tokens."""

    name: str
    tokens: np.ndarray  # uint16


def shard_paths(folder: Path) -> list[Path]:
    """The validation shards of a folder, in the order in which the script reads them.

    NAME_val_bytes_*.bin are none: they tell the bytes of tokens, which are counted here.
    """
    paths = sorted(folder.glob("*_val_*.bin"))
    paths = [path for path in paths if not path.stem.rpartition("_")[0].endswith("_val_bytes")]
    need(paths, f"no *_val_*.bin shards in {folder}")
    return paths


def read_shards(folder: Path) -> list[Shard]:
    """The validation shards, read without the script. Raises UserError for files that are none."""
    return [read_shard(path) for path in shard_paths(folder)]


def read_shard(path: Path) -> Shard:
    """One shard, of any split. Raises UserError for a file that is none."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=3).tolist()
        need(header[:2] == [MAGIC, VERSION], f"{path} is not a token shard")
        count = (*header, -1)[2]
        whole = 0 <= 2 * count <= size - HEADER_BYTES
        need(whole, f"{path} is shorter than its header says")
        return Shard(path.name, np.fromfile(path, "<u2", count, offset=HEADER_BYTES))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def document_digests(tokens: np.ndarray) -> list[bytes]:
    """What documents are known by: equal digests are equal tokens. BOS begins each."""
    parts = np.split(tokens, np.flatnonzero(tokens == BOS_ID))
    digests = [hashlib.blake2b(part.tobytes(), digest_size=16).digest() for part in parts]
    # A document of BOS alone says nothing.
    return [digest for digest, part in zip(digests, parts, strict=True) if len(part) > 1]


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes a shard."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def stream_of(shards: list[Shard]) -> np.ndarray:
    """All tokens, in order."""
    return np.concatenate([shard.tokens for shard in shards])


def write_stream(folder: Path, shards: list[Shard], tokens: np.ndarray) -> None:
    """Writes tokens as shards of the same names; of the same lengths too, where they suffice."""
    place = 0
    for index, shard in enumerate(shards):
        end = place + len(shard.tokens)
        last = index + 1 == len(shards)
        part = tokens[place:] if last else tokens[place:end]
        write_shard(folder / shard.name, part)
        place = end


# ---- Capitals ----------------------------------------------------------------------------------

# Tokens 4 to 7 of a tokenizer for text whose capitals are operators. They say of what comes next:
# a letter that was a capital and begins a word; a word of capitals; a capital within a word; text.
OPERATORS = "\ue001\ue002\ue003\ue004"
TITLE, CAPITALS, NEXT, ESCAPE = OPERATORS
OPERATOR_IDS = [4, 5, 6, 7]
ESCAPED = {ord(sign): ESCAPE + sign for sign in OPERATORS} | {ord("▁"): ESCAPE + "_"}


def has_operators(model: Any) -> bool:
    """Whether a tokenizer has operators for capitals."""
    enough = model.vocab_size() > OPERATOR_IDS[-1]
    return enough and "".join(model.id_to_piece(OPERATOR_IDS)) == OPERATORS


def restored(text: str) -> str:
    """Text with capitals, of one with operators, character by character.

    An operator without a letter is no text: where a document was cut, one may be left.
    """
    made = []
    operator = ""  # that waits for its letters
    last = ""
    characters = iter(text)
    for character in characters:
        if character == ESCAPE:
            escaped = next(characters, "")
            made.append("▁" if escaped == "_" else escaped)
            operator = ""
        elif character in OPERATORS:
            operator = character
        elif operator and "a" <= character <= "z":
            made.append(character.upper())
            operator = operator if operator == CAPITALS else ""
        else:
            made.append(character)
            # A space may stand between an operator and its letters, and nothing else.
            operator = operator if character == " " and last == operator else ""
        last = character
    return "".join(made)


def with_operators(text: str) -> str:
    """Text as such a tokenizer encodes it: capitals are small letters behind operators.

    Words are letters A to Z in a row. An operator that begins a word stands before its space.
    """
    parts = re.split("([A-Za-z]+)", text)
    parts[::2] = [other.translate(ESCAPED) for other in parts[::2]]
    for place in range(1, len(parts), 2):
        word = parts[place]
        if word.islower():
            continue
        small = "".join(NEXT + letter.lower() if letter.isupper() else letter for letter in word)
        operator = TITLE if word[0].isupper() else ""
        if len(word) > 1 and word.isupper():
            operator = CAPITALS
            small = word.lower()
        before = parts[place - 1]
        if operator and before.endswith(" "):
            parts[place - 1] = before[:-1]
            operator += " "
        parts[place] = operator + (small.removeprefix(NEXT) if operator else small)
    return "".join(parts)


def encode(model: Any, text: str) -> list[int]:
    """A text's tokens, without BOS."""
    return model.encode(with_operators(text) if has_operators(model) else text)


@functools.cache
def usual_normalizer() -> Any:
    """SentencePiece's nmt_nfkc, as the contest's tokenizers have it."""
    import sentencepiece

    rules = {"rule_name": "nmt_nfkc", "escape_whitespaces": False, "add_dummy_prefix": False}
    return sentencepiece.SentencePieceNormalizer(**rules, remove_extra_whitespaces=True)


def normalize(text: str) -> str:
    """A text as the contest's tokenizers see it: white space is one space, ﬁ is fi."""
    return usual_normalizer().normalize(text)


# Characters that any text may have, which a tokenizer's own normalizer should leave as they are.
PROBE = "".join(map(chr, range(33, 127))) + "ÄéñЖ中"


def altered(model: Any) -> str:
    """A character of which a tokenizer makes another text, in words; "" if there is none in PROBE.

    A rule for several characters in a row is not found so: what tokens decode to shows it.
    """
    for character in PROBE:
        found = model.normalize(character).replace("▁", " ").strip()
        if normalize(found) != normalize(character):
            return f"{found!r} of {character!r}"
    return ""


def normalized(model: Any, text: str) -> str:
    """A document as it is encoded: a model with operators leaves that to who encodes."""
    return normalize(text) if has_operators(model) else text


# ---- Bytes -------------------------------------------------------------------------------------


def open_tokenizer(path: Path) -> Any:
    """SentencePiece's reading of a tokenizer. Raises UserError."""
    import sentencepiece  # only here, where text is decoded

    need(path.is_file(), f"no tokenizer at {path}")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=os.fsencode(path))
    except (RuntimeError, OSError, UnicodeDecodeError):
        raise UserError(f"{path} is not a SentencePiece model") from None


def text_bytes(model: Any, tokens: list[int], text: str) -> int | None:
    """UTF-8 bytes of the text that tokens decode to; None if the pieces contradict the text.

    A text that was cut within a character decodes to replacement characters: then the bytes are
    those of the pieces. The text is as it was decoded, where there are operators, with them.
    """
    cased = has_operators(model)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return len((restored(text) if cased else text).encode())
    raw = b""
    for piece, is_byte in zip(model.id_to_piece(tokens), model.is_byte(tokens), strict=True):
        # A byte's piece is written <0xE6>.
        raw += bytes.fromhex(piece[3:5]) if is_byte else piece.replace("▁", " ").encode()
    raw = raw if text.startswith(" ") else raw.removeprefix(b" ")
    with contextlib.suppress(UnicodeDecodeError):
        if raw.decode() != text:
            return None
    if cased:
        raw = restored(raw.decode(errors="surrogateescape")).encode(errors="surrogateescape")
    return len(raw)


def texts_between(silent: np.ndarray) -> list[tuple[int, int]]:
    """First and last + 1 of each run of tokens that have text."""
    bounded = np.concatenate([[True], silent, [True]])
    edges = np.flatnonzero(np.diff(bounded.astype(np.int8))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


class Text(NamedTuple):
    """A run of tokens that have text, and its bytes counted from that."""

    first: int  # token
    last: int  # + 1
    text: str
    bytes: int | None  # of targets; None if the pieces contradict the text


def texts_of(model: Any, tokens: np.ndarray) -> list[Text]:
    """The stream's texts, decoded: what stands between tokens that have none, such as BOS.

    Decoding drops the first space of each text. The stream's first token is no target.
    """
    ids = list(range(model.vocab_size()))
    largest = int(tokens.max(initial=0))
    need(largest < len(ids), f"the shards hold token {largest}, the tokenizer {len(ids)} tokens")
    silent = np.any([model.is_control(ids), model.is_unknown(ids), model.is_unused(ids)], axis=0)
    cased = has_operators(model)
    texts = []
    for first, last in texts_between(silent[tokens]):
        part = tokens[first:last].tolist()
        text = model.decode(part)
        count = text_bytes(model, part, text)
        if count is not None and first == 0:
            count -= text_bytes(model, part[:1], model.decode(part[:1])) or 0
        texts.append(Text(first, last, restored(text) if cased else text, count))
    return texts


def lost_characters(parts: list[str], original: str) -> int | None:
    """How many characters of a document its tokens lack; None if they stand for another text.

    parts: what they decode to, in order, without what they do not know. White space and compatible
    characters are the same text, and so is a ▁ of the text's own, which SentencePiece decodes to a
    space.
    """
    wanted, *found = (normalize(one.replace("▁", " ")) for one in (original, *parts))
    place = kept = 0
    for part in found:
        place = wanted.find(part, place)
        if place < 0:
            return None
        place += len(part)
        kept += len(part)
    return len(wanted) - kept


def read_documents(path: Path) -> list[str]:
    """A file of documents: one text, several with NUL between, or a JSON object with "text" a line.

    They are what data/prepare.py makes shards of: without white space around them or a mark of
    UTF-8 in front, with the line ends that they have. Raises UserError for a file that is not UTF-8
    or holds no text.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if path.suffix == ".jsonl":
        # Text may hold signs at which splitlines() would cut.
        lines = [line for line in content.split("\n") if line.strip()]
        try:
            documents = [(json.loads(line)["text"] or "").strip() for line in lines]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} has a line that is no object with a text") from None
    else:
        documents = [text.strip() for text in content.split("\0")]
    documents = [text for text in documents if text]
    need(documents, f"{path} holds no text")
    return documents


def encode_documents(model: Any, documents: list[str]) -> np.ndarray:
    """Documents as a stream of tokens, BOS before each."""
    parts = [[BOS_ID, *encode(model, normalized(model, text))] for text in documents]
    return np.concatenate([np.array(part, dtype=np.int64) for part in parts]).astype(np.uint16)


# ---- Files ---------------------------------------------------------------------------------------


def unknown_fields(content: bytes) -> dict[int, int]:
    """Bytes in each field of a tokenizer file that SentencePiece has no name for.

    The file is a message of protocol buffers: a key, whose lowest three bits are the kind of what
    follows, and a length where it is bytes. Raises ValueError for other files.
    """
    unknown = {}
    place = 0
    while place < len(content):
        began = place
        key, place = read_varint(content, place)
        kind = key & 7
        if kind == 0:
            _, place = read_varint(content, place)
        elif kind == 2:
            length, place = read_varint(content, place)
            place += length
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if place > len(content):
            raise ValueError("a field that is longer than the file")
        if key >> 3 not in FIELDS:
            unknown[key >> 3] = unknown.get(key >> 3, 0) + place - began
    return unknown


def read_varint(content: bytes, place: int) -> tuple[int, int]:
    """A number of protocol buffers, seven bits a byte, and the place behind it."""
    number = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            break
        byte = content[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise ValueError("a number that does not end")


# ---- Hidden text -------------------------------------------------------------------------------

WINDOW = 32  # bytes of validation text in a row that nothing but a copy holds
FACTOR = 0x9E3779B97F4A7C15 | 1
MOST_WINDOWS = 1 << 21
BLOCK = 1 << 22  # of a haystack, at once


def window_hashes(content: bytes) -> np.ndarray:
    """A number for each WINDOW bytes in a row, uint64 (len - WINDOW + 1,)."""
    numbers = np.frombuffer(content, np.uint8).astype(np.uint64)
    count = max(0, len(numbers) - WINDOW + 1)
    sums = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(WINDOW):
            sums = sums * np.uint64(FACTOR) + numbers[offset : offset + count]
    return sums


def needles(content: bytes, generator: np.random.Generator) -> np.ndarray:
    """Hashes of a text's windows, side by side; of a long text, as many by lot as there may be.

    Windows of few different bytes, as a row of dashes, are left out.
    """
    whole = len(content) // WINDOW
    rows = np.frombuffer(content[: whole * WINDOW], np.uint8).reshape(whole, WINDOW)
    if whole > MOST_WINDOWS:
        rows = rows[np.sort(generator.choice(whole, MOST_WINDOWS, replace=False))]
    ordered = np.sort(rows, axis=1)
    different = (np.diff(ordered, axis=1) != 0).sum(axis=1) + 1
    rows = rows[different >= WINDOW // 4]
    sums = np.zeros(len(rows), np.uint64)
    with np.errstate(over="ignore"):
        for column in rows.T.astype(np.uint64):
            sums = sums * np.uint64(FACTOR) + column
    return np.unique(sums)


def found_runs(haystack: bytes, wanted: np.ndarray) -> int:
    """How many places of a haystack begin a window that is wanted."""
    found = 0
    for start in range(0, len(haystack), BLOCK):
        part = haystack[start : start + BLOCK + WINDOW - 1]
        found += int(np.isin(window_hashes(part), wanted).sum())
    return found


def layers_of(content: bytes) -> Iterator[bytes]:
    """Bytes as they are, and what LZMA streams in them hold."""
    yield content
    for magic in (b"\xfd7zXZ\x00", b"\x5d\x00\x00"):
        place = content.find(magic)
        while place >= 0:
            with contextlib.suppress(lzma.LZMAError):
                yield lzma.LZMADecompressor().decompress(content[place:], 1 << 28)
            place = content.find(magic, place + 1)
