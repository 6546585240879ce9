"""Make the token shards and the SentencePiece tokenizer that train_gpt.py reads.

    python data/prepare.py sample                   a small English sample, without any download
    python data/prepare.py text a.txt b.txt --out data/my --name my
                                                    your own text (also: jsonl, parquet)
    python data/prepare.py fineweb --variant sp1024 --train-shards 10
                                                    the published FineWeb shards
    python data/prepare.py development data/my --out data/development
                                                    a dataset to choose settings on

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros)
and then that many little-endian uint16 tokens. Every document starts with the beginning-of-sequence
token (BOS, id 1); a document may continue in the next shard. Needs numpy, sentencepiece and tqdm;
also pyarrow for `parquet`, huggingface_hub for `fineweb`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import tempfile
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

# The shard format.
MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
BOS_ID = 1
MAX_VOCAB_SIZE = 2**16  # tokens are stored as uint16
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts tokens in an int32

CHUNK_BYTES = 2**24
MAX_DOCUMENT_BYTES = 2**26
BATCH_CHARACTERS = 250_000
SHARD_TOKENS = 100_000_000
# A tokenizer of at most 65,536 pieces gains nothing from more text than this, and it all has to fit
# in memory.
TOKENIZER_TRAINING_CHARACTERS = 100_000_000

SEPARATORS = {"nul": rb"\0", "blank-line": rb"\n[ \t\r]*\n"}
PROCESSORS = os.cpu_count() or 1
FINEWEB = {
    "sp1024": ("willdepueoai/parameter-golf", 1024),
    "sp8192": ("kevclark/parameter-golf", 8192),
}


class PrepareError(Exception):
    """Something the user can put right; main() prints it as one line."""


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


def read_jsonl(path: Path, field: str) -> Iterator[tuple[str, int]]:
    """Yield the text in `field` of each line, which holds one JSON object; blank lines are
    skipped.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(decode(line, where))
            except (ValueError, RecursionError) as error:
                raise PrepareError(
                    f"{where}: invalid JSON ({getattr(error, 'msg', error)})"
                ) from None
            if not isinstance(record, dict):
                raise PrepareError(
                    f"{where}: expected a JSON object, found a {type(record).__name__}"
                )
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


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """Train a SentencePiece byte-pair-encoding tokenizer on texts and return the bytes of its model
    file.

    The settings are those of the contest's tokenizers: ids 0 to 3 are padding, BOS, end and
    unknown; text is normalized with nmt_nfkc, which makes any white space one space; digits are
    separate pieces; there is no space before the first word. Byte pieces spell every other
    character, so nothing is unknown. PrepareError if the texts have too few different words, or too
    many different characters, for `vocab_size`.
    """
    # Pieces never cross a space, so long documents can be cut there; SentencePiece leaves out
    # over-long lines.
    words = (text.split() for text in texts)
    sentences = (
        " ".join(part[start : start + 100]) for part in words for start in range(0, len(part), 100)
    )
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
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            split_digits=True,
            max_sentence_length=2**20,
            num_threads=PROCESSORS,
            minloglevel=2,
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


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model file; PrepareError if it is not one or does not fit the shard
    format.
    """
    require_file(path)
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:
        raise PrepareError(f"{path}: not a SentencePiece model; give a .model file") from None
    if tokenizer.bos_id() != BOS_ID:
        raise PrepareError(f"{path}: its BOS id is {tokenizer.bos_id()}, but shards need {BOS_ID}")
    if tokenizer.vocab_size() > MAX_VOCAB_SIZE:
        raise PrepareError(
            f"{path}: {tokenizer.vocab_size()} pieces; shards hold uint16, at most {MAX_VOCAB_SIZE}"
        )
    return tokenizer


# ---- Encoding and writing ------------------------------------------------------------------------


def start_worker(model: bytes) -> None:
    """Load the tokenizer once per worker process.

    It comes as bytes: a processor cannot be sent to another process.
    """
    global worker_tokenizer
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # on Control-C the parent alone reports and cleans up
    worker_tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)


def encode_batch(texts: list[str]) -> list[np.ndarray]:
    """Return the uint16 tokens of each text, shape (number of tokens,), with BOS in front; runs in
    a worker.
    """
    return [
        np.array(tokens, "<u2")
        for tokens in worker_tokenizer.encode(texts, add_bos=True, num_threads=1)
    ]


def encode_documents(
    documents: Iterable[Document], model: bytes, workers: int
) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield documents with their tokens, in order; only a few batches per worker are in memory at a
    time.
    """
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(model,)) as pool:
        waiting = deque()  # batches that workers have, in order
        batch = []
        characters = 0
        for document in itertools.chain(documents, [None]):
            if document:
                batch.append(document)
                characters += len(document.text)
            if batch and (document is None or characters >= BATCH_CHARACTERS):
                waiting.append(
                    (batch, pool.submit(encode_batch, [document.text for document in batch]))
                )
                batch = []
                characters = 0
            while waiting and (document is None or len(waiting) > 3 * workers):
                done, tokens = waiting.popleft()
                yield from zip(done, tokens.result(), strict=True)


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
                # The header's place; close() knows what to write there.
                self.file.write(bytes(HEADER_BYTES))
                self.shards += 1
            part, tokens = np.split(tokens, [self.shard_tokens - self.filled])
            self.file.write(part.tobytes())
            self.filled += len(part)
            if self.filled == self.shard_tokens:
                self.close()

    def close(self) -> None:
        """Write the header of the shard in progress, if there is one, and close it."""
        if self.file is not None:
            header = np.zeros(HEADER_INTS, dtype="<i4")
            header[:3] = MAGIC, VERSION, self.filled
            with self.file as file:
                file.seek(0)
                file.write(header.tobytes())
            self.file = None


