"""Tests of data/prepare.py. Nothing here uses the network: the Hugging Face hub is a folder on
disk.
"""

import contextlib
import errno
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt
from tests.support import run_here, tiny_environment

SCRIPT = Path(__file__).parents[1] / "data" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
sys.modules["prepare"] = prepare  # worker processes find its functions by this name
spec.loader.exec_module(prepare)

WORDS = re.findall(
    r"\w+",
    "river stone garden letter morning window paper silver market bridge candle forest story "
    "winter number island kitchen harbor signal copper village theater engine blanket mountain "
    "captain orange pencil travel question",
)


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Return distinct documents of words, digits, accents and characters that only byte pieces can
    spell.
    """
    rng = random.Random(seed)
    documents = []
    for index in range(count):
        words = [
            rng.choice(WORDS) + rng.choice(["", "s", "ed", ", and", "."])
            for _ in range(rng.randint(5, 60))
        ]
        documents.append(
            " ".join(
                [f"Number {seed}-{index}:", *words, rng.choice(["", "café", "東京 🙂", "x = 10"])]
            )
        )
    return [document.strip() for document in documents]


def run(*arguments) -> int:
    return prepare.main([str(argument) for argument in arguments])


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def read_shard(path: Path) -> np.ndarray:
    """Check the header of a shard and return its tokens."""
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    tokens = np.frombuffer(raw[1024:], dtype="<u2")
    assert header[:3].tolist() == [20240520, 1, len(tokens)]
    assert not header[3:].any()
    return tokens


def read_split(out: Path, name: str, split: str, model: Path | None = None) -> list[str]:
    """Decode all documents of a split; every one must start with BOS and hold no BOS, end or
    unknown token.
    """
    model = model or next(out.glob(f"{name}_*_bpe.model"))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = np.concatenate(
        [read_shard(path) for path in sorted(out.glob(f"{name}_{split}_*.bin"))]
    )
    assert tokens[0] == 1
    assert tokens.max() < tokenizer.vocab_size()
    assert not np.isin(tokens, [tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id()]).any()
    starts = np.flatnonzero(tokens == 1)
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


def write_text(path: Path, documents: list[str], separator: str = "\0") -> Path:
    path.write_text(separator.join(documents), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which knows when they were made."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def encoded(documents: list[str], model: Path) -> np.ndarray:
    """The documents' tokens, one behind the other."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return np.concatenate(tokenizer.encode(documents, add_bos=True)).astype("<u2")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A small tokenizer, so that most tests need not train one."""
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(prepare.train_tokenizer(make_documents(300, seed=9), 400))
    return path


# ---- Datasets from files ----


def test_shards_decode_to_the_text_in_order_and_split_is_disjoint(tmp_path, capsys):
    documents = make_documents(400)
    source = write_text(tmp_path / "in.txt", documents)
    out = tmp_path / "my data"
    options = ("--out", out, "--name", "toy", "--vocab-size", 400, "--val-fraction", 0.2)
    assert run("text", source, "--separator", "nul", *options) == 0
    train, val = read_split(out, "toy", "train"), read_split(out, "toy", "val")
    assert 40 < len(val) < 120
    in_val = set(val)
    assert train == [document for document in documents if document not in in_val]
    assert val == [document for document in documents if document in in_val]
    assert sorted(contents(out)) == [
        "toy_400_bpe.model",
        "toy_train_000000.bin",
        "toy_val_000000.bin",
    ]
    command = capsys.readouterr().out.splitlines()[-1]
    paths = f"DATA_PATH='{out}' TOKENIZER_PATH='{out}/toy_400_bpe.model'"
    assert command.startswith(f"{paths} VOCAB_SIZE=400 PRESET=tiny ")
    assert command.endswith("train_gpt.py")


def test_equal_documents_are_in_one_split_and_blank_ones_are_left_out(tmp_path, model):
    documents = make_documents(50)
    source = write_text(
        tmp_path / "in.txt", [*documents, "", " \n", *(f"  {document}\n" for document in documents)]
    )
    options = ("--out", tmp_path / "o", "--name", "n", "--tokenizer", model, "--val-fraction", 0.3)
    assert run("text", source, "--separator", "nul", *options) == 0
    train, val = (read_split(tmp_path / "o", "n", split, model) for split in ("train", "val"))
    assert len(train) + len(val) == 100
    assert not set(train) & set(val)


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(
        prepare, "BATCH_CHARACTERS", 500
    )  # many small batches, which finish in any order
    source = write_text(tmp_path / "in.txt", make_documents(300))
    for workers in (1, 2):
        options = (
            "--out",
            tmp_path / str(workers),
            "--name",
            "n",
            "--vocab-size",
            400,
            "--workers",
            workers,
        )
        assert run("text", source, "--separator", "nul", *options) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_shards_end_at_shard_tokens(tmp_path, model):
    source = write_text(tmp_path / "in.txt", make_documents(100))
    options = ("--name", "n", "--tokenizer", model, "--separator", "nul")
    assert run("text", source, "--out", tmp_path / "one", *options) == 0
    assert run("text", source, "--out", tmp_path / "many", *options, "--shard-tokens", 1000) == 0
    whole = read_shard(tmp_path / "one" / "n_train_000000.bin")
    parts = [read_shard(path) for path in sorted((tmp_path / "many").glob("n_train_*.bin"))]
    assert [len(part) for part in parts[:-1]] == [1000] * (len(parts) - 1)
    assert 1 < len(parts) == -(-len(whole) // 1000)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_file_is_one_document_by_default(tmp_path, model):
    texts = make_documents(3)
    paths = [write_text(tmp_path / f"{index}.txt", [text]) for index, text in enumerate(texts)]
    out = tmp_path / "o"
    assert (
        run(
            "text",
            paths[2],
            paths[0],
            "--val",
            paths[1],
            "--out",
            out,
            "--name",
            "n",
            "--tokenizer",
            model,
        )
        == 0
    )
    assert read_split(out, "n", "train", model) == [texts[2], texts[0]]
    assert read_split(out, "n", "val", model) == [texts[1]]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
@given(
    pieces=st.lists(st.text("aé\r\n \0#"), max_size=8),
    separator=st.sampled_from(["nul", "blank-line", "##", None]),
)
def test_separators_are_found_across_the_chunks_of_a_file(tmp_path, pieces, separator):
    """Reading 3 bytes at a time must give the same documents as reading the whole file at once."""
    path = tmp_path / "in.txt"
    path.write_bytes(
        {"nul": "\0", "blank-line": "\n\n", "##": "##", None: ""}[separator].join(pieces).encode()
    )
    results = []
    for chunk_bytes in (3, 2**24):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "CHUNK_BYTES", chunk_bytes)
            documents = (text.strip() for text, _ in prepare.read_text(path, separator))
            results.append([document for document in documents if document])
    assert results[0] == results[1]
    assert separator != "nul" or results[0] == [
        text.strip() for text in path.read_bytes().decode().split("\0") if text.strip()
    ]


