"""data/prepare.py --case: no text is lost by case operators, in letters, in tokens or in shards."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train_gpt
from data import prepare
from tests.support import TEXT, train_tokenizer

T, C, N, E = prepare.OPERATORS
ANY_TEXT = st.one_of(st.text(), st.text(st.sampled_from([*"aAbBI \n\t_.éÉ▁\0", T, C, N, E])))
NASTY = [
    "The first word",
    "after newlines\n\nThe  several   spaces\t NASA",
    "McDonald and an iPhone, NASA's, aB, AbC, ABc, X",
    f"operators {T} {C}a {N}B {E}{E}{T} {E}The, {E}▁ and ▁The ▁▁_ __ _▁_",
    "",
    "ÉCOLE Straße Ελλάδα 東京 🙂 ´ The",
    E * 5,
    "I",
]


def make_documents(count: int) -> list[str]:
    """Different documents of words with and without capitals, the nasty ones among them."""
    generator = random.Random(0)
    words = " ".join(TEXT).split()
    words += [word.title() for word in words] + [word.upper() for word in words[:20]]
    texts = [f"{i} {' '.join(generator.choices(words, k=30))}" for i in range(count)]
    return [*texts[: count // 2], *NASTY, *texts[count // 2 :], *(f"x{text}" for text in NASTY)]


def normalized(texts: list[str]) -> list[str]:
    """Texts as prepare.py reads and then normalizes them; the empty ones are left out."""
    normalizer = prepare.make_normalizer()
    return [normalizer.normalize(text.strip()) for text in texts if text.strip()]


def run(*arguments) -> int:
    return prepare.main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    """The one line by which a command is refused."""
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("prepare.py: error: ") and said.count("\n") == 1, said
    return said


def tokens_of(path: Path) -> np.ndarray:
    """What stands behind the header of a file that is as long as that says."""
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    values = np.frombuffer(raw[1024:], dtype="<u2")
    assert header[:3].tolist() == [20240520, 1, len(values)]
    return values


def shards_of(folder: Path, name: str, split: str) -> list[np.ndarray]:
    """The values of NAME_SPLIT_NNNNNN.bin, shard by shard; of a split "val_bytes", too."""
    paths = sorted(folder.glob(f"{name}_{split}_[0-9]*.bin"))
    assert [path.name for path in paths] == [
        f"{name}_{split}_{number:06d}.bin" for number in range(len(paths))
    ]
    return [tokens_of(path) for path in paths]


def texts_of(tokenizer, tokens: np.ndarray) -> list[str]:
    """The documents that tokens with case operators stand for."""
    documents = np.split(tokens, np.flatnonzero(tokens == 1))[1:]
    return [prepare.decode_case(tokenizer.decode(part[1:].tolist())) for part in documents]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A small tokenizer with case operators."""
    path = tmp_path_factory.mktemp("case") / "case.model"
    path.write_bytes(prepare.train_tokenizer(make_documents(200), 420, case=True))
    return path


@pytest.fixture(scope="session")
def tokenizer(model):
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


@pytest.fixture
def source(tmp_path) -> Path:
    """A file of documents, the nasty ones among them."""
    path = tmp_path / "in.jsonl"
    lines = (json.dumps({"text": text}) for text in make_documents(120))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def finished(tmp_path, source, model) -> Path:
    """A dataset of several validation shards, made with a tokenizer that is given."""
    out = tmp_path / "finished"
    options = ("--name", "n", "--tokenizer", model, "--val-fraction", 0.4, "--shard-tokens", 500)
    assert run("jsonl", source, "--out", out, *options) == 0
    return out


# ---- The transform ----


each_copy = pytest.mark.parametrize("copy", [prepare, train_gpt], ids=["prepare", "script"])


@each_copy
@given(ANY_TEXT)
@example("The\nThe  The")
@example(f"{E} The{T} x{T}The ▁The {N}A {C} B")
def test_every_text_comes_back(copy, text):
    marked = copy.encode_case(text)
    assert copy.decode_case(marked) == text
    assert not re.search("[A-Z▁]", marked)


@each_copy
@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("The", f"{T}the"),
        ("a The", f"a{T} the"),
        ("\nA  B", f"\n{T}a {T} b"),
        ("x NASA'S", f"x{C} nasa'{T}s"),
        ("an iPhone", f"an i{N}phone"),
        ("Mr McDONald", f"{T}mr{T} mc{N}d{N}o{N}nald"),
        ("McDonald", f"{T}mc{N}donald"),
        ("of iX Y", f"of i{N}x{T} y"),
        ("AB ABc aBC", f"{C}ab{T} a{N}bc a{N}b{N}c"),
        ("É ÉCOLE", f"É É{C}cole"),
        (f"{T} {E}", f"{E}{T} {E}{E}"),
        ("▁_", f"{E}__"),
        ("▁_A", f"{E}__{T}a"),
        ("", ""),
    ],
)
def test_operators_are_those_of_the_capitals(copy, text, marked):
    assert copy.encode_case(text) == marked


