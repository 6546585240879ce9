"""Idea: windows are filled with whole documents. An --idea of `python -m tools.explore`.

Windows that are cut out of the stream every TRAIN_SEQ_LEN tokens cut most documents in two, and
what stands behind a cut is learned without what it follows from. Here a shard's documents are
laid into windows so that they fit (the longest that fits, first; cf. arXiv 2404.10830): only longer
ones than a window are cut, and the shortest, to fill a window's last few tokens. What is left of a
cut document begins a window. For runs with DOCUMENT_RESET=1; each epoch reads each token once.
"""

import bisect
import collections
import itertools

import numpy as np
import torch

Piece = tuple[int, int]  # first token in the shard, and how many


class Pool:
    """Whole documents that wait, by length."""

    def __init__(self, documents: list[Piece]):
        self.by_length = collections.defaultdict(list)
        for start, length in documents:
            self.by_length[length].append(start)
        self.lengths = sorted(self.by_length)

    def take(self, room: int) -> Piece | None:
        """The longest document of at most room tokens; if there is none, the shortest of all."""
        if not self.lengths:
            return None
        place = max(0, bisect.bisect_right(self.lengths, room) - 1)
        length = self.lengths[place]
        start = self.by_length[length].pop()
        if not self.by_length[length]:
            del self.lengths[place]
        return start, length


def pack(begins: np.ndarray, count: int, seq_len: int, generator) -> list[list[Piece]]:
    """Windows of seq_len tokens as pieces of a shard of count tokens; documents start at begins."""
    lengths = np.diff(begins, append=count)
    order = generator.permutation(len(begins))
    windows, rests, whole = [], [], []
    for start, length in zip(begins[order].tolist(), lengths[order].tolist(), strict=True):
        full = length // seq_len
        windows += [[(start + i * seq_len, seq_len)] for i in range(full)]
        rest = start + full * seq_len, length - full * seq_len
        if rest[1]:
            (rests if full else whole).append(rest)
    pool = Pool(whole)
    while True:
        first = rests.pop() if rests else pool.take(seq_len)
        if first is None:
            break
        window, room = [first], seq_len - first[1]
        while room and (piece := pool.take(room)):
            start, length = piece
            if length > room:
                rests.append((start + room, length - room))
                length = room
            window.append((start, length))
            room -= length
        if not room:
            windows.append(window)  # the last one, which nothing fills, is left out
    return [windows[i] for i in generator.permutation(len(windows))]


def install(script) -> None:
    """Changes train_gpt.py's Batches."""

    class Batches(script.Batches):
        """Batches of windows that pack() filled."""

        def __init__(self, settings, ranks, first: int = 0):
            self.begins = {}
            self.packed = None
            super().__init__(settings, ranks, first)

        def pieces(self):
            """Yields (shard, pieces) of a window, for ever."""
            seq_len = self.settings.train_seq_len
            for epoch in itertools.count():
                generator = np.random.default_rng([self.settings.seed, epoch])
                for shard in generator.permutation(len(self.shards)).tolist():
                    if shard not in self.begins:
                        tokens = self.shards[shard].read(0, self.shards[shard].count)
                        self.begins[shard] = np.union1d(0, np.flatnonzero(tokens == script.BOS_ID))
                    count = self.shards[shard].count - 1
                    begins = self.begins[shard]
                    for window in pack(begins[begins < count], count, seq_len, generator):
                        yield shard, window

        def _gather(self):
            if self.packed is None:
                self.packed = self.pieces()
            rows = []
            for shard, window in itertools.islice(self.packed, self.sequences):
                read = self.shards[shard].read
                parts = [read(start, length) for start, length in window[:-1]]
                start, length = window[-1]
                rows.append(np.concatenate([*parts, read(start, length + 1)]))
            tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
            if self.stream is None:
                return tokens, None
            torch.cuda.set_device(self.ranks.device)
            with torch.cuda.stream(self.stream):
                on_device = tokens.pin_memory().to(self.ranks.device, non_blocking=True)
                return on_device, self.stream.record_event()

    script.Batches = Batches