def test_jsonl_field_and_null(tmp_path, model):
    documents = make_documents(40)
    rows = [{"text": "wrong", "body": document} for document in documents] + [{"body": None}]
    source = tmp_path / "in.jsonl"
    source.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8-sig")
    options = ("--out", tmp_path / "o", "--name", "n", "--tokenizer", model, "--val-fraction", 0.3)
    assert run("jsonl", source, "--field", "body", *options) == 0
    found = [read_split(tmp_path / "o", "n", split, model) for split in ("train", "val")]
    assert sorted(sum(found, [])) == sorted(documents)


def test_parquet_field_null_and_errors(tmp_path, model, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    documents = make_documents(40)
    table = pyarrow.table({"body": [*documents, None], "number": list(range(41))})
    source, broken = tmp_path / "in.parquet", tmp_path / "broken.parquet"
    parquet.write_table(table, source, row_group_size=7)
    broken.write_bytes(source.read_bytes()[:200])
    options = ("--out", tmp_path / "o", "--name", "n", "--tokenizer", model, "--val-fraction", 0.3)
    for path, field, message in (
        (source, "text", "no field 'text'; it has body, number"),
        (source, "number", "row 1: the field is of type int, not text"),
        (broken, "body", "cannot be read as Parquet"),
    ):
        assert run("parquet", path, "--field", field, *options) == 2
        assert message in capsys.readouterr().err
    assert run("parquet", source, "--field", "body", *options) == 0
    found = [read_split(tmp_path / "o", "n", split, model) for split in ("train", "val")]
    assert sorted(sum(found, [])) == sorted(documents)


def test_tokenizer_has_the_settings_of_the_contest(model):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert [tokenizer.id_to_piece(index) for index in range(5)] == [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<0x00>",
    ]
    assert tokenizer.vocab_size() == 400
    assert tokenizer.encode("a1234", out_type=str)[-4:] == list("1234")
    assert not tokenizer.encode("a", out_type=str)[0].startswith("▁")
    assert tokenizer.decode(tokenizer.encode("Ж  ½\n")) == "Ж 1⁄2"


def test_tokenizer_sample_is_bounded_even_and_without_validation():
    documents = [
        prepare.Document(text, index % 5 == 0, 0) for index, text in enumerate(make_documents(1000))
    ]
    total = sum(len(document.text) for document in documents if not document.is_validation)
    kept = prepare.tokenizer_sample(documents, total // 3)
    assert total / 8 < sum(map(len, kept)) <= total // 3
    training = [document.text for document in documents if not document.is_validation]
    assert set(kept) <= set(training)
    assert 0.3 < np.mean([training.index(text) for text in kept]) / len(training) < 0.7
    assert sorted(prepare.tokenizer_sample(documents)) == sorted(training)


# ---- Failures ----


def check_error(capsys, status: int, *fragments: str) -> None:
    """The run failed with one line on stderr that has these fragments."""
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("prepare.py: error: "), error
    assert error.count("\n") == 1, error
    for fragment in fragments:
        assert fragment in error


BAD_INPUTS = {
    "missing": ("text", None, [], "no such file"),
    "empty": ("text", b"", [], "no document that is not empty"),
    "blank": ("text", b" \n\n ", ["--separator", "blank-line"], "no document that is not empty"),
    "utf8": (
        "text",
        b"fine\0caf\xe9 \0",
        ["--separator", "nul"],
        "document 2 is not valid UTF-8 (byte 3)",
    ),
    "json": ("jsonl", b'{"text": "a"}\n{"text": \n', [], "line 2: invalid JSON"),
    "deep": ("jsonl", b"[" * 200_000, [], "line 1: invalid JSON"),
    "list": ("jsonl", b"[1]\n", [], "line 1: expected a JSON object, found a list"),
    "field": (
        "jsonl",
        b'{"title": "a", "body": "b"}\n',
        [],
        "line 1: no field 'text'; it has title, body",
    ),
    "type": ("jsonl", b'\n{"text": 3}\n', [], "line 2: the field is of type int, not text"),
    "surrogate": ("jsonl", b'{"text": "\\ud83d"}\n', [], "line 1: half of a surrogate pair"),
    "jsonutf8": ("jsonl", b'{"text": "\xff"}\n', [], "line 1 is not valid UTF-8"),
    "one": ("text", b"just one document", [], "none of the 1 documents is for validation"),
    "separator": ("text", b"a", ["--separator", ""], "--separator is empty"),
    "shard": ("text", b"a", ["--shard-tokens", "0"], "--shard-tokens 0 is not between"),
    "workers": ("text", b"a", ["--workers", "0"], "--workers 0 is not between"),
    "fraction": ("text", b"a", ["--val-fraction", "1"], "--val-fraction 1.0 is not between"),
    "name": ("text", b"a", ["--name", "a/b"], "--name 'a/b'"),
    "train": ("text", b"a", ["--name", "my_train"], "its validation shards would be training's"),
    "val": ("text", b"a", ["--name", "my_val_1"], "its validation shards would be training's"),
    "parquet": ("parquet", b"not parquet at all", [], "cannot be read as Parquet"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, model, case):
    command, data, options, message = BAD_INPUTS[case]
    if command == "parquet":
        pytest.importorskip("pyarrow")
    source, out = tmp_path / "input", tmp_path / "out"
    if data is not None:
        source.write_bytes(data)
    status = run(command, source, "--out", out, "--name", "n", "--tokenizer", model, *options)
    check_error(capsys, status, message)
    assert not out.exists()


RECORDS = [{"text": f"document {number} [1]", "tags": ["a"]} for number in range(3)]
OTHER_JSON = {  # how they are written, and what jq makes lines of that by
    "array": (json.dumps(RECORDS), "'.[]'"),
    "array of lines": ("[" + ",\n".join(map(json.dumps, RECORDS)) + "]\n", "'.[]'"),
    "indented array": (json.dumps(RECORDS, indent=2), "'.[]'"),
    "indented objects": ("\n".join(json.dumps(x, indent=2) for x in RECORDS), "."),
    "broken lines": ("\n".join(json.dumps(x).replace(", ", ",\n") for x in RECORDS), "."),
}


@pytest.mark.parametrize("kind", OTHER_JSON)
def test_json_that_is_not_one_object_a_line_is_told_the_way_there(tmp_path, kind):
    content, items = OTHER_JSON[kind]
    source, lines = tmp_path / "it's.json", tmp_path / "it's-lines.jsonl"
    source.write_text(content)
    with pytest.raises(prepare.PrepareError) as raised:
        list(prepare.read_jsonl(source, "text"))
    (command,) = re.findall("wanted is one object a line, which (.*) makes of", str(raised.value))
    assert shlex.split(command) == ["jq", "-c", items.strip("'"), str(source), ">", str(lines)]
    if shutil.which("jq"):
        subprocess.run(command, shell=True, check=True)
        read = [text for text, _ in prepare.read_jsonl(lines, "text")]
        assert read == [x["text"] for x in RECORDS]


@pytest.mark.parametrize("line", ['{"text": "cut o', "plain text\n", '{"text": "a"}, \n', "[1]\n"])
def test_a_line_that_is_otherwise_wrong_is_told_what_is_wanted_alone(tmp_path, line):
    (tmp_path / "lines.jsonl").write_text(line)
    with pytest.raises(prepare.PrepareError, match=r"; wanted is one object a line$"):
        list(prepare.read_jsonl(tmp_path / "lines.jsonl", "text"))


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (70_000, "--vocab-size 70000 is not between 1 and 65536"),
        (5000, "too little text"),
        (100, "too small"),
    ],
)
def test_vocabulary_that_does_not_fit(tmp_path, capsys, vocab_size, message):
    source, out = write_text(tmp_path / "in.txt", make_documents(50)), tmp_path / "new" / "out"
    options = ("--separator", "nul", "--out", out, "--name", "n", "--vocab-size", vocab_size)
    check_error(capsys, run("text", source, *options), message)
    assert sorted(tmp_path.iterdir()) == [source]  # no folder was made for nothing


def test_bad_tokenizers(tmp_path, capsys, monkeypatch, model):
    source, bad = write_text(tmp_path / "in.txt", make_documents(50)), tmp_path / "bad.model"
    options = ("--separator", "nul", "--out", tmp_path / "out", "--name", "n", "--tokenizer")
    check_error(capsys, run("text", source, *options, bad), "no such file")
    for content in (b"", b"plain text", model.read_bytes()[:1000]):
        bad.write_bytes(content)
        check_error(capsys, run("text", source, *options, bad), "not a SentencePiece model")
    monkeypatch.setattr(prepare, "BOS_ID", 7)
    check_error(capsys, run("text", source, *options, model), "its BOS id is 1")
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "MAX_VOCAB_SIZE", 399)
    with pytest.raises(prepare.PrepareError, match="400 pieces; shards hold uint16, at most 399"):
        prepare.load_tokenizer(model)