def test_the_docstring_has_true_examples():
    """Its signs stand for the operators."""
    signs = dict(zip("TCNE", prepare.OPERATORS, strict=True))
    pairs = re.findall(
        r"^ {8}(\S.*?) {2,}(\S+(?: \S+)*)", prepare.encode_case.__doc__, re.MULTILINE
    )
    assert len(pairs) == 8
    for pair in pairs:
        text, marked = (re.sub("⟨(.)⟩", lambda sign: signs[sign[1]], part) for part in pair)
        assert prepare.encode_case(text) == marked


@each_copy
def test_an_operator_without_a_letter_stays(copy):
    """As a model may write it."""
    assert copy.decode_case(f"{T}{C} {N}1 {E}") == f"{T}{C} {N}1 {E}"


@given(ANY_TEXT)
def test_the_script_and_prepare_agree(text):
    """On any text, also one that only a model writes."""
    assert train_gpt.encode_case(text) == prepare.encode_case(text)
    assert train_gpt.decode_case(text) == prepare.decode_case(text)


# ---- Tokens and their bytes ----


def test_a_trained_tokenizer_has_the_operators_as_pieces_4_to_7(tokenizer, model):
    pieces = [tokenizer.id_to_piece(number) for number in range(9)]
    assert pieces == ["<pad>", "<s>", "</s>", "<unk>", T, C, N, E, "<0x00>"]
    assert prepare.has_case_operators(tokenizer)
    assert tokenizer.encode(prepare.encode_case("of The"), out_type=str)[-2:] == [T, "▁the"]
    every = [tokenizer.id_to_piece(number) for number in range(tokenizer.vocab_size())]
    assert not [piece for piece in every if re.search("[A-Z]", piece) and piece[0] != "<"]
    # Other text than the tokenizer has seen is not made another one.
    assert tokenizer.decode(tokenizer.encode("Ж  ½\n ")) == "Ж  ½\n "


def reference_bytes(tokenizer, tokens: list[int]) -> list[int]:
    """Each token's bytes, from left to right, as one says it."""
    counts = []
    escaped = False
    for token in tokens:
        piece = tokenizer.id_to_piece(token)
        silent = tokenizer.is_control(token) or tokenizer.is_unknown(token)
        size = len(piece.replace("▁", " ").encode())
        if tokenizer.is_byte(token):
            size = 1
            piece = chr(int(piece[3:5], 16))
        if silent:
            size = 0
        elif piece in (T, C, N, E):
            size = 3 if escaped else 0
        elif escaped and piece[0] == "_":
            size += 2
        counts.append(size)
        escaped = piece == E and not escaped
    return counts


@given(st.data())
def test_bytes_are_those_of_a_reading_from_left_to_right(tokenizer, data):
    """Of any tokens, however they are cut into shards; operators come often."""
    ids = st.one_of(st.integers(0, 8), st.integers(0, tokenizer.vocab_size() - 1))
    underscores = [i for i in range(420) if tokenizer.id_to_piece(i).startswith(("_", "<0x5F>"))]
    ids = st.one_of(ids, st.sampled_from(underscores), st.just(7))
    parts = data.draw(st.lists(st.lists(ids), max_size=5))
    wanted = reference_bytes(tokenizer, [1, *sum(parts, [])])[1:]
    pieces = prepare.piece_bytes(tokenizer)
    before = 1
    found = []
    for part in parts:
        tokens = np.array(part, dtype="<u2")
        found.append(pieces.each(tokens, before))
        assert found[-1].dtype == np.uint16 and len(found[-1]) == len(part)
        assert pieces.count(tokens, before) == found[-1].sum()
        before = pieces.last(tokens, before)
    assert sum((part.tolist() for part in found), []) == wanted


@given(st.data())
def test_the_script_and_prepare_count_the_same_bytes(model, tokenizer, data):
    ids = st.one_of(st.integers(0, 8), st.integers(0, tokenizer.vocab_size() - 1))
    tokens = np.array([1, *data.draw(st.lists(ids))], dtype="<u2")
    counter = train_gpt.Tokenizer(str(model), tokenizer.vocab_size())
    counted = prepare.piece_bytes(tokenizer).each(tokens)[1:]
    assert counter.target_bytes(tokens).tolist() == counted.tolist()