def refuse_other_dataset(out: Path, name: str) -> None:
    """Raise PrepareError if there are training shards in `out` that are not this dataset's."""
    if others := [
        path.name
        for path in out.glob("*_train_*.bin")
        if not path.name.startswith(f"{name}_train_")
    ]:
        raise PrepareError(
            f"{out} already holds another dataset ({min(others)}); give each its own --out folder"
        )


def publish(work: Path, out: Path, name: str) -> None:
    """Move finished files from `work` to `out`, where they replace an earlier dataset of that
    name.
    """
    # Shards that an earlier, longer run left would be read as part of this dataset.
    for old in itertools.chain(out.glob(f"{name}_train_*.bin"), out.glob(f"{name}_val_*.bin")):
        old.unlink()
    for path in sorted(work.iterdir()):
        os.replace(path, out / path.name)


def check_options(args: argparse.Namespace) -> None:
    """Raise PrepareError for a name or a number that cannot be."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name):
        raise PrepareError(f"--name {args.name!r}: use only letters, digits, '.', '_' and '-'")
    limits = {"vocab_size": MAX_VOCAB_SIZE, "shard_tokens": MAX_SHARD_TOKENS, "workers": 1024}
    for option, most in limits.items():
        value = getattr(args, option)
        if not 1 <= value <= most:
            name = option.replace("_", "-")
            raise PrepareError(f"--{name} {value} is not between 1 and {most}")


def new_tokenizer(documents: Iterable[Document], vocab_size: int) -> bytes:
    """Train a tokenizer on the training documents and return the bytes of its model file."""
    texts = tokenizer_sample(documents)
    if not texts:
        raise PrepareError(
            "no training document to train a tokenizer on: the input is empty or all validation"
        )
    characters = sum(map(len, texts)) / 1e6
    size = f"{vocab_size} pieces on {characters:.1f} M characters"
    print(f"training a tokenizer of {size}", flush=True)
    return train_tokenizer(texts, vocab_size)


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


def print_splits(splits: dict[str, ShardWriter]) -> None:
    """Print what each split holds."""
    for name, writer in splits.items():
        ratio = writer.text_bytes / writer.tokens
        text = f"{writer.documents:,} documents, {writer.text_bytes:,} bytes of text"
        tokens = f"{writer.tokens:,} tokens ({ratio:.2f} bytes each)"
        print(f"{name}: {text}, {tokens}, shards: {writer.shards}")


def build_dataset(
    documents: Callable[[], Iterable[Document]], input_bytes: int, args: argparse.Namespace
) -> None:
    """Write a dataset's shards, and its tokenizer unless `args.tokenizer` is given, to `args.out`.

    `documents` is called once per pass over the input, whose size is `input_bytes`. All files are
    complete before the first one gets its final name; then they replace an earlier dataset of that
    name.
    """
    out = args.out
    name = args.name
    check_options(args)
    refuse_other_dataset(out, name)

    def progress(title: str) -> Iterator[Document]:
        with tqdm(desc=title, total=input_bytes, unit="B", unit_scale=True, disable=None) as bar:
            for document in documents():
                yield document
                bar.update(document.input_bytes)

    path = args.tokenizer or out / f"{name}_{args.vocab_size}_bpe.model"
    tokenizer = load_tokenizer(path) if args.tokenizer else None
    out.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that finished files can be moved without copying them.
    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as temporary:
        work = Path(temporary)
        if tokenizer is None:
            model = new_tokenizer(progress("reading for the tokenizer"), args.vocab_size)
            (work / path.name).write_bytes(model)
            tokenizer = load_tokenizer(work / path.name)
        train = ShardWriter(work, f"{name}_train", args.shard_tokens)
        validation = ShardWriter(work, f"{name}_val", args.shard_tokens)
        with contextlib.closing(train), contextlib.closing(validation):
            model = tokenizer.serialized_model_proto()
            for document, tokens in encode_documents(progress("encoding"), model, args.workers):
                writer = validation if document.is_validation else train
                writer.append(document.text, tokens)
        splits = {"training": train, "validation": validation}
        check_splits(splits)
        publish(work, out, name)
    print_splits(splits)
    print_environment(out, path, tokenizer.vocab_size())


def print_environment(data: Path, tokenizer: Path, vocab_size: int) -> None:
    """Print where the data are, as the environment variables that train_gpt.py takes.

    The last line can be pasted in front of a command.
    """
    print("environment for train_gpt.py:")
    paths = f"DATA_PATH={shlex.quote(str(data))} TOKENIZER_PATH={shlex.quote(str(tokenizer))}"
    print(f"{paths} VOCAB_SIZE={vocab_size}")


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


def read_shards(folder: Path, split: str) -> np.ndarray:
    """Return all tokens of a dataset's split, "train" or "val", in order."""
    # Shards are numbered in the order in which they were written.
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    if not paths:
        raise PrepareError(f"{folder} holds no *_{split}_*.bin shards")
    for path in paths:
        if fault := fault_of_shard(path):
            raise PrepareError(f"{path}: {fault}")
    return np.concatenate([np.fromfile(path, dtype="<u2", offset=HEADER_BYTES) for path in paths])


