"""The audit: an honest entry passes every check, and each check fails on the violation it is there
for.
"""

import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.support import PATIENCE, tiny_environment, write_shard
from tools import audit

SCRIPT = Path(t.__file__).resolve()
MODES = ("plain", "sliding", "stateful")
WATCHED = (
    audit.check_causal,
    audit.check_scored_once,
    audit.check_probabilities,
    audit.check_text_bytes,
    audit.check_order,
)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> SimpleNamespace:
    """A run of two steps on little text: its environment, data, artifact, and log."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "data"
    shutil.copytree(shards, data)
    tokens = t.Shard(shards / "words_val_000000.bin").read(count=250)
    write_shard(data / "words_val_000000.bin", tokens)
    environment = tiny_environment(
        data_path=data,
        tokenizer_path=data / "tokenizer.model",
        log_dir=folder,
        run_id="a",
        device="cpu",
        iterations=2,
        max_wallclock_seconds=0.0,
        matrix_lr=0.1,
        eval_mode="plain",
        ttt_lr=0.05,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", environment)
        patch.setattr(sys, "argv", [str(SCRIPT)])
        assert t.run() == 0
    return SimpleNamespace(
        environment=environment, artifact=folder / "a.int6.lzma", log=folder / "a.txt", data=data
    )


@pytest.fixture(autouse=True)
def few_cuts(monkeypatch):
    """One random cut and two at the end of a chunk: every cut costs an evaluation."""
    monkeypatch.setattr(audit, "CUTS", 1)


@pytest.fixture
def entry_of(run):
    """entry_of(**settings): the run's artifact, to be evaluated with other settings; with the log
    where it fits.
    """

    def build(script=t, log: Path | None = None, **changes) -> audit.Entry:
        environment = run.environment | {
            name.upper(): str(value) for name, value in changes.items()
        }
        tokenizer = run.data / "tokenizer.model"
        return audit.open_entry(script, run.artifact, run.data, tokenizer, environment, log)

    return build


def process_environment(settings: dict[str, str]) -> dict[str, str]:
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ
    }
    return kept | {"OMP_NUM_THREADS": "1"} | settings


def fails(check, entry: audit.Entry, *said: str) -> None:
    """The check does not hold, and says why."""
    holds, evidence = check(t, entry)
    assert not holds, evidence
    for text in said:
        assert text in evidence


def changed_script(folder: Path, *replacements: tuple[str, str]) -> Path:
    """A copy of the script in which each (old, new) is replaced, once."""
    text = SCRIPT.read_text(encoding="utf-8")
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "train_gpt.py"
    path.write_text(text, encoding="utf-8")
    return path


# ---- An honest entry -----------------------------------------------------------------------------


def run_audit(run, *arguments: str) -> subprocess.CompletedProcess:
    """The tool as a reviewer starts it: the settings are the log's."""
    paths = [
        str(run.artifact),
        "--data",
        str(run.data),
        "--tokenizer",
        str(run.data / "tokenizer.model"),
    ]
    return subprocess.run(
        [sys.executable, "-m", "tools.audit", *paths, *arguments],
        cwd=SCRIPT.parent,
        env=process_environment({"DEVICE": "cpu"}),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_an_honest_run_passes_every_check_and_its_score_is_reproduced_to_the_last_digit(run):
    done = run_audit(run, "--log", str(run.log))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in done.stdout.splitlines()]
    assert rows[0] == ["check", "result", "evidence"]
    assert [row[0] for row in rows[2:]] == list(audit.CHECKS)
    assert {row[1] for row in rows[2:]} == {"holds"}
    evidence = {row[0]: row[2] for row in rows[2:]}
    claimed = re.findall(r"val_bpb:(\d+\.\d{8})\n?\Z", run.log.read_text(encoding="utf-8"))[0]
    reproduced = evidence["score from the artifact alone"]
    assert reproduced.startswith(f"{claimed} BPB")
    assert f"the log says {claimed} on such a machine" in reproduced
    assert "data are data/words_val_000000.bin" in reproduced
    assert (
        f"= {SCRIPT.stat().st_size + run.artifact.stat().st_size:,} of"
        in evidence["16,000,000 bytes"]
    )
    assert "6 updates on 192 of 249 targets" in evidence["score first, then train"]
    said = done.stderr.splitlines()
    assert [line for line in said if "s left)" in line]
    assert said[-1].startswith(f"audit: {len(audit.CHECKS)} of {len(audit.CHECKS)}: clocks: holds")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ttt_enabled", [0, 1], ids=["frozen", "adapting"])
