"""Capitals as operators: texts come back, bytes are the text's, and whoever reads tokens knows."""

import doctest
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train_gpt as t
from data import prepare
from tests.support import (
    FINAL,
    TEXT,
    mistake,
    run_environment,
    run_here,
    tiny,
    train_tokenizer,
    write_shard,
)
from tools.audit import text as audit_text

T, C, N, E = t.CASE_OPERATORS
NASTY = st.text(st.sampled_from([*"abthexABTHEX \n\t_.éÉ▁\0", *t.CASE_OPERATORS]))
ANY_TEXT = st.one_of(st.text(), NASTY)
DOCUMENTS = [
    *TEXT,
    "NASA and UNESCO met Ms McDonald, who has an iPhone: ÉCOLE, aBC, A B.",
    f"The {T}sign {E} {E}{E}The ▁_ __x {C}{N} end {T}",
    "the market opens",
]


@pytest.fixture(scope="module")
def tokenizer(case_tokenizer) -> t.Tokenizer:
    return t.Tokenizer(str(case_tokenizer), 512)


def stream(tokenizer: t.Tokenizer, documents: list[str]) -> np.ndarray:
    """Documents as shards hold them, uint16, each behind BOS."""
    parts = [[t.BOS_ID, *tokens] for tokens in tokenizer.encode(documents)]
    return np.array(sum(parts, []), dtype=np.uint16)


def true_bytes(documents: list[str]) -> list[int]:
    return [len(document.encode()) for document in documents]


# ---- The transform -------------------------------------------------------------------------------


def test_the_docstring_has_a_true_example():
    """More of the transform is in test_case_operators.py, beside data/prepare.py's copy of it."""
    (found,) = doctest.DocTestFinder().find(t.decode_case, globs=vars(t))
    assert doctest.DocTestRunner().run(found) == (0, len(found.examples))


@given(ANY_TEXT)
def test_the_audits_own_transform_agrees(text):
    encoded = t.encode_case(text)
    assert audit_text.with_operators(text) == encoded
    assert audit_text.restored(encoded) == text


# ---- Bytes ---------------------------------------------------------------------------------------


@given(st.lists(ANY_TEXT, max_size=4))
@example([f"{E}" * 5, f"{E}{T}{E}▁{E}_{E}"])
@example([" the", "  The", "▁", "_"])
def test_bytes_are_those_of_each_text(tokenizer, documents):
    """Also of spaces before a text, which such a model keeps; a shard's first token is BOS."""
    tokens = stream(tokenizer, ["x", *documents])
    counted = np.append(0, tokenizer.target_bytes(tokens))
    parts = np.split(counted, np.flatnonzero(tokens == t.BOS_ID)[1:])
    assert [part.sum() for part in parts] == [1, *true_bytes(documents)]
    assert tokenizer.decode(tokens.tolist()) == "\n\n".join(filter(None, ["x", *documents]))
    assert tokenizer.mismatch(tokens) == ""


@given(st.lists(ANY_TEXT, min_size=1, max_size=3), st.integers(0, 40), st.integers(0, 40))
def test_the_audit_counts_the_same_bytes_of_cut_texts_too(tokenizer, documents, first, last):
    """A cut behind an operator, within a character, or a stream that begins within a document."""
    tokens = stream(tokenizer, [*documents, "The end"])[first:]
    tokens = tokens[: max(1, len(tokens) - last)]
    if not len(tokens):
        return
    counted = np.append(0, tokenizer.target_bytes(tokens))
    for one in audit_text.texts_of(tokenizer.model, tokens):
        assert counted[one.first : one.last].sum() == one.bytes, one


def test_an_operator_is_no_byte_and_the_space_behind_it_is_one(tokenizer):
    pieces = ["<s>", T, "the", T, "▁the", E, T, E, E, E, E, T, "▁the", E, "_"]
    tokens = np.array([tokenizer.model.PieceToId(piece) for piece in pieces])
    wanted = [0, 3, 0, 4, 0, 3, 0, 3, 0, 3, 0, 4, 0, 3]
    assert tokenizer.target_bytes(tokens).tolist() == wanted
    decoded = tokenizer.decode(tokens.tolist())
    assert decoded == f"The The{T}{E}{E} The▁"
    assert sum(wanted) == len(decoded.encode())


def test_a_word_keeps_its_token_and_the_words_capital_is_one_more(tokenizer):
    small, capital = tokenizer.encode(["over the", "over The"])
    title = t.CASE_OPERATORS.index(T) + 4
    assert [token for token in capital if token != title] == small
    assert capital.count(title) == 1
    assert tokenizer.pieces[small[-1]] == "▁the"


# ---- Does the tokenizer fit? ---------------------------------------------------------------------


