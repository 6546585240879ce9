"""The manifest that data/prepare.py left beside shards, if it describes those that a run read.

manifest.json names every shard with its SHA-256, says where the text is from, and counts the
validation documents that are training documents, too. A run's log has counts, a digest of the
training shards' names and lengths and, where they were known, the SHA-256 of every shard. A
manifest that does not fit these belongs to other data.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.package", file=sys.stderr)
    sys.exit(2)

from tools.command import UserError, need
from tools.contradictions import files_of

NAME = "manifest.json"


class Manifest(NamedTuple):
    """What a manifest says of a folder of shards."""

    path: Path
    train: dict[str, str]  # SHA-256 by the name of the shard
    validation: dict[str, str]
    overlap: int  # validation documents that are in the training shards
    tokenizer_sha256: str
    source: str


def read_manifest(path: Path, events: dict[str, dict]) -> Manifest:
    """A manifest of the data of a run with these records.

    Raises UserError if it cannot be read or is of other shards.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        splits = {
            split: {
                name: shard for name, shard in found["shards"].items() if shard["split"] == split
            }
            for split in ("train", "val")
        }
        digest = digest_of({name: shard["tokens"] for name, shard in splits["train"].items()})
        counts = {name: found["splits"]["val"][name] for name in ("tokens", "documents", "bytes")}
        sums = {
            split: {name: shard["sha256"] for name, shard in shards.items()}
            for split, shards in splits.items()
        }
        manifest = Manifest(
            path=path,
            train=sums["train"],
            validation=sums["val"],
            overlap=read_overlap(found),
            tokenizer_sha256=found["tokenizer"]["sha256"],
            source=json.dumps(found["source"], ensure_ascii=False),
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a manifest of data/prepare.py") from None
    logged = events.get("training_data", {}).get("digest")
    need(digest == logged, f"{path} is of other training shards than the log")
    logged = events.get("validation_data", {})
    same = all(count == logged.get(name) for name, count in counts.items())
    need(same, f"{path} is of another validation text than the log")
    hashes = events.get("hashes", {})
    for kind, sums in (("training", manifest.train), ("validation", manifest.validation)):
        for name, sha256 in files_of(hashes, kind).items():
            other = f"{path} has another SHA-256 of {name} than the log"
            need(not sha256 or sums.get(name) == sha256, other)
    return manifest


def read_overlap(manifest: dict) -> int:
    """How many validation documents are training documents. Raises ValueError if it is no count."""
    overlap = manifest["overlap"]["documents"]
    if type(overlap) is not int or overlap < 0:
        raise ValueError("no count")
    return overlap


def digest_of(lengths: dict[str, int]) -> str:
    """What a run's log says of training shards with these names and numbers of tokens."""
    listed = ascii(sorted(lengths.items()))
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def find_manifest(given: Path | None, data_path: str, events: dict[str, dict]) -> Manifest | None:
    """The manifest that was given, or the one that lies where the run read its shards.

    None if there is none; one that is not given and does not fit is none.
    """
    if given is not None:
        return read_manifest(given, events)
    path = Path(data_path, NAME)
    try:
        return read_manifest(path, events) if path.is_file() else None
    except UserError:
        return None