def test_folders_that_cannot_be_used(tmp_path, capsys, model):
    source = write_text(tmp_path / "in.txt", make_documents(50))
    options = ("--separator", "nul", "--name", "n", "--tokenizer", model)
    check_error(
        capsys, run("text", tmp_path, "--out", tmp_path / "o", *options), "not a regular file"
    )
    check_error(capsys, run("text", source, "--out", source, *options), f"{source}: File exists")
    check_error(capsys, run("text", source, "--out", source / "below", *options), "Not a directory")
    both = run("text", source, "--val", source, "--out", tmp_path / "o", *options)
    check_error(capsys, both, "both as INPUT and as --val")
    # By another name, a file is the same: its documents were validated on, or scored, twice.
    for number, link in enumerate((Path.symlink_to, Path.hardlink_to)):
        name = tmp_path / f"link{number}"
        link(name, source)
        both = run("text", source, "--val", name, "--out", tmp_path / "o", *options)
        check_error(capsys, both, f"{name} is given both as INPUT and as --val")
        for files in ((source, name), (source, source), (model, "--val", source, name)):
            twice = run("text", *files, "--out", tmp_path / "o", *options)
            check_error(capsys, twice, f"{files[-1]} is given twice")
    assert run("text", source, "--out", tmp_path / "o", *options) == 0
    other = run("text", source, "--out", tmp_path / "o", *options, "--name", "other")
    check_error(capsys, other, "already holds another dataset (n_train_000000.bin)")
    for path in (tmp_path / "o").glob("n_train_*.bin"):  # what is left would be scored, too
        path.rename(tmp_path / path.name)
    other = run("text", source, "--out", tmp_path / "o", *options, "--name", "other")
    check_error(capsys, other, "already holds another dataset (n_val_000000.bin)")
    (tmp_path / "n_train_000000.bin").rename(tmp_path / "o" / "n_train_000000.bin")
    for name in ("n_val_000007.bin", "n_val_bytes_000007.bin", "manifest.json"):
        before = contents(tmp_path / "o")
        (tmp_path / "o" / name).unlink(missing_ok=True)
        (tmp_path / "o" / name).mkdir()
        again = run("text", source, "--out", tmp_path / "o", *options)
        check_error(capsys, again, f"{name} is a folder where a file is to be")
        assert contents(tmp_path / "o") == before
        (tmp_path / "o" / name).rmdir()
    check_error(
        capsys, run("text", source, "--out", tmp_path / "o", *options[:-1], tmp_path), "not"
    )


def test_a_failed_run_leaves_the_earlier_dataset_and_a_good_one_replaces_it(
    tmp_path, capsys, monkeypatch, model
):
    source, out = write_text(tmp_path / "in.txt", make_documents(100)), tmp_path / "out"
    options = ("--separator", "nul", "--out", out, "--name", "n", "--tokenizer", model)
    assert run("text", source, *options, "--shard-tokens", 1000) == 0
    before = contents(out)
    assert len(before) > 3
    appended = prepare.ShardWriter.append
    for error, status, message in (
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            prepare.BrokenProcessPool(),
            2,
            "a worker process died, perhaps for lack of memory; try fewer --workers",
        ),
    ):

        def fail(writer, text, tokens, error=error):
            appended(writer, text, tokens)
            if writer.documents == 20:
                raise error

        monkeypatch.setattr(prepare.ShardWriter, "append", fail)
        capsys.readouterr()
        assert run("text", source, *options) == status
        assert capsys.readouterr().err.endswith(f": {message}\n")
        assert contents(out) == before
        assert not [path for path in out.iterdir() if path.is_dir()]
    monkeypatch.undo()
    assert run("text", source, *options) == 0
    assert sorted(contents(out)) == ["n_train_000000.bin", "n_val_000000.bin"]


