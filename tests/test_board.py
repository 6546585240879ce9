"""tools/board.py: the curves that a log becomes, live ones too, and what is refused."""

import json
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from tests.support import called_here
from tools import board
from tools.command import UserError

ROOT = Path(board.__file__).resolve().parent.parent
SETTINGS = {"event": "settings", "settings": {"run_id": "a", "matrix_lr": 0.02}}
TRAIN = [{"event": "train", "step": s, "train_loss": 5.0 - s, "seconds": s} for s in (1, 2)]
FINAL = {"event": "final", "val_bpb": 1.25, "seconds": 9}


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(folder))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(p.step, p.value) for p in events.Scalars(name)] for name in names}


def start(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.board", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_figure_becomes_a_curve_over_the_steps(tmp_path):
    pytest.importorskip("tensorboard")
    log = tmp_path / "a.jsonl"
    log.write_text(lines(SETTINGS, *TRAIN, FINAL))
    done = start(log, "--out", tmp_path / "board")
    assert done.returncode == 0, done.stderr
    assert f"tensorboard --logdir {tmp_path / 'board'}" in done.stdout
    found = curves(tmp_path / "board" / "a")
    assert found == {"train/train_loss": [(1, 4.0), (2, 3.0)], "final/val_bpb": [(2, 1.25)]}


def test_a_run_whose_name_is_no_text_is_shown(tmp_path):
    """TensorBoard refused such a folder by a traceback; settings may hold such paths, too."""
    pytest.importorskip("tensorboard")
    log = tmp_path / "a\udcff.jsonl"
    paths = {"run_id": "a\udcff", "data_path": "d\udce4t"}
    log.write_text(lines(SETTINGS | {"settings": paths}, *TRAIN))
    done = start(log, "--out", tmp_path / "board")
    assert done.returncode == 0, done.stderr
    assert list(curves(tmp_path / "board" / "a\\udcff")) == ["train/train_loss"]


def test_a_log_that_grows_is_followed_to_its_end(tmp_path, monkeypatch):
    """A line that is not finished yet waits; nothing is read twice."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(board, "PAUSE", 0.05)
    log = tmp_path / "a.jsonl"
    log.write_text(lines(SETTINGS, TRAIN[0]) + lines(TRAIN[1])[:20])

    def go_on() -> None:
        with log.open("a") as file:
            file.write(lines(TRAIN[1])[20:] + lines(FINAL))

    threading.Timer(0.3, go_on).start()
    done = called_here(board.main, "board", log, "--follow", "--out", tmp_path / "b")
    assert done.returncode == 0
    found = curves(tmp_path / "b" / "a")
    assert found == {"train/train_loss": [(1, 4.0), (2, 3.0)], "final/val_bpb": [(2, 1.25)]}


def test_steps_that_are_made_again_and_logs_that_are_read_again_stand_there_once(tmp_path):
    """A second call drew each point twice, and a run that was resumed or trained anew two lines."""
    pytest.importorskip("tensorboard")
    log = tmp_path / "a.jsonl"
    again = [record | {"train_loss": 1.0} for record in TRAIN]
    resumed = {"event": "resumed", "step": 1, "clock": 9.0}
    log.write_text(lines(SETTINGS, *TRAIN, SETTINGS, resumed, again[1], FINAL))
    for _ in range(2):
        assert called_here(board.main, "board", log, "--out", tmp_path / "b").returncode == 0
        found = curves(tmp_path / "b" / "a")
        assert found["train/train_loss"] == [(1, 4.0), (2, 1.0)]
        assert found["final/val_bpb"] == [(2, 1.25)]
    with log.open("a") as file:
        file.write(lines(SETTINGS, *again))
    assert called_here(board.main, "board", log, "--out", tmp_path / "b").returncode == 0
    found = curves(tmp_path / "b" / "a")
    assert (found["train/train_loss"], found["final/val_bpb"]) == ([(1, 1.0), (2, 1.0)], [])


@pytest.mark.parametrize(
    "odd",
    [{"step": "x"}, {"step": None}, {"step": 1e400}, {"step": 10**30}, {"train_loss": 10**400}],
    ids=["text", "null", "infinity", "large step", "large loss"],
)
def test_records_that_no_run_writes_end_in_one_line(tmp_path, odd):
    """They ended in tracebacks, as did a start without its settings."""
    for record in (TRAIN[0] | odd, {"event": "settings", "machine": {}}):
        log = tmp_path / "a.jsonl"
        log.write_text(lines(SETTINGS, record))
        with pytest.raises(UserError, match="is not a run's .jsonl log"):
            called_here(board.main, "board", log, "--out", tmp_path / "b")


def test_weights_and_biases_gets_the_same(tmp_path, monkeypatch):
    told = []

    class Run:
        config = types.SimpleNamespace(update=lambda settings, **_: told.append(settings))

        def log(self, values: dict, step: int) -> None:
            told.append((step, values))

        def finish(self) -> None:
            told.append("finished")

    def init(project: str, name: str, reinit: str) -> Run:
        told.append((project, name))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    log = tmp_path / "a.jsonl"
    log.write_text(lines(SETTINGS, *TRAIN, FINAL))
    assert called_here(board.main, "board", log, "--wandb", "golf").returncode == 0
    assert told == [
        ("golf", "a"),
        SETTINGS["settings"],
        (1, {"train/train_loss": 4.0}),
        (2, {"train/train_loss": 3.0}),
        (2, {"final/val_bpb": 1.25}),
        "finished",
    ]


def test_weights_and_biases_itself_where_it_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    log = tmp_path / "a.jsonl"
    log.write_text(lines(SETTINGS, *TRAIN, FINAL))
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    done = start(log, "--wandb", "golf")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("problem", ["no log", "missing", "two of one name"])
def test_mistakes_end_in_one_line(tmp_path, problem):
    log = tmp_path / "a.jsonl"
    arguments = [log]
    if problem == "no log":
        log.write_text("hello\n")
    elif problem == "two of one name":
        log.write_text(lines(SETTINGS))
        arguments *= 2
    done = start(*arguments, "--out", tmp_path / "board")
    assert done.returncode == 2
    assert done.stderr.startswith("board.py: error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "board").exists()
