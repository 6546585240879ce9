"""Checkpoints: a run that is killed, stopped or disturbed loses nothing, and says in one line what
happened.

What only real processes can show (signals, torchrun) is shown by real processes; the rest happens
inside this one.
"""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as t
from tests import forked
from tests.support import (
    PATIENCE,
    SCRIPT,
    SOLO,
    Quiet,
    fill_gradients,
    free_port,
    mistake,
    process_environment,
    random_model,
    relative,
    run_environment,
    run_here,
    run_ranks,
    tiny,
    torchrun,
    with_settings,
)

# Twelve steps, late QAT in the last ones, a checkpoint as often as one can be written, and a quick
# score. No clock: a machine that stalls must not move the schedule.
QUICK = {
    "iterations": 12,
    "max_wallclock_seconds": 0.0,
    "warmup_steps": 0,
    "train_log_every": 1,
    "checkpoint_every": 1e-6,
    "eval_mode": "plain",
    "ttt_enabled": False,
    "late_qat_threshold": 0.5,
    "calibration_tokens": 64,
}
# The factor of the grids is found, when QAT begins and again for export: it takes a third of a run.
FOUND = {"sdclip_k": 0.0}


def quick_environment(shards: Path, folder: Path, **changes) -> dict[str, str]:
    return run_environment(shards, folder, **(QUICK | changes))