def test_a_document_without_end_is_refused(tmp_path, capsys, monkeypatch, model):
    monkeypatch.setattr(prepare, "MAX_DOCUMENT_BYTES", 1000)
    source = write_text(tmp_path / "in.txt", ["a", "b" * 2000])
    options = ("--out", tmp_path / "out", "--name", "n", "--tokenizer", model)
    check_error(capsys, run("text", source, *options), "document 1 exceeds 1,000 bytes")
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 100)
    check_error(
        capsys,
        run("text", source, *options, "--separator", "nul"),
        "document 2 exceeds 1,000 bytes",
    )


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (["parquet", SCRIPT, "--out", "o", "--name", "n", "--val", __file__], "pyarrow"),
        (["fineweb"], "huggingface_hub"),
    ],
)
def test_missing_packages(tmp_path, capsys, monkeypatch, model, command, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    extra = ["--variant", "sp1024"] if command == ["fineweb"] else ["--tokenizer", model]
    check_error(capsys, run(*command, *extra), f"pip install {package}")


def test_a_console_without_a_paths_signs_ends_nothing(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1251")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(prepare, "run_sample", lambda args: print(args.out, flush=True))
    assert run("sample", "--out", "a×b") == 0
    assert console.buffer.getvalue() == b"a?b\n"


def test_nobody_needs_to_read_what_is_said(tmp_path, model):
    """The folders' names are no UTF-8, and the pipe is closed before anything is written to it."""
    folder = os.fsencode(tmp_path) + b"/d\xe4t"
    source, out = write_text(tmp_path / "in.txt", make_documents(60)), folder + b"/out"
    os.mkdir(folder)
    shutil.copy(model, os.fsdecode(folder))
    command = [sys.executable, SCRIPT, "text", source, "--separator", "nul", "--name", "n"]
    command += ["--out", out, "--tokenizer", folder + b"/small.model"]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert len(os.listdir(out)) == 3


def test_command_line_exit_status_without_traceback(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    command = [sys.executable, SCRIPT, "jsonl", bad, "--out", tmp_path / "o", "--name", "n"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"prepare.py: error: {bad} line 1: invalid JSON")
    assert result.stderr.count("\n") == 1


# ---- Tokenizers that do not give the text back ----


def trained(path: Path, texts: list[str], **options) -> Path:
    """A tokenizer of SentencePiece's own settings but for options."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).split("\n")),
        model_writer=model,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        **({"model_type": "bpe", "vocab_size": 400, "byte_fallback": True} | options),
    )
    path.write_bytes(model.getvalue())
    return path


EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def without_bare_space(model: Path, path: Path) -> Path:
    """The tokenizer with another name for the piece that is one space."""
    raw = model.read_bytes()
    assert raw.count(b"\n\x03\xe2\x96\x81\x15") == 1
    path.write_bytes(raw.replace(b"\n\x03\xe2\x96\x81\x15", b"\n\x03zqx\x15"))
    return path


def test_a_tokenizer_that_does_not_give_the_text_back_is_refused(tmp_path, capsys, model):
    """Its bytes would be counted wrong, by every check that asks the tokenizer itself."""
    documents = make_documents(100)
    source, out = write_text(tmp_path / "in.txt", documents), tmp_path / "out"
    suffix = trained(tmp_path / "suffix.model", documents, treat_whitespace_as_suffix=True)
    for bad, message in (
        (without_bare_space(model, tmp_path / "bare.model"), "do not give the text back"),
        (suffix, "bytes of a text of"),
    ):
        options = ("--separator", "nul", "--name", "n", "--tokenizer", bad)
        check_error(capsys, run("text", source, "--out", out, *options), message)
        assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {**EXACT, "add_dummy_prefix": False},
        {**EXACT, "user_defined_symbols": ["    ", "\n", "<|x|>"]},
        {"model_type": "unigram", "vocab_size": 350},
        {"normalization_rule_name": "nmt_nfkc_cf", "split_by_whitespace": False},
        {"model_type": "char", "vocab_size": 60, "byte_fallback": False},
    ],
    ids=["plain", "exact", "symbols", "unigram", "folded", "characters"],
)
def test_bytes_are_those_that_scores_divide_by(tmp_path, capsys, options):
    """The manifest's are train_gpt.py's; where they are not the text's, a line has both."""
    documents = [f"{text}\n\n    Ünïcode ½  of <s> {text[:9]}" for text in make_documents(60)]
    source, out = write_text(tmp_path / "in.txt", documents), tmp_path / "out"
    model = trained(tmp_path / "a.model", make_documents(200), **options)
    files = ("--separator", "nul", "--val-fraction", 0.4, "--tokenizer", model)
    assert run("text", source, "--out", out, "--name", "n", *files, "--shard-tokens", 999) == 0
    said = capsys.readouterr().err
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    counter = train_gpt.Tokenizer(str(model), tokenizer.vocab_size())
    splits = manifest_of(out)["splits"]
    for split, found in splits.items():
        tokens = np.concatenate(shards_of(out, split))
        assert found["bytes"] == counter.target_bytes(tokens).sum()
        assert found["unknown"] == (tokens == 3).sum()
    found = splits["val"]
    assert sum(splits[split]["text_bytes"] for split in splits) == len("".join(documents).encode())
    exact = options.items() >= EXACT.items()
    assert exact == (found["text_bytes"] == found["bytes"])
    if not exact:
        assert said.count("normalize text") == 1
        assert f"{found['text_bytes']:,} bytes of validation text are {found['bytes']:,}" in said
    assert ("does not know" in said) == bool(found["unknown"]) == ("byte_fallback" in options)
    # Without capitals, bytes are as many and scores lower.
    folded = options.get("normalization_rule_name") == "nmt_nfkc_cf"
    assert (f"{model} makes 'a' of 'A'" in said) == folded


def test_a_trained_tokenizer_has_a_piece_for_the_space_where_there_are_few(tmp_path):
    rng = random.Random(0)
    documents = ["".join(chr(0x4E00 + rng.randint(0, 99)) for _ in range(80)) for _ in range(300)]
    documents[0] += " " + documents[1]
    source = write_text(tmp_path / "in.txt", documents)
    options = ("--separator", "nul", "--out", tmp_path / "o", "--name", "n", "--vocab-size", 400)
    assert run("text", source, *options) == 0
    texts = [read_split(tmp_path / "o", "n", split) for split in ("train", "val")]
    assert sorted(sum(texts, [])) == sorted(documents)


def test_paragraphs_of_the_same_files_on_both_sides_are_said(tmp_path, capsys, model):
    source = write_text(tmp_path / "in.txt", make_documents(60), "\n\n")
    other = write_text(tmp_path / "val.txt", make_documents(6, seed=1), "\n\n")
    options = ("--separator", "blank-line", "--name", "n", "--tokenizer", model)
    assert run("text", source, "--out", tmp_path / "a", *options, "--val-fraction", 0.2) == 0
    assert "every paragraph is a document of its own" in capsys.readouterr().err
    assert run("text", source, "--out", tmp_path / "b", *options, "--val", other) == 0
    assert "paragraph" not in capsys.readouterr().err


# ---- Manifest ----


def test_the_manifest_says_what_the_shards_hold(tmp_path, model):
    documents = make_documents(80)
    source, out = write_text(tmp_path / "in.txt", documents), tmp_path / "out"
    options = ("--out", out, "--name", "n", "--tokenizer", model, "--val-fraction", 0.3)
    assert run("text", source, "--separator", "nul", *options, "--shard-tokens", 2000) == 0
    found = manifest_of(out)
    assert found["source"]["inputs"] == [
        {"file": "in.txt", "size": source.stat().st_size, "sha256": file_sha256(source)}
    ]
    command = shlex.join(["prepare.py", "text", str(source), "--separator", "nul", "--out"])
    assert found["command"].startswith(f"{command} ")
    assert found["tokenizer"]["sha256"] == file_sha256(model)
    assert (out / found["tokenizer"]["path"]).samefile(model)
    assert found["shards"].keys() == {path.name for path in out.glob("*.bin")}
    for name, entry in found["shards"].items():
        tokens, state = read_shard(out / name), (out / name).stat()
        assert entry["sha256"] == file_sha256(out / name)
        assert (entry["size"], entry["mtime_ns"]) == (state.st_size, state.st_mtime_ns)
        assert (entry["tokens"], entry["documents"]) == (len(tokens), (tokens == 1).sum())
        assert f"_{entry['split']}_" in name
        sample = train_gpt.Shard(out / name).sample
        assert entry["sampled_sha256"] == hashlib.sha256(sample).hexdigest()
    for split, sums in found["splits"].items():
        entries = [entry for entry in found["shards"].values() if entry["split"] == split]
        assert sums["shards"] == len(entries) > 1
        for kind in ("tokens", "documents", "bytes"):
            assert sums[kind] == sum(entry[kind] for entry in entries) > 0


def test_a_hash_is_trusted_while_the_file_is_as_it_was(finished, capsys):
    assert run("manifest", finished) == 0
    path = finished / "d_train_000001.bin"
    state, old, raw = path.stat(), file_sha256(path), path.read_bytes()
    path.write_bytes(raw[:-2] + raw[-4:-2])
    new = file_sha256(path)
    assert prepare.recorded_sha256(path) == new != old
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert prepare.recorded_sha256(path) == old  # read from the manifest
    assert run("manifest", finished) == 0
    assert "d_train_000001.bin is not the file that the earlier" in capsys.readouterr().err
    assert prepare.recorded_sha256(path) == new
    (finished / "d_train_000001.bin").unlink()
    assert run("manifest", finished) == 0
    assert "d_train_000001.bin, which the earlier manifest has," in capsys.readouterr().err


def test_what_an_earlier_manifest_knows_of_the_source_stays(tmp_path, model):
    source, out = write_text(tmp_path / "in.txt", make_documents(80)), tmp_path / "out"
    options = ("--out", out, "--name", "n", "--tokenizer", model, "--val-fraction", 0.3)
    assert run("text", source, "--separator", "nul", *options) == 0
    before = manifest_of(out)
    assert run("manifest", out) == 0
    after = manifest_of(out)
    assert (
        before.pop("command")
        != after.pop("command")
        == shlex.join(["prepare.py", "manifest", str(out)])
    )
    assert after == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "shards": 3}', "[" * 99_999])
def test_a_manifest_that_cannot_be_read_is_none(finished, text):
    assert run("manifest", finished) == 0
    good = manifest_of(finished)
    (finished / "manifest.json").write_text(text)
    path = finished / "d_val_000000.bin"
    assert prepare.recorded_sha256(path) == file_sha256(path)
    assert run("manifest", finished) == 0
    assert manifest_of(finished) == good


def test_validation_documents_among_those_for_training_are_counted(tmp_path, capsys, model):
    """Whole documents only: also one that goes over three shards, and one behind the last BOS."""
    train, val = make_documents(30), make_documents(10, seed=1)
    mixed = [*train[:7], val[3], "", *train[7:], val[8]]
    folder = tmp_path / "d"
    folder.mkdir()
    tokens = encoded(mixed, model)
    place = len(encoded(train[:7], model))
    for number, part in enumerate(np.split(tokens, [place + 2, place + 5, place + 5, place + 200])):
        write_shard(folder / f"x_train_{number:06d}.bin", part)
    # The beginning of a training document, and two with one between them, are no documents.
    nothing = [1] * 3  # BOS alone, as of a text of zero-width spaces
    tokens = np.append(encoded([*val, train[5][:20]], model), nothing)
    write_shard(folder / "x_val_000000.bin", tokens)
    assert run("manifest", folder, "--tokenizer", model) == 0
    size = len(encoded([val[3], val[8]], model))
    said = f"overlap: 2 of 14 validation documents ({size} tokens) are training documents, too"
    assert said in capsys.readouterr().out
    assert manifest_of(folder)["overlap"] == {"documents": 2, "tokens": size, "numbers": [3, 8]}


def test_shards_that_are_not_whole_or_of_another_tokenizer_are_refused(
    finished, tmp_path, capsys, model
):
    other = trained(tmp_path / "other.model", make_documents(200))
    small = trained(tmp_path / "small.model", make_documents(200), vocab_size=310)
    check_error(capsys, run("manifest", finished, "--tokenizer", other), "another tokenizer made")
    check_error(capsys, run("manifest", finished, "--tokenizer", small), "has 310 pieces: another")
    bare = without_bare_space(model, tmp_path / "bare.model")
    write_shard(finished / "d_val_000000.bin", encoded(make_documents(5, seed=1), bare))
    assert run("manifest", finished, "--tokenizer", bare) == 0
    assert "has no piece for the bare space" in capsys.readouterr().err
    shutil.copy(finished / "d_train_000000.bin", finished / "d_train_000003.bin")
    check_error(capsys, run("manifest", finished), "lacks number 2 of d_train_*.bin, but has 3")
    (finished / "d_train_000003.bin").rename(finished / "d_train_00.bin")
    check_error(capsys, run("manifest", finished), "has number 0 of d_train_*.bin twice")
    (finished / "d_train_00.bin").unlink()
    shutil.copy(finished / "d_val_000000.bin", finished / "d_val_000000 (1).bin")
    said = "d_val_000000.bin and d_val_000000 (1).bin are the same text"
    check_error(capsys, run("manifest", finished, "--tokenizer", bare), said)
    (finished / "d_val_000000 (1).bin").unlink()
    for model in (finished / "small.model", finished / "manifest.json"):
        model.unlink()
    check_error(capsys, run("manifest", finished), "give --tokenizer FILE.model")


@pytest.mark.parametrize("name", ["d_train_000002", "d_val_000001", "d_val_bytes_000000"])
@pytest.mark.parametrize("kind", ["a folder", "no file"])
def test_what_is_named_like_a_file_of_tokens_and_is_none_is_refused(
    finished, tmp_path, capsys, name, kind
):
    """By whatever reads that split. Files of bytes, which no command needs, are no exception."""
    assert run("manifest", finished) == 0
    capsys.readouterr()
    place = finished / f"{name}.bin"
    if kind == "a folder":
        place.mkdir()
    else:
        place.symlink_to("gone")
    said = f"{name}.bin is named like a file of tokens, but is {kind}; move it away"
    check_error(capsys, run("manifest", finished), said)
    out = ("--out", tmp_path / "o")
    check_error(capsys, run("development", finished, *out, "--part", 0), said)
    assert not (tmp_path / "o").exists()


# ---- The command at the end ----


@pytest.mark.parametrize(
    ("gpus", "enough", "end"),
    [
        (0, 0, "PRESET=tiny python train_gpt.py"),
        (8, 10**9, "PRESET=tiny python train_gpt.py"),
        (1, 0, "PRESET=short python train_gpt.py"),
        (3, 0, "PRESET=short python -m torch.distributed.run --standalone --nproc_per_node=2 "),
        (9, 0, "PRESET=default python -m torch.distributed.run --standalone --nproc_per_node=8 "),
    ],
)
def test_the_command_fits_the_machine(finished, capsys, monkeypatch, gpus, enough, end):
    monkeypatch.chdir(SCRIPT.parents[1])
    monkeypatch.setattr(prepare, "count_gpus", lambda: gpus)
    monkeypatch.setattr(prepare, "python_command", lambda: "python")
    monkeypatch.setattr(prepare, "LEAST_GPU_TOKENS", enough)
    assert run("manifest", finished) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert f" VOCAB_SIZE=400 {end}" in command
    assert command.endswith(" train_gpt.py")
    monkeypatch.setattr(prepare, "MOST_CPU_TOKENS", 100)
    assert run("manifest", finished) == 0
    *_, place, command = capsys.readouterr().out.splitlines()
    assert (gpus == 0) == ("on a machine with a GPU" in place)
    assert ("PRESET=tiny" in command) == (enough > 0)


def test_gpus_are_those_that_a_program_may_use(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nfor i in 0 1 2 3; do echo GPU $i: A; echo '  MIG 0'; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for visible, count in ((None, 4), ("1,3", 2), ("", 0), ("-1", 0), ("0,1,2,3,4,5", 4)):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert prepare.count_gpus() == count
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prepare.count_gpus() == 0


def test_the_command_of_a_development_split_trains_and_scores(
    tmp_path, capsys, monkeypatch, finished
):
    """It names the tokenizer, which lies in another folder; the model is a small one here."""
    monkeypatch.chdir(tmp_path)
    assert run("development", finished, "--out", "dev", "--part", 0.3) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    *given, python, script = shlex.split(command)
    assert Path(script).samefile(SCRIPT.parents[1] / "train_gpt.py") and shutil.which(python)
    given = dict(variable.split("=", 1) for variable in given)
    assert given.keys() == {"DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE", "PRESET"}
    small = tiny_environment(iterations=1, max_wallclock_seconds=0, ttt_enabled=False)
    small |= {"EVAL_MODE": "plain", "DEVICE": "cpu", "RUN_ID": "dev"}
    assert run_here(monkeypatch, small | given) == 0
    assert "val_bpb" in capsys.readouterr().out.splitlines()[-1]


# ---- Signals ----


def workers_of(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(number) for number in text.split()]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition) -> None:
    """Until it is true, or the test fails: machines that are shared stall."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def kill(process: subprocess.Popen, workers: list[int]) -> None:
    """Kills a process of prepare.py; workers becomes the list of all that it had started by then.

    The first that are seen are not all: a pool starts the others as there is work for them.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        workers[:] = {*workers, *workers_of(process.pid)}
    process.kill()
    process.wait()


@contextlib.contextmanager
def started(*arguments, **options):
    """A process of prepare.py that has workers; it and they are gone afterwards."""
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)
    workers = []
    try:
        wait_until(lambda: workers.extend(workers_of(process.pid)) or workers)
        yield process, workers
    finally:
        kill(process, workers)
        process.stderr.close()
        wait_until(lambda: not any(map(is_alive, workers)))


@pytest.fixture(scope="session")
def long_text(tmp_path_factory) -> Path:
    """A text that keeps its workers busy for longer than a test takes to stop them."""
    path = tmp_path_factory.mktemp("long") / "long.txt"
    return write_text(path, make_documents(1000) * 60)


def stop_default(number: int):
    """What a child does first: shells leave signals ignored to what they start behind."""
    return lambda: signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
def test_every_signal_to_stop_cleans_up(tmp_path, long_text, model, name):
    out, number = tmp_path / "out", getattr(signal, name)
    options = ("--separator", "nul", "--out", out, "--name", "n", "--tokenizer", model)
    with started("text", long_text, *options, preexec_fn=stop_default(number)) as (
        process,
        workers,
    ):
        process.send_signal(number)
        error = process.communicate()[1]
        assert process.returncode == 128 + number
        assert error.splitlines()[-1] == f"prepare.py: error: interrupted by {name}"
        assert "Traceback" not in error
        assert not any(map(is_alive, workers))
        assert not out.exists()


def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path, long_text, capsys, model):
    """Its workers end by themselves, and until then nobody else writes there."""
    source, out = write_text(tmp_path / "in.txt", make_documents(60)), tmp_path / "out"
    options = ("--separator", "nul", "--out", out, "--name", "n", "--tokenizer", model)
    with started("text", long_text, *options) as (process, workers):
        check_error(capsys, run("text", source, *options), f"another process is writing to {out}")
        kill(process, workers)
        assert [path.name[:12] for path in out.iterdir()] == [".unfinished-"]
        wait_until(lambda: not any(map(is_alive, workers)))
    assert run("text", source, *options) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        "n_train_000000.bin",
        "n_val_000000.bin",
    ]