def test_what_is_watched_is_honest_in_every_mode(entry_of, mode, ttt_enabled):
    entry = entry_of(eval_mode=mode, ttt_enabled=ttt_enabled)
    for check in WATCHED:
        holds, evidence = check(t, entry)
        assert holds, f"{check.__name__}: {evidence}"
    seen = audit.observe(t, entry)
    assert len(seen.sampled) == audit.SAMPLED_TARGETS
    assert any(kind == "step" for kind, _ in seen.events) == bool(ttt_enabled)


# ---- Size, log and clocks ------------------------------------------------------------------------


def test_a_swollen_artifact_a_wrong_sum_and_another_script_are_seen(entry_of, run, tmp_path):
    entry = entry_of(log=run.log)
    assert audit.check_bytes(t, entry)[0]
    swollen = tmp_path / "swollen"
    with swollen.open("wb") as file:
        file.truncate(audit.CAP_BYTES - SCRIPT.stat().st_size + 1)
    fails(audit.check_bytes, dataclasses.replace(entry, artifact=swollen, log=None), "over the cap")
    fails(
        audit.check_bytes,
        dataclasses.replace(entry, log=entry.log._replace(total_bytes=1)),
        "the log says 1",
    )
    other = changed_script(tmp_path, ("    sys.exit(run())\n", "    sys.exit(run())  \n"))
    fails(audit.check_bytes, dataclasses.replace(entry, script=other), "another script")


def test_clocks_that_are_not_kept_are_seen(entry_of, run, monkeypatch):
    entry = entry_of(log=run.log)
    alone = audit.Alone(0, "", None, None, 3.0, [], [], [], [])
    monkeypatch.setattr(audit, "run_alone", lambda entry: alone)
    assert audit.check_clocks(t, entry)[0]
    for changes in ({"training_seconds": 600.1}, {"evaluation_seconds": 600.1}):
        fails(
            audit.check_clocks,
            dataclasses.replace(entry, log=entry.log._replace(**changes)),
            "600.1s of 600s",
        )
    short = dataclasses.replace(entry.settings, eval_max_seconds=2.9)
    fails(audit.check_clocks, dataclasses.replace(entry, settings=short, log=None), "3.0s of 2.9s")


# ---- A process of its own ------------------------------------------------------------------------


def test_looking_for_a_driver_as_triton_does_is_no_offence(entry_of, run, tmp_path):
    """CUDA builds of torch do so on any machine; other calls, and other programs by that name, are
    still seen.
    """
    asks = """def main():
    \"\"\"The story of a run.\"\"\"
    with __import__("contextlib").suppress(OSError):
        __import__("subprocess").run(["/sbin/ldconfig", "-p"], capture_output=True)
        __import__("subprocess").run(["/sbin/ldconfig", "--version"], capture_output=True)
        __import__("subprocess").run(["/sbin/ldconfig", "-p"], executable="/bin/true")
"""
    script = changed_script(tmp_path, ('def main():\n    """The story of a run."""\n', asks))
    alone = audit.run_alone(dataclasses.replace(entry_of(log=run.log), script=script))
    assert alone.status == 0, alone.said
    assert alone.programs == ["'/sbin/ldconfig'", "'/bin/true'"]


