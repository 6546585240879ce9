"""What a run shows while it goes on: a bar on a terminal, plain lines elsewhere."""

import contextlib
import fcntl
import os
import re
import struct
import sys
import termios
import threading
import types

import pytest

import train_gpt as t
from tests.support import SOLO, on_console, run_environment, run_here, tiny

PHASES = ("warm-up", "training", "plain windows", "calibration", "GPTQ", "evaluation")


@contextlib.contextmanager
def terminal(monkeypatch, columns: int = 200):
    """Has the standard output be a terminal; yields a function that reads what it was sent."""
    ours, theirs = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    sent = []
    reader = threading.Thread(target=drain, args=(ours, sent))
    reader.start()
    console = os.fdopen(theirs, "w", encoding="utf-8")

    def shown() -> str:
        console.close()
        reader.join()
        return b"".join(sent).decode()

    monkeypatch.setattr(sys, "stdout", console)
    yield shown
    shown()
    os.close(ours)


def drain(place: int, sent: list[bytes]):
    """Reads a terminal until nobody can write to it any more."""
    with contextlib.suppress(OSError):
        while part := os.read(place, 1 << 16):
            sent.append(part)


def messages(folder) -> list[str]:
    text = (folder / "a.txt").read_text(encoding="utf-8")
    return text[text.index("\n" + "=" * 100) + 102 :].splitlines()


def test_a_terminal_has_a_bar_and_whole_lines_and_the_log_no_bar(monkeypatch, shards, tmp_path):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(t, "BAR_OPTIONS", t.BAR_OPTIONS | {"mininterval": 0.0})
    with terminal(monkeypatch) as shown:
        assert run_here(monkeypatch, run_environment(shards, tmp_path)) == 0
        said = shown()
    for phase in PHASES:
        assert re.search(rf"\r[█▏▎▍▌▋▊▉ ]{{20}} {phase}[^\r\n]*: \d+%, \d+ of \d+s", said), phase
    training = r"training: 50%, \d+ of \d+s, step 3, [\d,]+ tokens/s, score in about \d+s"
    assert re.search(training, said)
    # What a line shows in the end stands behind the last return of the cursor.
    lines = [line.rpartition("\r")[2] for line in said.split("\r\n")]
    assert lines == [*map(on_console, messages(tmp_path)), ""]
    assert not re.search("[█▏▎▍▌▋▊▉]", "".join(lines) + (tmp_path / "a.jsonl").read_text())


@pytest.mark.parametrize("library", [True, False], ids=["tqdm", "no tqdm"])
def test_elsewhere_there_are_plain_lines_in_every_phase(
    monkeypatch, capsys, shards, tmp_path, library
):
    monkeypatch.setattr(t, "PROGRESS_SECONDS", 0.0)
    if not library:
        monkeypatch.setattr(t, "tqdm", None)
    assert run_here(monkeypatch, run_environment(shards, tmp_path)) == 0
    out = capsys.readouterr().out
    assert "\r" not in out
    assert [*map(on_console, messages(tmp_path))] == out.splitlines()
    for phase in PHASES:
        assert re.search(rf"^  {phase}[^\n]*: \d+%, \d+ of \d+s", out, re.M), phase
    scored = r"^  evaluation: 100%, \d+ of \d+s, [\d,]+ tokens/s$"
    assert re.search(scored, out, re.M)


def test_without_a_long_silence_lines_of_events_are_enough(monkeypatch, capsys, shards, tmp_path):
    """And a step of which there is no line works out neither speed nor time."""
    paces, pace = [], t.Trainer.pace
    monkeypatch.setattr(t.Trainer, "pace", lambda *given: paces.append(given) or pace(*given))
    monkeypatch.setattr(t, "PROGRESS_SECONDS", 1e9)
    assert run_here(monkeypatch, run_environment(shards, tmp_path, train_log_every=100)) == 0
    assert "step:6/" in (tmp_path / "a.txt").read_text()
    assert len(paces) == 5  # of the first steps, which are logged
    assert not [line for line in messages(tmp_path) if re.match(r"  .*\d+ of \d+s", line)]


def test_other_ranks_show_nothing(monkeypatch, tmp_path):
    with terminal(monkeypatch) as shown:
        log = t.Log()
        log.open(tiny(log_dir=str(tmp_path)), t.Ranks(1, 1, SOLO.device), "a")
        log.progress("training", 0.5, 10.0)
        assert [*log.track("GPTQ", [1, 2])] == [1, 2]
        assert log.bar is None
        assert shown() == ""


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch, tmp_path):
    pytest.importorskip("tqdm")
    ours, theirs = os.openpty()
    console = os.fdopen(theirs, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", console)
    log = t.Log()
    log.open(tiny(log_dir=str(tmp_path)), SOLO, "a")
    log.begin()
    log.progress("training", 0.5, 10.0)
    os.close(ours)
    log("step")
    log.progress("training", 0.6, 12.0)
    log.close()
    assert messages(tmp_path) == ["step"]
    with contextlib.suppress(OSError):
        console.close()


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        # Training 30 s, export 10 s; two passes of 600 tokens cost 400, the last as it says: it is
        # one of the two in plain windows with frozen weights.
        ({"eval_mode": "plain", "ttt_enabled": False}, 30 + 10 + 400 / 100),
        ({"eval_mode": "sliding", "ttt_enabled": False}, 30 + 10 + (400 + 4 * 200) / 100),
        ({"eval_mode": "stateful", "ttt_epochs": 2}, 30 + 10 + (400 + 200 + 1200) / 100),
        ({"eval_mode": "plain", "ttt_epochs": 999}, 30 + 10 + 400 / 100 + 100),
        ({"eval_mode": "documents", "ttt_enabled": False}, 30 + 10 + (400 + 2 * 200) / 100),
        ({"eval_mode": "documents"}, 30 + 10 + (400 + 2 * 400) / 100),
    ],
    ids=str,
)
def test_the_time_to_the_score_counts_training_export_and_evaluation(monkeypatch, changes, seconds):
    settings = {"max_wallclock_seconds": 50.0, "export_reserve_seconds": 10.0}
    settings |= {"eval_max_seconds": 100.0, "eval_stride": 8, "train_batch_tokens": 100}
    s = tiny(**(settings | changes))
    trainer = types.SimpleNamespace(settings=s, steps_done=10, scored_tokens=600)
    trainer.log = types.SimpleNamespace(score_at=0.0)
    pace = t.Trainer.pace(trainer, 10.0)
    assert pace == {
        "tokens_per_second": 100,
        "seconds_left": pytest.approx(30.0),
        "seconds_to_score": pytest.approx(seconds),
    }


def test_records_of_older_logs_and_newer_ones_have_the_same_line():
    """tools/contradictions.py holds a line's first figures against its record."""
    from tools.contradictions import TRAIN_LINE

    start = "step:3/6 train_loss:5.1000 train_time:900ms step_avg:300.00ms "
    ends = ("50.0% 427 tokens/s 1s left", "50.0% of 2s 427 tokens/s 1s left score in 13s")
    found = [TRAIN_LINE.findall(start + end) for end in ends]
    assert found == [[("3", "5.1000", "900", "300.00")]] * 2