def test_a_signal_that_the_parent_ignores_is_ignored(tmp_path, long_text):
    """As nohup does it; and in a tokenizer's training, a signal is obeyed at once."""
    out = tmp_path / "out"
    options = ("--separator", "nul", "--out", out, "--name", "n", "--vocab-size", 600)

    def ignore_hangups():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with started("text", long_text, *options, preexec_fn=ignore_hangups) as (process, workers):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        assert process.poll() is None
        process.terminate()
        assert "interrupted by SIGTERM" in process.communicate()[1]
        assert not out.exists()


def test_a_signal_while_files_are_moved_waits_until_they_are(tmp_path, capsys, monkeypatch, model):
    source, out = write_text(tmp_path / "in.txt", make_documents(60)), tmp_path / "out"
    options = ("--separator", "nul", "--out", out, "--name", "n", "--tokenizer", model)
    replace = os.replace

    def interrupted(old, new):
        os.kill(os.getpid(), signal.SIGTERM)
        replace(old, new)

    monkeypatch.setattr(prepare.os, "replace", interrupted)
    monkeypatch.setattr(prepare, "write_manifest", lambda folder, manifest: None)
    assert run("text", source, *options) == 128 + signal.SIGTERM
    assert "interrupted by SIGTERM" in capsys.readouterr().err
    assert sorted(contents(out)) == ["n_train_000000.bin", "n_val_000000.bin"]