def test_its_own_tokens_fit_however_they_are_cut(tokenizer):
    tokens = stream(tokenizer, DOCUMENTS * 3)
    for cut in range(60):
        assert tokenizer.mismatch(tokens[cut : len(tokens) - cut]) == ""


def test_tokens_of_another_layout_or_tokenizer_or_without_operators_are_refused(
    tokenizer, byte_tokenizer
):
    documents = DOCUMENTS[:7] * 3
    behind = [t.encode_case(x).replace(f"{T} ", f" {T}") for x in documents]
    behind = [[t.BOS_ID, *tokens] for tokens in tokenizer.model.encode(behind)]
    problem = tokenizer.mismatch(np.array(sum(behind, [])))
    assert "encoded again" in problem
    assert "before the space?" in problem
    as_they_are = [[t.BOS_ID, *tokens] for tokens in tokenizer.model.encode(documents)]
    assert "encoded again" in tokenizer.mismatch(np.array(sum(as_they_are, [])))
    plain = t.Tokenizer(str(byte_tokenizer), 512)
    assert "encoded again" in tokenizer.mismatch(stream(plain, documents))
    assert plain.mismatch(stream(tokenizer, documents))


def test_a_plain_tokenizer_takes_operators_for_text(byte_tokenizer):
    """Its text is not changed."""
    plain = t.Tokenizer(str(byte_tokenizer), 512)
    text = f"The {T}sign"
    tokens = stream(plain, [text])
    assert plain.decode(tokens.tolist()) == text
    assert plain.target_bytes(tokens).sum() == len(text.encode())
    assert plain.mismatch(tokens) == ""


def test_operators_that_are_other_tokens_are_refused(case_tokenizer, tmp_path):
    """They would count as three bytes each."""
    path = tmp_path / "other.model"
    content = case_tokenizer.read_bytes()
    first, second = (sign.encode() for sign in (T, C))
    assert content.count(first) == content.count(second) == 2  # a piece, and in the options
    swapped = content.replace(first, b"???").replace(second, first).replace(b"???", second)
    path.write_bytes(swapped)
    with pytest.raises(t.UserError, match="not as tokens 4 to 7"):
        t.Tokenizer(str(path), 512)


@pytest.mark.parametrize(
    "options",
    [
        {"control_symbols": [*t.CASE_OPERATORS]},
        {"user_defined_symbols": [*t.CASE_OPERATORS, f"{T}▁the"]},
        {"user_defined_symbols": [*t.CASE_OPERATORS], "unk_piece": f"<{E}>"},
    ],
)
def test_operators_that_would_count_as_text_are_refused(tmp_path, options):
    """As no symbol of the text, ESCAPE behind ESCAPE was three bytes; within a piece, TITLE was."""
    path = tmp_path / "crafted.model"
    train_tokenizer(path, 512, **options)
    with pytest.raises(t.UserError, match="within other pieces, or as control symbols: train it"):
        t.Tokenizer(str(path), 512)


def test_an_escaped_token_without_text_has_no_bytes(tmp_path):
    """Its name may begin with the sign that stands for the longer "▁" behind ESCAPE."""
    path = tmp_path / "crafted.model"
    train_tokenizer(path, 512, user_defined_symbols=[*t.CASE_OPERATORS], unk_piece="_unknown")
    tokenizer = t.Tokenizer(str(path), 512)
    tokens = np.array([t.BOS_ID, t.ESCAPE_ID, tokenizer.model.unk_id(), t.ESCAPE_ID])
    assert tokenizer.target_bytes(tokens).tolist() == [0, 0, 0]
    assert prepare.piece_bytes(tokenizer.model).each(tokens).tolist() == [0, 0, 0, 0]


# ---- What people read and write ------------------------------------------------------------------


def test_a_prompt_is_ordinary_text(tokenizer):
    """Normalized as the texts of such a tokenizer are: any white space is one space."""
    tokens = tokenizer.encode_prompt("  The\n NASA's ﬁle, Mr McDonald ")
    assert tokens[0] == t.BOS_ID
    assert tokenizer.decode(tokens) == "The NASA's file, Mr McDonald"
    small = tokenizer.model.encode(f"{T}the{C} nasa's file,{T} mr{T} mc{N}donald")
    assert tokens[1:] == small
    assert tokenizer.encode_prompt("") == []
    with pytest.raises(t.UserError, match="SAMPLE_PROMPT holds no text"):
        tokenizer.encode_prompt(" \n")


# ---- Settings that look into the tokenizer -------------------------------------------------------


@hypothesis_settings(suppress_health_check=[HealthCheck.too_slow])
@given(ANY_TEXT)
def test_no_pair_that_occurs_is_masked(tokenizer, text):
    never = masked_pairs(tokenizer)
    tokens = stream(tokenizer, [text, *DOCUMENTS])
    assert not never[tokens[:-1], tokens[1:]].any()


