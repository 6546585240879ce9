"""Damages valid shards, tokenizers, artifacts and checkpoints, and requires that train_gpt.py reads
them right or refuses them.

    python -m tests.fuzz [--count 10000] [--seed 0]

A file counts as read right if what was read is what an independent reading of its bytes gives;
refused means train_gpt.UserError with a message of one line. Everything else is a finding: another
exception, the death of a worker, more time or memory than the bounds below, code that runs, another
file that is opened. Case N of a seed is always the same file. Prints counts, and the findings; exit
status 1 if there are any.
"""

import argparse
import codecs
import collections
import dataclasses
import faulthandler
import hashlib
import itertools
import json
import lzma
import multiprocessing
import os
import random
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tests.fuzz", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from tests.support import (
    SMALLEST,
    SOLO,
    Quiet,
    random_model,
    tiny,
    train_tokenizer,
    write_shard,
)
from tools.audit import decoder

MIB = 1 << 20
# A case may take this long: a header may ask for 256 layers, which takes seconds on a busy machine
# to refuse.
SECONDS = 60.0
# Memory above an idle worker's, in bytes. An artifact of up to 2^26 numbers is unpacked before it
# is refused; one that is read takes a few copies in float32.
MEMORY = {"shard": 64 * MIB, "tokenizer": 256 * MIB, "artifact": 768 * MIB, "checkpoint": 64 * MIB}
MEMORY_PER_STORED_BYTE = 16
WARM_UP_SECONDS = 30.0  # of a worker
# Cases that a worker handles before another takes its place: its peak of memory cannot be reset.
BATCH = 250
VOCABULARY = 512
# Of the artifact, as the default has it: with tables in common, and points that a trellis moves.
FORMAT = {"shared_tables": True, "trellis_states": 8}

Originals = dict[str, bytes]


class Case(NamedTuple):
    """A damaged file."""

    kind: str  # shard, tokenizer, artifact, checkpoint
    damage: str  # what was done
    data: bytes
    sealed: bool = False  # an artifact or a checkpoint whose checksum was computed anew


class Outcome(NamedTuple):
    case: int
    kind: str
    damage: str
    result: str  # read, refused or finding
    reason: str  # class of the refusal, or what was found


# ---- Valid files ---------------------------------------------------------------------------------


def make_originals(folder: Path) -> Originals:
    """A valid file of each kind, and "bomb": an LZMA stream of 40 KB that unpacks to 272 MiB of
    zeros.
    """
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 300)
    settings = tiny(**SMALLEST, **FORMAT)
    t.validate_settings(settings, 1)
    stored = t.quantize_model(random_model(settings), settings, SOLO, {}, 5.0)
    artifact = t.pack_artifact(settings, stored, "00" * 32)
    bomb = lzma.LZMACompressor(preset=0)
    settings = tiny(**SMALLEST, log_dir=str(folder), run_id="original")
    trainer = make_trainer(settings)
    with t.Checkpoints(settings, SOLO, trainer.log) as trainer.checkpoints:
        trainer.save()
    return {
        "checkpoint": settings.checkpoint_paths[0].read_bytes(),
        "shard": write_shard(folder / "original_val_0.bin", tokens).read_bytes(),
        "tokenizer": train_tokenizer(folder / "original.model", VOCABULARY).read_bytes(),
        "artifact": artifact,
        "bomb": b"".join([bomb.compress(bytes(16 * MIB)) for _ in range(17)] + [bomb.flush()]),
    }


def make_trainer(settings: t.Settings) -> t.Trainer:
    """Of a small model, after two steps of an average, as a checkpoint may find it."""
    trainer = t.Trainer(random_model(settings), settings, SOLO, 32, 1e6, Quiet())
    trainer.steps_done, trainer.average.count, trainer.clock.counted, trainer.qat_k = 3, 2, 1.5, 5.0
    return trainer


# ---- Damage --------------------------------------------------------------------------------------