@given(ANY_TEXT)
@example("The ▁ NASA")
@example(" the")
def test_every_text_comes_back_from_tokens_with_its_bytes(tokenizer, text):
    tokens = tokenizer.encode(prepare.encode_case(text), add_bos=True)
    assert prepare.decode_case(tokenizer.decode(tokens)) == text
    assert prepare.piece_bytes(tokenizer).each(np.array(tokens)).sum() == len(text.encode())


@pytest.mark.parametrize("letter", ["a", "é", "東", "🙂", "\0"])
def test_each_token_has_its_own_bytes(tokenizer, letter):
    """A letter's bytes stand where the letter is, and operators have none."""
    pieces = prepare.piece_bytes(tokenizer)
    tokens = np.array(tokenizer.encode(prepare.encode_case(f"I {T}▁{letter}"), add_bos=True))
    counts = pieces.each(tokens).tolist()
    assert tokens[:2].tolist() == [1, 4] and tokens[-1] != 7
    assert counts[:2] == [0, 0]
    places = np.flatnonzero(tokens == 7)
    assert counts[places[0]] == counts[places[1]] == 0
    assert tokens[places[0] + 1] == 4 and counts[places[0] + 1] == 3
    assert sum(counts[places[1] + 1 :]) == 3 + len(letter.encode())


def test_a_plain_tokenizer_has_bytes_as_before(sample):
    """No token of it is an operator, whatever its id."""
    path = sample / "sample_1024_bpe.model"
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = prepare.piece_bytes(plain)
    tokens = np.random.default_rng(0).integers(0, 1024, 5000).astype("<u2")
    wanted = train_gpt.Tokenizer(str(path), 1024).target_bytes(np.append(1, tokens).astype("<u2"))
    assert not pieces.has_case
    assert (pieces.each(tokens) == wanted).all()
    assert pieces.count(tokens) == wanted.sum()


# ---- Datasets ----


