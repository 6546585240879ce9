"""The table of the contest's validation text: what is it, what is another text, what is unknown."""

import json

import pytest

from tools import known
from tools.command import UserError

COUNTS = {"documents": 50_000, "bytes": 151_080_891, "shards": 1}
SP1024 = COUNTS | {"tokens": 62_021_846, "scored_tokens": 62_021_845}
SP8192 = COUNTS | {"tokens": 40_540_803, "scored_tokens": 40_540_802}
OURS = {variant.name: variant.tokenizer_sha256 for variant in known.read_variants()}


@pytest.mark.parametrize(("name", "counts"), [("sp1024", SP1024), ("sp8192", SP8192)])
def test_the_contests_text_is_known_by_its_counts_and_tokenizer(name, counts):
    shards = {variant.name: variant.shards for variant in known.read_variants()}[name]
    found = known.compare(
        counts, OURS[name], {file: sha256 for file, sha256 in shards.items() if sha256}
    )
    # Nobody has written down yet what the other variant's is: whatever is found, it is not known.
    filled = name == "sp1024"
    by = "" if filled else " by its counts alone"
    assert found.name == f"FineWeb's validation text{by}, {name}"
    assert found.differences == []
    lacking = "SHA-256 of fineweb_val_000000.bin"
    to_fill = f"{lacking} (not known: table to fill, data/known.json)"
    assert found.unknown == ([] if filled else [to_fill])
    unmeasured = known.compare(counts, OURS[name], {"fineweb_val_000000.bin": ""})
    assert unmeasured.unknown == [lacking if filled else to_fill]
    assert known.compare(counts, OURS[name], {"fineweb_val_000000.bin": "0" * 64}).name == (
        "" if filled else found.name
    )
    assert known.variant_of(OURS[name]).name == name


@pytest.mark.parametrize(
    ("counts", "tokenizer", "difference"),
    [
        (SP8192 | {"documents": 10_000}, "sp8192", "10,000 documents, not FineWeb's 50,000"),
        (SP8192 | {"bytes": 176_332_748}, "sp8192", "176,332,748 bytes, not FineWeb's 151,080,891"),
        (SP8192 | {"tokens": 9, "scored_tokens": 8}, "sp8192", "9 tokens, not sp8192's 40,540,803"),
        (SP1024, "sp8192", "62,021,846 tokens, not sp8192's 40,540,803"),
        (SP8192, "other", "the tokens are sp8192's, but the tokenizer is another"),
    ],
)
def test_another_text_is_none_of_the_contests(counts, tokenizer, difference):
    found = known.compare(counts, OURS.get(tokenizer, "0" * 64))
    assert found.name == ""
    assert any(difference in line for line in found.differences)


def test_a_tokenizer_of_ones_own_may_write_the_same_text():
    found = known.compare(COUNTS | {"tokens": 30_000_000, "scored_tokens": 29_999_999}, "0" * 64)
    assert found.name == "FineWeb's validation text, a tokenizer of its own"
    assert known.variant_of("0" * 64) is None


def test_a_shard_is_compared_once_its_sum_is_in_the_table(tmp_path):
    table = json.loads(known.PATH.read_text())
    table["variants"]["sp8192"]["shards"]["fineweb_val_000000.bin"]["sha256"] = "a" * 64
    path = tmp_path / "known.json"
    path.write_text(json.dumps(table))
    right = known.compare(SP8192, OURS["sp8192"], {"fineweb_val_000000.bin": "a" * 64}, path)
    assert (right.differences, right.unknown) == ([], [])
    wrong = known.compare(SP8192, OURS["sp8192"], {"fineweb_val_000000.bin": "b" * 64}, path)
    assert wrong.differences == ["fineweb_val_000000.bin is another file than sp8192's"]


@pytest.mark.parametrize("text", ["", "{}", '{"text": 1, "variants": {"a": 1}}'])
def test_a_table_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "known.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is not the table of known data"):
        known.read_variants(path)
