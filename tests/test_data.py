"""Data: shards, the order of batches, and the bytes behind every token."""

import collections
import itertools
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt as t
from tests.support import CPU, SOLO, TEXT, tiny, write_shard

# ---- Shards --------------------------------------------------------------------------------------


def test_a_shard_gives_back_its_tokens(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65_536, 1000)
    assert np.array_equal(t.Shard(write_shard(tmp_path / "a_train_0.bin", tokens)).read(), tokens)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"magic": 1}, "magic number"),
        ({"version": 7}, "or version"),
        ({"count": 11}, "1044 bytes, but its header says 1046"),
        ({"count": 9}, "1044 bytes, but its header says 1042"),
        ({"count": -1}, "its header says"),
        ({"count": 2**31 - 1}, "its header says"),
    ],
)
def test_a_bad_shard_is_refused_with_its_name_and_the_reason(tmp_path, options, said):
    path = write_shard(tmp_path / "a_train_0.bin", range(10), **options)
    with pytest.raises(t.UserError, match=said) as error:
        t.Shard(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, make):
    """A pipe that nobody writes to would keep a run waiting without a word."""
    path = tmp_path / "a_train_0.bin"
    make(path)
    with pytest.raises(t.UserError, match="is none; move it away") as error:
        t.open_shards(str(tmp_path), "train")
    assert str(path) in str(error.value)


def test_a_shard_that_is_cut_while_it_is_in_use_is_an_error_and_not_the_end(tmp_path):
    """A file that is mapped into memory would end the process by SIGBUS."""
    path = write_shard(tmp_path / "a_train_0.bin", range(1000))
    shard = t.Shard(path)
    os.truncate(path, 1024 + 2 * 500)
    assert list(shard.read(498, 2)) == [498, 499]
    with pytest.raises(t.UserError, match="a_train_0.bin was cut off"):
        shard.read(499, 2)


def test_threads_may_read_one_shard(tmp_path):
    """Each gets its own tokens, whatever another reads meanwhile."""
    path = tmp_path / "a_train_000000.bin"
    write_shard(path, range(2, 60_002))
    shard = t.Shard(path)

    def read(first: int) -> bool:
        return all(
            shard.read(first, 100).tolist() == list(range(first + 2, first + 102))
            for _ in range(200)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(0, 40_000, 5_000)))


