"""Decodes an artifact without the script: from the file's bytes to weights.

The format is drawn in train_gpt.py, section 9. This module reads it independently, by other means
(Python's whole numbers for the entropy coder's states, one number after the other), and imports
nothing from there. The file does not contain the order and the shapes of the model's parameters:
these are arguments.
"""

import hashlib
import json
import lzma
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.audit", file=sys.stderr)
    sys.exit(2)

from tools.command import UserError, need

MAGIC = b"SSMGOLF"
SUM_BYTES = 32
LANES = 256  # of the entropy coder, which take turns
FREQUENCIES = 1 << 16  # sum of a table's
TABLES = 64  # of frequencies, where the header's "shared_tables" says that matrices share them
MIDDLE = 16  # added to a row's and to a column's reach: once too often in their sum
MOST_RECORD_BYTES = 1 << 30
# By the header's "trellis_states": which of the bits that a column's trellis has read, the latest
# being 1, make a weight a half more than its integer, and which of them flip the bit that is read.
TRELLIS_TAPS = {
    4: ([1], [2]),
    8: ([1], [1, 2, 3]),
    16: ([1], [1, 3, 4]),
    32: ([1, 3], [1, 3, 4, 5]),
}
TRELLIS_ROWS = 128  # after which a trellis has read nothing


class Parameter(NamedTuple):
    """A parameter's place in the file."""

    name: str
    shape: tuple[int, ...]
    on_grid: bool  # whether it is a matrix of integers, with steps of rows and of columns


class Parts(NamedTuple):
    """A file, taken apart."""

    header: dict  # the model's settings
    record: bytes  # vectors, grid steps and frequencies
    words: np.ndarray  # uint16: the entropy coder's


def take_apart(path: Path) -> Parts:
    """Checks an artifact's sum and takes it apart. Raises UserError for other files."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    body, digest = data[:-SUM_BYTES], data[-SUM_BYTES:]
    need(
        hashlib.sha256(body).digest() == digest, f"{path} is no artifact, or its checksum is wrong"
    )
    line, _, payload = body.partition(b"\n")
    need(line.startswith(MAGIC), f"{path} is no artifact of this project's format")
    unpacker = lzma.LZMADecompressor()
    try:
        header = json.loads(line[len(MAGIC) + 1 :])
        record = unpacker.decompress(payload, MOST_RECORD_BYTES)
    except (ValueError, lzma.LZMAError):
        raise UserError(f"{path} is no artifact: its header or its record cannot be read") from None
    complete = isinstance(header, dict) and unpacker.eof and len(unpacker.unused_data) % 2 == 0
    need(complete, f"{path} is no artifact: its record does not end")
    return Parts(header, record, np.frombuffer(unpacker.unused_data, "<u2"))


class Reader:
    """Takes numbers off the front of bytes."""

    def __init__(self, content: bytes):
        self.content = content
        self.place = 0

    def take(self, kind: str, count: int) -> np.ndarray:
        """So many numbers of a type; UserError where there are fewer."""
        size = np.dtype(kind).itemsize * count
        need(self.place + size <= len(self.content), "the record is shorter than the model")
        found = np.frombuffer(self.content, kind, count, self.place)
        self.place += size
        return found


def decode(parts: Parts, parameters: list[Parameter]) -> dict[str, np.ndarray]:
    """Every parameter's numbers, float32, by its name.

    Raises UserError unless the file holds these parameters and not a byte more.
    """
    reader = Reader(parts.record)
    steps = {}
    for name, shape, on_grid in parameters:
        count = sum(shape) if on_grid else int(np.prod(shape, dtype=np.int64))
        exact = name.endswith((".dt_bias", ".D"))
        steps[name] = reader.take("<f4" if exact else "<f2", count).astype(np.float32)
    matrices = [one for one in parameters if one.on_grid]
    integers = decode_integers(parts, reader, matrices)
    need(reader.place == len(parts.record), "the record is longer than the model")

    weights = {}
    states = parts.header.get("trellis_states", 0)
    known = type(states) is int and states in (0, *TRELLIS_TAPS)
    need(known, f"there is no trellis of {ascii(states)[:40]} states")
    for name, shape, on_grid in parameters:
        if not on_grid:
            weights[name] = steps[name].reshape(shape)
            continue
        row_steps = steps[name][: shape[0], None]
        column_steps = steps[name][shape[0] :]
        values = integers[name]
        points = values.astype(np.float32) + (half_steps(values, states) if states else 0)
        weights[name] = points * row_steps * column_steps
    return weights


def decode_integers(parts: Parts, reader: Reader, matrices: list[Parameter]) -> dict:
    """Every matrix's integers, int8, by its name: of one code, or of one for each matrix."""
    words = parts.words.tolist()
    if not parts.header.get("shared_tables", False):
        found = {}
        place = 0
        frequencies = [reader.take("<u4", 256).tolist() for _ in matrices]
        for (name, shape, _), table in zip(matrices, frequencies, strict=True):
            chosen = [0] * (shape[0] * shape[1])
            values, place = pop_integers([table], words, place, chosen)
            found[name] = values.reshape(shape)
    else:
        chosen = []
        for _, (rows, columns), _ in matrices:
            reach = reader.take("u1", rows + columns).astype(int)
            sums = np.add.outer(reach[:rows], reach[rows:]) - MIDDLE
            chosen += np.clip(sums, 0, TABLES - 1).ravel().tolist()
        frequencies = reader.take("<u4", 256 * TABLES).reshape(TABLES, 256).tolist()
        values, place = pop_integers(frequencies, words, 0, chosen)
        ends = np.cumsum([rows * columns for _, (rows, columns), _ in matrices])[:-1]
        split = zip(matrices, np.split(values, ends), strict=True)
        found = {one.name: part.reshape(one.shape) for one, part in split}
    need(place == len(words), "there are words behind the last matrix")
    return found