def masked_pairs(tokenizer: t.Tokenizer) -> np.ndarray:
    """Which pairs MASK_IMPOSSIBLE_PAIRS rules out, bool (V, V); made once."""
    if not hasattr(tokenizer, "masked"):
        tokenizer.masked = t.impossible_pairs(t.merge_order(tokenizer), 512)
    return tokenizer.masked


def test_operators_are_beside_any_token_and_share_no_spelling(tokenizer):
    never = masked_pairs(tokenizer)
    assert never.sum() > 512 / 2
    assert not never[t.CASE_OPERATOR_IDS].any()
    assert not never[:, t.CASE_OPERATOR_IDS].any()
    matrix = t.spelling_matrix(tokenizer, 100)
    assert not matrix[t.CASE_OPERATOR_IDS].any()
    assert matrix[tokenizer.model.PieceToId("▁the")].any()


# ---- Files of bytes ------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path, tokenizer, case_tokenizer) -> Path:
    """A data folder: two validation shards, the second of which begins within a document, with
    their files of bytes, and a training shard.
    """
    shutil.copy(case_tokenizer, tmp_path / "tokenizer.model")
    tokens = stream(tokenizer, DOCUMENTS * 2)
    counted = np.append(0, tokenizer.target_bytes(tokens))
    for number, part in enumerate((slice(0, 200), slice(200, None))):
        write_shard(tmp_path / f"words_val_{number:06d}.bin", tokens[part])
        write_shard(tmp_path / f"words_val_bytes_{number:06d}.bin", counted[part])
    write_shard(tmp_path / "words_train_000000.bin", stream(tokenizer, DOCUMENTS * 9))
    return tmp_path


def load(folder: Path, tokenizer: t.Tokenizer, **settings) -> t.ValidationSet:
    path = str(folder / "tokenizer.model")
    return t.load_validation(
        tiny(data_path=str(folder), tokenizer_path=path, **settings), tokenizer
    )


def test_files_of_bytes_are_no_shards_and_agree(data, tokenizer):
    validation = load(data, tokenizer)
    assert [shard.path.name for shard in validation.shards] == [
        "words_val_000000.bin",
        "words_val_000001.bin",
    ]
    assert validation.target_bytes.sum() == 2 * sum(true_bytes(DOCUMENTS))
    assert [shard.name for shard in audit_text.read_shards(data)] == [
        shard.path.name for shard in validation.shards
    ]
    for path in data.glob("*_val_bytes_*.bin"):
        path.unlink()
    assert (load(data, tokenizer).target_bytes == validation.target_bytes).all()


def test_a_shard_without_tokens_has_a_file_without_bytes(data, tokenizer):
    """In front of the others, which keep their places in the stream."""
    for name in ("a_val_000000.bin", "a_val_bytes_000000.bin"):
        write_shard(data / name, [])
    assert len(load(data, tokenizer).shards) == 3
    write_shard(data / "a_val_000000.bin", [t.BOS_ID])
    write_shard(data / "a_val_bytes_000000.bin", [0])
    assert len(load(data, tokenizer).shards) == 3
    (data / "words_val_000000.bin").unlink()  # leaves a file of bytes behind
    assert len(load(data, tokenizer).shards) == 2


def test_bytes_that_spell_an_operator_are_refused(data, tokenizer):
    """They counted three bytes, where decoding takes them for an operator: also far behind the
    tokens that are decoded and encoded again.
    """
    for path in data.glob("*_val_*.bin"):
        path.unlink()
    spelt = tokenizer.model.PieceToId(["<0xEE>", "<0x80>", "<0x82>"])
    honest = stream(tokenizer, DOCUMENTS * 99)
    write_shard(data / "words_val_000000.bin", honest)
    assert len(load(data, tokenizer).tokens) == len(honest) > t.ROUND_TRIP_TOKENS
    write_shard(data / "words_val_000000.bin", [*honest, *spelt, *honest[1:9]])
    with pytest.raises(
        t.UserError, match="spell an operator of capitals, 1 times, and would count"
    ):
        load(data, tokenizer)


@pytest.mark.parametrize("any_tokens", [False, True])
def test_other_bytes_than_the_tokens_are_refused(data, tokenizer, any_tokens):
    path = data / "words_val_bytes_000001.bin"
    counted = t.Shard(path).read()
    for places in ([0], [7, 30]):
        wrong = counted.copy()
        wrong[places] += 1
        write_shard(path, wrong)
        said = f"bytes_000001.bin gives {len(places)} of .* token {places[0]} first: make the data"
        with pytest.raises(t.UserError, match=said):
            load(data, tokenizer, eval_any_tokens=any_tokens)
    write_shard(path, counted)
    path = data / "words_val_bytes_000000.bin"
    wrong = t.Shard(path).read()
    wrong[0] = 9  # of the stream's first token, which is no target
    write_shard(path, wrong)
    load(data, tokenizer)