def test_a_script_that_does_elsewhere_what_it_does_not_do_when_watched_is_seen(
    entry_of, run, tmp_path, monkeypatch
):
    """It reads training data, calls out, starts a program, takes its time, and polishes the score
    behind the evaluator; all of it without a trace in its log. One violation after the other is
    taken away.
    """
    leak = f'''def main():
    """The story of a run."""
    np.fromfile("{run.data}/words_train_000001.bin", dtype="<u2")
    with __import__("contextlib").suppress(OSError):
        __import__("socket").create_connection(("127.0.0.1", 9), timeout=1)
    os.system("true")
'''
    polished = """score = score._replace(val_bpb=score.val_bpb - 0.001, nats=score.nats - 0.001)
    report(log, "final","""
    script = changed_script(
        tmp_path,
        ('def main():\n    """The story of a run."""\n', leak),
        ('report(log, "final",', polished),
    )
    entry = dataclasses.replace(entry_of(log=run.log), script=script)
    alone, log = audit.run_alone(entry), entry.log
    assert alone.status == 0, alone.said

    def changed(**changes) -> None:
        nonlocal alone
        alone = alone._replace(**changes)
        monkeypatch.setattr(audit, "run_alone", lambda entry: alone)

    short = dataclasses.replace(entry.settings, eval_max_seconds=0.01)
    changed()
    fails(audit.check_clocks, dataclasses.replace(entry, settings=short, log=None), "of 0.01s")
    fails(audit.check_reproduced, entry, "used the network", "127.0.0.1")
    changed(network=[])
    fails(audit.check_reproduced, entry, "words_train_000001.bin")
    changed(strangers=[])
    fails(audit.check_reproduced, entry, "it started", "true")
    changed(programs=[])
    fails(audit.check_reproduced, entry, "in the watched evaluation")
    honest = alone.log._replace(val_loss=log.val_loss, val_bpb=log.val_bpb)
    changed(nats=audit.observe(t, entry).score.nats, log=honest)
    assert audit.check_reproduced(t, entry)[0]
    changed(log=honest._replace(epochs_given_up=1))
    fails(audit.check_reproduced, entry, "1 epochs were given up")
    changed(log=honest, status=2, said="no score in EVAL_MAX_SECONDS")
    fails(audit.check_reproduced, entry, "status 2: no score")


def test_a_log_that_claims_another_score_is_seen(entry_of, run, monkeypatch):
    """In the last of eight digits on a machine like this; elsewhere, arithmetic may round in other
    ways.
    """
    entry = entry_of(log=run.log)
    log, nats = entry.log, audit.observe(t, entry).score.nats
    alone = audit.Alone(0, "", log, nats, 1.0, [], [], [], [])
    monkeypatch.setattr(audit, "run_alone", lambda entry: alone)
    assert audit.check_reproduced(t, entry)[0]
    last_digit = log.val_bpb[:-1] + str((int(log.val_bpb[-1]) + 1) % 10)
    fails(
        audit.check_reproduced,
        dataclasses.replace(entry, log=log._replace(val_bpb=last_digit)),
        last_digit,
    )
    elsewhere = log._replace(settings=log.settings | {"hardware": "1 × GPU"}, val_bpb=last_digit)
    assert audit.check_reproduced(t, dataclasses.replace(entry, log=elsewhere))[0]
    far = elsewhere._replace(val_bpb=f"{float(log.val_bpb) - 0.011:.8f}")
    fails(audit.check_reproduced, dataclasses.replace(entry, log=far), "1 × GPU")


# ---- Scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_scorer_that_peeks_at_the_token_after_the_target_is_seen(entry_of, monkeypatch, mode):
    nats = t.Model.nats

    def peek(self, hidden, targets, tokens=None):
        return nats(self, hidden, targets, tokens) - 0.01 * (targets.roll(-1, dims=1) % 2)

    monkeypatch.setattr(t.Model, "nats", peek)
    fails(audit.check_causal, entry_of(eval_mode=mode, ttt_enabled=0), "earlier scores move")


def test_a_score_that_depends_on_the_whole_text_is_seen(entry_of, monkeypatch):
    """Once per evaluation, and by a few bits only."""
    collect = t.Evaluator._collect

    def tuned(self, given_up):
        self.nats += 1e-6 * float(self.validation.target_bytes[-50:].sum())
        return collect(self, given_up)

    monkeypatch.setattr(t.Evaluator, "_collect", tuned)
    fails(audit.check_causal, entry_of(), "earlier scores move")


def test_a_scorer_that_ignores_the_tokens_does_not_pass_for_causal(entry_of, monkeypatch):
    monkeypatch.setattr(
        t.Model, "nats", lambda self, hidden, targets, *_: hidden.new_ones(targets.shape)
    )
    fails(audit.check_causal, entry_of(ttt_enabled=0), "would not see")


