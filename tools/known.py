"""What is known of the contest's validation text and tokenizers, from data/known.json.

A folder can have any name. That FineWeb was scored is shown by the number of its documents, its
bytes and tokens, and the SHA-256 of shards and tokenizer. Where the table has no SHA-256 yet, only
the counts are compared, and whoever compares says so.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.package", file=sys.stderr)
    sys.exit(2)

from tools.command import UserError

TO_FILL = "not known: table to fill, data/known.json"
PATH = Path(__file__).resolve().parent.parent / "data" / "known.json"


class Variant(NamedTuple):
    """The contest's validation text as one of its tokenizers writes it."""

    name: str
    documents: int
    text_bytes: int
    tokens: int
    scored_tokens: int
    tokenizer_bytes: int
    tokenizer_sha256: str
    shards: dict[str, str | None]  # SHA-256 by file name; None: not in the table


class Comparison(NamedTuple):
    """What a text is, compared with the contest's."""

    name: str  # "FineWeb's validation text, sp8192", say; empty: another text
    differences: list[str]  # what contradicts that it is FineWeb's whole validation text
    unknown: list[str]  # what could not be compared, and why


def read_variants(path: Path = PATH) -> list[Variant]:
    """The table. Raises UserError if it cannot be read."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        text = table["text"]["documents"], table["text"]["bytes"]
        return [read_variant(name, *text, of) for name, of in table["variants"].items()]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the table of known data") from None


def read_variant(name: str, documents: int, text_bytes: int, entry: dict) -> Variant:
    """An entry of the table. Raises KeyError or TypeError if it is none."""
    tokenizer = entry["tokenizer"]
    return Variant(
        name,
        documents,
        text_bytes,
        tokens=entry["tokens"],
        scored_tokens=entry["scored_tokens"],
        tokenizer_bytes=tokenizer["bytes"],
        tokenizer_sha256=tokenizer["sha256"],
        shards={file: shard["sha256"] for file, shard in entry["shards"].items()},
    )


def variant_of(tokenizer_sha256: str, path: Path = PATH) -> Variant | None:
    """The variant whose tokenizer this is; None for a tokenizer of one's own."""
    found = [v for v in read_variants(path) if v.tokenizer_sha256 == tokenizer_sha256]
    return found[0] if found else None


def compare(
    counts: Mapping[str, int],
    tokenizer_sha256: str = "",
    shards: Mapping[str, str] | None = None,
    path: Path = PATH,
) -> Comparison:
    """Compares what was scored with the contest's validation text.

    counts has documents, bytes, tokens and scored_tokens, as ValidationSet.counts() gives them;
    shards the SHA-256 of validation shards by file name. What is empty was not measured.
    """
    variants = read_variants(path)
    expected = {"documents": variants[0].documents, "bytes": variants[0].text_bytes}
    differences = count_differences(counts, expected, "FineWeb's")
    unknown = [] if tokenizer_sha256 else ["SHA-256 of the tokenizer"]
    named = [v for v in variants if v.tokenizer_sha256 == tokenizer_sha256]
    alike = [v for v in variants if v.tokens == counts["tokens"]]
    if not named and not alike:
        name = "" if differences else "FineWeb's validation text, a tokenizer of its own"
        return Comparison(name, differences, unknown)
    variant = [*named, *alike][0]
    expected = {"tokens": variant.tokens, "scored_tokens": variant.scored_tokens}
    differences += count_differences(counts, expected, f"{variant.name}'s")
    if tokenizer_sha256 and not named:
        differences.append(f"the tokens are {variant.name}'s, but the tokenizer is another")
    for file, published in variant.shards.items():
        found = (shards or {}).get(file)
        if published is None:
            unknown.append(f"SHA-256 of {file} ({TO_FILL})")
        elif not found:
            unknown.append(f"SHA-256 of {file}")
        elif found != published:
            differences.append(f"{file} is another file than {variant.name}'s")
    by = " by its counts alone" if unknown else ""
    name = "" if differences else f"FineWeb's validation text{by}, {variant.name}"
    return Comparison(name, differences, unknown)


def count_differences(counts: Mapping[str, int], expected: dict[str, int], whose: str) -> list[str]:
    """A sentence for each count that is not the expected one."""
    sentences = []
    for name, number in expected.items():
        if counts[name] != number:
            label = name.replace("_", " ")
            sentences.append(f"{counts[name]:,} {label}, not {whose} {number:,}")
    return sentences