def half_steps(integers: np.ndarray, states: int) -> np.ndarray:
    """What the trellises of a matrix's columns add to its integers: 0 or 1/2, float32."""
    halving, flipping = TRELLIS_TAPS[states]
    added = np.zeros(integers.shape, np.float32)
    for row, values in enumerate(integers):
        if row % TRELLIS_ROWS == 0:
            read = np.zeros((max(flipping) + 1, len(values)), np.int8)
        added[row] = np.bitwise_xor.reduce(read[halving]) / 2
        bit = values & 1 ^ np.bitwise_xor.reduce(read[flipping])
        read[2:] = read[1:-1]
        read[1] = bit
    return added


def pop_integers(
    tables: list[list[int]], words: list[int], place: int, chosen: list[int]
) -> tuple[np.ndarray, int]:
    """Integers, int8, one for each chosen table, and the place in words that follows their code.

    Each state is a stack of values: its lowest 16 bits are a slot, which one value owns by its
    table of frequencies; taking the value off makes the state smaller, and where it falls below
    2^16, a word fills it up.
    """
    need(all(sum(table) == FREQUENCIES for table in tables), "frequencies have a wrong sum")
    owners = [np.repeat(np.arange(256), table).tolist() for table in tables]
    starts = [np.cumsum([0, *table]).tolist() for table in tables]
    need(place + 2 * LANES <= len(words), "the integers' code is too short")
    states = [words[place + lane] | words[place + LANES + lane] << 16 for lane in range(LANES)]
    # Reading ends at the last word at the latest: the list is as long as the file.
    place += 2 * LANES
    symbols = bytearray(-(-len(chosen) // LANES) * LANES)
    for index in range(len(symbols)):
        lane = index % LANES
        state = states[lane]
        slot = state & 0xFFFF
        table = chosen[min(index, len(chosen) - 1)]  # the last one fills the lanes up
        symbol = owners[table][slot]
        symbols[index] = symbol
        state = tables[table][symbol] * (state >> 16) + slot - starts[table][symbol]
        if state < FREQUENCIES:
            need(place < len(words), "the integers' code is too short")
            state = state << 16 | words[place]
            place += 1
        states[lane] = state
    need(states == [FREQUENCIES] * LANES, "the integers' code does not end where it must")
    return np.frombuffer(bytes(symbols), np.int8)[: len(chosen)], place