@pytest.mark.parametrize("first", [0, 64])
def test_a_chunk_that_is_scored_again_is_seen(entry_of, monkeypatch, first):
    """After an update, with the script's own count set right."""
    collect = t.Evaluator._collect

    def again(self, given_up):
        self._score_chunk(first, first + 64)
        self.times_scored[:] = 1
        return collect(self, given_up)

    monkeypatch.setattr(t.Evaluator, "_collect", again)
    fails(audit.check_scored_once, entry_of(), "0 targets are never scored, 64 more than once")


def test_targets_left_out_and_scores_polished_afterwards_are_seen(entry_of, monkeypatch):
    plan, collect = t.plan_windows, t.Evaluator._collect

    def polish(self, given_up):
        self.times_scored[:] = 1
        return collect(self, given_up)

    monkeypatch.setattr(t.Evaluator, "_collect", polish)
    with monkeypatch.context() as patch:
        patch.setattr(t, "plan_windows", lambda *arguments: plan(*arguments)[1:])
        fails(audit.check_scored_once, entry_of(), "more than once")
    with monkeypatch.context() as patch:
        patch.setattr(
            t.Evaluator,
            "_collect",
            lambda self, given_up: (self.nats.mul_(0.9), collect(self, given_up))[1],
        )
        fails(audit.check_scored_once, entry_of(), "not what was scored")


@pytest.mark.parametrize("mode", MODES)
def test_unnormalized_probabilities_are_seen(entry_of, monkeypatch, mode):
    """In nats(), and as a factor behind it."""
    nats, score = t.Model.nats, t.Model.score

    def scaled_nats(self, *arguments):
        return 0.95 * nats(self, *arguments)

    def scaled_score(self, *arguments):
        return 0.99 * score(self, *arguments)

    for name, wrong in (("nats", scaled_nats), ("score", scaled_score)):
        if (name, mode) == ("score", "stateful"):  # which reads hidden states out by itself
            continue
        with monkeypatch.context() as patch:
            patch.setattr(t.Model, name, wrong)
            fails(audit.check_probabilities, entry_of(eval_mode=mode))


def test_a_softmax_over_part_of_the_vocabulary_is_seen(entry_of, monkeypatch):
    """The likeliest half of the tokens only: right for most targets, and more probable than it
    should be.
    """

    def half(self, hidden, targets, tokens):
        logits = self.logits(hidden)
        kept = logits >= logits.median(dim=-1, keepdim=True).values
        kept = kept.scatter(-1, targets[..., None], True)
        logits = logits.masked_fill(~kept, -math.inf)
        return -torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0]

    monkeypatch.setattr(t.Model, "nats", half)
    fails(audit.check_probabilities, entry_of())


# ---- Bytes ---------------------------------------------------------------------------------------


def test_a_space_that_is_counted_twice_is_seen(entry_of, monkeypatch):
    """As in an entry that was struck off: the piece's space, and once more for the piece behind
    it.
    """
    count = t.Tokenizer.target_bytes

    def double(self, tokens):
        return count(self, tokens) + self.has_space[tokens[1:]]

    assert audit.check_text_bytes(t, entry_of())[0]
    monkeypatch.setattr(t.Tokenizer, "target_bytes", double)
    fails(audit.check_text_bytes, entry_of(), "their text has")


def test_one_byte_too_many_behind_a_documents_start_is_seen(entry_of, monkeypatch):
    """A single byte in the second document, and bytes for tokens that have no text."""
    count = t.Tokenizer.target_bytes
    for place in (1, 0):

        def wrong(self, tokens, place=place):
            counted = count(self, tokens)
            counted[np.flatnonzero(tokens == t.BOS_ID)[1] + place - 1] += 1
            return counted

        with monkeypatch.context() as patch:
            patch.setattr(t.Tokenizer, "target_bytes", wrong)
            fails(
                audit.check_text_bytes, entry_of(), "their text has" if place else "of them in text"
            )


def test_texts_with_and_cut_within_characters_have_the_bytes_of_their_pieces(byte_tokenizer):
    """U+FFFD that was in the text has three bytes; half of a character has those that are there."""
    model = t.Tokenizer(str(byte_tokenizer), 512).model
    start = model.encode("a")
    for raw, wanted in (
        ("\ufffd".encode(), 4),
        ("東".encode()[:2], 3),
        ("\ufffd🙂".encode()[:6], 7),
        (b"\xff\xfe", 3),
    ):
        tokens = start + [model.piece_to_id(f"<0x{byte:02X}>") for byte in raw]
        text = model.decode(tokens)
        assert "\ufffd" in text
        assert audit.text_bytes(model, tokens, text) == wanted
    assert audit.text_bytes(model, start, "a\ufffd") is None