READERS = {
    "training": lambda settings, tokenizer: t.Batches(settings, SOLO).next(),
    "evaluation": t.load_validation,
    "check of the tokenizer": lambda settings, tokenizer: t.check_tokenizer(
        settings, tokenizer, t.open_shards(settings.data_path, "train"), "training"
    ),
    "digest": lambda settings, _: t.sampled_digest(t.open_shards(settings.data_path, "train")),
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_a_shard_notices_that_it_was_cut(monkeypatch, shards, tmp_path, reader):
    """Right after its header was read, to a third."""
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    settings = tiny(data_path=str(data))
    tokenizer = t.Tokenizer(str(data / "tokenizer.model"), settings.vocab_size)
    READERS[reader](settings, tokenizer)
    opened = t.open_shards

    def cut(folder: str, split: str) -> list[t.Shard]:
        found = opened(folder, split)
        for shard in found:
            os.truncate(shard.path, 1024 + 2 * (shard.count // 3) + 1)
        return found

    monkeypatch.setattr(t, "open_shards", cut)
    with pytest.raises(t.UserError, match="was cut off after the start: download it again"):
        READERS[reader](settings, tokenizer)


@pytest.mark.parametrize("size", [0, 4, 1023])
def test_a_file_shorter_than_a_header_is_refused(tmp_path, size):
    path = write_shard(tmp_path / "a_train_0.bin", [])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(t.UserError, match="not a token shard"):
        t.Shard(path)


def test_a_folder_that_is_named_like_a_shard_is_refused(tmp_path):
    (tmp_path / "a_train_0.bin").mkdir()
    with pytest.raises(t.UserError, match="a_train_0.bin"):
        t.open_shards(str(tmp_path), "train")


def test_a_link_to_a_shard_that_is_gone_is_refused(tmp_path):
    (tmp_path / "a_train_0.bin").symlink_to(tmp_path / "gone")
    with pytest.raises(t.UserError, match="a_train_0.bin"):
        t.open_shards(str(tmp_path), "train")


def test_shards_come_in_the_order_of_their_names_and_splits_do_not_mix(tmp_path):
    for name, token in (("b_train_1", 11), ("b_train_0", 10), ("b_val_0", 12)):
        write_shard(tmp_path / f"{name}.bin", [token])
    assert [list(shard.read()) for shard in t.open_shards(str(tmp_path), "train")] == [[10], [11]]
    assert [list(shard.read()) for shard in t.open_shards(str(tmp_path), "val")] == [[12]]
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(t.UserError, match=f"bin shards in {nowhere}, which does not exist: set"):
        t.open_shards(nowhere, "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(t.UserError, match=r"no \*_val_\*.bin shards in \S+empty: set DATA_PATH"):
        t.open_shards(str(tmp_path / "empty"), "val")


@pytest.mark.parametrize(
    ("numbers", "missing"),
    [((0, 2), 1), ((1, 2, 4), 3), ((2, 3), 1), ((0, 1, 2), None), ((7,), None)],
)
def test_a_gap_in_the_numbers_of_shards_is_refused(tmp_path, numbers, missing):
    """Half of a text has a score like any other. A single shard, and another series, are no gap."""
    for number in numbers:
        write_shard(tmp_path / f"a_val_{number:06d}.bin", [1])
    write_shard(tmp_path / "b_val_000000.bin", [1])
    write_shard(tmp_path / "b_val_20301231.bin", [1])
    if missing is None:
        assert len(t.open_shards(str(tmp_path), "val")) == len(numbers) + 2
        return
    with pytest.raises(
        t.UserError, match=f"a_val_00000{max(numbers)}.bin .* not number {missing}:"
    ):
        t.open_shards(str(tmp_path), "val")


def test_a_number_that_two_shards_have_is_refused(tmp_path):
    """As a name without zeros beside the same with: the text would be read, and scored, twice."""
    for name in ("a_val_000000", "a_val_000001", "a_val_1"):
        write_shard(tmp_path / f"{name}.bin", [1])
    with pytest.raises(t.UserError, match=r"a_val_000001.bin and \S+a_val_1.bin are one number"):
        t.open_shards(str(tmp_path), "val")


def test_shards_of_other_names_or_lengths_have_another_summary(tmp_path):
    def summary(**lengths: int) -> dict:
        for path in tmp_path.iterdir():
            path.unlink()
        for name, length in lengths.items():
            write_shard(tmp_path / f"{name}.bin", [5] * length)
        return t.summarize_shards(t.open_shards(str(tmp_path), "train"))

    first = summary(a_train_0=9, a_train_1=3)
    assert (first["shards"], first["tokens"]) == (2, 12)
    assert first == summary(a_train_0=9, a_train_1=3)
    others = [summary(a_train_0=3, a_train_1=9), summary(b_train_0=9, b_train_1=3)]
    assert len({x["digest"] for x in (first, *others)}) == 3


def test_validation_is_all_shards_in_one_stream(tmp_path, byte_tokenizer):
    write_shard(tmp_path / "a_val_0.bin", range(100))
    write_shard(tmp_path / "a_val_1.bin", range(100, 150))
    validation = t.load_validation(
        tiny(data_path=str(tmp_path), eval_any_tokens=True), t.Tokenizer(str(byte_tokenizer), 512)
    )
    assert np.array_equal(validation.tokens, np.arange(150))
    assert len(validation.target_bytes) == 149


@pytest.mark.parametrize(
    ("tokens", "said"), [(range(32), "less than one sequence"), ([1] * 50 + [512], "id 512")]
)
def test_unusable_validation_is_refused(tmp_path, byte_tokenizer, tokens, said):
    write_shard(tmp_path / "a_val_0.bin", tokens)
    with pytest.raises(t.UserError, match=said):
        t.load_validation(tiny(data_path=str(tmp_path)), t.Tokenizer(str(byte_tokenizer), 512))


# ---- The order of batches ------------------------------------------------------------------------

# Of these, 32, 0 and 1 hold no sequence of 32 tokens and its target; the others have as many
# windows at every phase.
LENGTHS = [352, 33, 32, 224, 0, 1, 96]
WINDOWS = 10 + 1 + 6 + 2


def epochs_of(count: int, seed: int = 3) -> list[list[tuple[int, int]]]:
    windows = t.batch_windows(LENGTHS, 32, seed)
    return [list(itertools.islice(windows, WINDOWS)) for _ in range(count)]


def test_an_epoch_visits_every_window_of_every_shard_once():
    """No token of a shard is left out, apart from less than a window at either end, and none is a
    target twice.
    """
    for epoch in epochs_of(5):
        assert len(set(epoch)) == len(epoch)
        for shard, length in enumerate(LENGTHS):
            starts = sorted(start for s, start in epoch if s == shard)
            if length <= 32:
                assert not starts
                continue
            assert starts == list(range(starts[0], starts[-1] + 1, 32))
            assert 0 <= starts[0] < 32
            assert starts[-1] + 33 <= length < starts[-1] + 32 + 33


def test_epochs_differ_in_order_and_phase_and_one_shard_is_read_at_a_time():
    epochs = epochs_of(6)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({min(start for shard, start in epoch if shard == 0) for epoch in epochs}) > 2
    orders = []
    for epoch in epochs:
        turns = [shard for shard, _ in itertools.groupby(epoch, key=lambda window: window[0])]
        assert len(turns) == len(set(turns))
        orders.append(turns)
        starts = [start for shard, start in epoch if shard == 0]
        assert starts != sorted(starts)
    # Where an epoch began with the shard that had ended the one before, text came twice in a row.
    assert orders == 6 * orders[:1]


def test_the_order_depends_on_the_seed_alone():
    assert epochs_of(3, seed=1) == epochs_of(3, seed=1)
    assert epochs_of(3, seed=1) != epochs_of(3, seed=2)


def test_shards_without_a_single_sequence_are_refused():
    with pytest.raises(t.UserError, match="TRAIN_SEQ_LEN=32"):
        next(t.batch_windows([32, 5], 32, seed=0))


def take(settings: t.Settings, world_size: int, steps: int) -> list[torch.Tensor]:
    """The first global batches, (sequences, length), put together from the ranks' shares."""
    ranks = [t.Batches(settings, t.Ranks(rank, world_size, CPU)) for rank in range(world_size)]
    return [torch.cat([batches.next()[0] for batches in ranks]) for _ in range(steps)]


def test_any_number_of_ranks_trains_on_the_same_batches(shards):
    settings = tiny(data_path=str(shards))
    one = take(settings, 1, 40)
    for world_size in (2, 4):
        assert all(map(torch.equal, take(settings, world_size, 40), one))
    assert not torch.equal(take(tiny(data_path=str(shards), seed=2), 1, 1)[0], one[0])


def test_targets_are_the_next_tokens_of_the_shard(tmp_path):
    """Tokens that count upwards show any shift, and any window that runs over the end of a
    shard.
    """
    write_shard(tmp_path / "a_train_0.bin", range(250))
    write_shard(tmp_path / "a_train_1.bin", range(300, 480))
    batches = t.Batches(tiny(data_path=str(tmp_path)), SOLO)
    for _ in range(10):
        tokens, targets = batches.next()
        assert tokens.dtype == torch.int64
        assert tokens.shape == targets.shape == (4, 32)
        assert torch.equal(targets, tokens + 1)
        assert (tokens.diff(dim=1) == 1).all()


def test_a_token_outside_the_vocabulary_reaches_the_training_loop_as_a_users_error(tmp_path):
    """At once if it is in the first batch, else where it comes."""
    write_shard(tmp_path / "a_train_0.bin", [5] * 200 + [512] + [5] * 200)
    with pytest.raises(t.UserError, match="id 512, but VOCAB_SIZE=512"):
        batches = t.Batches(tiny(data_path=str(tmp_path)), SOLO)
        for _ in range(10):
            batches.next()


# ---- Bytes per token -----------------------------------------------------------------------------

TEXTS = [
    "the cat sat",
    "The quick brown fox jumps over the lazy dog.",
    "naïve café, straße; Ελλάδα 東京 🙂 e\u0301 \u200b zero-width",
    "  many   spaces\tand\nlines  ",
    "x = 10_000 # 3.14159",
    "▁ is the space's own sign",
    "🙂",
    "a",
]


def encode(tokenizer: t.Tokenizer, documents: list[str]) -> np.ndarray:
    """The documents as in a shard: each behind BOS."""
    return np.concatenate(
        [[t.BOS_ID, *tokenizer.model.EncodeAsIds(text)] for text in documents]
    ).astype(np.uint16)


@pytest.mark.parametrize("kind", ["byte_tokenizer", "dummy_prefix_tokenizer"])
@pytest.mark.parametrize("documents", [*([text] for text in TEXTS), TEXTS, TEXTS[::-1]], ids=str)
def test_bytes_are_those_of_the_decoded_text(kind, documents, request):
    """Counting a space twice, or not at all, or a byte piece as its name, would show in the sum."""
    tokenizer = t.Tokenizer(str(request.getfixturevalue(kind)), 512)
    decoded = [tokenizer.model.DecodeIds(tokenizer.model.EncodeAsIds(text)) for text in documents]
    assert tokenizer.target_bytes(encode(tokenizer, documents)).sum() == sum(
        len(text.encode()) for text in decoded
    )


def test_the_bytes_of_a_known_sentence(byte_tokenizer):
    """Eleven letters and spaces, two bytes of é, four of the smiling face, one of its space."""
    tokenizer = t.Tokenizer(str(byte_tokenizer), 512)
    assert tokenizer.target_bytes(encode(tokenizer, ["the cat sat"])).sum() == 11
    assert tokenizer.target_bytes(encode(tokenizer, ["é 🙂"])).sum() == 2 + 1 + 4


def test_the_space_belongs_to_the_token_that_carries_it(byte_tokenizer):
    """Behind another word a leading space counts; behind BOS it does not, for decoding drops it."""
    tokenizer = t.Tokenizer(str(byte_tokenizer), 512)
    word = next(i for i in range(512) if tokenizer.model.IdToPiece(i) == "▁the")
    counted = tokenizer.target_bytes(np.array([t.BOS_ID, word, word, t.BOS_ID, word, 2, word]))
    assert counted.tolist() == [3, 4, 0, 3, 0, 3]


def test_unknown_tokens_have_no_bytes_and_do_not_pass_for_text(plain_tokenizer):
    """Without byte pieces: ☃ is unknown; by the contest's rule, so is the space right behind it."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(plain_tokenizer))
    tokenizer = t.Tokenizer(str(plain_tokenizer), model.vocab_size())
    tokens = encode(tokenizer, ["the ☃ market"])
    assert collections.Counter(tokens.tolist())[model.unk_id()] == 1
    assert tokenizer.target_bytes(tokens).sum() == len("the ") + len("market")
    assert tokenizer.target_bytes(encode(tokenizer, ["a☃b", "the market"])).sum() == 2 + len(
        "the market"
    )


def test_pieces_of_several_spaces_count_one_byte_a_space(tmp_path):
    """A tokenizer for source code may have such pieces; three bytes for each inner ▁ would flatter
    the score.
    """
    path = tmp_path / "spaces"
    lines = ["if a:", "        return b", "    else:", "        return c"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=f"{path}.model")
    tokenizer = t.Tokenizer(f"{path}.model", model.vocab_size())
    tokens = encode(tokenizer, ["if a:        return b"])
    assert any("▁▁" in model.IdToPiece(int(i)) for i in tokens)
    assert tokenizer.target_bytes(tokens).sum() == len("if a:        return b")


def without_its_space(path: Path, folder: Path) -> t.Tokenizer:
    """A tokenizer whose piece for the bare space is renamed, so that three byte pieces spell it."""
    renamed = folder / "nospace.model"
    data = path.read_bytes()
    assert data.count(b"\n\x03\xe2\x96\x81\x15") == 1
    renamed.write_bytes(data.replace(b"\n\x03\xe2\x96\x81\x15", b"\n\x03zqx\x15"))
    return t.Tokenizer(str(renamed), 512)


def streams(tokenizer: t.Tokenizer, documents: list[str]) -> list[np.ndarray]:
    """Documents as shards hold them: behind BOS, before EOS, cut in front, and one without end."""
    tokens = encode(tokenizer, documents)
    ends = np.where(tokens == t.BOS_ID, 2, tokens)
    return [tokens, ends[1:], tokens[5:], tokens[tokens != t.BOS_ID][3:]]


@pytest.mark.parametrize("kind", ["byte_tokenizer", "dummy_prefix_tokenizer", "plain_tokenizer"])
def test_a_tokenizers_own_tokens_fit_it(kind, request):
    """Also where characters are unknown, and with texts that normalizing changes, or twice does."""
    path = request.getfixturevalue(kind)
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    tokenizer = t.Tokenizer(str(path), size)
    documents = [*TEXT, *TEXTS, "▁ ▁▁ a  ▁", "ﬁ ﷺ \t two   spaces"] * 3
    for tokens in streams(tokenizer, documents):
        assert tokenizer.mismatch(tokens) == ""
    for tokens in (
        np.array([], np.uint16),
        np.array([t.BOS_ID, 2, t.BOS_ID]),
        np.array([size - 1] * 9),
    ):
        assert tokenizer.mismatch(tokens) == ""


def test_the_sample_fits_its_tokenizer_and_no_other(sample, byte_tokenizer):
    """Not the other way round either: tokens of the smaller one are all known to the larger one."""
    tokens = t.open_shards(str(sample), "val")[0].read()
    larger = t.Tokenizer(str(sample / "sample_1024_bpe.model"), 1024)
    started = time.perf_counter()
    assert larger.mismatch(tokens) == ""
    assert time.perf_counter() - started < 1
    smaller = t.Tokenizer(str(byte_tokenizer), 512)
    documents = np.split(tokens, np.flatnonzero(tokens == t.BOS_ID)[1:])
    texts = larger.model.decode([document[1:].tolist() for document in documents])
    assert "decoded and encoded again" in larger.mismatch(encode(smaller, texts))
    assert "decoded and encoded again" in smaller.mismatch(tokens % 512)


def test_text_that_was_encoded_in_pieces_is_refused_where_pairs_are_masked(sample, tmp_path):
    """Its pairs where pieces meet would get the least probability there is; most come back when
    it is decoded and encoded again, so that nothing else tells. A finished artifact has chosen.
    """
    model = sample / "sample_1024_bpe.model"
    named = {"data_path": str(tmp_path), "tokenizer_path": str(model), "vocab_size": 1024}
    settings = tiny(**named, mask_impossible_pairs=True)
    tokenizer = t.Tokenizer(str(model), 1024)
    whole = t.open_shards(str(sample), "val")[0].read()[:16_000]
    text = tokenizer.model.decode(whole[whole != t.BOS_ID].tolist())
    pieces = [text[start : start + 400] for start in range(0, len(text), 400)]
    pieces = np.concatenate(tokenizer.model.encode(pieces)).astype(np.uint16)
    write_shard(tmp_path / "sample_val_000000.bin", whole)
    t.load_validation(settings, tokenizer)
    write_shard(tmp_path / "sample_val_000000.bin", pieces)
    t.load_validation(t.replace(settings, mask_impossible_pairs=False), tokenizer)
    t.load_validation(t.replace(settings, eval_only=True), tokenizer)
    with pytest.raises(t.UserError, match="encoded in pieces.*MASK_IMPOSSIBLE_PAIRS=0"):
        t.load_validation(settings, tokenizer)


@pytest.mark.parametrize("lacking", [(), ("train",), ("val",), ("train", "val")], ids="+".join)
def test_text_without_bos_is_told_in_a_line_where_documents_count(shards, tmp_path, lacking):
    """And nowhere else; a shard of a text may hold none, or no token."""
    for path in shards.glob("*.bin"):
        tokens = t.Shard(path).read()
        kept = tokens[tokens != t.BOS_ID] if any(f"_{x}_" in path.name for x in lacking) else tokens
        write_shard(tmp_path / path.name, kept)
        if "_train_" in path.name:
            write_shard(tmp_path / path.name.replace("words", "more"), kept[kept != t.BOS_ID])
            write_shard(tmp_path / path.name.replace("words", "none"), [])
    named = {"tokenizer_path": str(shards / "tokenizer.model"), "data_path": str(tmp_path)}
    tokenizer = t.Tokenizer(named["tokenizer_path"], 512)
    training = t.open_shards(str(tmp_path), "train")
    changes = [
        {"document_reset": True, "eval_mode": "sliding"},
        {"document_reset": False, "eval_mode": "documents"},
        {"document_reset": False, "eval_mode": "sliding"},
    ]
    names = {"train": "training", "val": "validation"}
    told = " and ".join(names[x] for x in sorted(lacking, reverse=True))
    said = []

    def log(line: str, *_, **__):
        said.append(line)

    for number, change in enumerate(changes):
        settings = tiny(**named, **change)
        for opened in (training, []):  # none: as EVAL_ONLY has it
            said.clear()
            t.text_to_score(settings, tokenizer, [], opened, log)
            found = [line for line in said if "no BOS" in line]
            expected = told if opened else "validation" * ("val" in lacking)
            assert len(found) == (number < 2 and bool(expected))
            assert not found or f"no BOS (1) in the {expected} shards: put it" in found[0]
    # An artifact keeps its DOCUMENT_RESET: to set it would be refused.
    said.clear()
    t.text_to_score(tiny(**named, **changes[0], eval_only=True), tokenizer, [], [], log)
    found = [line for line in said if "no BOS" in line]
    assert len(found) == ("val" in lacking)
    assert all(line.endswith("shards: put it before each document") for line in found)


def test_a_space_that_is_spelt_by_bytes_is_found(byte_tokenizer, tmp_path):
    """Such a tokenizer agrees with itself: its tokens come back, and as text they have as many
    bytes as are counted, for decoding gives the sign ▁ for a space.
    """
    tokenizer = without_its_space(byte_tokenizer, tmp_path)
    assert tokenizer.model.decode(tokenizer.model.encode("a 🙂")) == "a▁🙂"
    assert "has it no piece for a space?" in tokenizer.mismatch(encode(tokenizer, ["a 🙂"] * 20))


@pytest.mark.parametrize(
    ("content", "vocab_size", "said"),
    [
        (None, 512, "no tokenizer at"),
        (b"", 512, "not a SentencePiece"),
        (b"\x00junk" * 99, 512, "not a SentencePiece"),
    ],
)
def test_an_unusable_tokenizer_is_refused(tmp_path, content, vocab_size, said):
    path = tmp_path / "t.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(t.UserError, match=said):
        t.Tokenizer(str(path), vocab_size)


@pytest.mark.parametrize("preset", t.PRESETS)
def test_the_command_that_makes_missing_data_is_told(monkeypatch, tmp_path, preset):
    """For the files of every preset; of others, the script that makes some."""
    monkeypatch.chdir(tmp_path)
    settings = t.Settings(**t.PRESETS[preset])
    fineweb = f"python data/prepare.py fineweb --variant sp{settings.vocab_size}"
    command = "python data/prepare.py sample" if preset in t.FOR_CPUS else fineweb
    with pytest.raises(t.UserError, match=f"set TOKENIZER_PATH, or run: {command}$"):
        t.Tokenizer(settings.tokenizer_path, settings.vocab_size)
    for split in ("train", "val"):
        with pytest.raises(t.UserError, match=f"set DATA_PATH, or run: {command}$"):
            t.open_shards(settings.data_path, split)
        with pytest.raises(t.UserError, match="set DATA_PATH, or see data/prepare.py$"):
            t.open_shards("elsewhere", split)


def test_a_tokenizer_of_another_size_is_refused(byte_tokenizer):
    with pytest.raises(t.UserError, match="512 tokens, but VOCAB_SIZE=500"):
        t.Tokenizer(str(byte_tokenizer), 500)


def test_the_sample_corpus_is_counted_to_the_byte(sample):
    """On all validation documents that data/prepare.py makes: 140,000 bytes of real text."""
    tokenizer = t.Tokenizer(str(sample / "sample_1024_bpe.model"), 1024)
    validation = t.load_validation(tiny(data_path=str(sample), vocab_size=1024), tokenizer)
    documents = np.split(validation.tokens, np.flatnonzero(validation.tokens == t.BOS_ID)[1:])
    texts = tokenizer.model.DecodeIds([document[1:].tolist() for document in documents])
    assert validation.target_bytes.sum() == sum(len(text.encode()) for text in texts)
