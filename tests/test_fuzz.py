"""The fuzzer: a few hundred damaged files are read right or refused, and whatever else a reader may
do is found.
"""

import os
import random
import re
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as t
from tests import fuzz

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="workers are forked, which CUDA does not survive"
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> fuzz.Originals:
    return fuzz.make_originals(tmp_path_factory.mktemp("originals"))


def test_damaged_files_are_read_right_or_refused(originals):
    outcomes = fuzz.fuzz(originals, 320)
    text = fuzz.report(outcomes)
    assert text.splitlines()[-1] == "320 cases, 0 findings", text
    assert [outcome.case for outcome in outcomes] == list(range(320))
    for kind in fuzz.READERS:  # neither is all refused nor all harmless
        results = [outcome.result for outcome in outcomes if outcome.kind == kind]
        assert (
            results.count("read") >= 5 or kind == "artifact"
        )  # hardly any damage passes an artifact's checks
        assert results.count("refused") >= 20
    assert len({outcome.reason for outcome in outcomes if outcome.result == "refused"}) >= 8


def test_a_case_is_the_same_file_each_time(originals):
    kinds = tuple(fuzz.READERS)
    files = [
        [fuzz.make_case(n, seed, kinds, originals).data for n in range(60)] for seed in (1, 1, 2)
    ]
    assert files[0] == files[1]
    assert sum(a != b for a, b in zip(files[0], files[2], strict=False)) > 50


@pytest.mark.parametrize(
    "how",
    [*fuzz.GENERAL, *(how for own in fuzz.OWN.values() for how in own)],
    ids=lambda h: h.__name__,
)
def test_every_damage_changes_files_of_every_size(originals, how):
    """Short files, too, as a second damage may find them."""
    pick = random.Random(0)
    kinds = [kind for kind, own in fuzz.OWN.items() if how in own] or list(fuzz.OWN)
    for kind in kinds:
        changed = [how(originals[kind], pick, [b"other"]) != originals[kind] for _ in range(20)]
        assert sum(changed) >= 10
    if how in fuzz.GENERAL:
        for size in (1, 2, 33):
            for _ in range(20):
                assert isinstance(how(bytes(size), pick, [b"other"]), bytes)


def raise_(error: Exception) -> None:
    raise error


# What a reader may not do, and what the fuzzer says of it.
MISDEEDS = {
    "another exception": (lambda: raise_(KeyError("x")), "KeyError"),
    "a message of two lines": (lambda: raise_(t.UserError("a\nb")), "message 'a"),
    "a crash": (
        lambda: os.kill(os.getpid(), signal.SIGSEGV),
        f"ended with status -{signal.SIGSEGV.value}",
    ),
    "a silent end": (lambda: os._exit(0), "ended with status 0"),
    "a hang": (lambda: time.sleep(60), "took longer than 1 s"),
    "too much memory": (lambda: np.ones(100 << 17).sum(), "MiB of memory, more than 64"),
    "code from the file": (lambda: exec("pass"), "compile"),
    "a program": (lambda: os.system("true"), "os.system"),
    "another file": (lambda: open(os.devnull).close(), f"open {os.devnull}"),
}


@pytest.mark.parametrize("name", MISDEEDS)
def test_a_reader_that_misbehaves_is_found(originals, monkeypatch, name):
    """Only with damaged files; workers inherit the reader, and go on with the next case."""
    misbehave, said = MISDEEDS[name]
    shard = t.Shard

    def reader(path):
        if path.read_bytes() != originals["shard"]:
            misbehave()
        return shard(path)

    monkeypatch.setattr(t, "Shard", reader)
    outcomes = fuzz.fuzz(
        originals, 2, kinds=("shard",), jobs=1, seconds=1 if name == "a hang" else 30
    )
    assert [outcome.result for outcome in outcomes] == ["finding"] * 2
    assert all(said in outcome.reason for outcome in outcomes), outcomes
    assert re.search(r"FINDING in case 0, shard, \w+: ", fuzz.report(outcomes))


