"""Make the token shards and the SentencePiece tokenizer that train_gpt.py reads.

    python data/prepare.py sample                   a small English sample, without any download
    python data/prepare.py text a.txt b.txt --val c.txt --out data/my --name my
                                                    your own text (also: jsonl, parquet)
    python data/prepare.py fineweb --variant sp1024 --train-shards 10
                                                    the published FineWeb shards
    python data/prepare.py development data/my --out data/development
                                                    a dataset to choose settings on
    python data/prepare.py manifest FOLDER --tokenizer FILE.model
                                                    a manifest for shards made elsewhere
    python data/prepare.py text a.txt b.txt --val c.txt --out data/my-case --name my --case
                                                    with capitals as tokens before their words

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros)
and then that many little-endian uint16 tokens. Every document starts with the beginning-of-sequence
token (BOS, id 1); a document may continue in the next shard. Beside the shards, manifest.json says
what they contain. A dataset appears only when it is whole: a run that fails or is stopped leaves
what was there before. Needs numpy, sentencepiece and tqdm; also pyarrow for `parquet`,
huggingface_hub for `fineweb`.

With case operators, NAME_val_bytes_000000.bin is made beside NAME_val_000000.bin: a file of the
same format whose uint16 are the numbers of bytes of text that the shard's tokens stand for.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from tqdm import tqdm

if not __package__:  # started by its path: the repository's folder is not where Python looks
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from tools.command import file_sha256, tolerate_consoles

# The shard format.
MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
BOS_ID = 1
MAX_VOCAB_SIZE = 2**16  # tokens are stored as uint16
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts tokens in an int32

CHUNK_BYTES = 2**24
BLOCK_TOKENS = 2**22  # NumPy counts them as int64: 32 MiB
MAX_DOCUMENT_BYTES = 2**26
BATCH_CHARACTERS = 250_000
SHARD_TOKENS = 100_000_000
# A tokenizer of at most 65,536 pieces gains nothing from more text than this, and it all has to fit
# in memory.
TOKENIZER_TRAINING_CHARACTERS = 100_000_000

SEPARATORS = {"nul": rb"\0", "blank-line": rb"\n[ \t\r]*\n"}
PROCESSORS = os.cpu_count() or 1
LEAST_GPU_TOKENS = 100_000
MOST_CPU_TOKENS = 1_000_000  # PRESET=tiny adapts to about so many in its ten minutes
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
FINEWEB = {
    "sp1024": ("willdepueoai/parameter-golf", 1024),
    "sp8192": ("kevclark/parameter-golf", 8192),
}


class PrepareError(Exception):
    """Something the user can put right; main() prints it as one line."""


class Stopped(KeyboardInterrupt):
    """A signal told the script to stop; the argument is its number."""


class StopSignals:
    """Let the signals that say stop raise Stopped, as Control-C raises KeyboardInterrupt."""

    def __init__(self):
        self.received: int | None = None
        self.held = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle them in the block; those that the parent process ignores, as nohup does, stay
        ignored.
        """
        self.received = None
        former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, handler in former.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self.receive)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        """Note the first signal, and raise it; another one must not cut the cleaning short."""
        if self.received is None:
            self.received = number
            if not self.held:
                self.check()

    def check(self) -> None:
        """Raise what was received. Python swallows what handlers raise in some of its corners, so
        loops ask, too.
        """
        if self.received is not None:
            raise Stopped(self.received)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Let signals wait for the end of the block."""
        self.held = True
        try:
            yield
        finally:
            self.held = False
        self.check()


stop_signals = StopSignals()


class Document(NamedTuple):
    """One document, the split it belongs to, and how many bytes of input it took (for the progress
    bar).
    """

    text: str
    is_validation: bool
    input_bytes: int


# ---- Reading: each reader yields (text, bytes of input) for one source ---------------------------


def decode(raw: bytes, where: str) -> str:
    """Decode UTF-8, with or without a byte order mark; PrepareError names `where` if it is not
    valid.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PrepareError(
            f"{where} is not valid UTF-8 (byte {error.start}); convert the file to UTF-8"
        ) from None


def checked_text(value: Any, where: str) -> str:
    """Return the text of a field, "" for null; PrepareError if it is not text or cannot be written
    as UTF-8.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        hint = "choose another with --field"
        raise PrepareError(f"{where}: the field is of type {kind}, not text; {hint}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PrepareError(
            f"{where}: half of a surrogate pair (character {error.start}) is not text"
        ) from None
    return value


def read_text(path: Path, separator: str | None) -> Iterator[tuple[str, int]]:
    """Yield the documents of a text file, which are what stands between separators (None: the file
    is one document).
    """
    pattern = re.compile(
        SEPARATORS.get(separator, re.escape(separator.encode())) if separator else rb"(?!)"
    )
    rest = b""
    number = itertools.count(1)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            *complete, rest = pattern.split(rest + chunk)
            for raw in complete:
                yield decode(raw, f"{path}: document {next(number)}"), len(raw)
            if len(rest) > MAX_DOCUMENT_BYTES:
                where = f"{path}: document {next(number)}"
                hint = "tell documents apart by --separator"
                raise PrepareError(f"{where} exceeds {MAX_DOCUMENT_BYTES:,} bytes; {hint}")
    yield decode(rest, f"{path}: document {next(number)}"), len(rest)


def way_to_lines(path: Path, line: str) -> str:
    """Say what read_jsonl() wants, and which command makes it of a file with this line: one of an
    array of objects, or of an object that goes on in the next line.
    """
    goes_on = line.endswith("\n") and not line.rstrip().endswith(("}", "},"))
    if re.match(r"\s*\[\s*(\{|$)", line):
        kind, items = "an array", "'.[]'"
    elif line.lstrip().startswith("{") and goes_on:
        kind, items = "objects of several lines", "."
    else:
        return "wanted is one object a line"
    to = shlex.quote(str(path.with_name(f"{path.stem}-lines.jsonl")))
    command = f"jq -c {items} {shlex.quote(str(path))} > {to}"
    return f"wanted is one object a line, which {command} makes of {kind}"


def read_jsonl(path: Path, field: str) -> Iterator[tuple[str, int]]:
    """Yield the text in `field` of each line, which holds one JSON object; blank lines are
    skipped.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            if not line.strip():
                continue
            text = decode(line, where)
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                problem = f"{where}: invalid JSON ({getattr(error, 'msg', error)})"
                raise PrepareError(f"{problem}; {way_to_lines(path, text)}") from None
            if not isinstance(record, dict):
                problem = f"{where}: expected a JSON object, found a {type(record).__name__}"
                raise PrepareError(f"{problem}; {way_to_lines(path, text)}")
            if field not in record:
                fields = ", ".join(record) or "none"
                raise PrepareError(f"{where}: no field {field!r}; it has {fields} (see --field)")
            yield checked_text(record[field], where), len(line)


def read_parquet(path: Path, field: str) -> Iterator[tuple[str, int]]:
    """Yield the text in the column `field` of each row; the input bytes are the file's average per
    row.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PrepareError(
            "reading Parquet needs a package that is missing: pip install pyarrow"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise PrepareError(
                    f"{path}: no field {field!r}; it has {', '.join(names)} (see --field)"
                )
            row_bytes = path.stat().st_size // max(1, file.metadata.num_rows)
            number = itertools.count(1)
            for batch in file.iter_batches(batch_size=1000, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield checked_text(value, f"{path} row {next(number)}"), row_bytes
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PrepareError(f"{path}: cannot be read as Parquet ({first_line(error)})") from None


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends only on the text.

    Python's own hash() differs from process to process.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def split_documents(
    inputs: Iterable,
    val_inputs: Iterable,
    val_fraction: float,
    read: Callable[[Any], Iterable[tuple[str, int]]],
) -> Iterator[Document]:
    """Yield the non-empty documents of `inputs`, in their order, and then those of `val_inputs`.

    Without `val_inputs` a document is validation if the hash of its text falls in the lowest
    `val_fraction`. So its split does not depend on its place or on other documents, and equal
    documents are never in different splits.
    """
    for sources, is_val_input in ((inputs, False), (val_inputs, True)):
        for source in sources:
            for text, input_bytes in read(source):
                if text := text.strip():
                    is_validation = is_val_input or (
                        not val_inputs and hash_fraction(text) < val_fraction
                    )
                    yield Document(text, is_validation, input_bytes)


# ---- Case operators: capitals as tokens of their own ---------------------------------------------
#
# "The" and "the" are two tokens, and a model learns each by itself. Here a capital becomes a small
# letter, and an operator says what it was: "of The" is "of", TITLE, "▁the". The operators are those
# of the contest's pull request 1729. Their place is not: they stand before the space of their word,
# since behind it they would cut "▁the" in two.
#
# A tokenizer for such text has the four as its pieces 4 to 7, never merges them, and normalizes
# nothing. The text is normalized before, as the contest's tokenizers do it, so that its bytes are
# the ones that these count.

TITLE = "\ue001"  # the word's first letter is a capital
CAPITALS = "\ue002"  # all of the word's letters are, two or more
NEXT = "\ue003"  # the next letter is one
ESCAPE = "\ue004"  # the next character is text, though it looks like an operator or like "▁"
OPERATORS = (TITLE, CAPITALS, NEXT, ESCAPE)
FIRST_OPERATOR_ID = 4  # padding, BOS, end and unknown stand before
TITLE_ID, CAPITALS_ID, NEXT_ID, ESCAPE_ID = range(FIRST_OPERATOR_ID, FIRST_OPERATOR_ID + 4)

CAPITAL = re.compile("[A-Z]")
FROM_FIRST_CAPITAL = re.compile("[A-Z][A-Za-z]*")  # what is left of a word from there on
MISTAKABLE = re.compile(f"[{''.join(OPERATORS)}▁]")
ENCODED_CASE = re.compile(
    f"{ESCAPE}(?P<escaped>.)"
    f"|{CAPITALS}(?P<space_before_all> ?)(?P<all>[a-z]+)"
    f"|[{TITLE}{NEXT}](?P<space> ?)(?P<letter>[a-z])",
    re.DOTALL,
)


def encode_case(text: str) -> str:
    """Return a text without the capitals A to Z, whose place operators take; decode_case() undoes
    it, whatever the text.

    A word is a run of letters A to Z and a to z. With T, C, N, E for the operators:

        of The       of⟨T⟩ the              the operator stands before the space
        NASA         ⟨C⟩nasa
        iPhone       i⟨N⟩phone              small letters come first
        McDonald     ⟨T⟩mc⟨N⟩donald
        it's I       it's⟨T⟩ i
        ÉCOLE        É⟨C⟩cole               other letters stay as they are
        ⟨T⟩          ⟨E⟩⟨T⟩                 a private character of the text's own
        ▁            ⟨E⟩_                   or a tokenizer would take it for a space
    """
    text = MISTAKABLE.sub(escaped_character, text)
    text = FROM_FIRST_CAPITAL.sub(encoded_word, text)
    # An operator of the text's own is behind ESCAPE, and so never behind a space.
    return text.replace(f" {TITLE}", f"{TITLE} ").replace(f" {CAPITALS}", f"{CAPITALS} ")


def escaped_character(match: re.Match) -> str:
    """Return what stands for a character that decoding would take for something else."""
    character = match[0]
    return ESCAPE + ("_" if character == "▁" else character)


def encoded_word(match: re.Match) -> str:
    """Return what stands for a word from its first capital on."""
    letters = match[0]
    place = match.start()
    begins = not place or not "a" <= match.string[place - 1] <= "z"
    if begins and letters[1:].islower():  # first, as most are like that
        return TITLE + letters.lower()
    if begins and len(letters) > 1 and letters.isupper():
        return CAPITALS + letters.lower()
    marked = CAPITAL.sub(lambda capital: NEXT + capital[0].lower(), letters)
    return TITLE + marked.removeprefix(NEXT) if begins else marked


def decode_case(text: str) -> str:
    """Return the text that encode_case() was given; an operator that no letter follows stays."""
    return ENCODED_CASE.sub(decoded_part, text)


def decoded_part(match: re.Match) -> str:
    """Return what an operator and its letters, or an escaped character, stand for."""
    if character := match["escaped"]:
        return "▁" if character == "_" else character
    if letters := match["all"]:
        return match["space_before_all"] + letters.upper()
    return match["space"] + match["letter"].upper()


def make_normalizer() -> sentencepiece.SentencePieceNormalizer:
    """Return what normalizes text as the contest's tokenizers do: nmt_nfkc, which makes any white
    space one space.
    """
    return sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc",
        escape_whitespaces=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=True,
    )


def has_case_operators(tokenizer: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether a tokenizer is one for text that encode_case() has written."""
    if tokenizer.vocab_size() <= ESCAPE_ID:
        return False
    ids = list(range(TITLE_ID, ESCAPE_ID + 1))
    return tokenizer.id_to_piece(ids) == list(OPERATORS)