def test_bits_per_byte_over_other_bytes_are_seen(entry_of, monkeypatch):
    collect = t.Evaluator._collect
    monkeypatch.setattr(
        t.Evaluator,
        "_collect",
        lambda self, n: (s := collect(self, n))._replace(val_bpb=s.val_bpb * 0.99),
    )
    fails(audit.check_text_bytes, entry_of())


# ---- Order ---------------------------------------------------------------------------------------


def adapt(self, order: str) -> t.Score:
    """evaluate() with its parts in another order: s scores a chunk, t trains on it, l trains on the
    last, too.
    """
    sgd = torch.optim.SGD(self.model.parameters(), lr=0.05)
    for first in range(0, self.total, 64):
        last = min(first + 64, self.total)
        for part in order:
            if part == "s":
                self._score_chunk(first, last)
            elif part == "l" or last < self.total:
                self._train_epoch(first, last, sgd)
    return self._collect(0)


@pytest.mark.parametrize(
    ("order", "said"),
    [("st", ""), ("ts", "before it is scored"), ("tst", "before it"), ("sl", "of the last chunk")],
)
def test_updates_before_scoring_or_on_the_last_chunk_are_seen(entry_of, monkeypatch, order, said):
    monkeypatch.setattr(t.Evaluator, "evaluate", lambda self, *_: adapt(self, order))
    entry = entry_of()
    if said:
        fails(audit.check_order, entry, said)
    else:
        assert audit.check_order(t, entry)[0]
    if order.startswith("t"):
        fails(audit.check_causal, entry, "earlier scores move")


def test_updates_that_read_on_are_seen(entry_of, monkeypatch):
    """A chunk's update that sees one token of the next chunk."""
    train = t.Evaluator._train_epoch
    monkeypatch.setattr(
        t.Evaluator,
        "_train_epoch",
        lambda self, first, last, sgd: train(self, first + 1, last + 1, sgd),
    )
    fails(audit.check_order, entry_of(), "before it is scored")


@pytest.mark.parametrize("told", ["nothing", "other positions", "other tokens"])
def test_updates_on_tokens_from_nobody_knows_where_are_seen(entry_of, monkeypatch, told):
    """What the audit is told of them is nothing, or not what stands there."""

    def secret(self, first, last, sgd):
        tokens = torch.from_numpy(self.validation.tokens[None, 100:133].astype(np.int64))
        read = t.Excerpt(np.arange(32)[None], tokens[:, :-1], tokens[:, 1:])
        if told == "other positions":
            self.observer.on_train(read)
        elif told == "other tokens":
            self.observer.on_train(read._replace(positions=read.positions + 100))
        self.loss_function(read.tokens, read.targets, self.order).backward()
        sgd.step()

    monkeypatch.setattr(t.Evaluator, "_train_epoch", secret)
    said = "without a loss" if told == "nothing" else "before it is scored"
    fails(audit.check_order, entry_of(), said)


def test_an_update_that_reads_on_behind_an_honest_one_is_seen(entry_of, monkeypatch):
    """It takes one step with both gradients, and tells of the honest one: later tokens move
    scores.
    """
    train = t.Evaluator._train_epoch

    def both(self, first, last, sgd):
        ahead = self.validation.tokens[None, -33:]
        tokens = torch.from_numpy(ahead.astype(np.int64))
        self.loss_function(tokens[:, :-1], tokens[:, 1:], self.order).backward()
        train(self, first, last, sgd)

    monkeypatch.setattr(t.Evaluator, "_train_epoch", both)
    entry = entry_of()
    assert audit.check_order(t, entry)[0]
    fails(audit.check_causal, entry, "earlier scores move")


def test_scores_that_the_audit_is_not_told_of_are_seen(entry_of, monkeypatch):
    """A chunk is written anew with weights that know it, and only the first scores are told."""
    train = t.Evaluator._train_epoch

    def again(self, first, last, sgd):
        train(self, first, last, sgd)
        self.observer, observer = t.EvaluationObserver(), self.observer
        self.times_scored[first:last] = 0
        self._score_chunk(first, last)
        self.observer = observer

    monkeypatch.setattr(t.Evaluator, "_train_epoch", again)
    fails(audit.check_scored_once, entry_of(), "not what was scored")