def test_a_dataset_holds_the_text_and_says_how(tmp_path, source, capsys):
    """From the command to the documents, with a tokenizer that it trains."""
    out = tmp_path / "out"
    options = ("--name", "n", "--vocab-size", 420, "--val-fraction", 0.4, "--shard-tokens", 500)
    assert run("jsonl", source, "--out", out, "--case", *options) == 0
    said = capsys.readouterr().out
    path = out / "n_420_bpe_case.model"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert prepare.has_case_operators(tokenizer)
    found = {}
    for split in ("train", "val"):
        found[split] = texts_of(tokenizer, np.concatenate(shards_of(out, "n", split)))
    wanted = normalized(make_documents(120))
    assert sorted(found["train"] + found["val"]) == sorted(wanted)
    assert [text for text in wanted if text in found["train"]] == found["train"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokenizer"]["case_operators"] is True
    for split, texts in found.items():
        sums = manifest["splits"][split]
        tokens = np.concatenate(shards_of(out, "n", split))
        assert sums["bytes"] == len("".join(texts).encode())
        assert sums["operators"] == np.isin(tokens, range(4, 8)).sum() > 0
    part = sums["operators"] / sums["tokens"]
    assert f"capitals: {part:.1%} of the validation tokens are case operators\n" in said
    assert f"TOKENIZER_PATH={path} VOCAB_SIZE=420 PRESET=tiny " in said.splitlines()[-1]


def test_text_files_can_be_prepared_so_too(tmp_path):
    paths = []
    for name in ("train.txt", "val.txt"):
        paths.append(tmp_path / name)
        text = "\0".join(f"{text} {name}" for text in make_documents(40))
        paths[-1].write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    options = ("--separator", "nul", "--vocab-size", 400, "--case", "--workers", 2)
    command = ("text", paths[0], "--val", paths[1], "--out", out, "--name", "n")
    assert run(*command, *options) == 0
    path = out / "n_400_bpe_case.model"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for split in ("train", "val"):
        wanted = normalized([f"{text} {split}.txt" for text in make_documents(40)])
        assert texts_of(tokenizer, np.concatenate(shards_of(out, "n", split))) == wanted
    sizes = np.concatenate(shards_of(out, "n", "val_bytes"))
    assert sizes.sum() == len("".join(wanted).encode())


def test_the_sample_can_be_made_so_too(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "standard_library_documents", lambda: make_documents(200))
    assert run("sample", "--case", "--out", tmp_path / "o", "--vocab-size", 400) == 0
    assert (tmp_path / "o" / "sample_400_bpe_case.model").is_file()
    assert len(shards_of(tmp_path / "o", "sample", "val_bytes")) == 1


def test_beside_each_validation_shard_are_the_bytes_of_its_tokens(finished, tokenizer):
    shards = shards_of(finished, "n", "val")
    sizes = shards_of(finished, "n", "val_bytes")
    assert len(shards) > 2
    assert [len(part) for part in sizes] == [len(part) for part in shards]
    tokens = np.concatenate(shards)
    wanted = reference_bytes(tokenizer, tokens.tolist())
    assert np.concatenate(sizes).tolist() == wanted
    # Document by document, the bytes are those of the text.
    starts = np.flatnonzero(tokens == 1)
    sums = np.add.reduceat(np.concatenate(sizes), starts, dtype=np.int64).tolist()
    assert sums == [len(text.encode()) for text in texts_of(tokenizer, tokens)]
    assert not list(finished.glob("*_train_bytes_*"))


def test_the_manifest_lists_them_and_takes_them_for_no_shards(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    names = {path.name for path in finished.glob("*.bin")}
    listed = [entry.get("token_bytes") for entry in manifest["shards"].values()]
    listed = [entry for entry in listed if entry]
    assert names - manifest["shards"].keys() == {entry["file"] for entry in listed}
    assert len(listed) == manifest["splits"]["val"]["shards"]
    for entry in listed:
        assert entry["sha256"] == prepare.file_sha256(finished / entry["file"])
        assert entry["size"] == (finished / entry["file"]).stat().st_size
    assert run("manifest", finished) == 0
    again = json.loads((finished / "manifest.json").read_text())
    assert manifest.pop("command") != again.pop("command")
    assert again == manifest


def test_validation_shards_come_last_whatever_is_beside_them(tmp_path, source, model, monkeypatch):
    """A run that is killed meanwhile leaves none, and so nothing that can be trained on."""
    moved = []
    replace = prepare.os.replace
    monkeypatch.setattr(
        prepare.os, "replace", lambda *paths: (moved.append(paths[1]), replace(*paths))
    )
    out = tmp_path / "o"
    options = ("--tokenizer", model, "--val-fraction", 0.4, "--shard-tokens", 2000)
    assert run("jsonl", source, "--out", out, "--name", "n", *options) == 0
    names = [path.name for path in moved if path.parent == out]
    kinds = [re.sub(r"_\d+\.bin", "", name) for name in names]
    assert list(dict.fromkeys(kinds)) == ["n_train", "n_val_bytes", "n_val", "manifest.json"]
    assert kinds.count("n_val") == kinds.count("n_val_bytes") > 1


def test_a_folder_that_has_them_is_known_by_its_manifest(finished, model):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert prepare.is_current(manifest, finished, model)
    (finished / "n_val_000001.bin").unlink()
    assert not prepare.is_current(manifest, finished, model)


def test_bytes_that_are_not_those_of_the_tokens_are_said(finished, capsys):
    path = finished / "n_val_bytes_000001.bin"
    raw = bytearray(path.read_bytes())
    raw[-2] += 1
    path.write_bytes(raw)
    capsys.readouterr()
    assert run("manifest", finished) == 0
    said = capsys.readouterr().err
    assert "n_val_bytes_000001.bin is not the bytes of the tokens of n_val_000001.bin" in said
    assert said.count("warning") == 1
    path.write_bytes(raw[:-2])
    assert "n_val_bytes_000001.bin: the header says" in refused(capsys, "manifest", finished)
    path.unlink()
    assert run("manifest", finished) == 0
    entry = json.loads((finished / "manifest.json").read_text())["shards"]["n_val_000001.bin"]
    assert "token_bytes" not in entry


@pytest.mark.parametrize("part", [0, 0.3])
def test_a_development_split_has_its_own(tmp_path, finished, tokenizer, part):
    out = tmp_path / "development"
    assert run("development", finished, "--out", out, "--part", part, "--orders", 1) == 0
    [tokens] = shards_of(out, "development", "val")
    [sizes] = shards_of(out, "development", "val_bytes")
    assert sizes.tolist() == reference_bytes(tokenizer, tokens.tolist())
    if part == 0:
        assert (tokens == np.concatenate(shards_of(finished, "n", "val"))).all()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokenizer"]["case_operators"] is True
    assert manifest["splits"]["val"]["shards"] == 1
    assert manifest["splits"]["val"]["bytes"] == sizes.sum(dtype=np.int64)
    named = manifest["shards"]["development_val_000000.bin"]["token_bytes"]["file"]
    assert named == "development_val_bytes_000000.bin"


def test_a_plain_dataset_of_the_same_name_takes_them_away(finished, source, sample):
    model = sample / "sample_1024_bpe.model"
    options = ("--name", "n", "--tokenizer", model, "--val-fraction", 0.4)
    assert run("jsonl", source, "--out", finished, *options) == 0
    assert not list(finished.glob("*_val_bytes_*"))
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["tokenizer"]["case_operators"] is False
    assert "operators" not in manifest["splits"]["val"]


# ---- Refusals ----


def test_a_tokenizer_without_the_operators_is_refused(tmp_path, source, sample, capsys):
    model = sample / "sample_1024_bpe.model"
    command = ("jsonl", source, "--out", tmp_path / "o", "--name", "n", "--tokenizer", model)
    said = refused(capsys, *command, "--case")
    assert f"{model}: its pieces 4 to 7 are not the operators of --case" in said
    assert not (tmp_path / "o").exists()


def test_operators_that_are_other_pieces_are_refused(tmp_path, source, capsys):
    path = tmp_path / "other.model"
    train_tokenizer(path, 512, user_defined_symbols=["<x>", *prepare.OPERATORS])
    command = ("jsonl", source, "--out", tmp_path / "o", "--name", "n", "--tokenizer", path)
    for case in ([], ["--case"]):
        said = refused(capsys, *command, *case)
        assert f"{path}: it has case operators, but not as pieces 4 to 7; train one anew" in said


@pytest.mark.parametrize(
    "options",
    [
        {"control_symbols": list(prepare.OPERATORS)},
        {"user_defined_symbols": [*prepare.OPERATORS, f"{T}▁the"]},
    ],
)
def test_operators_that_would_count_as_text_are_refused(tmp_path, source, capsys, options):
    path = tmp_path / "crafted.model"
    train_tokenizer(path, 512, **options)
    command = ("jsonl", source, "--out", tmp_path / "o", "--name", "n", "--tokenizer", path)
    said = refused(capsys, *command)
    assert f"{path}: it has case operators within other pieces, or as control symbols" in said


def test_a_tokenizer_that_has_them_needs_no_case(tmp_path, source, model, finished):
    out = tmp_path / "o"
    options = ("--tokenizer", model, "--val-fraction", 0.4, "--shard-tokens", 500)
    assert run("jsonl", source, "--out", out, "--name", "n", *options, "--case") == 0
    for path in finished.glob("*.bin"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_a_document_that_would_not_come_back_is_named(tmp_path, capsys):
    """This tokenizer has the operators, but makes other letters small itself."""
    path = tmp_path / "bad.model"
    symbols = list(prepare.OPERATORS)
    train_tokenizer(path, 400, user_defined_symbols=symbols, normalization_rule_name="nmt_nfkc_cf")
    source = tmp_path / "in.txt"
    source.write_text("good one\0ΕΛΛΆΔΑ comes back small\0good two", encoding="utf-8")
    command = ("text", source, "--out", tmp_path / "o", "--name", "n", "--separator", "nul")
    said = refused(capsys, *command, "--tokenizer", path, "--val-fraction", 0.5)
    assert "the document that begins 'ΕΛΛΆΔΑ comes back small' does not come back" in said
    assert "--case has trained" in said
    assert not (tmp_path / "o").exists()


def test_tokens_that_count_other_bytes_than_the_document_has_are_refused(tokenizer):
    pieces = prepare.piece_bytes(tokenizer)
    texts = ["a good one", "The bad one"]
    encoded = tokenizer.encode([prepare.encode_case(text) for text in texts], add_bos=True)
    prepare.check_case_round_trip(tokenizer, pieces, texts, encoded)
    more = pieces.texts.copy()
    more[prepare.TITLE_ID] = 1
    said = "document that begins 'The bad one' has 11 bytes, but its tokens stand for 12: scores"
    with pytest.raises(prepare.PrepareError, match=said):
        prepare.check_case_round_trip(tokenizer, pieces._replace(texts=more), texts, encoded)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(texts=st.lists(ANY_TEXT, min_size=1))
def test_a_worker_encodes_whatever_it_is_given(model, tokenizer, monkeypatch, texts):
    monkeypatch.setattr(prepare, "start_process", lambda: None)
    prepare.start_worker(model.read_bytes())
    normalizer = prepare.make_normalizer()
    wanted = [normalizer.normalize(text) for text in texts]
    found = prepare.encode_batch(texts)
    assert texts_of(tokenizer, np.concatenate(found)) == wanted