def find(originals: fuzz.Originals, patch: pytest.MonkeyPatch, case: fuzz.Case) -> str:
    """What is found with this file."""
    patch.setattr(fuzz, "make_case", lambda *_: case)
    (outcome,) = fuzz.fuzz(originals, 1, kinds=(case.kind,), jobs=1)
    return outcome.reason if outcome.result == "finding" else ""


def test_a_reader_that_reads_wrong_or_too_much_is_found(originals, monkeypatch):
    """Other tokens; weights that differ in the last bit; a checksum that nobody looks at."""
    read, load_model, sha256 = t.Shard.read, t.load_model, t.hashlib.sha256
    with monkeypatch.context() as patch:
        assert find(originals, patch, fuzz.Case("shard", "", originals["shard"])) == ""
        patch.setattr(t.Shard, "read", lambda shard: np.append(read(shard)[:-1], 5))
        assert (
            find(originals, patch, fuzz.Case("shard", "", originals["shard"]))
            == "other tokens were read"
        )

    def wrong(*arguments):
        model, settings = load_model(*arguments)
        model.embedding.weight.data.view(torch.int32)[0, 0] += 1
        return model, settings

    with monkeypatch.context() as patch:
        assert find(originals, patch, fuzz.Case("artifact", "", originals["artifact"])) == ""
        patch.setattr(t, "load_model", wrong)
        assert (
            find(originals, patch, fuzz.Case("artifact", "", originals["artifact"]))
            == "other weights were read"
        )
    damaged = originals["artifact"].replace(b'"qk_gain_init":1.5', b'"qk_gain_init":1.7')
    assert damaged != originals["artifact"]
    with monkeypatch.context() as patch:
        assert find(originals, patch, fuzz.Case("artifact", "", damaged)) == ""
        digest = SimpleNamespace(digest=lambda: damaged[-32:])
        patch.setattr(
            t.hashlib, "sha256", lambda data: digest if data == damaged[:-32] else sha256(data)
        )
        assert "wrong checksum was read" in find(
            originals, patch, fuzz.Case("artifact", "", damaged)
        )


def test_a_reader_of_checkpoints_that_reads_wrong_is_found(originals, monkeypatch):
    """By a bit, or a step."""
    resume, data = t.Trainer.resume, originals["checkpoint"]

    def other_bit(trainer):
        resume(trainer)
        trainer.average.ema[0].view(torch.int32).view(-1)[0] += 1

    def other_step(trainer):
        resume(trainer)
        trainer.steps_done += 1

    for wrong, said in (
        (other_bit, "other numbers were read"),
        (other_step, "other progress was read"),
    ):
        with monkeypatch.context() as patch:
            assert find(originals, patch, fuzz.Case("checkpoint", "", data)) == ""
            patch.setattr(t.Trainer, "resume", wrong)
            assert find(originals, patch, fuzz.Case("checkpoint", "", data)) == said


def test_a_piece_that_is_no_text_and_a_header_that_writes_to_the_terminal_are_refused(
    originals, tmp_path
):
    """As the fuzzer found them."""
    piece = re.search(rb"\x0a\x04(\xe2\x96\x81[a-z])", originals["tokenizer"])
    path = tmp_path / "t.model"
    path.write_bytes(originals["tokenizer"].replace(piece.group(1), b"\xff" * 4, 1))
    with pytest.raises(t.UserError, match="not a SentencePiece model"):
        t.Tokenizer(str(path), fuzz.VOCABULARY)
    body = originals["artifact"][:-32]
    for text in (b"\\u001b[2J", b"0\\n", b"\\ud800"):
        path.write_bytes(
            fuzz.seal(body.replace(b'"mamba_layers":"0"', b'"mamba_layers":"' + text + b'"'))
        )
        with pytest.raises(t.UserError, match="mamba_layers in its header has the wrong type"):
            t.read_artifact(path)