def test_a_dataset_is_published_with_its_validation_text_last(tmp_path, monkeypatch, model):
    """A run that is killed in between leaves what train_gpt.py refuses."""
    source, out = write_text(tmp_path / "in.txt", make_documents(60)), tmp_path / "out"
    options = ("--separator", "nul", "--out", out, "--name", "n", "--shard-tokens", 500)
    moved, replace = [], os.replace
    monkeypatch.setattr(
        prepare.os, "replace", lambda old, new: moved.append(Path(new).name) or replace(old, new)
    )
    assert run("text", source, *options, "--vocab-size", 400, "--val-fraction", 0.3) == 0
    moved = [name for name in moved if name in {path.name for path in out.iterdir()}]
    kinds = [name.split("_")[1] if "_" in name else name for name in moved]
    order = [kind for kind, _ in itertools.groupby(kinds)]
    assert order == ["manifest.json", "400", "train", "val", "manifest.json"]


def test_a_disk_without_room_is_one_line(tmp_path, long_text, model):
    out = tmp_path / "out"
    options = ("--separator", "nul", "--out", out, "--name", "n", "--tokenizer", model)
    limit = [resource.RLIMIT_FSIZE, (100_000, 100_000)]
    command = [sys.executable, SCRIPT, "text", long_text, *map(str, options)]
    result = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(*limit)
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "File too large" in result.stderr
    assert not out.exists()


# ---- Sample ----


@pytest.fixture
def finished(tmp_path, model) -> Path:
    """A dataset of two training shards, which a document goes over, and one of validation text."""
    folder = tmp_path / "finished"
    folder.mkdir()
    shutil.copy(model, folder)
    train = encoded(make_documents(50), model)
    for name, tokens in (
        ("train_000000", train[:300]),
        ("train_000001", train[300:]),
        ("val_000000", encoded(make_documents(5, seed=1), model)),
    ):
        write_shard(folder / f"d_{name}.bin", tokens)
    return folder