def run_development(args: argparse.Namespace) -> None:
    """Make a dataset that validates on the end of another's training text; the rest may come
    several times, reordered.

    With `args.part` 0, the validation text stays the other dataset's.
    """
    if not 0 <= args.part < 1:
        raise PrepareError(f"--part {args.part} is not between 0 and 1")
    if not 0 <= args.orders <= 100:
        raise PrepareError(f"--orders {args.orders} is not between 0 and 100")
    refuse_other_dataset(args.out, "development")
    if args.out.resolve() == args.dataset.resolve():
        raise PrepareError(f"{args.out} is the dataset itself; give --out another folder")
    # A document begins with BOS; splits and orders never cut one.
    train = read_shards(args.dataset, "train")
    starts = np.flatnonzero(train == BOS_ID)
    kept = int((1 - args.part) * len(starts))
    if not 0 < kept < len(starts) + (args.part == 0):
        raise PrepareError(
            f"--part {args.part} of {len(starts)} training documents leaves one side without any"
        )
    if args.part:
        train, validation = np.split(train, starts[kept : kept + 1])
    else:
        validation = read_shards(args.dataset, "val")
    texts = [train]
    generator = np.random.default_rng(args.seed)
    if args.orders:
        documents = np.split(train, starts[1:kept])
        orders = (generator.permutation(len(documents)) for _ in range(args.orders))
        texts = (np.concatenate([documents[i] for i in order]) for order in orders)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".unfinished-") as temporary:
        work = Path(temporary)
        with contextlib.closing(ShardWriter(work, "development_val", MAX_SHARD_TOKENS)) as writer:
            writer.append("", validation)
        # A shard for each order.
        writer = ShardWriter(work, "development_train", min(len(train), MAX_SHARD_TOKENS))
        for text in texts:
            writer.append("", text)
        writer.close()
        publish(work, args.out, "development")
    kept = f"training: {len(train):,} tokens, shards: {writer.shards}"
    print(f"{kept}; validation: {len(validation):,} tokens")
    print(f"environment for train_gpt.py: DATA_PATH={shlex.quote(str(args.out))}")


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
    if entry.lfs:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != entry.lfs.sha256:
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