def truncate(data: bytes, pick: random.Random, others: list[bytes]) -> bytes:
    return data[
        : pick.choice((pick.randrange(len(data) + 1), max(0, len(data) - pick.randrange(1, 64))))
    ]


def extend(data: bytes, pick: random.Random, others: list[bytes]) -> bytes:
    extra = pick.choice(
        (bytes(pick.randrange(1, 5000)), pick.randbytes(pick.randrange(1, 200)), data)
    )
    return pick.choice((data + extra, extra + data))


def flip_bits(data: bytes, pick: random.Random, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    near = pick.choice((16, 64, 1024, len(data)))  # headers stand first
    for _ in range(pick.choice((1, 1, 2, 4, 16))):
        changed[pick.randrange(min(near, len(data)))] ^= 1 << pick.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, pick: random.Random, others: list[bytes]) -> bytes:
    """A run of bytes becomes random, zero or 255."""
    place, size = pick.randrange(len(data)), pick.choice((1, 2, 4, 8, 100))
    run = pick.choice((pick.randbytes(size), bytes(size), b"\xff" * size))
    return data[:place] + run + data[place + size :]


def splice(data: bytes, pick: random.Random, others: list[bytes]) -> bytes:
    """A part of this or another file replaces, or is put before, another part."""
    source = pick.choice([data, *others])
    begin, place, size = (
        pick.randrange(len(source)),
        pick.randrange(len(data)),
        pick.randrange(1, 300),
    )
    return data[:place] + source[begin : begin + size] + data[place + pick.choice((0, size)) :]


def remove(data: bytes, pick: random.Random, others: list[bytes]) -> bytes:
    place = pick.randrange(len(data))
    return data[:place] + data[place + pick.choice((1, 4, 50)) :]


def swap(data: bytes, pick: random.Random, others: list[bytes]) -> bytes:
    """Two parts change places, or the file is one of another kind."""
    if pick.random() < 0.2:
        return pick.choice(others)
    a, b, c = sorted(pick.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def noise(data: bytes, pick: random.Random, others: list[bytes]) -> bytes:
    """Random bytes, perhaps behind a right beginning."""
    return data[: pick.choice((0, 4, 8, 16, 1024))] + pick.randbytes(pick.choice((0, 1, 100, 3000)))


GENERAL = (truncate, extend, flip_bits, overwrite, splice, remove, swap, noise)


def shard_header(data: bytes, pick: random.Random, others: list[bytes]) -> bytes:
    """Counts, versions and magic numbers that are too large, negative, or off by one."""
    header = np.frombuffer(data[: t.SHARD_HEADER_BYTES], "<i4").copy()
    count = int(header[2])
    values = (count + 1, count - 1, 0, -1, 2**31 - 1, -(2**31), 2**30, 33, 32, count * 2)
    header[pick.choice((2, 2, 2, 1, 0, 3))] = pick.choice(values)
    return header.tobytes() + data[t.SHARD_HEADER_BYTES :]


def large_token(data: bytes, pick: random.Random, others: list[bytes]) -> bytes:
    place = t.SHARD_HEADER_BYTES + 2 * pick.randrange(300)
    return data[:place] + pick.choice((511, 512, 65_535)).to_bytes(2, "little") + data[place + 2 :]


def field_lengths(data: bytes, pick: random.Random, others: list[bytes]) -> bytes:
    """A byte of the protobuf, likely a length or a tag, becomes a number of up to 2^64."""
    number, place = (
        pick.choice((0, 127, 2**14, 2**31 - 1, 2**32, 2**63, 2**64 - 1)),
        pick.randrange(len(data)),
    )
    varint = b""
    while number > 127:
        varint, number = varint + bytes([number & 127 | 128]), number >> 7
    return data[:place] + varint + bytes([number]) + data[place + 1 :]


def piece_text(data: bytes, pick: random.Random, others: list[bytes]) -> bytes:
    """A piece of text becomes another of the same length: no text at all, a space, or a byte's
    name.
    """
    pieces = list(re.finditer(rb"\x0a([\x01-\x20])(?=([ -\xff]{1,32}))", data))
    piece = pick.choice(pieces)
    size, place = piece.group(1)[0], piece.end(1)
    texts = (
        b"\xff" * size,
        b"\x80" * size,
        b"\0" * size,
        ("▁" * size).encode()[:size],
        b"<0xFF>"[:size].ljust(size),
    )
    return data[:place] + pick.choice(texts) + data[place + size :]


NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    8,
    16,
    24,
    64,
    1000,
    1025,
    2**16,
    2**20,
    2**20 + 1,
    2**31,
    2**40,
    2**63,
    10**30,
)
FRACTIONS = (0.0, -1.0, -0.0, 0.5, 1.0, 1.5, 1e-300, 1e6, 1e300, float("inf"), float("nan"))
TEXTS = (
    "",
    "0",
    "0,1",
    "1,0,1",
    "M",
    "MA",
    "ma",
    "all",
    "none",
    "0-1",
    "0-999999999",
    "9" * 5000,
    "\n",
    "a\nb",
    "\0",
    "²",
    "x" * 10_000,
    "0," * 5000 + "1",
    "٣",
    "\ud800",
    "__import__('os').system('true')",
    "hinge",
    "spread",
    "1-0",
    "-",
)