def shards_of(folder: Path, split: str) -> list[np.ndarray]:
    return [read_shard(path) for path in sorted(folder.glob(f"*_{split}_*.bin"))]


def split_documents(tokens: np.ndarray) -> list[bytes]:
    return [part.tobytes() for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]


def test_a_development_split_is_the_end_of_the_training_text(finished, tmp_path, capsys):
    """Cut between documents; the dataset itself stays as it is, and its validation text out of
    it.
    """
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    out = tmp_path / "out"
    assert run("development", finished, "--out", out, "--part", 0.1) == 0
    (train,), (validation,) = shards_of(out, "train"), shards_of(out, "val")
    assert np.array_equal(
        np.append(train, validation), np.concatenate(shards_of(finished, "train"))
    )
    assert len(split_documents(validation)) == 5
    assert validation[0] == 1
    assert f"DATA_PATH={shlex.quote(str(out))}" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_shard_that_is_cut_while_it_is_read_is_refused(finished, tmp_path, monkeypatch, capsys):
    """Half of it would be taken for the whole, and a manifest agree with that."""
    read = np.fromfile

    def cut(path, **options):
        os.truncate(path, 1024 + 2 * 100)
        return read(path, **options)

    monkeypatch.setattr(np, "fromfile", cut)
    assert run("development", finished, "--out", tmp_path / "out") == 2
    assert "d_train_000000.bin was cut off while it was read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [0, 0.1])
def test_documents_come_in_as_many_orders_as_asked_for(finished, tmp_path, part):
    """A shard for each, with the same documents; and another part or number replaces what an
    earlier run made.
    """
    out = tmp_path / "out"
    assert run("development", finished, "--out", out, "--orders", 5) == 0
    assert run("development", finished, "--out", out, "--orders", 3, "--part", part) == 0
    orders = [split_documents(tokens) for tokens in shards_of(out, "train")]
    originals = split_documents(np.concatenate(shards_of(finished, "train")))
    assert len(orders) == 3
    assert len({tuple(order) for order in orders} | {tuple(originals)}) == 4
    assert all(sorted(order) == sorted(originals[: len(orders[0])]) for order in orders)
    assert len(orders[0]) == (45 if part else 50)
    if not part:
        assert np.array_equal(shards_of(out, "val"), shards_of(finished, "val"))
    assert (
        run("development", finished, "--out", tmp_path / "again", "--orders", 3, "--part", part)
        == 0
    )
    assert [split_documents(tokens) for tokens in shards_of(tmp_path / "again", "train")] == orders


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--part", 1], "--part 1.0 is not between 0 and 1"),
        (["--part", 1e-20], "leaves one side without any"),
        (["--part", 0.999], "leaves one side without any"),
        (["--orders", -1], "--orders -1 is not between"),
        (["--seed", -1], "--seed -1 is negative"),
        (["--out", "finished"], "already holds another dataset (d_train_000000.bin)"),
        (["--out", "mine"], "mine is the dataset itself"),
        (["damaged"], "d_train_000000.bin: the header says 300 tokens"),
        (["nothing"], "nothing holds no *_train_*.bin shards"),
    ],
)
def test_development_splits_that_cannot_be(
    finished, tmp_path, capsys, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "damaged")
    with open("damaged/d_train_000000.bin", "ab") as file:
        file.write(b"xx")
    assert run("development", finished, "--out", "mine") == 0
    dataset = (
        "mine" if arguments[-1] == "mine" else arguments.pop(0) if len(arguments) == 1 else finished
    )
    assert run("development", dataset, "--out", "out", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_sample_is_about_2_megabytes_and_deterministic(tmp_path, sample):
    """The fixture's process had another seed of hashes."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    out = tmp_path / "again"
    done = subprocess.run(
        [sys.executable, SCRIPT, "sample", "--out", out],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(sample)
    assert sorted(contents(out)) == [
        "sample_1024_bpe.model",
        "sample_train_000000.bin",
        "sample_val_000000.bin",
    ]
    folder, model = shlex.quote(str(out)), shlex.quote(f"{out}/sample_1024_bpe.model")
    environment = f"DATA_PATH={folder} TOKENIZER_PATH={model} VOCAB_SIZE=1024 "
    assert done.stdout.splitlines()[-1].startswith(environment)
    train, val = read_split(out, "sample", "train"), read_split(out, "sample", "val")
    assert 1.5e6 < sum(len(text.encode()) for text in train + val) < 3e6
    assert not set(train) & set(val)
    assert 0.02 < len(val) / len(train + val) < 0.1
    text = " ".join(train)
    assert text.count(" the ") > 0.03 * len(text.split())


def test_sample_needs_sources_and_enough_text(tmp_path, capsys, monkeypatch):
    library = tmp_path / "lib"
    library.mkdir()
    monkeypatch.setattr(prepare.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    check_error(
        capsys, run("sample", "--out", tmp_path / "o"), "no standard-library sources", str(library)
    )
    (library / "broken.py").write_text("def (")
    (library / "latin.py").write_bytes(b"# caf\xe9")
    (library / "good.py").write_text(
        '"""This is the text of the module.\n\nThis is an example of it:\n'
        '>>> the_code(1)\n\nx = {}\n"""\n\ndef f():\n'
        '    """Return the *result* of the :func:`call`."""\n'
        "    # This comment is in\n    # two lines of the source.\n"
    )
    assert prepare.standard_library_documents() == [
        "This is the text of the module.\n\nThis is an example of it:\n\n"
        "Return the result of the call."
        "\n\nThis comment is in two lines of the source."
    ]
    check_error(
        capsys, run("sample", "--out", tmp_path / "o"), "too little text for a vocabulary of 1024"
    )


# ---- FineWeb ----


class FakeHub(types.SimpleNamespace):
    """What prepare.py uses of huggingface_hub, over a folder on disk; `fetched` lists the
    downloads.
    """

    def __init__(self, root: Path):
        super().__init__(root=root, fetched=[], before_download=lambda path, copy: None, lfs=True)

    def HfApi(self):  # noqa: N802 (the package's name)
        return self

    def list_repo_tree(self, repo_id, path_in_repo, *, repo_type):
        assert (repo_id, repo_type) == ("willdepueoai/parameter-golf", "dataset")
        for path in sorted((self.root / path_in_repo).iterdir()):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            lfs = types.SimpleNamespace(sha256=digest) if self.lfs else None
            yield types.SimpleNamespace(
                path=f"{path_in_repo}/{path.name}", size=path.stat().st_size, lfs=lfs
            )

    def hf_hub_download(self, repo_id, filename, *, repo_type, local_dir):
        assert (repo_id, repo_type) == ("willdepueoai/parameter-golf", "dataset")
        copy = Path(local_dir) / filename
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.root / filename, copy)
        self.before_download(Path(filename).name, copy)
        self.fetched.append(Path(filename).name)
        return str(copy)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


TOKENIZER, VAL = "fineweb_1024_bpe.model", ["fineweb_val_000000.bin", "fineweb_val_000001.bin"]
TRAIN = [f"fineweb_train_{index:06d}.bin" for index in range(4)]
COMMAND = ("fineweb", "--variant", "sp1024", "--out", "data", "--train-shards")