def start(environment: dict[str, str], *command: str) -> forked.Popen:
    """A process of the script, or of another command; it writes all to stdout."""
    return forked.Popen(
        command or [sys.executable, str(SCRIPT)],
        env=process_environment(environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@contextlib.contextmanager
def interrupted_at(step: int, error: BaseException):
    """Training ends with an error before this step, and every checkpoint that was begun is
    complete.
    """
    gradients, save = t.Trainer.accumulate_gradients, t.Trainer.save

    def fail(trainer, *arguments):
        if trainer.steps_done == step:
            raise error
        return gradients(trainer, *arguments)

    def save_now(trainer):
        save(trainer)
        trainer.checkpoints.finish()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "accumulate_gradients", fail)
        patch.setattr(t.Trainer, "save", save_now)
        yield


class Killed(Exception):
    """Stands for the end of a process."""


def kill_here(monkeypatch, environment: dict[str, str], step: int = 7):
    with interrupted_at(step, Killed()), pytest.raises(Killed):
        run_here(monkeypatch, environment)


def run_undisturbed(shards: Path, folder: Path, **changes) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        environment = quick_environment(shards, folder, checkpoint_every=0, **changes)
        assert run_here(patch, environment) == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    return run_undisturbed(shards, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def found(shards, tmp_path_factory) -> Path:
    """The folder of one that finds its grids' factor."""
    return run_undisturbed(shards, tmp_path_factory.mktemp("found"), **FOUND)


@pytest.fixture(scope="module")
def killed(shards, tmp_path_factory) -> Path:
    """The folder of a run that was killed before its eighth step; see killed_in()."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        kill_here(patch, quick_environment(shards, folder))
    return folder


def killed_in(folder: Path, killed: Path) -> None:
    """Has the killed run be this folder's."""
    shutil.copytree(killed, folder, dirs_exist_ok=True)


def artifact(folder: Path) -> bytes:
    return (folder / "a.int6.lzma").read_bytes()


def records(folder: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    return [record for record in lines if record["event"] == event]


def losses(folder: Path) -> dict[int, float]:
    """Of the last time that each step was made."""
    return {record["step"]: record["train_loss"] for record in records(folder, "train")}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


# ---- Killed --------------------------------------------------------------------------------------


# Comes no further than the line that begins so, but for the thread that writes checkpoints: however
# late a busy machine wakes who reads it, the run has not passed it, or even ended.
WAIT_BEHIND_A_LINE = """
import sys, time
import train_gpt as t
moment, say = sys.argv.pop(1), t.Log.__call__
def wait_behind(log, line, *more, **values):
    say(log, line, *more, **values)
    if line.startswith(moment):
        time.sleep(600)
t.Log.__call__ = wait_behind
sys.exit(t.run())
"""


def test_killed_at_any_moment_it_ends_with_the_same_artifact(shards, tmp_path, found):
    """SIGKILL in early and late steps and in GPTQ, one after the other; each run goes on no earlier
    than the one before.
    """
    environment = quick_environment(shards, tmp_path, **FOUND)
    for moment in ("step:3/", "QAT", "GPTQ at"):
        process = start(environment, sys.executable, "-c", WAIT_BEHIND_A_LINE, moment)
        assert any(line.startswith(moment) for line in process.stdout)
        deadline = time.monotonic() + PATIENCE
        while not {"a.checkpoint", "a.checkpoint-before"} & {
            *checkpoints(tmp_path)
        }:  # a disk may be slow
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    process = start(environment)
    out = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, out
    assert "warning" not in out
    assert artifact(tmp_path) == artifact(found)
    assert losses(tmp_path) == losses(found)
    resumed = [
        int(step)
        for step in re.findall(r"^resumed .*: step (\d+),", (tmp_path / "a.txt").read_text(), re.M)
    ]
    assert len(resumed) == 3
    assert resumed == sorted(resumed)
    assert resumed[0] > 0
    assert checkpoints(tmp_path) == []


KILL_ONE_RANK_ONCE = """
import os, signal, sys
from pathlib import Path
import train_gpt as t
mark, save, gradients = Path(sys.argv.pop(1)), t.Trainer.save, t.Trainer.accumulate_gradients
def save_now(trainer):
    save(trainer)
    trainer.checkpoints.finish()
def kill_once(trainer, *arguments):
    if trainer.ranks.rank == 1 and trainer.steps_done == 5 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return gradients(trainer, *arguments)
t.Trainer.save, t.Trainer.accumulate_gradients = save_now, kill_once
sys.exit(t.run())
"""


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(shards, tmp_path, found):
    """Without a RUN_ID, to the same artifact as two undisturbed ranks; and one process has the same
    losses.
    """
    (tmp_path / "kill.py").write_text(KILL_ONE_RANK_ONCE)
    environment = quick_environment(shards, tmp_path, **FOUND, run_id=None)
    command = torchrun("--nproc_per_node=2", "--max-restarts=1", str(tmp_path / "kill.py"))
    artifacts = []
    for killed in (True, False):
        process = start(environment, *command, str(tmp_path / "mark"))
        out = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, out
        assert (tmp_path / "mark").exists()  # from here on, it kills none
        assert (": step 5," in out) == ("resumed" in out) == killed
        (log,) = tmp_path.glob("*-tiny-1337.jsonl")
        (file,) = tmp_path.glob("*-tiny-1337.int6.lzma")
        artifacts.append(file.read_bytes())
        assert [path.name for path in tmp_path.glob("*checkpoint*")] == []
        log.rename(tmp_path / "a.jsonl")
        file.unlink()
        for mine, other in zip(losses(tmp_path).values(), losses(found).values(), strict=True):
            # Weights on their grids: a last bit may move a row's step by an eighth.
            assert mine == pytest.approx(other, rel=1e-4)
    assert artifacts[0] == artifacts[1]


def test_other_numbers_of_ranks_go_on_from_the_same_bits(tmp_path):
    """Ranks are threads here, and gradients are given. Steps by three ranks, then two, then one end
    where one rank would have come alone.
    """
    settings = tiny(run_id="a", log_dir=str(tmp_path), num_layers=5, mamba_layers="0,2,4")

    def steps(count: int):
        models = [
            random_model(settings) for _ in range(3)
        ]  # from one generator, which threads would share

        def work(ranks: t.Ranks) -> list[torch.Tensor]:
            log = Quiet()
            trainer = t.Trainer(models[ranks.rank], settings, ranks, 32, 1e6, log)
            trainer.resume()
            for _ in range(count):
                fill_gradients(trainer.model, np.nan if trainer.steps_done == 3 else None)
                trainer.optimizers.step(0.5, 0.9)
                trainer.steps_done += 1
                rate = trainer.average.rate(trainer.steps_done)
                trainer.average.update(rate, trainer.optimizers.skip)
            with t.Checkpoints(settings, ranks, log) as trainer.checkpoints:
                trainer.save()
                trainer.checkpoints.finish()
            assert trainer.count_skipped(trainer.optimizers.skipped) == int(trainer.steps_done > 3)
            return [x.detach().clone() for x in trainer.tensors()]

        return work

    for world_size, count in ((3, 2), (2, 2), (1, 2)):
        tensors = run_ranks(world_size, steps(count))
        again = run_ranks(2, steps(0))
        for other in (*tensors, *again):
            assert all(map(torch.equal, tensors[0], other))
    for path in tmp_path.glob("*checkpoint*"):
        path.unlink()
    for a, b in zip(tensors[0], run_ranks(1, steps(6))[0], strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU],
    ids=lambda number: number.name,
)
def test_a_signal_stops_a_run_with_a_checkpoint(
    monkeypatch, capsys, shards, tmp_path, undisturbed, number
):
    """Even where none is due; then the same command goes on, and handlers are what they were."""
    handler = signal.getsignal(number)
    environment = quick_environment(shards, tmp_path, checkpoint_every=0)
    gradients = t.Trainer.accumulate_gradients

    def signalled(trainer, *arguments):
        if trainer.steps_done == 3:
            signal.raise_signal(number)
            signal.raise_signal(number)  # as from a launcher and a terminal
        return gradients(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(t.Trainer, "accumulate_gradients", signalled)
        said = mistake(patch, capsys, environment)
    assert f"stopped by {number.name} at step 4; RUN_ID=a goes on from the last checkpoint" in said
    assert checkpoints(tmp_path) == ["a.checkpoint"]
    assert signal.getsignal(number) == handler
    if number == signal.SIGTERM:  # a checkpoint does not know which it was
        assert run_here(monkeypatch, environment) == 0
        assert "step 4," in capsys.readouterr().out
        assert signal.getsignal(number) == handler
        assert artifact(tmp_path) == artifact(undisturbed)


def test_a_launchers_second_signal_on_the_way_out_is_the_same_stop(
    monkeypatch, capsys, shards, tmp_path
):
    """Linux sends PR_SET_PDEATHSIG's for each of a launcher's threads that a child has had as its
    parent: the second one may come when training's handler is gone already.
    """
    environment = quick_environment(shards, tmp_path, checkpoint_every=0)
    leave = t.Checkpoints.__exit__

    def signalled_again(checkpoints, *error):
        signal.raise_signal(signal.SIGTERM)
        return leave(checkpoints, *error)

    gradients = t.Trainer.accumulate_gradients

    def signalled(trainer, *arguments):
        signal.raise_signal(signal.SIGTERM)
        return gradients(trainer, *arguments)

    monkeypatch.setattr(t.Trainer, "accumulate_gradients", signalled)
    monkeypatch.setattr(t.Checkpoints, "__exit__", signalled_again)
    said = mistake(monkeypatch, capsys, environment)
    assert "stopped by SIGTERM at step 1; RUN_ID=a goes on from the last checkpoint" in said
    assert checkpoints(tmp_path) == ["a.checkpoint"]


SAVED = "the last checkpoint"
PHASES = {  # what is running, which step the same command goes on from, and what that is called
    "warm_up": (t.Trainer, None, "the start: nothing that it trained is kept"),
    "update": (t.Trainer, "1", SAVED),
    "plain_score": (t, "12", SAVED),
    "quantize_model": (t, "12", SAVED),
    "write_whole": (t, "12", SAVED),
    "load_model": (t, None, "its artifact"),  # which is whole: only its evaluation is left
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_ends_in_one_line_and_loses_no_step_of_training(
    monkeypatch, capsys, shards, tmp_path, undisturbed, phase
):
    """Twice, as from a launcher and a terminal; no half file stays, and handlers are what they
    were.
    """
    owner, step, kept = PHASES[phase]
    environment = quick_environment(shards, tmp_path, checkpoint_every=0, warmup_steps=1)
    function, handlers = getattr(owner, phase), [*map(signal.getsignal, t.STOP_SIGNALS)]

    def signalled(*arguments, **options):
        if phase != "write_whole" or str(arguments[0]).endswith(".lzma"):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, phase, signalled)
        said = mistake(patch, capsys, environment)
    assert re.search(f"stopped by SIGTERM.*; RUN_ID=a goes on from {kept}\n", said)
    assert [*map(signal.getsignal, t.STOP_SIGNALS)] == handlers
    assert checkpoints(tmp_path) == ([] if phase == "warm_up" else ["a.checkpoint"])
    assert run_here(monkeypatch, environment) == 0
    assert re.findall(r"a.checkpoint: step (\d+),", capsys.readouterr().out) == (
        [step] if step else []
    )
    assert artifact(tmp_path) == artifact(undisturbed)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("variant", [{}, {"average": "swa"}], ids=str)
def test_warm_up_changes_nothing(variant):
    """Weights, averages, moments, steps and random state are what they were, to the bit."""
    settings = tiny(warmup_steps=3, recur_start=0.5, layer_order="0-2,1-2", **variant)
    quiet = t.Log()  # not opened, as on any rank but the first
    model = random_model(settings)
    trainer = t.Trainer(model, settings, SOLO, settings.train_batch_tokens, 1e6, quiet)

    def state() -> str:
        digest = hashlib.sha256()
        for tensor in [*model.state_dict().values(), *trainer.tensors(), torch.get_rng_state()]:
            digest.update(tensor.detach().numpy().tobytes())
        numbers = random.getstate(), np.random.get_state()[1].tolist(), trainer.header()
        digest.update(repr(numbers).encode())
        return digest.hexdigest()

    before = state()
    trainer.warm_up()
    assert state() == before
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert state() != before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name)
def test_what_ends_torchrun_ends_its_ranks_with_a_checkpoint(shards, tmp_path, number):
    """SIGHUP it hands on; of SIGKILL, as of SIGUSR1, it knows nothing, and ranks must notice."""
    environment = quick_environment(shards, tmp_path, iterations=10**6, checkpoint_every=0)
    process = start(environment, *torchrun("--nproc_per_node=1", str(SCRIPT)))
    next(line for line in process.stdout if line.startswith("step:1/"))
    process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE)  # until its ranks have closed the pipe, too
    assert "stopped by SIG" in out
    assert " at step " in out
    assert checkpoints(tmp_path) == ["a.checkpoint"]


def test_a_signal_that_the_parent_ignores_stays_ignored(monkeypatch, shards, tmp_path):
    """As nohup does with SIGHUP, and a shell with SIGINT for a command in the background."""
    score = t.plain_score

    def signalled(*arguments, **options):
        signal.raise_signal(signal.SIGHUP)
        return score(*arguments, **options)

    monkeypatch.setattr(t, "plain_score", signalled)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_here(monkeypatch, quick_environment(shards, tmp_path)) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_comes_too_late_for_the_loop_reaches_the_handler_before():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    try:
        with t.stop_signals() as noted:
            signal.raise_signal(signal.SIGUSR1)
            assert (noted, received) == ([signal.SIGUSR1], [])
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that each look at it moves by 10 ms, and tick(seconds), so that a machine's stalls do
    not count.
    """
    now = [1000.0]

    def tick(seconds: float = 0.01) -> float:
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(t, "time", types.SimpleNamespace(**vars(time) | {"perf_counter": tick}))
    return tick


def test_a_run_by_the_clock_goes_on_with_the_time_that_was_left(
    monkeypatch, ticking, shards, tmp_path
):
    """Time that nothing holds any more does not count: here, none."""
    clock = {"max_wallclock_seconds": 3.0, "export_reserve_seconds": 1.0, "iterations": 10_000}
    environment = quick_environment(shards, tmp_path, **clock)
    kill_here(monkeypatch, environment, 8)
    assert run_here(monkeypatch, environment) == 0
    (resumed,) = re.findall(
        r"^resumed .*: step 8, ([\d.]+)s", (tmp_path / "a.txt").read_text(), re.M
    )
    steps = records(tmp_path, "train")
    assert float(resumed) > 0.05
    assert [record["step"] for record in steps][5:12] == [*range(6, 13)]
    assert steps[8]["train_ms"] >= 1000 * float(resumed) - 50
    assert 1900 < steps[-1]["train_ms"] < 3000
    assert records(tmp_path, "trained")[0]["train_clock_seconds"] <= 3


def test_a_signal_that_falls_into_a_finalizer_is_not_lost(capsys):
    """The interpreter drops what is raised there."""

    class Signalled:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    hook, deadline = sys.unraisablehook, time.monotonic() + PATIENCE
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), t.stop_signals(at_once=True) as noted:
        Signalled()
        assert noted == [signal.SIGTERM]
        while time.monotonic() < deadline:
            time.sleep(0.01)
    assert noted == [signal.SIGTERM, signal.SIGTERM]
    assert sys.unraisablehook is hook
    assert "Exception ignored" not in capsys.readouterr().err


# ---- Which checkpoint ----------------------------------------------------------------------------


def test_the_last_two_are_kept_and_gone_after_the_run(monkeypatch, killed, shards, tmp_path):
    killed_in(tmp_path, killed)
    assert checkpoints(tmp_path) == ["a.checkpoint", "a.checkpoint-before"]
    steps = [
        json.loads((tmp_path / name).read_bytes()[8:].split(b"\n")[0])["steps"]
        for name in checkpoints(tmp_path)
    ]
    assert steps == [7, 6]
    assert run_here(monkeypatch, quick_environment(shards, tmp_path)) == 0
    assert checkpoints(tmp_path) == []


def test_a_checkpoint_that_comes_soon_replaces_the_newest_and_keeps_the_one_before(tmp_path):
    """As the end's behind the last regular one: or the two would be of one moment."""
    settings = tiny(run_id="a", log_dir=str(tmp_path), checkpoint_every=1e6)
    tensors = [torch.zeros(2)]
    with t.Checkpoints(settings, SOLO, Quiet()) as writer:
        for step, ago in ((1, 2e6), (2, 2e6), (3, 4e5), (4, 6e5)):
            writer.begun = time.perf_counter() - ago
            writer.write_soon({"steps": step}, tensors)
            writer.finish()
            found = [
                json.loads(path.read_bytes()[8:].split(b"\n")[0])["steps"]
                for path in settings.checkpoint_paths
                if path.exists()
            ]
            assert found == {1: [1], 2: [2, 1], 3: [3, 1], 4: [4, 3]}[step]


DAMAGES = {
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
    "another byte": lambda data: data[:99] + b"?" + data[100:],
}


@pytest.mark.parametrize(
    ("damage", "names"),
    [(damage, ["a.checkpoint"]) for damage in DAMAGES]
    + [("cut", ["a.checkpoint", "a.checkpoint-before"])],
    ids=str,
)
def test_a_damaged_checkpoint_is_left_out_with_a_warning(
    monkeypatch, capsys, killed, shards, tmp_path, undisturbed, damage, names
):
    """For the one before; a run whose checkpoints are all damaged starts anew."""
    environment = quick_environment(shards, tmp_path, checkpoint_every=1e-6)
    killed_in(tmp_path, killed)
    for name in names:
        (tmp_path / name).write_bytes(DAMAGES[damage]((tmp_path / name).read_bytes()))
    assert run_here(monkeypatch, environment) == 0
    out = capsys.readouterr().out
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert [
        f"{name} is not a usable checkpoint: " in line
        for name, line in zip(names, warnings, strict=True)
    ] == [True] * len(names)
    assert len(warnings) == len(names)
    assert ("resumed" in out) == (len(names) == 1)
    assert artifact(tmp_path) == artifact(undisturbed)


def test_a_checkpoint_of_other_settings_is_refused_with_the_differences(
    monkeypatch, capsys, killed, shards, tmp_path
):
    """But not one of other paths, logs, validation, evaluation or kernels; and not where it is not
    wanted.
    """
    killed_in(tmp_path, killed)
    other = {"matrix_lr": 0.03, "num_layers": 2, "mamba_layers": "0", "seed": 7}
    said = mistake(monkeypatch, capsys, quick_environment(shards, tmp_path, **other))
    for part in (
        "MATRIX_LR=0.02, not 0.03",
        "NUM_LAYERS=3, not 2",
        "SEED=1337, not 7",
        "RESUME=never starts anew",
    ):
        assert part in said
    assert "ITERATIONS" not in said
    assert len(checkpoints(tmp_path)) == 2
    free = {
        "train_log_every": 3,
        "eval_mode": "sliding",
        "scan_backend": "sequential",
        "micro_batch_tokens": 32,
    }
    assert run_here(monkeypatch, quick_environment(shards, tmp_path, **free, val_loss_every=5)) == 0
    assert "resumed" in capsys.readouterr().out
    for path in tmp_path.iterdir():
        path.unlink()
    killed_in(tmp_path, killed)
    assert run_here(monkeypatch, quick_environment(shards, tmp_path, **other, resume="never")) == 0
    assert "resumed" not in capsys.readouterr().out


def test_a_checkpoint_may_be_named(monkeypatch, capsys, killed, shards, tmp_path, undisturbed):
    killed_in(tmp_path / "first", killed)
    kept = tmp_path / "kept"
    (tmp_path / "first" / "a.checkpoint-before").rename(kept)
    environment = quick_environment(shards, tmp_path, resume=kept, overwrite=True)
    assert run_here(monkeypatch, environment) == 0
    assert "step 6," in capsys.readouterr().out
    assert artifact(tmp_path) == artifact(undisturbed)
    kept.write_bytes(kept.read_bytes()[:-1])
    assert "kept is not a usable checkpoint: its checksum" in mistake(
        monkeypatch, capsys, environment
    )
    kept.unlink()
    assert f"no checkpoint at {kept}" in mistake(monkeypatch, capsys, environment)


def test_a_checkpoint_of_other_shards_is_refused(monkeypatch, capsys, killed, shards, tmp_path):
    """Batches depend on them: a download that went on in between would change all that come."""
    data = tmp_path / "data"
    data.mkdir()
    for path in shards.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    environment = quick_environment(data, tmp_path)
    killed_in(tmp_path, killed)
    added = data / "words_train_000002.bin"
    added.write_bytes((data / "words_train_000000.bin").read_bytes())
    said = mistake(monkeypatch, capsys, environment)
    assert re.search(r"trained on [\d,]+ tokens in 2 shards .* has [\d,]+ tokens in 3", said)
    assert "RESUME=never starts anew" in said
    added.unlink()
    assert run_here(monkeypatch, environment) == 0
    assert [record["starts"] for record in records(tmp_path, "resumed")] == [2]


def test_a_checkpoint_of_another_tokenizer_is_refused(
    monkeypatch, capsys, killed, shards, tmp_path
):
    """One of the same size, though the shards are the same."""
    environment = quick_environment(shards, tmp_path)
    killed_in(tmp_path, killed)
    other = tmp_path / "other.model"
    other.write_bytes((shards / "tokenizer.model").read_bytes() + b"\xc2>\x01x")  # unknown field
    said = mistake(monkeypatch, capsys, environment | {"TOKENIZER_PATH": str(other)})
    sums = [t.file_sha256(str(path)) for path in (shards / "tokenizer.model", other)]
    assert f"trained on {sums[0]}, but TOKENIZER_PATH has {sums[1]}" in said
    path = tmp_path / "a.checkpoint"
    line, _, payload = path.read_bytes()[len(t.CHECKPOINT_MAGIC) : -32].partition(b"\n")
    former = json.loads(line)
    del former["tokenizer_sha256"]  # as before headers named tokenizers
    path.write_bytes(b"".join(t.seal(t.CHECKPOINT_MAGIC, former, payload)))
    ours = former | {"tokenizer_sha256": sums[1]}
    settings = tiny(resume=str(path))
    assert t.find_checkpoint(ours, settings, Quiet())[1]["tokenizer_sha256"] == ""
    assert run_here(monkeypatch, environment) == 0
    assert len(records(tmp_path, "resumed")) == 1


def test_what_could_not_be_read_back_is_not_trained(shards, tmp_path):
    """The readers of artifact and checkpoint are asked before the first step: a text that is not
    printable in a field of either's header.
    """
    settings = tiny(
        data_path=str(shards),
        tokenizer_path=str(shards / "tokenizer.model"),
        log_dir=str(tmp_path),
    )
    for field in ("mamba_layers", "calibration"):
        spoiled = with_settings(settings, **{field: getattr(settings, field) + "\n"})
        with pytest.raises(t.UserError, match=f"{field} in its header has the wrong type"):
            t.train_and_export(spoiled, SOLO, t.open_shards(str(shards), "train"), None, Quiet())


def test_nothing_in_a_checkpoint_is_unpickled(monkeypatch, capsys, shards, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    path = tmp_path / "evil.checkpoint"
    environment = quick_environment(shards, tmp_path, resume=path)
    torch.save({"steps": Evil()}, path)
    assert "wrong magic number" in mistake(monkeypatch, capsys, environment)
    body = t.CHECKPOINT_MAGIC + pickle.dumps(Evil())
    path.write_bytes(body + t.hashlib.sha256(body).digest())
    assert "is not a usable checkpoint" in mistake(monkeypatch, capsys, environment)
    assert not (tmp_path / "evil").exists()


# ---- Trouble while it runs -----------------------------------------------------------------------


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(
    monkeypatch, capsys, shards, tmp_path, undisturbed
):
    """What was written before stays, and no half file takes up the rest of the disk."""
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if 3 < len(calls) < 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    environment = quick_environment(shards, tmp_path)
    kill_here(monkeypatch, environment, 4)
    out = capsys.readouterr().out
    line = f"warning: cannot write {tmp_path}/a.checkpoint: No space left on device; "
    line += "training goes on\n"
    assert out.count(line) == out.count("warning") == 2
    assert checkpoints(tmp_path) == ["a.checkpoint", "a.checkpoint-before"]
    assert run_here(monkeypatch, environment) == 0
    assert "step 2," in capsys.readouterr().out
    assert artifact(tmp_path) == artifact(undisturbed)


def test_a_shard_that_is_cut_while_a_run_trains_costs_no_more_than_a_restart(
    monkeypatch, capsys, shards, tmp_path, undisturbed
):
    """One line; with the whole shard the same command goes on from a checkpoint."""
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    environment = quick_environment(data, tmp_path)
    gradients = t.Trainer.accumulate_gradients

    def cut(trainer, *arguments):
        if trainer.steps_done == 3:
            for path in data.glob("*_train_*.bin"):
                os.truncate(path, 2000)
        return gradients(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(t.Trainer, "accumulate_gradients", cut)
        assert "was cut off after the start: download it again" in mistake(
            patch, capsys, environment
        )
    shutil.copytree(shards, data, dirs_exist_ok=True)
    assert run_here(monkeypatch, environment) == 0
    assert re.search(r"^resumed .*: step [1-9]", capsys.readouterr().out, re.M)
    assert artifact(tmp_path) == artifact(undisturbed)


def test_a_stop_while_a_file_is_written_leaves_no_half_one(monkeypatch, tmp_path):
    def stop(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        t.write_whole(tmp_path / "a", b"one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [True, False], ids=["checkpoint", "nothing"])
def test_a_disk_that_is_full_in_the_end_says_what_is_kept_and_what_to_do(
    monkeypatch, capsys, shards, tmp_path, undisturbed, kept
):
    """Where a checkpoint found room, room for the artifact is all that the run lacks."""
    fsync = os.fsync

    def full(file):
        if not kept or not os.readlink(f"/proc/self/fd/{file}").endswith(".checkpoint.part"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    environment = quick_environment(shards, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = mistake(patch, capsys, environment)
    source = SAVED if kept else "the start: nothing that it trained is kept"
    way = f"No space left on device; make room, and RUN_ID=a goes on from {source}\n"
    assert said.endswith(f"cannot write {tmp_path}/a.int6.lzma: {way}")
    assert run_here(monkeypatch, environment) == 0
    assert ("a.checkpoint: step 12," in capsys.readouterr().out) == kept
    assert artifact(tmp_path) == artifact(undisturbed)


def test_a_run_outlives_its_console(shards, tmp_path):
    """Whoever read it is gone, by the third line; the log's files are whole, and nothing is said at
    the end.
    """
    read, write = os.pipe()
    process = forked.Popen(
        [sys.executable, str(SCRIPT)], stdout=write, stderr=subprocess.PIPE,
        env=process_environment(quick_environment(shards, tmp_path)),
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as console:
        for _ in range(3):
            console.readline()
    _, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, error) == (0, b"")
    assert len(losses(tmp_path)) == 12
    assert records(tmp_path, "final")
    assert "_exact val_loss:" in (tmp_path / "a.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_log_that_can_no_longer_be_written_ends_in_one_line(shards, tmp_path, name):
    """In a real process: nothing may be said as it ends, either."""
    (tmp_path / name).symlink_to("/dev/full")
    process = start(quick_environment(shards, tmp_path))
    out = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 2
    assert re.fullmatch(
        r"train_gpt.py: error: cannot write logs.*: No space left on device; make room, and .*",
        out.splitlines()[-1],
    )
    assert "Traceback" not in out
    assert "Exception" not in out


def test_a_run_that_diverges_stops_with_a_checkpoint(monkeypatch, capsys, shards, tmp_path):
    loss, calls = t.Model.loss, iter(range(99))
    monkeypatch.setattr(
        t.Model, "loss", lambda *a: loss(*a) * (float("nan") if next(calls) >= 5 else 1.0)
    )
    settings = {"iterations": 40, "train_log_every": 15, "checkpoint_every": 0}
    said = mistake(monkeypatch, capsys, quick_environment(shards, tmp_path, **settings))
    assert "training diverged; lower MATRIX_LR, MAMBA_MATRIX_LR, SCALAR_LR or TIED_EMBED_LR" in said
    assert "RUN_ID=a goes on from the last checkpoint" in said
    assert checkpoints(tmp_path) == ["a.checkpoint"]
    monkeypatch.setattr(t.Model, "loss", loss)
    assert run_here(monkeypatch, quick_environment(shards, tmp_path, **settings)) == 0
    assert "step 15," in capsys.readouterr().out
    assert records(tmp_path, "train")[-1]["skipped_steps"] == 10


@pytest.mark.parametrize("where", ["Trainer.accumulate_gradients", "Evaluator._score_chunk"])
def test_a_lack_of_gpu_memory_names_the_setting_to_halve(
    monkeypatch, capsys, shards, tmp_path, where
):
    def fail(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"
        )

    name, method = where.split(".")
    monkeypatch.setattr(getattr(t, name), method, fail)
    said = mistake(monkeypatch, capsys, quick_environment(shards, tmp_path))
    assert "out of GPU memory: halve MICRO_BATCH_TOKENS, VAL_BATCH_SIZE or TTT_LORA_SLOTS" in said


def test_a_training_clock_that_runs_over_ends_without_a_score(
    monkeypatch, ticking, capsys, shards, tmp_path
):
    """As when GPTQ is held up. The model is kept without a claim, and what the error tells to do
    helps: a checkpoint from before the larger reserve is taken up.
    """
    quantize = t.quantize_model
    monkeypatch.setattr(
        t, "quantize_model", lambda *arguments: (ticking(1.1), quantize(*arguments))[1]
    )
    environment = quick_environment(
        shards,
        tmp_path,
        max_wallclock_seconds=2.0,
        export_reserve_seconds=1.0,
        checkpoint_every=0.6,
    )
    environment["ITERATIONS"] = "10000"
    said = mistake(monkeypatch, capsys, environment)
    assert "GPTQ ended after MAX_WALLCLOCK_SECONDS: raise EXPORT_RESERVE_SECONDS" in said
    assert "_exact" not in (tmp_path / "a.txt").read_text().split("=" * 100)[-1]
    assert not (tmp_path / "a.int6.lzma").exists()
    t.load_model(tmp_path / "a.int6.lzma.late", tiny(), set(), SOLO)  # not lost, but unclaimed
    said = mistake(monkeypatch, capsys, environment)
    told = rf"raise EXPORT_RESERVE_SECONDS to at least (\S+), and RUN_ID=a goes on from {tmp_path}/"
    environment["EXPORT_RESERVE_SECONDS"] = re.search(told + "a.checkpoint-before;", said)[1]
    assert run_here(monkeypatch, environment) == 0
    assert not (tmp_path / "a.int6.lzma.late").exists()
    resumed = records(tmp_path, "resumed")
    assert len(resumed) == 2
    assert records(tmp_path, "trained")[0]["train_clock_seconds"] <= 2


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_late_export_that_no_checkpoint_leaves_time_for_is_told_so(
    monkeypatch, ticking, capsys, shards, tmp_path, resume
):
    """The one of the last step is too late for any reserve; what is told then is no way on."""
    quantize = t.quantize_model
    monkeypatch.setattr(
        t, "quantize_model", lambda *arguments: (ticking(1.1), quantize(*arguments))[1]
    )
    clock = {"max_wallclock_seconds": 2.0, "export_reserve_seconds": 1.0, "checkpoint_every": 0}
    environment = quick_environment(shards, tmp_path, **clock, iterations=10_000, resume=resume)
    said = mistake(monkeypatch, capsys, environment)
    assert "and MAX_WALLCLOCK_SECONDS, too: no checkpoint leaves the time, RESUME=never" in said
    assert "goes on from" not in said
    assert f"; {tmp_path}/a.int6.lzma.late has this model, unclaimed\n" in said
    environment |= {"EXPORT_RESERVE_SECONDS": re.search(r"at least (\S+), and", said)[1]}
    environment |= {"MAX_WALLCLOCK_SECONDS": "3", "RESUME": "never"}
    assert run_here(monkeypatch, environment) == 0


def test_an_export_that_failed_is_made_with_other_settings_of_it(
    monkeypatch, capsys, shards, tmp_path
):
    """From the checkpoint of training's end. Where weights trained on their grids, these stay."""
    target = (t.code_bytes() + 42_000) / 1e6
    changes = FOUND | {"target_mb": target, "sdclip_most": 5, "late_qat_threshold": 0}
    environment = quick_environment(shards, tmp_path, **changes)
    assert "raise it or SDCLIP_MOST" in mistake(monkeypatch, capsys, environment)
    environment["SDCLIP_MOST"] = "16"
    environment["TARGET_MB"] = "15"
    assert run_here(monkeypatch, environment) == 0
    (resumed,) = records(tmp_path, "resumed")
    assert resumed["step"] == records(tmp_path, "trained")[0]["steps"]
    environment = quick_environment(shards, tmp_path / "qat", **FOUND, late_qat_threshold=0.9)
    kill_here(monkeypatch, environment | {"CHECKPOINT_EVERY": "1e-6"})
    said = mistake(monkeypatch, capsys, environment | {"SDCLIP_MOST": "12"})
    assert "has SDCLIP_MOST=16.0, not 12.0" in said


def test_a_run_does_not_go_on_over_other_text_of_the_same_length(
    monkeypatch, capsys, killed, shards, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    environment = quick_environment(copy, tmp_path)
    killed_in(tmp_path, killed)
    path = next(iter(sorted(copy.glob("*_train_*.bin"))))
    data = path.read_bytes()
    # Documents in another order: the same names and lengths.
    tokens = np.frombuffer(data[1024:], "<u2")
    second = np.flatnonzero(tokens == t.BOS_ID)[1]
    path.write_bytes(data[:1024] + np.roll(tokens, -second).tobytes())
    said = mistake(monkeypatch, capsys, environment)
    assert "trained on" in said
    assert "but DATA_PATH has" in said


STALL = """
import os, sys, time
import train_gpt as t
t.COLLECTIVE_SECONDS, gradients = 4.0, t.Trainer.accumulate_gradients
def stall(trainer, *arguments):
    if trainer.ranks.rank == 1 and trainer.steps_done == 5:
        time.sleep(600)
    return gradients(trainer, *arguments)
t.Trainer.accumulate_gradients = stall
sys.exit(t.run())
"""


def test_a_rank_that_stalls_is_named(shards, tmp_path):
    """Two processes without a launcher, which would take half a minute to end the one that
    stalls.
    """
    (tmp_path / "stall.py").write_text(STALL)
    port = free_port()
    environment = quick_environment(shards, tmp_path)
    environment |= {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    ranks = [
        start(environment | {"RANK": str(rank)}, sys.executable, str(tmp_path / "stall.py"))
        for rank in (0, 1)
    ]
    out = ranks[0].communicate(timeout=PATIENCE)[0]
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 2
    assert out.splitlines()[-1] == "train_gpt.py: error: ranks [1] did not answer for 4 s"
    assert "Traceback" not in out
    assert checkpoints(tmp_path)


# ---- Twice the same ------------------------------------------------------------------------------


def test_a_deterministic_run_asks_torch_for_it(monkeypatch, shards, tmp_path, undisturbed):
    environment = quick_environment(shards, tmp_path, deterministic=1)
    try:
        assert run_here(monkeypatch, environment) == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert artifact(tmp_path) == artifact(undisturbed)


def test_rates_reach_every_step_as_float32(monkeypatch, shards, tmp_path):
    """A CUDA graph takes tensors. Were the first steps, which run before there is one, given
    Python's wider numbers, a run that is resumed would round otherwise than one that is not.
    """
    seen, step = [], t.Optimizers.step

    def remember(optimizers, *rates):
        seen.append(rates)
        step(optimizers, *rates)

    monkeypatch.setattr(t.Optimizers, "step", remember)
    assert run_here(monkeypatch, quick_environment(shards, tmp_path)) == 0
    rates = [
        rates for rates in seen if float(rates[0])
    ]  # construction and warm-up have a rate of 0
    assert len(rates) > 5
    assert all(x.dtype == torch.float32 and x.shape == () for pair in rates for x in pair)


def test_batches_go_on_where_they_were(shards):
    settings = tiny(data_path=str(shards))
    whole, rest = t.Batches(settings, SOLO), t.Batches(settings, SOLO, 3)
    for _ in range(3):
        whole.next()
    for _ in range(40):  # into the next epoch
        assert all(map(torch.equal, whole.next(), rest.next()))