def test_files_of_bytes_of_another_length_are_refused(data, tokenizer):
    path = data / "words_val_bytes_000001.bin"
    counted = t.Shard(path).read()
    write_shard(path, counted[:-1])
    with pytest.raises(t.UserError, match=r"holds \d+ numbers, words_val_000001.bin \d+ tokens"):
        load(data, tokenizer)
    write_shard(path, counted)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(t.UserError, match="bytes_000001.bin has .* header says.* or take the"):
        load(data, tokenizer)


@pytest.mark.parametrize("kind", ["folder", "link to nothing"])
def test_what_is_named_like_a_file_of_bytes_and_is_none_is_refused(data, tokenizer, kind):
    path = data / "words_val_bytes_000001.bin"
    path.unlink()
    load(data, tokenizer)
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("gone")
    with pytest.raises(t.UserError, match="bytes_000001.bin.* or take the file away"):
        load(data, tokenizer)


def test_a_plain_tokenizers_files_of_bytes_are_compared_too(shards, byte_tokenizer, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    plain = t.Tokenizer(str(byte_tokenizer), 512)
    counted = np.append(0, load(data, plain).target_bytes)
    write_shard(data / "words_val_bytes_000000.bin", counted)
    load(data, plain)
    write_shard(data / "words_val_bytes_000000.bin", counted + 1)
    with pytest.raises(t.UserError, match="other bytes than TOKENIZER_PATH="):
        load(data, plain)


def test_a_folder_of_nothing_but_bytes_has_no_shards(data):
    for path in data.glob("words_val_0*.bin"):
        path.unlink()
    with pytest.raises(t.UserError, match=r"no \*_val_\*.bin shards"):
        t.open_shards(str(data), "val")


def test_a_manifest_that_lists_files_of_bytes_is_believed(data):
    """And says of none that it is a shard that lacks."""
    shards = t.open_shards(str(data), "train")
    validation = {shard.path.name: shard.sha256 for shard in t.open_shards(str(data), "val")}
    entries = {name: {"sha256": sum_} for name, sum_ in validation.items()}
    for shard in shards:
        sampled = t.hashlib.sha256(shard.sample).hexdigest()
        entries[shard.path.name] = shard.state | {
            "sha256": shard.sha256,
            "sampled_sha256": sampled,
        }
    entries |= {path.name: {"sha256": "1"} for path in data.glob("*_val_bytes_*")}
    manifest = {"shards": entries, "overlap": {"documents": 3}}
    (data / "manifest.json").write_text(json.dumps(manifest))
    found = t.recorded_hashes(str(data), shards, validation)
    assert found == ({shards[0].path.name: shards[0].sha256}, 3, [])


# ---- A whole run ---------------------------------------------------------------------------------


def test_a_run_divides_by_the_bytes_of_the_text_and_goes_on_in_ordinary_text(
    data, tmp_path, monkeypatch, capsys, signal_handlers
):
    prompt = {"sample_prompt": "The NASA", "sample_tokens": 40}
    folder = tmp_path / "logs"
    masked = {"mask_impossible_pairs": True, "spelling_features": 50}
    environment = run_environment(data, folder, **prompt, **masked)
    assert run_here(monkeypatch, environment) == 0
    records = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    text = (folder / "a.txt").read_text(encoding="utf-8")
    loss, bpb = map(float, FINAL.fullmatch(text.strip().splitlines()[-1]).groups())
    counts = next(record for record in records if record["event"] == "validation_data")
    size = 2 * sum(true_bytes(DOCUMENTS))
    assert counts["bytes"] == size
    assert bpb == pytest.approx(loss * counts["scored_tokens"] / math.log(2) / size, rel=1e-6)
    files = "words_val_bytes_000000.bin, words_val_bytes_000001.bin"
    assert f" tokens, {size:,} bytes; by {files}, too\n" in text
    assert text.count("words_val_bytes") == 2  # they are not hashed as shards
    (said,) = [record for record in records if record["event"] == "sample"]
    assert said["sample"].startswith("The NASA")
    assert not re.search(f"[{T}{C}{N}] ?[a-z]", said["sample"])
    write_shard(data / "words_val_bytes_000000.bin", np.zeros(200))
    capsys.readouterr()
    error = mistake(monkeypatch, capsys, environment | {"RUN_ID": "b"})
    assert "words_val_bytes_000000.bin gives" in error