def header_values(settings: dict, pick: random.Random) -> dict:
    """The artifact's settings with some of them changed, mostly to others of their type."""
    changed = dict(settings)
    for _ in range(pick.choice((1, 1, 2, 5))):
        name = pick.choice(list(settings))
        value = settings[name]
        same = {int: NUMBERS, float: FRACTIONS, str: TEXTS, bool: (True, False)}[type(value)]
        others = (None, [], {}, [[0]] * 50, 1, 1.5, "1", True)
        changed[name] = pick.choice(same if pick.random() < 0.85 else others)
        if pick.random() < 0.05:
            del changed[name]
    return changed


def seal(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def sealed_parts(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Magic number, header and payload of an artifact or a checkpoint."""
    first, _, payload = data[:-32].partition(b"\n")
    return first[:8], first[8:], payload


def damaged_part(
    magic: bytes,
    header: bytes,
    payload: bytes,
    how: Callable,
    what: str,
    pick: random.Random,
    others: list[bytes],
) -> tuple[str, bytes]:
    """What was done, and the sealed file with its body, header or payload damaged as any file
    is.
    """
    if what == "body":
        return f"{how.__name__}, sealed", seal(how(magic + header + b"\n" + payload, pick, others))
    if what == "header":
        header = how(header, pick, others)
    else:
        payload = how(payload, pick, others)
    return f"{what}, sealed", seal(magic + header + b"\n" + payload)


def damaged_artifact(originals: Originals, pick: random.Random) -> tuple[str, bytes]:
    """What was done, and an artifact that is wrong in its parts but has the right checksum."""
    magic, header, payload = sealed_parts(originals["artifact"])
    parts = ("body", "header", "payload", "content", "codes", "values", "values", "bomb")
    how, what = pick.choice(GENERAL), pick.choice(parts)
    others = [originals["shard"], originals["tokenizer"]]
    if what in ("body", "header", "payload"):
        return damaged_part(magic, header, payload, how, what, pick, others)
    if what in ("content", "codes"):
        unpack = lzma.LZMADecompressor()
        content, codes = unpack.decompress(payload), unpack.unused_data
        if what == "content":
            payload = lzma.compress(how(content, pick, others), preset=0) + codes
        else:
            payload = payload[: len(payload) - len(codes)] + how(codes, pick, others)
    else:
        settings = (
            header_values(json.loads(header), pick) if what == "values" else json.loads(header)
        )
        if what == "bomb":  # for a small model, or one of up to 2^30 bytes
            payload = originals["bomb"]
            settings["bigram_vocab_size"] = 2 ** pick.randrange(1, 21)
            settings["bigram_dim"] = 2 ** pick.choice((0, 1, 2, 3, 4, pick.randrange(11)))
        header = json.dumps(settings).encode("utf-8", "surrogatepass")
    return f"{what}, sealed", seal(magic + header + b"\n" + payload)


def damaged_checkpoint(originals: Originals, pick: random.Random) -> tuple[str, bytes]:
    """What was done, and a checkpoint that is wrong in its parts, or has other numbers, but has the
    right checksum.
    """
    magic, header, payload = sealed_parts(originals["checkpoint"])
    others = [originals["shard"], originals["tokenizer"], originals["artifact"]]
    how, what = (
        pick.choice(GENERAL),
        pick.choice(("body", "header", "payload", "numbers", "values", "progress")),
    )
    if what in ("body", "header", "payload"):
        return damaged_part(magic, header, payload, how, what, pick, others)
    if what == "numbers":
        payload = flip_bits(payload, pick, others)
    else:
        values = json.loads(header)
        names = t.PROGRESS_FIELDS if what == "progress" else tuple(values)
        kept = {name: value for name, value in values.items() if name not in names}
        values = kept | header_values({name: values[name] for name in names}, pick)
        header = json.dumps(values).encode("utf-8", "surrogatepass")
    return f"{what}, sealed", seal(magic + header + b"\n" + payload)


OWN = {
    "shard": (shard_header, large_token),
    "tokenizer": (field_lengths, piece_text),
    "artifact": (),
    "checkpoint": (),
}
SEALED = {"artifact": damaged_artifact, "checkpoint": damaged_checkpoint}


def make_case(number: int, seed: int, kinds: tuple[str, ...], originals: Originals) -> Case:
    """Case number of a seed."""
    pick = random.Random(f"{seed} {number}")
    kind = kinds[number % len(kinds)]
    if kind in SEALED and pick.random() < 0.7:
        return Case(kind, *SEALED[kind](originals, pick), sealed=True)
    how = pick.choice((*GENERAL, *OWN[kind], *OWN[kind]))
    others = [data for other, data in originals.items() if other not in (kind, "bomb")]
    data = how(originals[kind], pick, others)
    if pick.random() < 0.2:
        how = pick.choice(GENERAL)
        data = how(data or b"\0", pick, others)
    return Case(kind, how.__name__, data)


# ---- Reading, and what it should have given ------------------------------------------------------


def read_shard(case: Case, path: Path, originals: Originals) -> str:
    """Reads a shard alone and as validation set; "" or what is wrong."""
    header = np.frombuffer(
        case.data[: t.SHARD_HEADER_BYTES].ljust(t.SHARD_HEADER_BYTES, b"\0"), "<i4"
    ).astype(int)
    count, body = int(header[2]), case.data[t.SHARD_HEADER_BYTES :]
    valid = len(case.data) >= t.SHARD_HEADER_BYTES and header[0] == t.SHARD_MAGIC and header[1] == 1
    valid = valid and 0 <= 2 * count <= len(body)
    tokens = t.Shard(path).read()
    if not valid:
        return "a shard that is not valid was read"
    expected = np.frombuffer(body[: 2 * count], "<u2")
    if not np.array_equal(tokens, expected):
        return "other tokens were read"
    usable = count > tiny().train_seq_len and expected.max(initial=0) < VOCABULARY
    validation = t.load_validation(
        tiny(data_path=str(path.parent), eval_any_tokens=True),
        worker_tokenizer(path.parent, originals),
    )
    if not usable:
        return "a validation set that is not usable was read"
    right = (
        np.array_equal(validation.tokens, expected) and len(validation.target_bytes) == count - 1
    )
    return "" if right else "another validation set was read"


def worker_tokenizer(folder: Path, originals: Originals) -> t.Tokenizer:
    path = folder / "valid.model"
    if not path.is_file():
        path.write_bytes(originals["tokenizer"])
    return t.Tokenizer(str(path), VOCABULARY)


def read_tokenizer(case: Case, path: Path, originals: Originals) -> str:
    tokenizer = t.Tokenizer(str(path), VOCABULARY)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for i in range(VOCABULARY):
        piece, special = (
            model.id_to_piece(i),
            model.is_control(i) or model.is_unknown(i) or model.is_unused(i),
        )
        inner = piece[1:] if piece[:1] == "▁" else piece
        size = 1 if model.is_byte(i) else sum(1 if c == "▁" else len(c.encode()) for c in inner)
        wanted = (special, 0 if special else size, piece[:1] == "▁" and not special)
        if wanted != (tokenizer.is_special[i], tokenizer.piece_bytes[i], tokenizer.has_space[i]):
            return f"piece {i} was misread"
    counted = tokenizer.target_bytes(np.arange(VOCABULARY, dtype=np.uint16))
    return "" if counted.shape == (VOCABULARY - 1,) and (counted >= 0).all() else "impossible bytes"


def former(*names: tuple[str, ...]) -> dict:
    """What a header means that lacks some of these."""
    return {n: t.FORMER_DEFAULTS[n] for n in itertools.chain(*names) if n in t.FORMER_DEFAULTS}


def read_artifact(case: Case, path: Path, originals: Originals) -> str:
    model, settings = t.load_model(path, tiny(), set(), SOLO)
    if not case.sealed and case.data != originals["artifact"]:
        return "an artifact with a wrong checksum was read"
    _, header, payload = sealed_parts(case.data)
    others = ("tokenizer_sha256", "preset", "train_seq_len")  # what no model depends on
    header = former((*others, *t.MODEL_FIELDS)) | json.loads(header)
    if header != t.artifact_header(settings) | {name: header[name] for name in others}:
        return "other settings were read"
    # The data once more, by the audit's decoder, which shares nothing with the script.
    parameters = dict(model.named_parameters())
    matrices = t.grid_limits(model)
    layout = [decoder.Parameter(n, tuple(p.shape), n in matrices) for n, p in parameters.items()]
    with np.errstate(all="ignore"):
        parts = decoder.decode(decoder.take_apart(path), layout)
    right = all(
        np.array_equal(p.detach().numpy(), parts[n], equal_nan=True) for n, p in parameters.items()
    )
    return "" if right else "other weights were read"


def read_checkpoint(case: Case, path: Path, originals: Originals) -> str:
    settings = tiny(**SMALLEST, resume=str(path))
    trainer = make_trainer(settings)
    trainer.resume()
    if not case.sealed and case.data != originals["checkpoint"]:
        return "a checkpoint with a wrong checksum was read"
    _, header, payload = sealed_parts(case.data)
    header = former(t.TRAINING_FIELDS, t.PROGRESS_FIELDS) | json.loads(header)
    wanted = {name: getattr(settings, name) for name in t.TRAINING_FIELDS}
    held = {name: header.pop(name) for name in t.TRAINING_FIELDS}
    if held["export_reserve_seconds"] < wanted["export_reserve_seconds"]:
        held["export_reserve_seconds"] = wanted["export_reserve_seconds"]  # it may be raised
    if not any(x["late_qat_threshold"] or x["quantizer"] == "ternary" for x in (held, wanted)):
        held |= {name: wanted[name] for name in t.EXPORT_FIELDS}  # they may be others
    if held != wanted:
        return "a checkpoint of other settings was read"
    progress = [trainer.steps_done, trainer.clock.counted, trainer.qat_k]
    if repr(progress) != repr([header[name] for name in ("steps", "seconds", "qat_k")]):
        return "other progress was read"
    numbers = torch.cat([x.detach().flatten() for x in trainer.tensors()])
    return "" if numbers.numpy().tobytes() == payload else "other numbers were read"


READERS = {
    "shard": read_shard,
    "tokenizer": read_tokenizer,
    "artifact": read_artifact,
    "checkpoint": read_checkpoint,
}


def reason_of(message: str, path: Path) -> str:
    """The class of a refusal: the message without what differs from file to file."""
    if " RESUME=never " in message:
        return "other settings"
    if re.match(r"[A-Z0-9_]+=", message):
        return "a setting in the header that cannot be"
    text = message.replace(str(path), "FILE").replace(str(path.parent), "FOLDER")
    text = re.sub(r"-?\d+", "N", re.sub(r"\b[a-z0-9_]+ in its header", "NAME in its header", text))
    text = re.sub(r"(settings (?:that|of) this script[a-z ]*): .*", r"\1", text)
    return re.split(r"[:;] (?=set|see|another|download)", text)[0]


class Watch:
    """Notes code that runs, programs that start, and files that are opened, while it is on."""

    EVENTS = (
        "exec",
        "compile",
        "import",
        "pickle.find_class",
        "marshal.loads",
        "subprocess.Popen",
        "os.system",
    )
    EVENTS += ("os.exec", "os.posix_spawn", "os.fork", "socket.connect", "os.remove", "os.rename")

    def __init__(self):
        self.on, self.allowed, self.seen = False, (), ""
        sys.addaudithook(self.notice)

    def notice(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event in self.EVENTS or (event == "open" and str(arguments[0]) not in self.allowed):
            self.seen = self.seen or f"{event} {str(arguments[0])[:80]}"


def peak_memory() -> int:
    """The most bytes that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_case(
    number: int, case: Case, folder: Path, originals: Originals, watch: Watch, idle: int
) -> Outcome:
    """Reads one damaged file. idle: peak_memory() of a worker that has read valid files only."""
    name = {
        "shard": "case_val_0.bin",
        "tokenizer": "case.model",
        "artifact": "case.lzma",
        "checkpoint": "c",
    }[case.kind]
    path = folder / name
    path.write_bytes(case.data)
    watch.allowed, watch.seen, watch.on = (str(path), str(folder / "valid.model")), "", True
    stored = 0
    try:
        wrong = READERS[case.kind](case, path, originals)
        result, reason = ("finding", wrong) if wrong else ("read", "")
    except t.UserError as error:
        message = str(error)
        result, reason = (
            ("refused", reason_of(message, path))
            if message.isprintable()
            else ("finding", f"message {message[:200]!r}")
        )
    except MemoryError:
        result, reason = "finding", "MemoryError"
    except Exception as error:
        result, reason = "finding", f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        watch.on = False
    if watch.seen:
        result, reason = "finding", watch.seen
    if case.kind == "artifact" and result == "read":
        header = former(t.MODEL_FIELDS) | json.loads(sealed_parts(case.data)[1])
        settings = dataclasses.replace(tiny(), **{name: header[name] for name in t.MODEL_FIELDS})
        stored = sum(p.numel() for p in t.model_skeleton(settings).parameters())
    used, most = peak_memory() - idle, MEMORY[case.kind] + MEMORY_PER_STORED_BYTE * stored
    if used > most:
        result, reason = "finding", f"{used / MIB:.0f} MiB of memory, more than {most / MIB:.0f}"
    path.unlink(missing_ok=True)
    return Outcome(number, case.kind, case.damage, result, reason)


# ---- Workers -------------------------------------------------------------------------------------


def work(
    numbers: list[int], seed: int, kinds: tuple[str, ...], originals: Originals, results: Connection
) -> None:
    """Handles cases in this process: sends None when warm, then their outcomes."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    warnings.simplefilter("ignore")  # showing one opens the source
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)  # native code writes of what it refuses
    with tempfile.TemporaryDirectory() as name:
        watch, folder, idle = Watch(), Path(name), 1 << 62
        for encoding in (
            "utf-8-sig",
            "utf-16",
            "utf-16-be",
            "utf-16-le",
            "utf-32",
            "utf-32-be",
            "utf-32-le",
        ):
            codecs.lookup(encoding)  # JSON may have any of these
        for kind in kinds:  # imports what reading needs
            run_case(-1, Case(kind, "none", originals[kind]), folder, originals, watch, idle)
        idle = peak_memory()
        results.send(None)
        for number in numbers:
            case = make_case(number, seed, kinds, originals)
            results.send(run_case(number, case, folder, originals, watch, idle))
            if peak_memory() > idle + 64 * MIB:  # or what comes next could hide below this peak
                return


def supervise(
    numbers: list[int], seed: int, kinds: tuple[str, ...], originals: Originals, seconds: float
) -> Iterator[Outcome]:
    """Outcomes of the cases, from one worker after the other: they are replaced when done, dead or
    stalled.
    """
    fork = multiprocessing.get_context("fork")
    while numbers:
        receiver, sender = fork.Pipe(duplex=False)
        worker = fork.Process(target=work, args=(numbers[:BATCH], seed, kinds, originals, sender))
        worker.start()
        sender.close()
        problem, left, limit = "", len(numbers), WARM_UP_SECONDS
        try:
            while not problem and receiver.poll(limit):
                if outcome := receiver.recv():
                    yield outcome
                    numbers = numbers[1:]
                limit = seconds
            problem = f"took longer than {seconds:g} s"
        except EOFError:  # the worker has ended
            worker.join()
            if worker.exitcode or len(numbers) == left:
                problem = f"the worker ended with status {worker.exitcode}"
        worker.kill()
        worker.join()
        if problem:
            case = make_case(numbers[0], seed, kinds, originals)
            yield Outcome(numbers[0], case.kind, case.damage, "finding", problem)
            numbers = numbers[1:]


def send_all(results: Connection, *arguments) -> None:
    for outcome in supervise(*arguments):
        results.send(outcome)


def fuzz(
    originals: Originals,
    count: int,
    seed: int = 0,
    kinds: tuple[str, ...] = tuple(READERS),
    jobs: int = 2,
    seconds: float = SECONDS,
) -> list[Outcome]:
    """Outcomes of count cases, in their order, from jobs supervisors at once."""
    fork = multiprocessing.get_context("fork")
    supervisors, receivers, outcomes = [], [], []
    for job in range(jobs):
        receiver, sender = fork.Pipe(duplex=False)
        numbers = list(range(job, count, jobs))
        supervisors.append(
            fork.Process(target=send_all, args=(sender, numbers, seed, kinds, originals, seconds))
        )
        supervisors[-1].start()
        sender.close()
        receivers.append(receiver)
    while receivers:
        for receiver in wait(receivers):
            try:
                outcomes.append(receiver.recv())
            except EOFError:
                receivers.remove(receiver)
    for supervisor in supervisors:
        supervisor.join()
    if len(outcomes) != count:
        raise RuntimeError(f"{count - len(outcomes)} of {count} cases have no outcome")
    return sorted(outcomes)


def report(outcomes: list[Outcome]) -> str:
    """Counts by kind, result and reason; findings one by one."""
    lines = []
    for kind in READERS:
        mine = [outcome for outcome in outcomes if outcome.kind == kind]
        counts = collections.Counter(outcome.result for outcome in mine)
        lines.append(
            f"{kind}: {len(mine)} cases, "
            + ", ".join(f"{counts[r]} {r}" for r in ("read", "refused", "finding"))
        )
        reasons = collections.Counter(
            outcome.reason for outcome in mine if outcome.result == "refused"
        )
        lines += [f"  {number:6} refused: {reason}" for reason, number in reasons.most_common()]
    findings = [outcome for outcome in outcomes if outcome.result == "finding"]
    lines += [f"FINDING in case {f.case}, {f.kind}, {f.damage}: {f.reason}" for f in findings]
    return "\n".join([*lines, f"{len(outcomes)} cases, {len(findings)} findings"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=int, metavar="CASE", help="write this case's file to fuzz-CASE instead"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        originals = make_originals(Path(folder))
    if given.keep is not None:
        case = make_case(given.keep, given.seed, tuple(READERS), originals)
        Path(f"fuzz-{given.keep}").write_bytes(case.data)
        return 0
    started = time.perf_counter()
    outcomes = fuzz(originals, given.count, given.seed)
    print(report(outcomes))
    print(f"seed {given.seed}, {time.perf_counter() - started:.0f} s")
    return int(any(outcome.result == "finding" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