def download(hub: Any, repository: str, entry: Any, staging: Path, name: str, target: Path) -> None:
    """Download one file, check it, and move it to its place.

    `staging` stays after an interruption: some clients resume a partial file.
    """
    try:
        staged = hub.hf_hub_download(repository, entry.path, repo_type="dataset", local_dir=staging)
    except Exception as error:
        message = f"download of {name} failed, run again to resume: {first_line(error)}"
        raise PrepareError(message) from None
    if fault := fault_of(Path(staged), entry):
        os.unlink(staged)
        message = f"the download of {name} is corrupt and was deleted ({fault}); run again"
        raise PrepareError(message)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(staged, target)


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

    # The repository's folder `datasets/` has the layout that the contest uses under `data/`.
    names = [model, *val_names, *train_names]
    target = {name: args.out / listing[name].path.removeprefix("datasets/") for name in names}
    missing = []
    for name in names:
        if not target[name].is_file() or fault_of(target[name], listing[name]):
            missing.append(name)
    print(f"{len(names) - len(missing)} of {len(names)} files are already there and good")
    args.out.mkdir(parents=True, exist_ok=True)
    staging = args.out / f".download-{args.variant}"
    for number, name in enumerate(missing, 1):
        entry = listing[name]
        print(f"file {number} of {len(missing)}: {name}, {entry.size / 1e6:.1f} MB", flush=True)
        download(huggingface_hub, repository, entry, staging, name, target[name])
    shutil.rmtree(staging, ignore_errors=True)
    load_tokenizer(target[model])
    print_environment(target[val_names[0]].parent, target[model], vocab_size)


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
    build_dataset(
        lambda: split_documents([texts], [], 0.05, iter), sum(size for _, size in texts), args
    )


def run_files(args: argparse.Namespace) -> None:
    """Build a dataset from text, JSONL or Parquet files.

    No file may be both an INPUT and a --val: its text would be in both splits.
    """
    for path in args.inputs + args.val:
        require_file(path)
    if both := set(map(Path.resolve, args.inputs)) & set(map(Path.resolve, args.val)):
        raise PrepareError(f"{min(both)} is given both as INPUT and as --val")
    if not 0 < args.val_fraction < 1:
        raise PrepareError(f"--val-fraction {args.val_fraction} is not between 0 and 1")
    if args.command == "text" and args.separator == "":
        raise PrepareError("--separator is empty; leave it out if a file is one document")

    def read(path: Path) -> Iterator[tuple[str, int]]:
        if args.command == "text":
            return read_text(path, args.separator)
        return (read_jsonl if args.command == "jsonl" else read_parquet)(path, args.field)

    input_bytes = sum(path.stat().st_size for path in args.inputs + args.val)
    build_dataset(
        lambda: split_documents(args.inputs, args.val, args.val_fraction, read), input_bytes, args
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
    add("--shard-tokens", default=SHARD_TOKENS, help="per shard (default: %(default)s)", **number)
    text = "encoding processes (default: all processors)"
    add("--workers", default=PROCESSORS, help=text, **number)
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


def add_development_options(add: Callable) -> None:
    """The options of `development`."""
    add("dataset", type=Path, help="folder of a finished dataset")
    add_out(add, None, "folder for the shards; replaces an earlier development split")
    text = "of the training documents, the last, to validate on; 0: keep the validation text"
    add("--part", type=float, default=0.02, metavar="X", help=f"{text} (default: %(default)s)")
    text = "write the training documents N times, each in a new order; 0: once, as they are"
    add("--orders", type=int, default=0, metavar="N", help=f"{text} (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the orders (default: %(default)s)")


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

    text = "download the published FineWeb shards and tokenizer; run again to resume"
    add = add_command(run_fineweb, "fineweb", text).add_argument
    add("--variant", choices=sorted(FINEWEB), required=True, help="which tokenizer")
    text = "the first N training shards, 200 MB each (default: %(default)s)"
    add("--train-shards", type=int, default=80, metavar="N", help=text)
    add_out(add, Path("data"), "gets datasets/ and tokenizers/")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 2 after an error, 130 after Control-C."""
    for stream in (sys.stdout, sys.stderr):  # consoles that lack a sign of a path
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    args = make_parser().parse_args(arguments)
    # Its thread is not needed, and worker processes are safer started without threads.
    tqdm.monitor_interval = 0
    status = 2
    try:
        args.run(args)
    except PrepareError as error:
        message = str(error)
    except BrokenProcessPool:
        message = "a worker process died, perhaps for lack of memory; try fewer --workers"
    except OSError as error:
        message = f"{error.filename or args.out}: {error.strerror or error}"
    except KeyboardInterrupt:
        message = "interrupted"
        status = 130
    else:
        return 0
    print(f"prepare.py: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
