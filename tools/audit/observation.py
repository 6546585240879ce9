"""What was observed of an evaluation, and how the observing process hands it to the audit.

The file contains arrays of numbers and a line of JSON; nothing in it is executed.
"""

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

NAME = "observation.npz"
KINDS = ("score", "train", "step", "changed")


class Event(NamedTuple):
    """Something that happened during an evaluation, in order."""

    # score; train: an update reads targets; step: an optimizer's; changed: weights, without a step
    kind: str
    targets: np.ndarray  # positions of those that are scored or trained on


class Sampled(NamedTuple):
    """One target's score, and what it should be."""

    position: int
    nats: float  # that the evaluator kept
    expected: float  # -log softmax in float64
    # Of the probabilities that the script's own nats() gives to all tokens; None: not asked for.
    total: float | None


class Weight(NamedTuple):
    """A parameter before the first score."""

    name: str
    shape: tuple[int, ...]
    on_grid: bool  # whether the artifact holds its integers
    sha256: str  # of its float32 numbers


@dataclass
class Observation:
    """What was seen of an evaluation of N targets."""

    times_written: np.ndarray  # (N,) how often each target got a score
    written: np.ndarray  # (N,) the last one
    target_bytes: np.ndarray  # (N,) that the script divides by
    nats: np.ndarray  # (N,) float32: the script's result, as all that follows
    val_loss: float = 0.0
    val_bpb: float = 0.0
    events: list[Event] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    with_gradients: bool = False  # whether a score was computed with gradients

    def save(self, folder: Path) -> None:
        """Writes the file."""
        told = {
            "val_loss": self.val_loss,
            "val_bpb": self.val_bpb,
            "with_gradients": self.with_gradients,
            "weights": self.weights,
            "sampled": self.sampled,
        }
        targets = [event.targets for event in self.events]
        kinds = [KINDS.index(event.kind) for event in self.events]
        counts = [len(one) for one in targets]
        positions = np.concatenate([np.empty(0, np.int64), *targets])
        np.savez(
            folder / NAME,
            times_written=self.times_written,
            written=self.written,
            target_bytes=self.target_bytes,
            nats=self.nats,
            kinds=np.array(kinds, np.uint8),
            counts=np.array(counts, np.int64),
            targets=positions.astype(np.int32),
            told=np.frombuffer(json.dumps(told).encode(), np.uint8),
        )


def read_observation(folder: Path, count: int) -> Observation:
    """Reads the file of an evaluation of so many targets. Raises ValueError for another one."""
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        raise ValueError("nothing was observed")
    try:
        with np.load(path, allow_pickle=False) as held:
            found = {name: held[name] for name in held.files}
        told = json.loads(found.pop("told").tobytes())
        arrays = {n: found[n] for n in ("times_written", "written", "target_bytes", "nats")}
        kinds = [KINDS[kind] for kind in found["kinds"]]
        parts = np.split(found["targets"], np.cumsum(found["counts"])[:-1])
        weights = [Weight(name, tuple(shape), *rest) for name, shape, *rest in told["weights"]]
        sampled = [Sampled(*one) for one in told["sampled"]]
        figures = {name: float(told[name]) for name in ("val_loss", "val_bpb")}
    except (KeyError, TypeError, IndexError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"what was observed cannot be read: {error!r}") from None
    if any(array.shape != (count,) for array in arrays.values()):
        raise ValueError(f"what was observed is not of {count} targets")
    if any(len(part) and not 0 <= part.min() <= part.max() < count for part in parts):
        raise ValueError("positions outside the stream were observed")
    events = [Event(*one) for one in zip(kinds, parts[: len(kinds)], strict=True)]
    return Observation(
        **arrays,
        **figures,
        events=events,
        sampled=sampled,
        weights=weights,
        with_gradients=bool(told["with_gradients"]),
    )