def test_weights_that_change_by_other_ways_are_seen(entry_of, monkeypatch):
    """By hand; by an optimizer without a loss that was seen; and by one while TTT is off."""

    def by_hand(self, *_):
        self.model.embedding.weight.data[5] *= 1.01

    def unseen(self, first, last, sgd):
        read = self._read(np.array([[last]]), 32)
        self.model.loss(read.tokens, read.targets, self.order).backward()
        sgd.step()

    for cheat, said in ((by_hand, "without a step"), (unseen, "without a loss")):
        with monkeypatch.context() as patch:
            patch.setattr(t.Evaluator, "_train_epoch", cheat)
            fails(audit.check_order, entry_of(), said)
    monkeypatch.setattr(t.Evaluator, "evaluate", lambda self, *_: adapt(self, "st"))
    fails(audit.check_order, entry_of(ttt_enabled=0))


def test_scoring_with_gradients_is_seen(entry_of, monkeypatch):
    nats, score_chunk = t.Model.nats, t.Evaluator._score_chunk.__wrapped__

    def with_gradients(self, first, last):
        with torch.enable_grad():
            score_chunk(self, first, last)

    monkeypatch.setattr(t.Model, "nats", lambda self, *arguments: nats(self, *arguments).detach())
    monkeypatch.setattr(t.Evaluator, "_score_chunk", with_gradients)
    fails(audit.check_order, entry_of(ttt_enabled=0), "with gradients")


# ---- The table, and input that cannot be audited -------------------------------------------------


def test_a_check_that_breaks_off_has_failed_and_the_table_stays_one(entry_of, monkeypatch):
    def broken(script, entry):
        raise RuntimeError("a | b\nc")

    monkeypatch.setattr(
        audit, "CHECKS", {"broken": broken, "fine": lambda *_: audit.Finding(True, "yes")}
    )
    results = audit.audit(t, entry_of())
    assert results == {"broken": (False, "RuntimeError: a | b\nc"), "fine": (True, "yes")}
    assert audit.table(results).splitlines()[2:] == [
        "| broken | FAILS | RuntimeError: a \\| b c |",
        "| fine | holds | yes |",
    ]


def test_unusable_input_is_one_line(run, monkeypatch, capsys, tmp_path):
    environment = {
        name: v
        for name, v in run.environment.items()
        if name not in ("DATA_PATH", "TOKENIZER_PATH")
    }
    monkeypatch.setattr(os, "environ", environment)
    tokenizer = str(run.data / "tokenizer.model")
    paths = ["--data", str(run.data), "--tokenizer", tokenizer]
    monkeypatch.setattr(audit, "load_script", lambda path: t)
    artifact, cut = str(run.artifact), tmp_path / "cut"
    cut.write_bytes(run.artifact.read_bytes()[:-1])
    (tmp_path / "log").write_text("nothing")

    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["audit.py", *arguments])
        assert audit.main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("audit.py: error: ")
        return line

    assert "required" in said(artifact)
    assert "no artifact at" in said("nothing", *paths)
    assert "checksum" in said(str(cut), *paths)
    assert "no *_val_*.bin" in said(artifact, "--data", str(tmp_path), "--tokenizer", tokenizer)
    assert "not a SentencePiece" in said(artifact, "--data", str(run.data), "--tokenizer", str(cut))
    assert "finished run" in said(artifact, *paths, "--log", str(tmp_path / "log"))
    assert "cannot read the log" in said(artifact, *paths, "--log", str(tmp_path))
    environment["EVAL_STRIDE"] = "16"
    assert "made with EVAL_STRIDE=8, here it is 16" in said(artifact, *paths, "--log", str(run.log))


@pytest.mark.parametrize("text", ["x =", "1 / 0", "import json"])
def test_a_file_that_is_not_the_script_is_refused(tmp_path, text):
    (tmp_path / "script.py").write_text(text)
    for path in (tmp_path / "script.py", tmp_path / "missing.py"):
        with pytest.raises(audit.UserError, match=re.escape(str(path))):
            audit.load_script(path)