# ---- Tokenizer -----------------------------------------------------------------------------------


def tokenizer_sample(
    documents: Iterable[Document], limit: int = TOKENIZER_TRAINING_CHARACTERS
) -> list[str]:
    """Return the texts of the training documents, or of an even choice of them with at most `limit`
    characters.
    """
    kept: list[tuple[float, str]] = []
    size = 0
    threshold = 0.0
    for document in documents:
        fraction = hash_fraction(document.text)
        if document.is_validation or fraction < threshold:
            continue
        kept.append((fraction, document.text))
        size += len(document.text)
        while size > limit and len(kept) > 1:
            # Drop the half with the lower hashes, and skip such documents from now on.
            kept = sorted(kept)[len(kept) // 2 :]
            size = sum(len(text) for _, text in kept)
            threshold = kept[0][0]
    return [text for _, text in kept]


def train_tokenizer(texts: list[str], vocab_size: int, case: bool = False) -> bytes:
    """Train a SentencePiece byte-pair-encoding tokenizer on texts and return the bytes of its model
    file.

    The settings are those of the contest's tokenizers: ids 0 to 3 are padding, BOS, end and
    unknown; text is normalized with nmt_nfkc, which makes any white space one space; digits are
    separate pieces; there is no space before the first word. Byte pieces spell every other
    character, so nothing is unknown. With `case`, it is for text that is normalized already and in
    which operators stand for capitals: they are the ids 4 to 7. PrepareError if the texts have too
    few different words, or too many different characters, for `vocab_size`.
    """
    # Pieces never cross a space, so long documents can be cut there; SentencePiece leaves out
    # over-long lines.
    words = (text.split() for text in texts)
    sentences = (
        " ".join(part[start : start + 100]) for part in words for start in range(0, len(part), 100)
    )
    options: dict[str, Any] = {"normalization_rule_name": "nmt_nfkc"}
    if case:
        normalizer = make_normalizer()
        sentences = (encode_case(normalizer.normalize(sentence)) for sentence in sentences)
        options["user_defined_symbols"] = list(OPERATORS)
        options["normalization_rule_name"] = "identity"
        options["remove_extra_whitespaces"] = False  # such as that behind an operator
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=0,
            bos_id=BOS_ID,
            eos_id=2,
            unk_id=3,
            byte_fallback=True,
            character_coverage=0.999,
            required_chars="▁",  # or, where spaces are rare, three byte pieces would spell one
            add_dummy_prefix=False,
            split_digits=True,
            max_sentence_length=2**20,
            num_threads=PROCESSORS,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        if most := re.search(r"value <= (\d+)", str(error)):
            little = f"too little text for a vocabulary of {vocab_size} (at most {most[1]})"
            raise PrepareError(f"{little}; lower --vocab-size or add text") from None
        if least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise PrepareError(
                f"--vocab-size {vocab_size} is too small: this text needs at least {least[1]}"
            ) from None
        raise PrepareError(
            f"SentencePiece cannot train a tokenizer on this text ({first_line(error)})"
        ) from None
    return model.getvalue()


def tokenizer_name(name: str, vocab_size: int, case: bool) -> str:
    """Return the file name of the tokenizer that is trained for a dataset of this name."""
    return f"{name}_{vocab_size}_bpe{'_case' if case else ''}.model"


def special_pieces(tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """Return which pieces are control, unknown or unused, and so have no text, (pieces,) bool."""
    ids = list(range(tokenizer.vocab_size()))
    kinds = [tokenizer.is_control(ids), tokenizer.is_unknown(ids), tokenizer.is_unused(ids)]
    return np.any(kinds, axis=0)


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model file; PrepareError if it is not one or does not fit the shard
    format.
    """
    require_file(path)
    try:
        # As bytes: SentencePiece opens no file whose name is not UTF-8.
        tokenizer = sentencepiece.SentencePieceProcessor()
        tokenizer.load_from_serialized_proto(path.read_bytes())
    except RuntimeError:
        raise PrepareError(f"{path}: not a SentencePiece model; give a .model file") from None
    if tokenizer.bos_id() != BOS_ID:
        raise PrepareError(f"{path}: its BOS id is {tokenizer.bos_id()}, but shards need {BOS_ID}")
    if tokenizer.vocab_size() > MAX_VOCAB_SIZE:
        raise PrepareError(
            f"{path}: {tokenizer.vocab_size()} pieces; shards hold uint16, at most {MAX_VOCAB_SIZE}"
        )
    if not has_case_operators(tokenizer) and all(
        tokenizer.id_to_piece(tokenizer.piece_to_id(operator)) == operator for operator in OPERATORS
    ):
        places = f"pieces {TITLE_ID} to {ESCAPE_ID}"
        raise PrepareError(f"{path}: it has case operators, but not as {places}; train one anew")
    if has_case_operators(tokenizer):
        ids = list(range(tokenizer.vocab_size()))
        operators = slice(TITLE_ID, ESCAPE_ID + 1)
        others = tokenizer.id_to_piece(ids)
        others[operators] = ""
        special = special_pieces(tokenizer)[operators].any()
        if special or set(OPERATORS) & set("".join(others)):
            odd = "case operators within other pieces, or as control symbols"
            raise PrepareError(f"{path}: it has {odd}; train one anew")
    return tokenizer


# Characters that any text may have, which a tokenizer's own normalizer should leave as they are.
PROBE = "".join(map(chr, range(33, 127))) + "ÄéñЖ中"


def warn_of_other_text(tokenizer: sentencepiece.SentencePieceProcessor, path: Path) -> None:
    """Warn of a tokenizer that makes another text of one, such as one without capitals.

    Its tokens may stand for as many bytes, so that nothing else would tell.
    """
    usual = make_normalizer()
    for character in PROBE:
        found = tokenizer.normalize(character).replace("▁", " ").strip()
        if usual.normalize(found) != usual.normalize(character):
            made = f"{path} makes {found!r} of {character!r} before it encodes"
            warn(f"{made}: its scores are of that other text, and compare with nobody else's")
            return


# ---- Encoding ------------------------------------------------------------------------------------


class PieceBytes(NamedTuple):
    """How many bytes of text each token stands for, as train_gpt.py counts them.

    A leading space counts unless the token before is special and decoding drops it there. A small
    letter has the one byte of its capital, so operators have none; unless ESCAPE stands before:
    then an operator is a character of the text, and "_" stands for the longer "▁".
    """

    texts: np.ndarray  # (pieces,) int64: bytes without a leading space; 0 of special pieces
    has_space: np.ndarray  # (pieces,) bool: begins with a space
    is_special: np.ndarray  # (pieces,) bool: control, unknown and unused pieces, which have no text
    unknown: int  # id of the unknown piece
    if_escaped: np.ndarray  # (pieces,) int64: bytes more behind ESCAPE; all 0 without operators
    drops_space: bool  # decoding drops a text's leading space

    @property
    def has_case(self) -> bool:
        """Whether the tokenizer has case operators."""
        return bool(self.if_escaped.any())

    def escaped(self, tokens: np.ndarray, before: int) -> np.ndarray:
        """Return the places of the tokens that an ESCAPE in front of them makes text, in order.

        Such a token may be ESCAPE itself, which then does nothing to the next one: of a row of
        them, every other one does.
        """
        if not self.has_case:
            return np.array([], dtype=np.int64)
        places = np.flatnonzero(tokens == ESCAPE_ID)
        if before == ESCAPE_ID:
            places = np.append(-1, places)
        first = np.flatnonzero(np.diff(places, prepend=-9) > 1)  # of each row of neighbours
        lengths = np.diff(first, append=len(places))
        place_in_row = np.arange(len(places)) - np.repeat(first, lengths)
        found = places[place_in_row % 2 == 0] + 1
        return found[found < len(tokens)]

    def last(self, tokens: np.ndarray, before: int) -> int:
        """Return the `before` of the tokens that come next."""
        if not len(tokens):
            return before
        escaped = self.escaped(tokens, before)
        if len(escaped) and escaped[-1] == len(tokens) - 1:
            return TITLE_ID  # or any other token that does nothing to the next one's bytes
        return int(tokens[-1])

    def each(self, tokens: np.ndarray, before: int = BOS_ID) -> np.ndarray:
        """Return each token's bytes of text, uint16; the token `before` stands in front of them."""
        counts = self.texts.astype("<u2")[tokens]
        dropping = self.is_special & self.drops_space
        dropped = np.append(dropping[before], dropping[tokens[:-1]])[: len(tokens)]
        counts += self.has_space[tokens] & ~dropped
        escaped = self.escaped(tokens, before)
        counts[escaped] += self.if_escaped[tokens[escaped]].astype("<u2")
        return counts

    def count(self, tokens: np.ndarray, before: int = BOS_ID) -> int:
        """Return the bytes of text of tokens, which the token `before` stands in front of: the sum
        of each(), sooner.
        """
        counts = np.zeros(len(self.texts), dtype=np.int64)
        for block in range(0, len(tokens), BLOCK_TOKENS):
            counts += np.bincount(tokens[block : block + BLOCK_TOKENS], minlength=len(counts))
        total = counts @ (self.texts + self.has_space)
        dropping = self.is_special & self.drops_space
        after_special = [tokens[:1]] if dropping[before] else []
        for special in np.flatnonzero(dropping & (counts > 0)):
            after_special.append(tokens[1:][tokens[:-1] == special])
        total -= sum(self.has_space[nexts].sum() for nexts in after_special)
        return int(total + self.if_escaped[tokens[self.escaped(tokens, before)]].sum())


def piece_bytes(tokenizer: sentencepiece.SentencePieceProcessor) -> PieceBytes:
    """Return the bytes of a tokenizer's pieces."""
    ids = list(range(tokenizer.vocab_size()))
    is_special = special_pieces(tokenizer)
    pieces = tokenizer.id_to_piece(ids)
    has_space = np.array([piece.startswith("▁") for piece in pieces]) & ~is_special
    lengths = [len(piece.removeprefix("▁").replace("▁", " ").encode()) for piece in pieces]
    # A byte piece is spelt <0x41>, but stands for that byte.
    lengths = np.where(tokenizer.is_byte(ids), 1, lengths)
    texts = np.where(is_special, 0, lengths)
    if_escaped = np.zeros_like(texts)
    drops_space = True
    if has_case_operators(tokenizer):
        # "_" may be the byte piece <0x5F>, where the vocabulary lacks it.
        underscore = np.array([piece.startswith("_") or piece == "<0x5F>" for piece in pieces])
        if_escaped[underscore & ~is_special] = len("▁".encode()) - len("_")
        texts[TITLE_ID : ESCAPE_ID + 1] = 0
        if_escaped[TITLE_ID : ESCAPE_ID + 1] = len(ESCAPE.encode())
        drops_space = not tokenizer.decode([int(np.argmax(has_space))]).startswith(" ")
    return PieceBytes(texts, has_space, is_special, tokenizer.unk_id(), if_escaped, drops_space)


def check_round_trip(
    tokenizer: sentencepiece.SentencePieceProcessor,
    pieces: PieceBytes,
    texts: list[str],
    encoded: list[list[int]],
) -> None:
    """Raise PrepareError if tokens stand for another text than the one that was encoded.

    Bytes are counted by tokens, so that they and every score would be wrong. The text is compared
    as the tokenizer normalizes it, not as it decodes it: without a piece for the bare space, one
    that spells it by three byte pieces would agree with itself. Texts with unknown tokens are not
    judged, since their characters are lost in any case.
    """
    originals = tokenizer.normalize(texts)
    decoded = tokenizer.decode(encoded, num_threads=1)
    for tokens, original, text in zip(encoded, originals, decoded, strict=True):
        if tokenizer.unk_id() in tokens:
            continue
        # Some tokenizers put a space in front of, or behind, every text.
        wanted = original.replace("▁", " ").strip(" ")
        found = text.strip(" ")
        if found != wanted:
            place = next_difference(found, wanted)
            excerpt = slice(max(0, place - 8), place + 8)
            given = f"{found[excerpt]!r} for {wanted[excerpt]!r}"
            raise PrepareError(
                f"the tokenizer's tokens do not give the text back ({given}): bytes, and so "
                "scores, would be wrong; has it a piece for the bare space (▁)?"
            )
        counted = pieces.count(np.array(tokens))
        if counted != (size := len(found.encode())):
            raise PrepareError(
                f"the tokenizer's tokens stand for {counted:,} bytes of a text of {size:,}: "
                "scores would be wrong; take one whose spaces begin a piece"
            )


def check_case_round_trip(
    tokenizer: sentencepiece.SentencePieceProcessor,
    pieces: PieceBytes,
    texts: list[str],
    encoded: list[list[int]],
) -> None:
    """Raise PrepareError if tokens with case operators do not give a normalized text back to the
    character, or stand for another number of bytes.
    """
    decoded = tokenizer.decode(encoded, num_threads=1)
    each = pieces.each(np.concatenate(encoded))
    starts = np.cumsum([0, *map(len, encoded[:-1])])
    counts = np.add.reduceat(each, starts, dtype=np.int64).tolist()
    for counted, text, marked in zip(counts, texts, decoded, strict=True):
        document = f"the document that begins {text[:40]!r}"
        found = decode_case(marked)
        if found != text:
            place = next_difference(found, text)
            excerpt = slice(max(0, place - 8), place + 8)
            given = f"{found[excerpt]!r} for {text[excerpt]!r}"
            hint = "take a tokenizer that --case has trained"
            raise PrepareError(f"{document} does not come back from its tokens ({given}); {hint}")
        if counted != (size := len(text.encode())):
            raise PrepareError(
                f"{document} has {size:,} bytes, but its tokens stand for {counted:,}: scores "
                "would be wrong; take a tokenizer that --case has trained"
            )


def next_difference(one: str, other: str) -> int:
    """Return where two texts begin to differ."""
    return len(os.path.commonprefix([one, other]))


def end_with_parent() -> None:
    """Wait in a thread of a worker process until its parent is gone, and end it then.

    A parent that is killed cannot tell its workers, which would wait for work for ever.
    """
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def start_process() -> None:
    """Set a worker process up: it ends when the parent does or says so, not at the terminal's
    signals, after which the parent alone reports and cleans up.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def answer(sender: Any, function: Callable, arguments: tuple) -> None:
    """Send what a function returns or raises; the whole life of call_in_process()'s process."""
    start_process()
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send(error)


def call_in_process(function: Callable, *arguments: Any) -> Any:
    """Return what a function returns, or raise what it raises, in a process of its own.

    A signal that says stop is obeyed at once, where a library's call would run to its end first.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=answer, args=(sender, function, arguments))
    with stop_signals.hold():  # what a handler raises in a fork gets lost
        process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise BrokenProcessPool from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(result, Exception):
        raise result
    return result


def start_worker(model: bytes) -> None:
    """Load the tokenizer once per worker process.

    It comes as bytes: a processor cannot be sent to another process.
    """
    global worker_tokenizer, worker_pieces, worker_normalizer
    start_process()
    worker_tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    worker_pieces = piece_bytes(worker_tokenizer)
    worker_normalizer = make_normalizer()


def encode_batch(texts: list[str]) -> list[np.ndarray]:
    """Return the uint16 tokens of each text, shape (number of tokens,), with BOS in front; runs in
    a worker.

    PrepareError if they are not those of the text: see check_round_trip().
    """
    if worker_pieces.has_case:
        texts = [worker_normalizer.normalize(text) for text in texts]
        marked = [encode_case(text) for text in texts]
        encoded = worker_tokenizer.encode(marked, add_bos=True, num_threads=1)
        check_case_round_trip(worker_tokenizer, worker_pieces, texts, encoded)
    else:
        encoded = worker_tokenizer.encode(texts, add_bos=True, num_threads=1)
        check_round_trip(worker_tokenizer, worker_pieces, texts, encoded)
    return [np.array(tokens, "<u2") for tokens in encoded]


def encode_documents(
    documents: Iterable[Document], model: bytes, workers: int
) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield documents with their tokens, in order; only a few batches per worker are in memory at a
    time.
    """
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(model,))
    try:
        waiting = deque()  # batches that workers have, in order
        batch = []
        characters = 0
        for document in itertools.chain(documents, [None]):
            if document:
                batch.append(document)
                characters += len(document.text)
            if batch and (document is None or characters >= BATCH_CHARACTERS):
                with stop_signals.hold():  # the first one forks: see call_in_process()
                    tokens = pool.submit(encode_batch, [document.text for document in batch])
                waiting.append((batch, tokens))
                batch = []
                characters = 0
            while waiting and (document is None or len(waiting) > 3 * workers):
                done, tokens = waiting.popleft()
                yield from zip(done, tokens.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


# ---- Writing -------------------------------------------------------------------------------------


class ShardWriter:
    """Write a stream of tokens to shards <prefix>_000000.bin, <prefix>_000001.bin, ... of
    `shard_tokens` tokens each.

    The last shard may be shorter. A header is written when its shard is complete; call close() at
    the end.
    """

    def __init__(self, folder: Path, prefix: str, shard_tokens: int):
        self.folder = folder
        self.prefix = prefix
        self.shard_tokens = shard_tokens
        self.file = None  # of the shard in progress
        self.filled = 0  # tokens in it
        # Of all shards.
        self.shards = 0
        self.tokens = 0
        self.documents = 0
        self.text_bytes = 0

    def append(self, text: str, tokens: np.ndarray) -> None:
        """Append the tokens of one document."""
        self.documents += 1
        self.text_bytes += len(text.encode())
        self.tokens += len(tokens)
        while len(tokens):
            if self.file is None:
                self.file = (self.folder / f"{self.prefix}_{self.shards:06d}.bin").open("wb")
                self.filled = 0
                # The header's place; close_shard() knows what to write there.
                self.file.write(bytes(HEADER_BYTES))
                self.shards += 1
            part, tokens = np.split(tokens, [self.shard_tokens - self.filled])
            self.file.write(part.tobytes())
            self.filled += len(part)
            if self.filled == self.shard_tokens:
                self.close_shard()

    def close_shard(self) -> None:
        """Write the header of the shard in progress, if there is one, and close it."""
        if self.file is not None:
            header = np.zeros(HEADER_INTS, dtype="<i4")
            header[:3] = MAGIC, VERSION, self.filled
            with self.file as file:
                file.seek(0)
                file.write(header.tobytes())
            self.file = None

    def close(self) -> None:
        """Complete the last shard."""
        self.close_shard()


class ValidationWriter(ShardWriter):
    """Write validation shards and, if the tokenizer has case operators, the bytes of their tokens:
    <prefix>_bytes_000000.bin beside <prefix>_000000.bin.

    Others read these bytes there, who do not know the operators.
    """

    def __init__(self, folder: Path, prefix: str, shard_tokens: int, pieces: PieceBytes):
        super().__init__(folder, prefix, shard_tokens)
        self.pieces = pieces
        self.bytes_writer = ShardWriter(folder, f"{prefix}_bytes", shard_tokens)

    def append(self, text: str, tokens: np.ndarray) -> None:
        """Append the tokens of whole documents."""
        super().append(text, tokens)
        if self.pieces.has_case:
            self.bytes_writer.append("", self.pieces.each(tokens))

    def close(self) -> None:
        """Complete the last shard, and the file of its bytes."""
        super().close()
        self.bytes_writer.close()


def refuse_other_dataset(out: Path, name: str) -> None:
    """Raise PrepareError if `out` holds shards that are not this dataset's, which would be read
    with it, or folders where its files are to be.
    """
    if others := [
        path.name
        for split in ("train", "val")
        for path in out.glob(f"*_{split}_*.bin")
        if not path.name.startswith(f"{name}_{split}_")
    ]:
        raise PrepareError(
            f"{out} already holds another dataset ({min(others)}); give each its own --out folder"
        )
    shards = [*out.glob(f"{name}_train_*.bin"), *out.glob(f"{name}_val_*.bin")]
    refuse_folders([out / MANIFEST, *out.glob(f"{name}_*.model"), *shards])


def refuse_folders(places: Iterable[Path]) -> None:
    """Raise PrepareError for a folder where a file is to be written."""
    for path in places:
        if path.is_dir():
            raise PrepareError(f"{path} is a folder where a file is to be; move it away")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Make a folder, and let no other prepare.py write to it; PrepareError if one does.

    Yields False where the file system cannot lock folders. A folder that was made for nothing, and
    those in which it lies, are taken away again.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = True
    except BlockingIOError:
        os.close(handle)
        raise PrepareError(f"another process is writing to {folder}; wait for it to end") from None
    except OSError:
        is_locked = False
    try:
        yield is_locked
    finally:
        os.close(handle)
        for each in made:
            with contextlib.suppress(OSError):  # it holds something
                each.rmdir()


@contextlib.contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A folder in `out` for files in progress, so that finished ones are moved, not copied.

    It is gone afterwards; what a killed run left there is removed.
    """
    with locked(out) as is_locked:
        if is_locked:
            for abandoned in out.glob(".unfinished-*"):
                shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as temporary:
            yield Path(temporary)


def publish(work: Path, out: Path, name: str) -> None:
    """Move finished files from `work` to `out`, where they replace an earlier dataset of that
    name.

    Signals wait for it. If it is killed, validation shards are missing, without which train_gpt.py
    refuses to train: they are the first to go and the last to come, behind the files of their
    bytes.
    """
    # Shards that an earlier, longer run left would be read as part of this dataset.
    former = [out / MANIFEST, *out.glob(f"{name}_val_*.bin"), *out.glob(f"{name}_train_*.bin")]

    def turn(path: Path) -> tuple[bool, bool, str]:
        is_validation = "_val_" in path.name and not is_bytes_file(path)
        return path.name == MANIFEST, is_validation, path.name

    with stop_signals.hold():
        for path in former:
            path.unlink(missing_ok=True)
        for path in sorted(work.iterdir(), key=turn):
            os.replace(path, out / path.name)


def check_options(args: argparse.Namespace) -> None:
    """Raise PrepareError for a name or a number that cannot be."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name):
        raise PrepareError(f"--name {args.name!r}: use only letters, digits, '.', '_' and '-'")
    for split in ("train", "val"):
        if f"_{split}_" in f"{args.name}_":  # such as x_train: x_train_val_000000.bin
            raise PrepareError(f"--name {args.name!r}: its validation shards would be training's")
    limits = {"vocab_size": MAX_VOCAB_SIZE, "shard_tokens": MAX_SHARD_TOKENS, "workers": 1024}
    for option, most in limits.items():
        value = getattr(args, option)
        if not 1 <= value <= most:
            name = option.replace("_", "-")
            raise PrepareError(f"--{name} {value} is not between 1 and {most}")


def new_tokenizer(documents: Iterable[Document], vocab_size: int, case: bool) -> bytes:
    """Train a tokenizer on the training documents, with case operators or without, and return the
    bytes of its model file.
    """
    texts = tokenizer_sample(documents)
    if not texts:
        raise PrepareError(
            "no training document to train a tokenizer on: the input is empty or all validation"
        )
    characters = sum(map(len, texts)) / 1e6
    say(f"training a tokenizer of {vocab_size} pieces on {characters:.1f} M characters")
    return call_in_process(train_tokenizer, texts, vocab_size, case)


def check_splits(splits: dict[str, ShardWriter]) -> None:
    """Raise PrepareError if a split has no tokens."""
    if not any(writer.tokens for writer in splits.values()):
        raise PrepareError("the input has no document that is not empty; nothing to write")
    documents = sum(writer.documents for writer in splits.values())
    for name, writer in splits.items():
        if not writer.tokens:
            raise PrepareError(
                f"none of the {documents} documents is for {name}; change --val-fraction, give "
                "--val files, or (text) tell documents apart by --separator"
            )


def build_dataset(
    documents: Callable[[], Iterable[Document]], input_bytes: int, args: argparse.Namespace
) -> None:
    """Write a dataset's shards, and its tokenizer unless `args.tokenizer` is given, to `args.out`.

    `documents` is called once per pass over the input, whose size is `input_bytes`. All files are
    complete before the first one gets its final name; then they replace an earlier dataset of that
    name. `args.source` says in the manifest where the text comes from.
    """
    out = args.out
    name = args.name
    check_options(args)
    refuse_other_dataset(out, name)

    def progress(title: str) -> Iterator[Document]:
        with tqdm(desc=title, total=input_bytes, unit="B", unit_scale=True, disable=None) as bar:
            for document in documents():
                stop_signals.check()
                yield document
                bar.update(document.input_bytes)

    path = args.tokenizer or out / tokenizer_name(name, args.vocab_size, args.case)
    tokenizer = load_tokenizer(path) if args.tokenizer else None
    if tokenizer is not None and not has_case_operators(tokenizer):
        if args.case:
            lacks = f"{path}: its pieces {TITLE_ID} to {ESCAPE_ID} are not the operators of --case"
            raise PrepareError(f"{lacks}; leave --tokenizer out to train one, or leave --case out")
        # With operators, a text that does not come back from its tokens is refused.
        warn_of_other_text(tokenizer, path)
    with work_folder(out) as work:
        if tokenizer is None:
            texts = progress("reading for the tokenizer")
            model = new_tokenizer(texts, args.vocab_size, args.case)
            (work / path.name).write_bytes(model)
            tokenizer = load_tokenizer(work / path.name)
        train = ShardWriter(work, f"{name}_train", args.shard_tokens)
        pieces = piece_bytes(tokenizer)
        validation = ValidationWriter(work, f"{name}_val", args.shard_tokens, pieces)
        model = tokenizer.serialized_model_proto()
        encoded = encode_documents(progress("encoding"), model, args.workers)
        with contextlib.closing(encoded), contextlib.closing(train), contextlib.closing(validation):
            for document, tokens in encoded:
                writer = validation if document.is_validation else train
                writer.append(document.text, tokens)
        check_splits({"training": train, "validation": validation})
        texts = {"train": train.text_bytes, "val": validation.text_bytes}
        manifest = make_manifest(work, tokenizer, args, texts)
        manifest["tokenizer"] |= tokenizer_entry(path, work / path.name, out)
        write_manifest(work, manifest)
        publish(work, out, name)
    report(manifest)
    print_command(out, path, manifest)


# ---- Manifest: what the shards hold --------------------------------------------------------------
#
# manifest.json stands beside the shards and says of each one under "shards", by its name:
#
#     split, tokens, documents (BOS tokens), bytes (of text, as train_gpt.py counts them by tokens)
#     sha256, size, mtime_ns (of the whole file; size in bytes, time of change in nanoseconds)
#     sampled_sha256 (of 16 pieces of 512 tokens, evenly spread, which a run compares)
#
# A shard whose size and time of change are those of its entry has that SHA-256; any other, and one
# without an entry, is to be hashed anew: recorded_sha256(). So 80 shards of 200 MB need not be read
# where seconds count. It saves time; it proves nothing to those who did not make it.
#
# Where the bytes of a validation shard's tokens lie beside it, "token_bytes" has that file's name,
# size and SHA-256.
#
# "splits" has sums for "train" and "val"; there, text_bytes is the size of the text that was read,
# null where that is not known. "tokenizer" has the SHA-256, the number of pieces, the path as seen
# from the folder, and case_operators: whether operators stand for capitals. If they do, "operators"
# says how many tokens are such. "overlap" counts the validation documents that are training
# documents too, token for token, and lists their numbers, from 0. "source" and "command" say where
# the text is from.

MANIFEST = "manifest.json"
ROUND_TRIPS = 100  # validation documents that are decoded and encoded again


def file_state(path: Path) -> dict[str, int]:
    """Return a file's size in bytes and time of change in nanoseconds, which tell whether it was
    written anew.
    """
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def recorded_sha256(path: Path) -> str:
    """Return a shard's SHA-256: the manifest's, if the file has the size and the time of change
    that stand there, otherwise of the bytes.
    """
    entry = read_manifest(path.parent).get("shards", {}).get(path.name, {})
    return entry["sha256"] if file_state(path).items() <= entry.items() else file_sha256(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a folder's manifest, or {} if it has none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["format"] == 1 and Path(manifest["tokenizer"]["path"])
        known = known and {"train", "val"} == manifest["splits"].keys()
        for entry in manifest["shards"].values():
            known = known and {"split", "sha256", "size", "mtime_ns"} <= entry.keys()
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}
    return manifest if known else {}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a folder's manifest, whole or not at all."""
    part = folder / f".{MANIFEST}.part"
    try:
        part.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        os.replace(part, folder / MANIFEST)
    finally:
        part.unlink(missing_ok=True)


def file_entry(path: Path) -> dict[str, Any]:
    """Return the manifest's entry for a file: its name, size and SHA-256."""
    return {"file": path.name, "size": path.stat().st_size, "sha256": file_sha256(path)}


def tokenizer_entry(path: Path, now: Path, folder: Path) -> dict[str, Any]:
    """Return the manifest's entry for a tokenizer: its path as seen from a dataset's folder, and
    its SHA-256. Until the dataset is published, its file may be `now`.
    """
    model = now if now.exists() else path
    return {"path": os.path.relpath(path, folder), "sha256": file_sha256(model)}


def make_manifest(
    folder: Path,
    tokenizer: sentencepiece.SentencePieceProcessor,
    args: argparse.Namespace,
    text_bytes: dict[str, int],
) -> dict[str, Any]:
    """Read all shards of a folder once and return what they hold, but for the tokenizer's file.

    `text_bytes` has the size of the text that was read, by split, as far as it is known. Reads some
    80 million tokens a second on one core. PrepareError for a damaged or missing shard, one that
    another tokenizer made, or validation text that is there twice.
    """
    pieces = piece_bytes(tokenizer)
    shards: dict[str, dict[str, Any]] = {}
    validation = list(document_keys(described_shards(folder, "val", pieces, shards)))
    refuse_copies({name: entry["sha256"] for name, entry in shards.items() if entry["tokens"]})
    training = document_keys(described_shards(folder, "train", pieces, shards))
    found = set(validation).intersection(training)  # keeps no more of them than these
    # Texts that a tokenizer normalizes to nothing, BOS alone, say nothing.
    doubles = [n for n, key in enumerate(validation) if key in found and key.tokens > 1]
    overlap = {
        "documents": len(doubles),
        "tokens": sum(validation[number].tokens for number in doubles),
        "numbers": doubles,
    }
    splits = {}
    for split in ("train", "val"):
        entries = [entry for entry in shards.values() if entry["split"] == split]
        kinds = ["tokens", "documents", "bytes", "unknown"]
        kinds += ["operators"] if pieces.has_case else []
        splits[split] = {kind: sum(entry[kind] for entry in entries) for kind in kinds}
        splits[split] |= {"shards": len(entries), "text_bytes": text_bytes.get(split)}
    return {
        "format": 1,
        "command": args.command_line,
        "source": args.source,
        "tokenizer": {"pieces": tokenizer.vocab_size(), "case_operators": pieces.has_case},
        "splits": splits,
        "overlap": overlap,
        "shards": dict(sorted(shards.items())),
    }


def refuse_copies(sums: dict[str, str]) -> None:
    """Raise PrepareError for two validation shards of one SHA-256: their text would be scored
    twice.
    """
    names: dict[str, str] = {}
    for name, sha256 in sums.items():
        if (twin := names.setdefault(sha256, name)) != name:
            raise PrepareError(f"{name} and {twin} are the same text; take one of them away")


def described_shards(
    folder: Path, split: str, pieces: PieceBytes, entries: dict[str, dict[str, Any]]
) -> Iterator[np.ndarray]:
    """Yield the tokens of each shard of a split, and enter what it holds, by its name."""
    before = BOS_ID
    for path in tqdm(shard_paths(folder, split), desc=f"reading {split} shards", disable=None):
        stop_signals.check()
        state = file_state(path)
        raw = read_shard(path)
        tokens = raw[HEADER_BYTES:].view("<u2")
        check_token_range(tokens, len(pieces.texts), path)
        entry = {"split": split, "tokens": len(tokens)}
        entry["documents"] = int(np.count_nonzero(tokens == BOS_ID))
        entry["unknown"] = int(np.count_nonzero(tokens == pieces.unknown))
        entry["bytes"] = pieces.count(tokens, before)
        entry["sha256"] = hashlib.sha256(raw).hexdigest()
        entry["sampled_sha256"] = sampled_sha256(tokens)
        if pieces.has_case:
            entry["operators"] = int(np.count_nonzero((tokens >= TITLE_ID) & (tokens <= ESCAPE_ID)))
        if split == "val" and (beside := bytes_path(path)).is_file():
            entry["token_bytes"] = file_entry(beside)
            check_token_bytes(beside, path, pieces.each(tokens, before))
        entries[path.name] = entry | state
        before = pieces.last(tokens, before)
        yield tokens


def bytes_path(shard: Path) -> Path:
    """Return where the bytes of a validation shard's tokens are, if they are anywhere."""
    name, _, number = shard.name.rpartition("_")
    return shard.with_name(f"{name}_bytes_{number}")


def is_bytes_file(path: Path) -> bool:
    """Whether a file's name is that of the bytes of a validation shard's tokens."""
    return path.name.rpartition("_")[0].endswith("_val_bytes")


def check_token_bytes(path: Path, shard: Path, wanted: np.ndarray) -> None:
    """Warn if a file does not hold the bytes of a shard's tokens; PrepareError if it is damaged."""
    found = read_shard(path)[HEADER_BYTES:].view("<u2")
    if not np.array_equal(found, wanted):
        counts = f"{found.sum(dtype=np.int64):,} bytes, not {wanted.sum(dtype=np.int64):,}"
        warn(f"{path.name} is not the bytes of the tokens of {shard.name} ({counts}): delete it")


def sampled_sha256(tokens: np.ndarray) -> str:
    """Return the SHA-256 of 16 pieces of 512 tokens, uint16, of a shard, as train_gpt.py's
    Shard.sample has them: they overlap in a short shard, and each is all of one under 512.
    """
    digest = hashlib.sha256()
    for first in np.linspace(0, max(0, len(tokens) - 512), 16).astype(int):
        digest.update(tokens[first : first + 512].tobytes())
    return digest.hexdigest()


def check_token_range(tokens: np.ndarray, pieces: int, path: Path) -> None:
    """Raise PrepareError for a token that a tokenizer of so many pieces lacks."""
    if (largest := int(tokens.max(initial=0))) >= pieces:
        raise PrepareError(
            f"{path} holds token id {largest}, but the tokenizer has {pieces} pieces: another one "
            "made it"
        )


class DocumentKey(NamedTuple):
    """What a document is known by: equal keys are equal tokens."""

    tokens: int
    digest: bytes  # BLAKE2b of the tokens, 16 bytes


def document_keys(shards: Iterable[np.ndarray]) -> Iterator[DocumentKey]:
    """Yield the key of every document of a split; one may go on in the next shard."""
    digest = hashlib.blake2b(digest_size=16)
    length = 0
    for tokens in shards:
        raw = memoryview(tokens).cast("B")
        starts = np.flatnonzero(tokens == BOS_ID).tolist()
        for begin, end in itertools.pairwise([0, *starts, len(tokens)]):
            # What stands in front of the first BOS belongs to the shard before.
            if length and end > begin and tokens[begin] == BOS_ID:
                yield DocumentKey(length, digest.digest())
                digest = hashlib.blake2b(digest_size=16)
                length = 0
            digest.update(raw[2 * begin : 2 * end])
            length += end - begin
    if length:
        yield DocumentKey(length, digest.digest())


def find_tokenizer(folder: Path, given: Path | None) -> Path:
    """Return the tokenizer of a dataset: the given one, the one that its manifest names, the only
    one beside the shards, or FineWeb's; PrepareError if there is none.
    """
    if given is not None:
        return given
    named = read_manifest(folder).get("tokenizer", {}).get("path")
    beside = list(folder.glob("*.model"))
    candidates = [folder / named] if named else []
    candidates += beside if len(beside) == 1 else []
    if variant := FINEWEB.get(folder.resolve().name.removeprefix("fineweb10B_")):
        tokenizers = folder.resolve().parents[1] / "tokenizers"
        candidates.append(tokenizers / f"fineweb_{variant[1]}_bpe.model")
    for path in candidates:
        if path.is_file():
            return Path(near_path(path.resolve()))
    raise PrepareError(f"no tokenizer of {folder} is known; give --tokenizer FILE.model")


def check_made_by(tokenizer: sentencepiece.SentencePieceProcessor, folder: Path) -> None:
    """Raise PrepareError if another tokenizer than this one made a folder's shards.

    The first validation documents are decoded and encoded again: their tokens must come back.
    Those with unknown tokens are left out; and a few may have been tokenized otherwise.
    """
    path = shard_paths(folder, "val")[0]
    tokens = read_shard(path)[HEADER_BYTES:].view("<u2")
    check_token_range(tokens, tokenizer.vocab_size(), path)
    starts = np.flatnonzero(tokens == BOS_ID)[: ROUND_TRIPS + 1]
    documents = [part[1:].tolist() for part in np.split(tokens, starts)[1:]]
    whole = [ids for ids in documents[:ROUND_TRIPS] if tokenizer.unk_id() not in ids]
    again = tokenizer.encode(tokenizer.decode(whole))
    alike = sum(one == other for one, other in zip(whole, again, strict=True))
    if 2 * alike < len(whole):
        raise PrepareError(
            f"{path}: of {len(whole)} documents that were decoded and encoded again, only "
            f"{alike} are the same tokens: another tokenizer made it"
        )


def describe_folder(folder: Path, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the manifest of a folder whose shards were made by the tokenizer of the file `path`,
    for a dataset that lies in `args.out`.
    """
    tokenizer = load_tokenizer(path)
    check_made_by(tokenizer, folder)
    warn_of_other_text(tokenizer, path)
    manifest = make_manifest(folder, tokenizer, args, {})
    if tokenizer.piece_to_id("▁") == tokenizer.unk_id():
        warn(f"{path} has no piece for the bare space; if it spells spaces by bytes, they count 3")
    manifest["tokenizer"] |= tokenizer_entry(path, path, args.out)
    return manifest


def split_hashes(manifest: dict[str, Any], split: str) -> dict[str, str]:
    """Return the SHA-256 of a split's shards, by their names."""
    shards = manifest["shards"].items()
    return {name: entry["sha256"] for name, entry in shards if entry["split"] == split}


def run_manifest(args: argparse.Namespace) -> None:
    """Make a folder's manifest, and name the shards that differ from an earlier one's.

    What the earlier one says of the source, and of the size of the text, stays where the shards
    have stayed.
    """
    folder = args.out
    path = find_tokenizer(folder, args.tokenizer)
    former = read_manifest(folder)
    args.source = former.get("source")
    manifest = describe_folder(folder, path, args)
    shards = manifest["shards"]
    for name, entry in former.get("shards", {}).items():
        if name not in shards:
            warn(f"{name}, which the earlier manifest has, is not there any more")
        elif shards[name]["sha256"] != entry["sha256"]:
            warn(f"{name} is not the file that the earlier manifest has: its SHA-256 differs")
    for split, found in manifest["splits"].items():
        if former and split_hashes(former, split) == split_hashes(manifest, split):
            found["text_bytes"] = former["splits"][split].get("text_bytes")
    report(manifest)
    write_manifest(folder, manifest)  # after what is also worth knowing of a read-only folder
    print_command(folder, path, manifest)


# ---- What is said at the end ---------------------------------------------------------------------


def say(message: str) -> None:
    """Print a line at once. Where nobody reads it any more, the work goes on."""
    try:
        print(message, flush=True)
    except OSError:
        # Until the process ends.
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115


def warn(message: str) -> None:
    """Print one line of warning; see say()."""
    with contextlib.suppress(OSError):
        print(f"prepare.py: warning: {message}", file=sys.stderr)


def report(manifest: dict[str, Any]) -> None:
    """Print what each split holds, and what a reader of scores on it should know."""
    for name, split in (("training", "train"), ("validation", "val")):
        found = manifest["splits"][split]
        size = found["bytes"] if found["text_bytes"] is None else found["text_bytes"]
        text = f"{found['documents']:,} documents, {size:,} bytes of text"
        ratio = size / max(1, found["tokens"])
        rate = f"{ratio:.2f} bytes each, {found['tokens'] / max(1, size):.4f} a byte"
        tokens = f"{found['tokens']:,} tokens ({rate})"
        say(f"{name}: {text}, {tokens}, shards: {found['shards']}")
    found = manifest["splits"]["val"]
    if manifest["tokenizer"].get("case_operators"):  # which older manifests lack
        part = found["operators"] / max(1, found["tokens"])
        say(f"capitals: {part:.1%} of the validation tokens are case operators")
    if found["unknown"]:
        warn(
            f"{found['unknown']:,} of {found['tokens']:,} validation tokens are characters that "
            "the tokenizer does not know; they count no bytes"
        )
    if found["text_bytes"] not in (None, found["bytes"]):
        warn(
            f"{found['text_bytes']:,} bytes of validation text are {found['bytes']:,} by the "
            "tokens, and these divide a score: compare it only with those of tokenizers that "
            "normalize text (white space, compatible characters) alike"
        )
    overlap = manifest["overlap"]
    of = f"{overlap['documents']:,} of {found['documents']:,} validation documents"
    say(f"overlap: {of} ({overlap['tokens']:,} tokens) are training documents, too")


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs that a program started here may use."""
    try:
        command = ["nvidia-smi", "-L"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    count = sum(line.startswith("GPU ") for line in listed.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    return min(count, sum(name.strip() not in ("", "-1") for name in visible.split(",")))


def python_command() -> str:
    """Return how this Python is called here: by its name, if that finds it."""
    if shutil.which("python") == sys.executable:
        return "python"
    return shlex.quote(near_path(Path(sys.executable)))


def near_path(path: Path) -> str:
    """Return a path as seen from the working folder if it lies below, else the whole path."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def print_command(data: Path, tokenizer: Path, manifest: dict[str, Any]) -> None:
    """Print a whole command that trains and scores on the data, with a preset for this machine."""
    gpus = count_gpus()
    place = "here"
    if not gpus and manifest["splits"]["val"]["tokens"] > MOST_CPU_TOKENS:
        place = "on a machine with a GPU (the validation text is too long for a CPU)"
        gpus = 1
    # The presets for GPUs read windows of 2,048 tokens, and want some of them.
    short = min(split["tokens"] for split in manifest["splits"].values()) < LEAST_GPU_TOKENS
    ranks = 1
    while 2 * ranks <= gpus:  # batches are powers of two
        ranks *= 2
    preset = "tiny" if short or not gpus else "default" if ranks == 8 else "short"
    script = shlex.quote(near_path(Path(__file__).resolve().parents[1] / "train_gpt.py"))
    if preset != "tiny" and ranks > 1:
        script = f"-m torch.distributed.run --standalone --nproc_per_node={ranks} {script}"
    paths = f"DATA_PATH={shlex.quote(str(data))} TOKENIZER_PATH={shlex.quote(str(tokenizer))}"
    sizes = f"VOCAB_SIZE={manifest['tokenizer']['pieces']} PRESET={preset}"
    say(f"train and score {place} by:")
    say(f"{paths} {sizes} {python_command()} {script}")


# ---- Sample: the prose inside the Python installation --------------------------------------------

COMMON_WORD = re.compile(
    r"\b(?:an?|and|are|as|at|be|by|can|for|from|has|if|in|is|it|its|not|of|on|or|so|that|the|then|"
    r"this|to|was|we|when|which|will|with|you)\b",
    re.IGNORECASE,
)


def prose_paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs that are English prose, each on one line, without code examples and
    markup.
    """
    for paragraph in re.split(r"\n[ \t]*\n", text):
        text_lines = re.split(r"^\s*(?:>>>|\$ )", paragraph, flags=re.MULTILINE)[0].splitlines()
        line = " ".join(" ".join(line for line in text_lines if re.search(r"\w", line)).split())
        line = re.sub(r":[a-z:]+:`([^`]*)`", r"\1", line)
        line = re.sub(r"(\*\*|\*|``|`)(\S(?:.*?\S)?)\1", r"\2", line)
        # Prose is known by its common little words, and by being letters for the most part.
        words = len(re.findall(r"[A-Za-z']+", line))
        common = len(COMMON_WORD.findall(line))
        letters = len(re.findall(r"[A-Za-z ]", line))
        if words >= 5 and common >= 0.15 * words and letters >= 0.85 * len(line):
            yield line


def source_texts(source: str, tree: ast.Module) -> list[str]:
    """Return the docstrings and the comments (adjacent lines joined) of a module, in the order of
    the source.
    """
    found = []
    nodes = [tree]
    # All statements; ast.walk would also visit the many more expressions, which have no docstring.
    for node in nodes:
        nodes += [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, (ast.stmt, ast.excepthandler))
        ]
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append((getattr(node, "lineno", 0), ast.get_docstring(node) or ""))
    lines = [(number, line.strip()) for number, line in enumerate(source.splitlines(), 1)]
    for is_comment, block in itertools.groupby(lines, lambda item: item[1].startswith("#")):
        if is_comment:
            comments = list(block)
            found.append((comments[0][0], "\n".join(line.lstrip("#") for _, line in comments)))
    return [text for _, text in sorted(found)]


def standard_library_documents() -> list[str]:
    """Return prose of the standard library: one document per help topic and per module, shuffled
    with a fixed seed.

    Sources are parsed, not imported. A paragraph occurs only once in all documents, because help
    topics contain each other. PrepareError if the installation has no sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    documents = []
    seen = set()
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if not excluded.isdisjoint(parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                # Invalid escapes in the sources are not the user's concern.
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # deliberately broken, or not in UTF-8
            continue
        if parts == ("pydoc_data", "topics.py"):
            topics = next(node.value for node in tree.body if isinstance(node, ast.Assign))
            groups = [[text] for text in ast.literal_eval(topics).values()]
        else:
            groups = [source_texts(source, tree)]
        for texts in groups:
            paragraphs = dict.fromkeys(itertools.chain.from_iterable(map(prose_paragraphs, texts)))
            fresh = [paragraph for paragraph in paragraphs if paragraph not in seen]
            seen.update(fresh)
            if fresh:
                documents.append("\n\n".join(fresh))
    if not documents:
        raise PrepareError(
            f"this Python has no standard-library sources in {folder}; use the text command instead"
        )
    random.Random(0).shuffle(documents)
    return documents


# ---- Finished shards -----------------------------------------------------------------------------


def fault_of_shard(path: Path) -> str | None:
    """Say what is wrong with a shard's header or size, or None if nothing is."""
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4")
    if len(header) < HEADER_INTS or tuple(header[:2]) != (MAGIC, VERSION):
        return "not a token shard (magic number or version)"
    if (size := path.stat().st_size) != HEADER_BYTES + 2 * int(header[2]):
        return f"the header says {header[2]} tokens, which does not fit {size} bytes"
    return None


def read_shard(path: Path) -> np.ndarray:
    """Return a shard's bytes, header included, uint8; PrepareError if it is damaged."""
    size = path.stat().st_size
    if fault := fault_of_shard(path):
        raise PrepareError(f"{path}: {fault}")
    raw = np.fromfile(path, dtype=np.uint8)
    if len(raw) != size:  # or half of it would be taken for the whole
        raise PrepareError(f"{path} was cut off while it was read: fetch it again")
    return raw


def shard_paths(folder: Path, split: str) -> list[Path]:
    """Return the shards of a split, "train" or "val", in the order in which they were written.

    PrepareError if there are none, or if the numbers have a gap, as a download has that was cut
    off: half a text would be taken for the whole. Also for a number that two have, and for what has
    the name of a shard, or of the bytes of one's tokens, and is no file: a folder, or a link to
    nothing.
    """
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    for path in paths:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no file"
            problem = f"is named like a file of tokens, but is {kind}"
            raise PrepareError(f"{path} {problem}; move it away")
    paths = [path for path in paths if not is_bytes_file(path)]
    if not paths:
        raise PrepareError(f"{folder} holds no *_{split}_*.bin shards")
    series: dict[str, list[int]] = {}
    for path in paths:
        name, _, number = path.stem.rpartition("_")
        if number.isdecimal() and len(number) <= 6:  # more digits are a date, not a count
            series.setdefault(name, []).append(int(number))
    for name, numbers in series.items():
        twice = {number for number in numbers if numbers.count(number) > 1}
        if twice:
            raise PrepareError(
                f"{folder} has number {min(twice)} of {name}_*.bin twice; take one of them away"
            )
        lacking = set(range(min(1, *numbers), max(numbers))).difference(numbers)
        if lacking and len(numbers) > 1:
            raise PrepareError(
                f"{folder} lacks number {min(lacking)} of {name}_*.bin, but has {max(numbers)}: "
                "fetch that, too"
            )
    return paths


def read_tokens(folder: Path, split: str) -> np.ndarray:
    """Return all tokens of a dataset's split, "train" or "val", in order."""
    shards = [read_shard(path) for path in shard_paths(folder, split)]
    return np.concatenate([raw[HEADER_BYTES:].view("<u2") for raw in shards])


def run_development(args: argparse.Namespace) -> None:
    """Make a dataset that validates on the end of another's training text; the rest may come
    several times, reordered.

    With `args.part` 0, the validation text stays the other dataset's.
    """
    if not 0 <= args.part < 1:
        raise PrepareError(f"--part {args.part} is not between 0 and 1")
    if not 0 <= args.orders <= 100:
        raise PrepareError(f"--orders {args.orders} is not between 0 and 100")
    if args.seed < 0:
        raise PrepareError(f"--seed {args.seed} is negative; NumPy's seeds are not")
    refuse_other_dataset(args.out, "development")
    if args.out.resolve() == args.dataset.resolve():
        raise PrepareError(f"{args.out} is the dataset itself; give --out another folder")
    # A document begins with BOS; splits and orders never cut one.
    train = read_tokens(args.dataset, "train")
    starts = np.flatnonzero(train == BOS_ID)
    kept = int((1 - args.part) * len(starts))
    if not 0 < kept < len(starts) + (args.part == 0):
        raise PrepareError(
            f"--part {args.part} of {len(starts)} training documents leaves one side without any"
        )
    if args.part:
        train, validation = np.split(train, starts[kept : kept + 1])
    else:
        validation = read_tokens(args.dataset, "val")
    texts = [train]
    generator = np.random.default_rng(args.seed)
    if args.orders:
        documents = np.split(train, starts[1:kept])
        orders = (generator.permutation(len(documents)) for _ in range(args.orders))
        texts = (np.concatenate([documents[i] for i in order]) for order in orders)
    path = find_tokenizer(args.dataset, args.tokenizer)
    pieces = piece_bytes(load_tokenizer(path))
    check_token_range(validation, len(pieces.texts), args.dataset)
    args.source = {"dataset": args.dataset.name}
    if (args.dataset / MANIFEST).is_file():
        args.source |= {"manifest_sha256": file_sha256(args.dataset / MANIFEST)}
    with work_folder(args.out) as work:
        writer = ValidationWriter(work, "development_val", MAX_SHARD_TOKENS, pieces)
        with contextlib.closing(writer):
            writer.append("", validation)
        # A shard for each order.
        writer = ShardWriter(work, "development_train", min(len(train), MAX_SHARD_TOKENS))
        for text in texts:
            writer.append("", text)
        writer.close()
        manifest = describe_folder(work, path, args)
        write_manifest(work, manifest)
        publish(work, args.out, "development")
    report(manifest)
    print_command(args.out, path, manifest)


# ---- FineWeb: the published shards ---------------------------------------------------------------


def fault_of(path: Path, entry: Any) -> str | None:
    """Say what is wrong with a downloaded file, or None if it is good.

    `entry` is the file's entry in the repository's listing, with its size and, for large files, its
    SHA-256.
    """
    if path.stat().st_size != entry.size:
        return f"{path.stat().st_size} bytes instead of {entry.size}"
    if path.suffix == ".bin" and (fault := fault_of_shard(path)):
        return fault
    if entry.lfs and recorded_sha256(path) != entry.lfs.sha256:
        return "its SHA-256 differs from the published one"
    return None


def list_fineweb(api: Any, repository: str, dataset: str) -> dict[str, Any]:
    """Return the repository's entries of a dataset and of all tokenizers, by file name."""
    listing = {}
    try:
        for folder in (f"datasets/datasets/{dataset}", "datasets/tokenizers"):
            for entry in api.list_repo_tree(repository, folder, repo_type="dataset"):
                listing[Path(entry.path).name] = entry
    except Exception as error:  # the package's network errors have no common base class
        raise PrepareError(f"cannot list the files of {repository}: {first_line(error)}") from None
    return listing


def choose_fineweb(
    listing: dict[str, Any], repository: str, dataset: str, model: str, train_shards: int
) -> tuple[list[str], list[str]]:
    """Return the names of the validation shards, and of the first training shards."""
    names = sorted(listing)
    val_names = [name for name in names if re.fullmatch(r"fineweb_val_\d{6}\.bin", name)]
    train_names = [name for name in names if re.fullmatch(r"fineweb_train_\d{6}\.bin", name)]
    if not val_names or model not in listing:
        raise PrepareError(f"{repository} has no validation shards of {dataset}, or no {model}")
    if train_shards > len(train_names):
        found = f"{dataset} has only {len(train_names)} training shards"
        raise PrepareError(f"--train-shards {train_shards}: {found}")
    return val_names, train_names[:train_shards]


def download(hub: Any, repository: str, entry: Any, staging: Path) -> None:
    """Download one file to `staging` and check it.

    `staging` stays after an interruption: some clients resume a partial file.
    """
    name = Path(entry.path).name
    try:
        staged = hub.hf_hub_download(repository, entry.path, repo_type="dataset", local_dir=staging)
    except Exception as error:
        message = f"download of {name} failed, run again to resume: {first_line(error)}"
        raise PrepareError(message) from None
    if fault := fault_of(Path(staged), entry):
        os.unlink(staged)
        message = f"the download of {name} is corrupt and was deleted ({fault}); run again"
        raise PrepareError(message)


def is_good(path: Path, entry: Any) -> bool:
    """Whether a file is there and is the published one."""
    return path.is_file() and fault_of(path, entry) is None


def download_missing(
    hub: Any, repository: str, entries: list[Any], staging: Path, target: dict[str, Path]
) -> None:
    """Download what is not in its place, and move it there when all has come.

    So training never begins on half a download. Validation shards, the last of `entries`, are the
    last to be moved.
    """
    missing = [entry for entry in entries if not is_good(target[entry.path], entry)]
    wanted = [entry for entry in missing if not is_good(staging / entry.path, entry)]
    say(f"{len(entries) - len(wanted)} of {len(entries)} files are already there and good")
    for number, entry in enumerate(wanted, 1):
        size = f"{entry.size / 1e6:.1f} MB"
        say(f"file {number} of {len(wanted)}: {Path(entry.path).name}, {size}")
        download(hub, repository, entry, staging)
    with stop_signals.hold():
        for entry in missing:
            target[entry.path].parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / entry.path, target[entry.path])
    shutil.rmtree(staging, ignore_errors=True)


def run_fineweb(args: argparse.Namespace) -> None:
    """Download one variant's published shards and tokenizer into the contest's folder layout."""
    try:
        import huggingface_hub
    except ImportError:
        raise PrepareError(
            "downloading needs a package that is missing: pip install huggingface_hub"
        ) from None
    if args.train_shards < 1:
        raise PrepareError(f"--train-shards {args.train_shards} must be at least 1")
    repository, vocab_size = FINEWEB[args.variant]
    dataset = f"fineweb10B_{args.variant}"
    model = f"fineweb_{vocab_size}_bpe.model"
    listing = list_fineweb(huggingface_hub.HfApi(), repository, dataset)
    val_names, train_names = choose_fineweb(listing, repository, dataset, model, args.train_shards)
    entries = [listing[name] for name in [model, *train_names, *val_names]]
    # The repository's folder `datasets/` has the layout that the contest uses under `data/`.
    target = {entry.path: args.out / entry.path.removeprefix("datasets/") for entry in entries}
    staging = args.out / f".download-{args.variant}"
    refuse_folders(target.values())  # before gigabytes come that could not be moved there
    with locked(staging):
        download_missing(huggingface_hub, repository, entries, staging, target)

    tokenizer = target[listing[model].path]
    args.source = {"repository": repository, "dataset": dataset}
    args.out = target[listing[val_names[0]].path].parent
    former = read_manifest(args.out)
    manifest = former if is_current(former, args.out, tokenizer) else None
    if manifest is None:
        manifest = describe_folder(args.out, tokenizer, args)
        write_manifest(args.out, manifest)
    report(manifest)
    print_command(args.out, tokenizer, manifest)


def is_current(manifest: dict[str, Any], folder: Path, tokenizer: Path) -> bool:
    """Whether a manifest is of the tokenizer and of just the shards that a folder has, unchanged
    by their size and time of change. It is not if it lacks samples, for a run does not believe it
    then, or if a folder or a broken link is named like a shard: shard_paths() refuses that.
    """
    if not manifest or manifest["tokenizer"].get("sha256") != file_sha256(tokenizer):
        return False
    if not all("sampled_sha256" in entry for entry in manifest["shards"].values()):
        return False
    found = list(folder.glob("*.bin"))
    if not all(path.is_file() for path in found):
        return False
    there = {path.name: file_state(path) for path in found if not is_bytes_file(path)}
    known = {
        name: {"size": entry["size"], "mtime_ns": entry["mtime_ns"]}
        for name, entry in manifest["shards"].items()
    }
    return there == known


# ---- Command line --------------------------------------------------------------------------------


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require_file(path: Path) -> None:
    """Raise PrepareError unless path is a file that can be read."""
    if not path.exists():
        raise PrepareError(f"{path}: no such file")
    if not path.is_file():
        raise PrepareError(f"{path}: not a regular file; give the files themselves")
    path.open("rb").close()


def run_sample(args: argparse.Namespace) -> None:
    """Build the sample dataset.

    Each text counts as one source; a twentieth of them is the validation split.
    """
    texts = [(text, len(text.encode())) for text in standard_library_documents()]
    args.source = {"standard library of Python": sys.version.split()[0]}
    build_dataset(
        lambda: split_documents([texts], [], 0.05, iter), sum(size for _, size in texts), args
    )


def file_number(path: Path) -> tuple[int, int]:
    """Return device and inode, which a file keeps under all its names, by any kind of link."""
    status = path.stat()
    return status.st_dev, status.st_ino


def run_files(args: argparse.Namespace) -> None:
    """Build a dataset from text, JSONL or Parquet files.

    No file may be both an INPUT and a --val, under whatever names: its text would be in both
    splits. None that validation documents are from may be given twice: they would be scored twice.
    """
    for path in args.inputs + args.val:
        require_file(path)
    inputs = set(map(file_number, args.inputs))
    for path in args.val:
        if file_number(path) in inputs:
            raise PrepareError(f"{path} is given both as INPUT and as --val")
    seen = set()
    for path in args.val or args.inputs:
        if file_number(path) in seen:
            raise PrepareError(f"{path} is given twice: its documents would be scored twice")
        seen.add(file_number(path))
    if not 0 < args.val_fraction < 1:
        raise PrepareError(f"--val-fraction {args.val_fraction} is not between 0 and 1")
    if args.command == "text" and args.separator == "":
        raise PrepareError("--separator is empty; leave it out if a file is one document")

    def read(path: Path) -> Iterator[tuple[str, int]]:
        if args.command == "text":
            return read_text(path, args.separator)
        return (read_jsonl if args.command == "jsonl" else read_parquet)(path, args.field)

    args.source = {
        "inputs": [file_entry(path) for path in args.inputs],
        "val": [file_entry(path) for path in args.val],
    }
    input_bytes = sum(entry["size"] for entries in args.source.values() for entry in entries)
    build_dataset(
        lambda: split_documents(args.inputs, args.val, args.val_fraction, read), input_bytes, args
    )
    if getattr(args, "separator", None) == "blank-line" and not args.val:
        warn(
            "with --separator blank-line every paragraph is a document of its own, and validation "
            "paragraphs are from the same files as training; --val names files to validate on"
        )


def add_out(add: Callable, default: Path | None, text: str) -> None:
    """The option --out, required where there is no default."""
    if default is None:
        add("--out", type=Path, required=True, help=text)
    else:
        add("--out", type=Path, default=default, help=f"{text} (default: %(default)s)")


def add_vocab_size(add: Callable, text: str) -> None:
    """The option --vocab-size."""
    text += " (default: %(default)s)"
    add("--vocab-size", type=int, default=1024, metavar="N", help=text)


def add_case(add: Callable) -> None:
    """The option --case."""
    text = "write capitals as operators, tokens in front of their words, so that The and the "
    text += "share a token; a tokenizer that knows the operators needs no --case"
    add("--case", action="store_true", help=text)


def add_file_options(command: argparse.ArgumentParser, name: str) -> None:
    """The options of the commands that read the user's own files."""
    add = command.add_argument
    add("inputs", type=Path, nargs="+", metavar="INPUT", help="files, read in the order given")
    if name == "text":
        kinds = "nul, blank-line, or any other text as it is"
        text = f"between documents: {kinds} (default: each file is one document)"
        add("--separator", metavar="TEXT", help=text)
    else:
        add("--field", default="text", help="field that holds the text (default: %(default)s)")
    add_out(add, None, "folder for shards and tokenizer; replaces a dataset of that name")
    add("--name", required=True, help="first part of the file names")
    number = {"type": int, "metavar": "N"}
    text = "tokens per shard (default: %(default)s)"
    add("--shard-tokens", default=SHARD_TOKENS, help=text, **number)
    text = "encoding processes (default: all processors)"
    add("--workers", default=PROCESSORS, help=text, **number)
    add_case(add)
    # A tokenizer is given or trained; a validation split is given or chosen.
    add = command.add_mutually_exclusive_group().add_argument
    text = "SentencePiece model to use (default: train one)"
    add("--tokenizer", type=Path, metavar="FILE.model", help=text)
    add_vocab_size(add, "pieces of a trained one")
    add = command.add_mutually_exclusive_group().add_argument
    add("--val", type=Path, nargs="+", default=[], metavar="INPUT", help="files to validate on")
    text = "part of the documents to validate on, chosen by a hash of their text"
    text += " (default: %(default)s)"
    add("--val-fraction", type=float, default=0.02, metavar="X", help=text)


def add_tokenizer_of(add: Callable) -> None:
    """The option --tokenizer of commands that read finished shards."""
    text = "model that made the shards (default: the one that the manifest names, or that is in "
    text += "the usual place)"
    add("--tokenizer", type=Path, metavar="FILE.model", help=text)


def add_development_options(add: Callable) -> None:
    """The options of `development`."""
    add("dataset", type=Path, help="folder of a finished dataset")
    add_tokenizer_of(add)
    add_out(add, None, "folder for the shards; replaces an earlier development split")
    text = "part of the training documents to validate on, the last; 0: keep the validation text"
    add("--part", type=float, default=0.02, metavar="X", help=f"{text} (default: %(default)s)")
    text = "write the training documents N times, each in a new order; 0: once, as they are"
    add("--orders", type=int, default=0, metavar="N", help=f"{text} (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the orders (default: %(default)s)")


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options; args.run is what a command calls."""
    parser = argparse.ArgumentParser(
        prog="prepare.py", description="Make token shards and a tokenizer for train_gpt.py."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(run: Callable, name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    text = "make a small English dataset from this Python's documentation"
    sample = add_command(run_sample, "sample", text)
    add_out(sample.add_argument, Path("data/sample"), "folder for shards and tokenizer")
    add_vocab_size(sample.add_argument, "pieces of the tokenizer")
    add_case(sample.add_argument)
    sample.set_defaults(name="sample", tokenizer=None)
    sample.set_defaults(shard_tokens=SHARD_TOKENS, workers=PROCESSORS)

    text = "make a dataset from plain text files (UTF-8)"
    add_file_options(add_command(run_files, "text", text), "text")
    text = "make a dataset from files with one JSON object per line; each object is a document"
    add_file_options(add_command(run_files, "jsonl", text), "jsonl")
    text = "make a dataset from Parquet files; each row is a document"
    add_file_options(add_command(run_files, "parquet", text), "parquet")

    text = "set the end of a dataset's training text aside, to choose settings on; "
    text += "the rest may come in several orders"
    add_development_options(add_command(run_development, "development", text).add_argument)

    text = "write into a folder's manifest.json what its shards contain, and whether validation "
    text += "documents are among those for training"
    add = add_command(run_manifest, "manifest", text).add_argument
    add("out", type=Path, metavar="FOLDER", help="folder of the shards")
    add_tokenizer_of(add)

    text = "download the published FineWeb shards and tokenizer; run again to resume"
    add = add_command(run_fineweb, "fineweb", text).add_argument
    add("--variant", choices=sorted(FINEWEB), required=True, help="which tokenizer")
    text = "the first N training shards, 200 MB each (default: %(default)s)"
    add("--train-shards", type=int, default=80, metavar="N", help=text)
    add_out(add, Path("data"), "folder that gets datasets/ and tokenizers/")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 2 after an error, 128 and its number
    after a signal (130 after Control-C).
    """
    tolerate_consoles()
    arguments = sys.argv[1:] if arguments is None else arguments
    args = make_parser().parse_args(arguments)
    args.command_line = shlex.join(["prepare.py", *arguments])
    # Its thread is not needed, and worker processes are safer started without threads.
    tqdm.monitor_interval = 0
    status = 2
    try:
        with stop_signals.handled():
            args.run(args)
    except PrepareError as error:
        message = str(error)
    except BrokenProcessPool:
        message = "a worker process died, perhaps for lack of memory; try fewer --workers"
    except MemoryError:
        message = "out of memory; try fewer --workers, or shorter shards"
    except OSError as error:
        message = f"{error.filename or args.out}: {error.strerror or error}"
    except Stopped as stopped:
        name = signal.Signals(stopped.args[0]).name
        message = f"interrupted by {name}"
        status = 128 + stopped.args[0]
    except KeyboardInterrupt:
        message = "interrupted"
        status = 130
    else:
        return 0
    print(f"prepare.py: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