@pytest.fixture
def hub(tmp_path, monkeypatch, model) -> FakeHub:
    """A hub with four training and two validation shards; the working folder is empty."""
    root = tmp_path / "remote"
    shards, tokenizers = root / "datasets/datasets/fineweb10B_sp1024", root / "datasets/tokenizers"
    shards.mkdir(parents=True)
    tokenizers.mkdir(parents=True)
    shutil.copy(model, tokenizers / TOKENIZER)
    (tokenizers / "fineweb_1024_bpe.vocab").write_text("not needed")
    for index, name in enumerate(TRAIN + VAL):
        write_shard(shards / name, encoded(make_documents(5, seed=index), model))
    hub = FakeHub(root)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    local = tmp_path / "local"
    local.mkdir()
    monkeypatch.chdir(local)
    return hub


def local_files() -> dict[str, bytes]:
    return {Path(path).name: content for path, content in contents(Path("data")).items()}


def test_fineweb_gets_the_layout_of_the_contest_and_skips_good_files(hub, capsys):
    assert run(*COMMAND, 2) == 0
    assert sorted(hub.fetched) == sorted([TOKENIZER, *VAL, *TRAIN[:2]])
    paths = "DATA_PATH=data/datasets/fineweb10B_sp1024 "
    paths += "TOKENIZER_PATH=data/tokenizers/fineweb_1024_bpe.model"
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{paths} VOCAB_SIZE=400 ")
    remote = contents(hub.root / "datasets")
    assert contents(Path("data")) == {
        path: remote[path] for path in remote if Path(path).name in hub.fetched
    }
    hub.fetched.clear()
    assert run(*COMMAND, 3) == 0
    assert hub.fetched == [TRAIN[2]]


def test_fineweb_replaces_damaged_local_files(hub):
    assert run(*COMMAND, 3) == 0
    folder = Path("data/datasets/fineweb10B_sp1024")
    good = (folder / TRAIN[0]).read_bytes()
    (folder / TRAIN[0]).write_bytes(good[:-2])
    (folder / TRAIN[2]).write_bytes(good[:-1] + b"\x7f")
    hub.fetched.clear()
    assert run(*COMMAND, 3) == 0
    assert hub.fetched == [TRAIN[0], TRAIN[2]]
    assert (folder / TRAIN[0]).read_bytes() == good


def test_fineweb_resumes_after_a_lost_connection(hub, capsys):
    def lose_connection(name, copy):
        if name == TRAIN[1]:
            copy.write_bytes(b"half")
            raise RuntimeError("connection lost\nmore lines")

    hub.before_download = lose_connection
    check_error(
        capsys,
        run(*COMMAND, 3),
        f"download of {TRAIN[1]} failed, run again to resume: connection lost",
    )
    assert TRAIN[0] in local_files()
    assert not Path("data/datasets").exists()  # half a dataset would be trained on
    hub.fetched.clear()
    hub.before_download = lambda name, copy: None
    assert run(*COMMAND, 3) == 0
    assert hub.fetched == TRAIN[1:3] + VAL
    assert len(local_files()) == 6


def test_a_dataset_that_grows_stays_as_it_was_until_all_has_come(hub, capsys):
    assert run(*COMMAND, 1) == 0
    folder = Path("data/datasets/fineweb10B_sp1024")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (hub.root / "datasets/datasets/fineweb10B_sp1024" / TRAIN[3]).write_bytes(b"no shard")
    check_error(capsys, run(*COMMAND, 4), f"the download of {TRAIN[3]} is corrupt")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert run(*COMMAND, 3) == 0
    assert manifest_of(folder)["splits"]["train"]["shards"] == 3


def test_files_that_are_there_are_not_read_again(hub, monkeypatch):
    """Their size and time of change are the manifest's; the tokenizer's file alone is read."""
    assert run(*COMMAND, 2) == 0
    path = Path("data/datasets/fineweb10B_sp1024/manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["tokenizer"]["case_operators"]  # as older ones are
    path.write_text(json.dumps(manifest))
    monkeypatch.setattr(prepare, "read_shard", None)
    read = []
    monkeypatch.setattr(prepare, "file_sha256", lambda path: read.append(path) or file_sha256(path))
    assert run(*COMMAND, 2) == 0
    assert {path.name for path in read} == {TOKENIZER}


def flip_last_byte(copy: Path) -> None:
    raw = copy.read_bytes()
    copy.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def test_fineweb_refuses_folders_where_files_are_to_be_before_it_downloads(hub, capsys):
    folder = Path("data/datasets/fineweb10B_sp1024")
    (folder / TRAIN[0]).mkdir(parents=True)
    check_error(capsys, run(*COMMAND, 1), f"{TRAIN[0]} is a folder where a file is to be")
    assert hub.fetched == []
    (folder / TRAIN[0]).rmdir()
    assert run(*COMMAND, 1) == 0
    capsys.readouterr()
    for name in (TRAIN[1], "fineweb_val_bytes_000000.bin"):  # of no download, but it is read
        (folder / name).mkdir()
        check_error(capsys, run(*COMMAND, 1), f"{name} is named like a file of tokens, but is a")
        (folder / name).rmdir()


def test_fineweb_refuses_corrupt_downloads(hub, capsys):
    for name, damage, message in (
        (VAL[1], flip_last_byte, "SHA-256 differs"),
        (TRAIN[0], lambda copy: copy.write_bytes(copy.read_bytes() + b"xx"), "bytes instead of"),
        (TOKENIZER, flip_last_byte, "SHA-256 differs"),
    ):
        hub.before_download = lambda path, copy, name=name, damage=damage: (
            damage(copy) if path == name else None
        )
        shutil.rmtree("data", ignore_errors=True)
        check_error(capsys, run(*COMMAND, 1), f"the download of {name} is corrupt", message)
        assert name not in local_files()
    hub.before_download = lambda name, copy: None
    assert run(*COMMAND, 1) == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_fineweb_checks_headers_even_without_checksums(hub, capsys, place):
    hub.lfs = False
    path = hub.root / "datasets/datasets/fineweb10B_sp1024" / TRAIN[0]
    raw = bytearray(path.read_bytes())
    raw[4 * place] ^= 1  # magic number, version, number of tokens
    path.write_bytes(raw)
    check_error(
        capsys, run(*COMMAND, 1), TRAIN[0], "the header says" if place == 2 else "not a token shard"
    )
    assert TRAIN[0] not in local_files()


def test_fineweb_requests_that_cannot_be_met(hub, capsys, monkeypatch):
    check_error(capsys, run(*COMMAND, 5), "has only 4 training shards")
    check_error(capsys, run(*COMMAND, 0), "must be at least 1")
    (hub.root / "datasets/tokenizers" / TOKENIZER).unlink()
    check_error(capsys, run(*COMMAND, 1), "has no validation shards of fineweb10B_sp1024, or no")
    shutil.rmtree(hub.root)
    check_error(capsys, run(*COMMAND, 1), "cannot list the files of willdepueoai/parameter-golf")
    assert not Path("data").exists()
