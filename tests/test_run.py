"""Runs: from shards to a scored artifact, on one process and on two, and every mistake of a user in
one line.

Most runs happen inside this process, with another os.environ; a few are real processes, for what
only they can show.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as t
from tests import forked
from tests.support import (
    FINAL,
    PATIENCE,
    SCRIPT,
    SIX_STEPS,
    SOLO,
    Quiet,
    free_port,
    mistake,
    on_console,
    process_environment,
    random_model,
    random_tokens,
    relative,
    run_environment,
    run_here,
    run_ranks,
    tiny,
    tiny_environment,
    torchrun,
    train_tokenizer,
    with_settings,
    write_shard,
)


@dataclasses.dataclass
class Run:
    folder: Path
    text: str  # the log, behind the source
    out: str
    weights: dict[str, torch.Tensor]  # averaged, before quantization

    @property
    def log(self) -> str:
        return (self.folder / "a.txt").read_text(encoding="utf-8")

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "a.jsonl").read_text().splitlines()]

    @property
    def artifact(self) -> Path:
        return self.folder / "a.int6.lzma"

    def scores(self) -> tuple[str, str]:
        """Loss and BPB of the last line."""
        return FINAL.fullmatch(self.text.strip().splitlines()[-1]).groups()


# Runs train_gpt.py as it stands, and keeps the weights from before export.
KEEP_WEIGHTS = """
import sys, torch
import train_gpt as t
path, export = sys.argv.pop(1), t.export
def keep_weights(trainer, *rest):
    if trainer.ranks.rank == 0:
        torch.save(trainer.model.state_dict(), path)
    return export(trainer, *rest)
t.export = keep_weights
sys.exit(t.run())
"""


@pytest.fixture(scope="module")
def train(shards, tmp_path_factory):
    """train(processes, **settings): a whole run in real processes."""

    def start(processes: int, **settings) -> Run:
        folder = tmp_path_factory.mktemp("run")
        (folder / "keep.py").write_text(KEEP_WEIGHTS)
        launch = [f"--nproc_per_node={processes}"]
        launcher = torchrun(*launch) if processes > 1 else [sys.executable]
        # Ranks are started as a user's are: each has its own seed of hashes, and an end of its own.
        start_process = subprocess.run if processes > 1 else forked.run
        done = start_process(
            [*launcher, str(folder / "keep.py"), str(folder / "weights.pt")],
            env=process_environment(run_environment(shards, folder, **settings)),
            capture_output=True, text=True, timeout=PATIENCE, cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        source = SCRIPT.read_text(encoding="utf-8") + "\n" + "=" * 100 + "\n"
        text = (folder / "a.txt").read_text(encoding="utf-8").removeprefix(source)
        return Run(folder, text, done.stdout, torch.load(folder / "weights.pt"))

    return start


@pytest.fixture(scope="module")
def trained(train) -> Run:
    """The run that most tests look at: one process, six steps of two micro-batches, sliding
    windows, test-time training.
    """
    return train(1, eval_nll_path="nll.npy", micro_batch_tokens=64)


@pytest.fixture(scope="module")
def trained_by_two(train) -> Run:
    return train(2)


# ---- A whole run ---------------------------------------------------------------------------------


def test_a_steps_mean_time_is_that_of_training_alone(trained):
    """GPTQ is on the training clock too, and no step takes longer by it."""
    (record,) = (r for r in trained.records if r["event"] == "trained")
    said = float(re.search(r"6 steps of ([\d.]+)ms", trained.text)[1])
    assert record["step_avg_ms"] == pytest.approx(said, abs=0.01)
    assert 6 * record["step_avg_ms"] < 1000 * record["train_clock_seconds"]


def test_what_a_record_holds_is_named_by_the_page_on_logs(trained):
    page = (SCRIPT.parent / "logs" / "README.md").read_text(encoding="utf-8").splitlines()
    for record in trained.records:
        (row,) = (line for line in page if re.match(rf"\| (`\w+`, )?`{record['event']}`", line))
        said = {"event", "seconds", *re.findall(r"`(\w+)`", row)}  # of all, above the table
        assert set(record) <= said, record["event"]


def test_the_log_begins_with_the_source_of_the_script(trained):
    assert trained.log.startswith(SCRIPT.read_text(encoding="utf-8"))
    assert SCRIPT.read_text(encoding="utf-8")[:200] not in trained.out


def test_the_logged_submission_size_is_that_of_the_files(trained):
    size = SCRIPT.stat().st_size + trained.artifact.stat().st_size
    assert f"\nTotal submission size int6+lzma: {size} bytes\n" in trained.text
    assert f"\nCode size: {SCRIPT.stat().st_size} bytes" in trained.text
    assert size <= t.ARTIFACT_CAP


def test_log_lines_have_the_contests_form(trained):
    steps = re.findall(
        r"^step:(\d+)/6 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms "
        r"\d+\.\d% of \d+s [\d,]+ tokens/s \d+s left score in \d+s$",
        trained.text,
        re.M,
    )
    assert [int(step) for step in steps] == [1, 2, 3, 4, 5, 6]
    assert re.search(
        r"^step:6/6 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} .*before quantization",
        trained.text,
        re.M,
    )
    assert re.search(
        r"^final_int6_lzma_plain_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$", trained.text, re.M
    )
    assert trained.text.strip().splitlines()[-1].startswith("final_int6_lzma_sliding_ttt_exact ")
    assert on_console(trained.text.strip()) in trained.out


def test_the_records_say_what_the_log_says(trained):
    events = {record["event"]: record for record in trained.records}
    assert events.keys() >= {"settings", "ready", "train", "trained", "after_quantization", "final"}
    assert (
        f"{events['final']['val_loss']:.8f}",
        f"{events['final']['val_bpb']:.8f}",
    ) == trained.scores()
    assert (
        events["trained"]["bytes_total"] == SCRIPT.stat().st_size + trained.artifact.stat().st_size
    )
    assert events["trained"]["steps"] == 6
    settings = events["settings"]["settings"]
    assert settings == dataclasses.asdict(tiny(**{k: settings[k] for k in settings}))


def test_the_log_tells_where_each_scores_nats_are_and_how_long_it_took(trained):
    events = {record["event"]: record for record in trained.records}
    counts = events["validation_data"]
    for event, mode in {"after_quantization": "plain", "final": "sliding_ttt"}.items():
        score, tables = events[event], events[f"{event}_profile"]
        assert score["mode"] == mode
        assert 0 < score["evaluation_seconds"] < score["seconds"]
        for name in ("document_length", "document_position", "chunks"):
            sums = {key: sum(column) for key, column in tables[name].items()}
            assert sums["targets"] == counts["scored_tokens"]
            assert sums["bytes"] == counts["bytes"]
            assert sums["nats"] == pytest.approx(
                score["val_loss"] * counts["scored_tokens"], rel=1e-5
            )
    chunks = events["final_profile"]["chunks"]
    assert chunks.keys() == {"targets", "bytes", "nats", *t.CHUNK_COLUMNS}
    assert set(chunks["epochs"]) == {0, 2}
    assert chunks.keys() > events["after_quantization_profile"]["chunks"].keys()
    took = sum(chunks["score_seconds"]) + sum(chunks["adapt_seconds"])
    assert 0 < took <= events["final"]["evaluation_seconds"] + 0.05
    kinds = events["trained"]["bytes_by_kind"]
    assert sum(kinds.values()) == trained.artifact.stat().st_size
    # They stand behind their scores: from one record to the next passes an evaluation, no more.
    names = [record["event"] for record in trained.records]
    assert names[-1] == "final_profile" and names[-2] == "final"
    assert "_profile" not in trained.text


def test_the_loss_after_quantization_is_that_of_the_artifact_in_plain_windows(trained, shards):
    settings = tiny(data_path=str(shards), eval_mode="plain", ttt_enabled=False)
    model, settings = t.load_model(trained.artifact, settings, set(), SOLO)
    validation = t.load_validation(settings, t.Tokenizer(str(shards / "tokenizer.model"), 512))
    score = t.Evaluator(model, settings, SOLO, validation).evaluate()
    (logged,) = (record for record in trained.records if record["event"] == "after_quantization")
    assert score.val_loss == pytest.approx(logged["val_loss"], rel=1e-6)


def test_the_log_begins_with_what_was_asked_for_and_says_what_scores_are_of(trained, shards):
    lines = trained.text.splitlines()
    assert lines[0].startswith("settings given: ")
    assert "ITERATIONS=6" in lines[0].split()
    assert lines[1].startswith("python=")
    assert "warming up ..." in lines  # on a CPU nothing is compiled
    assert "compiling" not in trained.text.split("=" * 100)[-1]
    assert "peak GPU memory" not in trained.text.split("=" * 100)[-1]
    events = {record["event"]: record for record in trained.records}
    (tokens,) = (shard.read() for shard in t.open_shards(str(shards), "val"))
    scored = events["validation_data"]
    text = t.Tokenizer(str(shards / "tokenizer.model"), 512).target_bytes(tokens).sum()
    assert (scored["shards"], scored["tokens"], scored["bytes"]) == (1, len(tokens), text)
    assert scored["scored_tokens"] == len(tokens) - 1
    assert scored["documents"] == np.count_nonzero(tokens == t.BOS_ID)
    lengths = [shard.count for shard in t.open_shards(str(shards), "train")]
    trained_on = events["training_data"]
    assert (trained_on["shards"], trained_on["tokens"]) == (2, sum(lengths))


def test_steps_say_how_fast_they_are_and_how_long_it_takes(trained):
    steps = [record for record in trained.records if record["event"] == "train"]
    for record in steps:
        seconds = record["train_ms"] / 1000
        speed = 128 * record["step"] / seconds
        assert record["tokens_per_second"] == pytest.approx(speed, abs=1)
        left = seconds * (6 - record["step"]) / record["step"]
        assert record["seconds_left"] == pytest.approx(left, abs=0.1)
        assert record["seconds_to_score"] > left + 12  # EXPORT_RESERVE_SECONDS of the preset


def test_six_steps_learn_something(trained):
    losses = [record["train_loss"] for record in trained.records if record["event"] == "train"]
    assert losses[-1] < losses[0] - 0.3


def test_the_audit_file_holds_every_targets_nats(trained, shards):
    nats = np.load(trained.folder / "nll.npy")
    (tokens,) = (shard.read() for shard in t.open_shards(str(shards), "val"))
    assert nats.dtype == np.float32
    assert nats.shape == (len(tokens) - 1,)
    loss, bpb = map(float, trained.scores())
    assert nats.mean(dtype=np.float64) == pytest.approx(loss, abs=1e-7)
    model = t.Tokenizer(str(shards / "tokenizer.model"), 512).model
    documents = np.split(tokens, np.flatnonzero(tokens == t.BOS_ID)[1:])
    text_bytes = sum(len(model.DecodeIds(document[1:].tolist()).encode()) for document in documents)
    assert nats.sum(dtype=np.float64) / np.log(2) / text_bytes == pytest.approx(bpb, abs=1e-7)


def test_evaluation_alone_reproduces_the_score_from_three_files(trained, shards, tmp_path):
    """In a folder without training data and without the log: artifact, tokenizer, validation shard;
    to the last digit.
    """
    for file in (trained.artifact, shards / "tokenizer.model", shards / "words_val_000000.bin"):
        shutil.copy(file, tmp_path)
    evaluation = (
        "EVAL_STRIDE VAL_BATCH_SIZE TTT_CHUNK_TOKENS TRAIN_SEQ_LEN MAMBA_CHUNK_SIZE VOCAB_SIZE"
    )
    environment = {
        name: value for name, value in tiny_environment().items() if name in evaluation.split()
    }
    environment |= {
        "EVAL_ONLY": "1",
        "ARTIFACT": "a.int6.lzma",
        "DATA_PATH": ".",
        "TOKENIZER_PATH": "tokenizer.model",
    }
    done = forked.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=tmp_path,
        env=process_environment(
            environment | {"PRESET": "tiny", "LOG_DIR": "out", "EVAL_NLL_PATH": "nll.npy"}
        ),
    )
    assert done.returncode == 0, done.stderr
    assert FINAL.fullmatch(done.stdout.strip().splitlines()[-1]).groups() == trained.scores()
    assert (tmp_path / "nll.npy").read_bytes() == (trained.folder / "nll.npy").read_bytes()


def test_two_ranks_train_the_same_model_as_one(trained, trained_by_two):
    """Batches, gradients, Muon's shared updates, averages: all six steps, before quantization can
    hide or add anything. One process sums two micro-batches as two ranks sum theirs; it runs bit
    for bit alike on some machines, and nearly on others, where Adam turns a gradient that is 0 up
    to rounding into a whole step: let one weight in a thousand differ.
    """
    for name, weight in trained.weights.items():
        other = trained_by_two.weights[name]
        assert relative(other, weight) < 2e-5, name
        assert ((other - weight).abs() > 1e-5).float().mean() <= 1e-3, name


def test_two_ranks_reach_the_same_score_as_one(trained, trained_by_two):
    """A rounding error may move a weight by one step of its grid, which moves the score a
    little.
    """
    before, after = (
        [r for r in run.records if r["event"] == "trained"][0] for run in (trained, trained_by_two)
    )
    assert after["val_loss"] == pytest.approx(before["val_loss"], abs=1e-4)
    assert after["val_bpb"] == pytest.approx(before["val_bpb"], abs=1e-4)
    assert float(trained_by_two.scores()[1]) == pytest.approx(float(trained.scores()[1]), abs=2e-3)
    assert trained_by_two.out.count("_exact val_loss") == 2


@pytest.mark.parametrize("micro_batch", [32, 64])
def test_two_ranks_step_as_one_does_and_exchange_gradients_once(micro_batch):
    """Ranks are threads here. Each takes half of the batch, in one or two micro-batches, and none
    its own initial weights.
    """
    settings = tiny(train_batch_tokens=128)
    models = [random_model(settings, seed) for seed in (0, 1, 0)]
    tokens = random_tokens(4, 33)
    kind = models[0].order(True), False

    def steps(ranks: t.Ranks) -> list[torch.Tensor]:
        model = models[ranks.rank if ranks.world_size > 1 else 2]
        trainer = t.Trainer(model, settings, ranks, micro_batch, 1e6, Quiet())
        exchange, exchanged = ranks.sum_, []
        ranks.sum_ = lambda x: exchanged.append(x.numel()) or exchange(x)
        mine = tokens.chunk(ranks.world_size)[ranks.rank]
        batch = mine[:, :-1], mine[:, 1:]
        losses = [trainer.graphed_steps(kind, *batch, 0.5, 0.9, 0.1) for _ in range(2)]
        several = ranks.world_size > 1
        assert exchanged == 2 * several * [sum(p.numel() for p in model.parameters())]
        assert all(p.grad is None for p in model.parameters())
        mean = exchange(losses[-1].clone()) / ranks.world_size
        return [mean, *(x.detach().clone() for x in trainer.tensors())]

    first, second = run_ranks(2, steps)
    (alone,) = run_ranks(1, steps)
    for mine, other, expected in zip(first, second, alone, strict=True):
        assert torch.equal(mine, other)
        assert relative(mine, expected) < 1e-5


@pytest.mark.parametrize("mamba_layers", ["0", "none"])
def test_a_single_layer_trains_on_several_ranks(mamba_layers):
    """Its U-Net skip has no gradient, hence no part in the exchange, until it is run again."""
    settings = tiny(num_layers=1, mamba_layers=mamba_layers, layer_order="0,0")
    models = [random_model(settings) for _ in range(2)]
    tokens = random_tokens(4, 33)

    def skips(ranks: t.Ranks) -> list[torch.Tensor]:
        model = models[ranks.rank]
        trainer = t.Trainer(model, settings, ranks, 64, 1e6, Quiet())
        seen = [model.skip_weights.detach().clone()]
        for recurrent in (False, True, False):
            kind = model.order(recurrent), False
            trainer.graphed_steps(kind, tokens[:, :-1], tokens[:, 1:], 0.5, 0.9, 0.1)
            seen.append(model.skip_weights.detach().clone())
        return seen

    first, second = run_ranks(2, skips)
    assert all(map(torch.equal, first, second))
    assert [bool((a != b).any()) for a, b in itertools.pairwise(first)] == [False, True, False]


class Graph:
    """Stands in for torch.cuda.CUDAGraph: replays by calling what has been recorded."""

    def __init__(self):
        self.calls: list[Callable] = []

    def replay(self):
        for call in self.calls:
            call()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_graph_holds_one_ranks_update_and_none_that_ranks_exchange_for(monkeypatch, world_size):
    """Weights end as without graphs, though a step of another kind comes between."""
    inside = threading.local()
    graphs = []

    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        inside.graph = graph
        graphs.append(graph)
        yield
        inside.graph = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    settings = tiny(layer_order="0,1,1,2")
    models = {graphed: [random_model(settings) for _ in "ab"] for graphed in (False, True)}
    tokens = random_tokens(8, 33)

    def weights(ranks: t.Ranks, graphed: bool) -> list[torch.Tensor]:
        model = models[graphed][ranks.rank]
        trainer = t.Trainer(model, settings, ranks, 32, 1e6, Quiet())
        parameters = trainer.optimizers.parameters
        places = [torch.zeros_like(p) for p in parameters]  # where a graph has its gradients
        inside.graph = None

        def put(gradients: list):
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient

        def gradients(kind, *batch) -> torch.Tensor:
            """Recorded, it computes nothing yet; replayed, it writes where it was recorded."""
            if inside.graph is None:
                return trainer.accumulate_gradients(kind, *batch)
            loss = torch.zeros(())

            def compute():
                put([None] * len(parameters))
                loss.copy_(trainer.accumulate_gradients(kind, *batch))
                torch._foreach_copy_(places, [p.grad for p in parameters])
                put([None] * len(parameters))

            inside.graph.calls.append(compute)
            put(places)
            return loss

        def update(*rates):
            if inside.graph is None:
                trainer.update(*rates)
            else:
                inside.graph.calls.append(lambda: put(places) or trainer.update(*rates))
                put([None] * len(parameters))

        steps = trainer.graphed_steps
        steps.enabled, steps.gradients, steps.update = graphed, gradients, update
        for number in range(5):
            batch = tokens[number + ranks.rank :][:2]
            kind = model.order(number == 3), False
            rates = 0.5 / (number + 1), 0.9, 0.1
            loss = steps(kind, batch[:, :-1], batch[:, 1:], *rates)
        return [loss.clone(), *(x.detach().clone() for x in trainer.tensors())]

    eager, graphed = (
        run_ranks(world_size, functools.partial(weights, graphed=graphed))[0]
        for graphed in (False, True)
    )
    assert all(map(torch.equal, eager, graphed))
    recorded = [len(graph.calls) for graph in graphs]
    assert recorded == 2 * world_size * [2 if world_size == 1 else 1]


KINDS = {"embedding", "bigrams", "Mamba in", "Mamba out", "MLP", "attention"}


def run_and_read(monkeypatch, shards: Path, folder: Path, **settings) -> dict[str, dict]:
    """A run in this process; its last record of each event."""
    assert run_here(monkeypatch, run_environment(shards, folder, **settings)) == 0
    return {
        record["event"]: record
        for record in map(json.loads, (folder / "a.jsonl").read_text().splitlines())
    }


def test_the_loss_of_each_kind_of_layer_is_reported_and_they_explain_the_whole(
    monkeypatch, shards, tmp_path
):
    """With coarse grids, on layers that have learned something."""
    coarse = {
        "sdclip_k": 40.0,
        "sdclip_k_int8": 40.0,
        "quantizer": "round",
        "matrix_lr": 0.02,
        "mamba_matrix_lr": 0.02,
    }
    events = run_and_read(
        monkeypatch, shards, tmp_path, quantization_report=True, iterations=40, **coarse
    )
    lost = events["quantization_loss"]["bpb_by_kind"]
    assert set(lost) == KINDS
    whole = events["after_quantization"]["val_bpb"] - events["trained"]["val_bpb"]
    assert sum(lost.values()) == pytest.approx(whole, rel=0.3)
    assert len({round(loss, 9) for loss in lost.values()}) == len(KINDS)
    assert lost["MLP"] > 0.01


def test_there_is_no_report_unless_it_is_asked_for(trained):
    assert not any(record["event"] == "quantization_loss" for record in trained.records)


def test_a_ternary_model_scores_as_it_trained_and_loses_nothing(monkeypatch, shards, tmp_path):
    """Its score before export is that of the integers, of which all kinds of layers are made
    already.
    """
    events = run_and_read(
        monkeypatch,
        shards,
        tmp_path,
        quantizer="ternary",
        quantization_report=True,
        val_loss_every=6,
        iterations=6,
    )
    assert events["trained"]["val_bpb"] == pytest.approx(
        events["after_quantization"]["val_bpb"], abs=1e-3
    )
    assert all(abs(loss) < 1e-6 for loss in events["quantization_loss"]["bpb_by_kind"].values())
    assert "QAT from step 0, " in (tmp_path / "a.txt").read_text(encoding="utf-8")
    model, _ = t.load_model(tmp_path / "a.int6.lzma", tiny(), set(), SOLO)
    ternary = t.grid_limits(t.build_model(tiny(quantizer="ternary"), SOLO))
    for name, limits in ternary.items():
        rows = model.get_parameter(name).detach()[limits.flatten() == 1]
        assert all(len(row.abs().unique()) <= 2 for row in rows)
        assert not name.startswith("blocks") or any(row.any() for row in rows)


# One of two ranks gets a gradient that is not finite in the third of six steps; both check that it
# changes nothing.
POISON_ONE_RANK = """
import sys
import torch
import train_gpt as t
from tests.support import SIX_STEPS, Quiet, optimizer_tensors, tiny
settings = tiny(**SIX_STEPS, data_path=sys.argv[1])
ranks = t.start_ranks(settings)
trainer = t.Trainer(t.build_model(settings, ranks), settings, ranks, 32, 1e6, Quiet())
trainer.model.blocks[0].mixer.out_proj.weight.register_hook(
    lambda gradient: (
        gradient * float("nan") if ranks.rank == 1 and trainer.steps_done == 2 else gradient
    )
)
tensors, update = [], trainer.average.update
def keep_tensors(*arguments):
    update(*arguments)
    tensors.append(optimizer_tensors(trainer.optimizers, trainer.average))
trainer.average.update = keep_tensors
trainer.run(t.Batches(settings, ranks), None)
same = [all(map(torch.equal, before, after)) for before, after in zip(tensors, tensors[1:])]
assert same == [False, True, False, False, False], same
assert all(x.isfinite().all() for x in tensors[-1])
assert trainer.count_skipped(trainer.optimizers.skipped) == 1
print("nothing changed on rank", ranks.rank)
"""


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_either(shards, tmp_path):
    (tmp_path / "poison.py").write_text(POISON_ONE_RANK)
    done = forked.run(
        torchrun("--nproc_per_node=2", str(tmp_path / "poison.py"), str(shards)),
        env=process_environment({}), capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing changed on rank") == 2


# ---- What must not change a run ------------------------------------------------------------------


def train_here(
    shards: Path, micro_batch: int = 128, validate=lambda recurrent: None, **changes
) -> list[torch.Tensor]:
    """The weights after six steps in this process."""
    settings = tiny(**(SIX_STEPS | {"data_path": str(shards)} | changes))
    trainer = t.Trainer(t.build_model(settings, SOLO), settings, SOLO, micro_batch, 1e6, Quiet())
    trainer.warm_up()
    trainer.run(t.Batches(settings, SOLO), validate)
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_the_training_loop_is_the_one_written_out_here(shards):
    """One batch, one backward, clipping, one step at the scheduled rate, gradients gone; and the
    weights' average.
    """
    settings = tiny(**SIX_STEPS, data_path=str(shards), matrix_lr=0.05)
    model, batches = t.build_model(settings, SOLO), t.Batches(settings, SOLO)
    optimizers = t.Optimizers(model, settings, SOLO)
    average = t.WeightAverage(model, settings, SOLO)
    for step in range(6):
        now = t.schedule_at(settings, step, 0.0)
        tokens, targets = batches.next()
        with (
            t.fake_quantization(model, t.grid_limits(model), t.fit_sdclip(model, settings, 1e6))
            if now.quantized
            else contextlib.nullcontext()
        ):
            model.loss(tokens, targets, model.order(True)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(now.lr_factor, now.momentum)
        average.update(average.rate(step + 1), torch.zeros(()))
    for a, b in zip(train_here(shards, matrix_lr=0.05), average.ema, strict=True):
        assert relative(a, b) < 1e-4


def test_the_compile_warm_up_leaves_no_trace(shards):
    """Neither in the weights, nor in momentum: with or without it, six steps end at the same
    bits.
    """
    assert all(
        map(torch.equal, train_here(shards, warmup_steps=3), train_here(shards, warmup_steps=0))
    )


def test_gradient_accumulation_trains_the_same_model(shards):
    for a, b in zip(
        train_here(shards, micro_batch=128), train_here(shards, micro_batch=32), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_validation_during_training_does_not_change_it(shards, byte_tokenizer):
    settings = tiny(data_path=str(shards))
    validation = t.load_validation(settings, t.Tokenizer(str(byte_tokenizer), 512))
    plain = train_here(shards)
    for mode in ("plain", "sliding"):
        calls = []

        def validate(recurrent: bool, mode=mode, calls=calls) -> t.Score:
            chosen = dataclasses.replace(settings, eval_mode=mode, ttt_enabled=False)
            model = t.build_model(settings, SOLO)
            calls.append(recurrent)
            return t.Evaluator(model, chosen, SOLO, validation, recurrent).evaluate()

        assert all(map(torch.equal, train_here(shards, validate=validate, val_loss_every=2), plain))
        assert len(calls) == 3


def test_recurrence_and_late_quantization_switch_on_during_the_run(shards):
    """Without a switch the run would be that of the plain model, bit for bit."""
    plain = {"late_qat_threshold": 0.0, "layer_order": "0,1,1,2", "recur_start": 1.0}
    base = train_here(shards, **plain)
    assert not all(map(torch.equal, train_here(shards, **plain | {"recur_start": 0.5}), base))
    assert not all(
        map(torch.equal, train_here(shards, **plain | {"late_qat_threshold": 0.5}), base)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"mamba_version": 2, "document_reset": True, "sdclip_k": 0.0, "eval_mode": "plain"},
        {"mamba_decay": "heavy_tail", "trellis_states": 8}
        | {"sdclip_by_matrix": 1.0, "sdclip_by_row": 0.5, "sdclip_k": 0.0},
        {"mamba_layers": "0", "mlp_layers": "0,2", "ttt_enabled": False, "unet_skips": False},
    ],
    ids=["Mamba-2", "heavy tail, trellis, shares", "a layer without MLP"],
)
def test_other_choices_run_from_shards_to_a_score(monkeypatch, capsys, shards, tmp_path, changes):
    settings = {"iterations": 2, "warmup_steps": 0, "val_loss_every": 1, **changes}
    assert run_here(monkeypatch, run_environment(shards, tmp_path, **settings)) == 0
    out = capsys.readouterr().out
    last = out.strip().splitlines()[-1]
    assert FINAL.fullmatch(last)
    assert ("_ttt_exact" in last) == changes.get("ttt_enabled", True)
    assert len(re.findall(r"^step:\d/2 val_loss:", out, re.M)) == 3


# ---- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_path": "nowhere"}, "nowhere"),
        ({"tokenizer_path": "nowhere.model"}, "nowhere.model"),
        ({"vocab_size": 500}, "512 tokens, but VOCAB_SIZE=500"),
        (
            {"train_seq_len": 1024, "train_batch_tokens": 1024, "ttt_chunk_tokens": 1024},
            "less than one sequence",
        ),
        ({"model_dim": 33}, "MODEL_DIM=33"),
        ({"mamba_head_dim": 24}, "MAMBA_HEAD_DIM"),
        ({"train_batch_tokens": 100}, "TRAIN_BATCH_TOKENS=100"),
        ({"mamba_layers": "0,9"}, "no layer 9"),
        ({"iterations": "many"}, 'ITERATIONS="many"'),
        ({"eval_mode": "slide"}, "EVAL_MODE=slide"),
        ({"muon_momentun": 0.9}, "did you mean MUON_MOMENTUM?"),
        ({"preset": "tinny"}, "should be one of default, short"),
        ({"scan_backend": "triton"}, "SCAN_BACKEND=triton needs a GPU"),
        ({"eval_only": True, "run_id": None}, "EVAL_ONLY=1 needs ARTIFACT"),
        ({"eval_only": True}, "no artifact at"),
        ({"eval_only": True, "artifact": "x" * 300}, "no artifact at xx"),
        ({"resume": "x" * 300}, "no checkpoint at xx"),
        ({"data_path": "x" * 300}, "File name too long"),
        ({"log_dir": "/dev/null/logs"}, "LOG_DIR=/dev/null/logs"),
        ({"artifact": "/dev/null/x/y.lzma", "iterations": 1}, "/dev/null/x/y.lzma"),
        ({"target_mb": t.code_bytes() / 1e6 + 0.001, "iterations": 1}, "on the coarsest grid"),
        ({"target_mb": t.code_bytes() / 1e6 + 0.02, "iterations": 1}, "at SDCLIP_K="),
        ({"eval_max_seconds": 1e-6, "iterations": 1}, "EVAL_MAX_SECONDS"),
        ({"eval_max_seconds": 1e-6, "iterations": 1, "ttt_enabled": False}, "EVAL_MAX_SECONDS"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_users_mistake_ends_in_one_line(monkeypatch, capsys, shards, tmp_path, changes, said):
    assert said in mistake(monkeypatch, capsys, run_environment(shards, tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"artifact": "FOLDER/x"}, "/x: it is a folder"),
        ({"eval_nll_path": "FOLDER/x"}, "/x: it is a folder"),
        ({"run_id": "b"}, "/b.checkpoint: it is a folder"),
        ({"run_id": "c"}, "/c.checkpoint-before: it is a folder"),
        ({"artifact": "FOLDER/file/x"}, "cannot write FOLDER/file/x: "),
        ({"target_mb": 0.1}, "TARGET_MB=0.1 is less than the script's "),
        ({"eval_only": True, "sample_prompt": "a", "data_path": "FOLDER/none"}, "FOLDER/none"),
    ],
    ids=str,
)
def test_what_could_not_be_written_in_the_end_is_told_before_training(
    monkeypatch, capsys, trained, shards, tmp_path, changes, said
):
    for name in ("x", "b.checkpoint", "c.checkpoint-before"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    shutil.copy(trained.artifact, tmp_path)
    changes = {name: str(v).replace("FOLDER", str(tmp_path)) for name, v in changes.items()}
    monkeypatch.setattr(t, "train_and_export", None)
    line = mistake(monkeypatch, capsys, run_environment(shards, tmp_path, **changes))
    assert said.replace("FOLDER", str(tmp_path)) in line


REFUSED_STARTS = [
    {"target_mb": 0.1},
    {"data_path": "nowhere"},
    {"tokenizer_path": "nowhere.model"},
    {"resume": "nowhere.checkpoint"},
    {"resume": "nowhere.checkpoint", "run_id": None},
    {"vocab_size": 500, "log_dir": "FOLDER/new/../other/logs"},
    {"eval_only": True},
    {"eval_only": True, "artifact": "TRAINED", "vocab_size": 500},
    {"eval_only": True, "artifact": "TRAINED", "data_path": "nowhere"},
]


@pytest.mark.parametrize("changes", REFUSED_STARTS, ids=str)
def test_a_refused_start_leaves_no_folder_that_it_made(
    monkeypatch, capsys, trained, shards, tmp_path, changes
):
    """LOG_DIR, and the folders of ARTIFACT and of the scores, stayed behind, empty."""
    (tmp_path / "mine").mkdir()  # empty, but not its own
    places = {"log_dir": "FOLDER/new/logs", "eval_nll_path": "FOLDER/mine/scores/a.npy"}
    places |= {"artifact": "FOLDER/x/y/a.lzma"}
    changes = places | changes
    for name, value in changes.items():
        if isinstance(value, str):
            value = value.replace("FOLDER", str(tmp_path))
            changes[name] = value.replace("TRAINED", str(trained.artifact))
    environment = run_environment(shards, tmp_path, **changes)
    mistake(monkeypatch, capsys, environment)
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_two_starts_that_made_one_folder_do_not_take_it_from_each_other(tmp_path):
    """One that is refused may have made the folder that the other found, and still wants."""
    settings = tiny(log_dir=str(tmp_path), artifact=str(tmp_path / "new" / "a.lzma"))
    with t.removing_empty_folders():
        t.check_outputs(settings)
    assert not (tmp_path / "new").exists()
    with t.claimed_artifact(settings):
        assert os.listdir(tmp_path / "new") == ["a.lzma.lock"]


def test_an_empty_folder_of_the_users_stays_by_whatever_path_it_is_named(tmp_path):
    """It does not seem to be there while a folder on the way to it is not."""
    (tmp_path / "mine").mkdir()
    with t.removing_empty_folders():
        t.make_folder(tmp_path / "new" / ".." / "mine")
        t.make_folder(tmp_path / "new" / ".." / "made" / "within")
        assert (tmp_path / "made" / "within").is_dir()
    assert os.listdir(tmp_path) == ["mine"]


OTHER_FILES = {  # names of a run "a" in FOLDER/q, on data in FOLDER, and what they are
    "q/a.int6.lzma": "ARTIFACT",
    "q/a.int6.lzma.late": "ARTIFACT",
    "q/a.int6.lzma.lock": "ARTIFACT",
    "q/a.checkpoint": "a checkpoint",
    "q/a.checkpoint.part": "a checkpoint",
    "q/a.checkpoint-before": "a checkpoint",
    "q/a.txt": "a log",
    "q/../q/a.jsonl": "a log",
    "words_train_000000.bin": "what is read",
    "words_val_000000.bin": "what is read",
    "link to words_val_000000.bin": "what is read",
    "tokenizer.model": "what is read",
    str(SCRIPT): "what is read",
}
WRITTEN_OVER = [
    ({setting: os.path.join("FOLDER", name)}, f"both {what} and {setting.upper()}: give each")
    for name, what in OTHER_FILES.items()
    for setting in ("artifact", "eval_nll_path")
    if what.lower() != setting
]
WRITTEN_OVER += [
    ({"artifact": "FOLDER/x", "resume": "FOLDER/x"}, "both a checkpoint and ARTIFACT"),
    ({"artifact": "FOLDER/x", "eval_nll_path": "FOLDER/q/../x"}, "ARTIFACT and EVAL_NLL_PATH"),
    ({"artifact": "FOLDER/x", "eval_nll_path": "FOLDER/x.part"}, "ARTIFACT and EVAL_NLL_PATH"),
    ({"eval_nll_path": "FOLDER/other.py"}, "other.py is there already, and no .npy"),
    ({"eval_nll_path": "FOLDER/q/b.checkpoint"}, "b.checkpoint is there already, and no .npy"),
]


@pytest.mark.parametrize(("changes", "problem"), WRITTEN_OVER, ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_what_would_be_written_over_is_refused_and_stays(
    monkeypatch, capsys, trained, shards, tmp_path, again, changes, problem
):
    """Also by a run of a RUN_ID that is finished, which takes its checkpoints away first."""
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    (tmp_path / "q").mkdir()
    (tmp_path / "link to words_val_000000.bin").symlink_to("words_val_000000.bin")
    for name in ("other.py", "q/b.checkpoint"):
        (tmp_path / name).write_text("what is not ours")
    changes = {name: str(v).replace("FOLDER", str(tmp_path)) for name, v in changes.items()}
    if again:
        shutil.copy(trained.folder / "a.jsonl", tmp_path / "q")
        for path in changes.values():
            if not os.path.exists(path):
                shutil.copy(trained.artifact, path)
    paths = {"data_path": tmp_path, "tokenizer_path": tmp_path / "tokenizer.model"}
    changes |= paths | {"overwrite": True}
    before = {path: t.file_sha256(path) for path in [SCRIPT, *tmp_path.rglob("*")]}
    monkeypatch.setattr(t, "train_and_export", None)
    line = mistake(monkeypatch, capsys, run_environment(shards, tmp_path / "q", **changes))
    assert problem in line
    assert {path: t.file_sha256(path) for path in [SCRIPT, *tmp_path.rglob("*")]} == before


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(
    "other", ["words_train_000000.bin", "tokenizer.model", "q/a.checkpoint", "x.lzma", "q/a.jsonl"]
)
def test_a_log_that_is_another_file_by_a_hard_link_is_refused(
    monkeypatch, capsys, shards, tmp_path, name, other
):
    """A run wrote its source and its messages behind the shard, with status 0."""
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    log, linked = tmp_path / "q" / name, tmp_path / other
    log.parent.mkdir()
    if log == linked:
        linked = log.with_name("a.txt")
    if not linked.exists():
        linked.write_text("kept")
    log.hardlink_to(linked)
    kept = linked.read_bytes()
    paths = {"data_path": tmp_path, "tokenizer_path": tmp_path / "tokenizer.model"}
    paths |= {"artifact": tmp_path / "x.lzma", "overwrite": True}
    said = mistake(monkeypatch, capsys, run_environment(shards, tmp_path / "q", **paths))
    assert " is one file with " in said and str(log) in said
    assert str(linked) in said and ", by a link: take one of them away" in said
    assert log.read_bytes() == linked.read_bytes() == kept


def test_what_has_an_outputs_name_too_stays_whole_under_its_own(
    monkeypatch, trained, shards, tmp_path
):
    """ARTIFACT, checkpoints and scores are written beside and renamed: a hard link is no harm. One
    in the place where they are written was.
    """
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    shard, old = tmp_path / "words_train_000000.bin", tmp_path / "old.npy"
    shutil.copy(trained.folder / "nll.npy", old)
    places = {"artifact": shard, "a.npy": old}
    for name in ("artifact.part", "a.checkpoint", "a.checkpoint-before.part", "a.checkpoint.part"):
        places[name] = shard
    for name, path in places.items():
        (tmp_path / name).hardlink_to(path)
    (tmp_path / "a.npy.part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("kept")
    kept = {path: path.read_bytes() for path in (shard, old, tmp_path / "elsewhere")}
    changes = {"artifact": tmp_path / "artifact", "eval_nll_path": tmp_path / "a.npy"}
    changes |= {"data_path": tmp_path, "iterations": 2, "overwrite": True}
    assert run_here(monkeypatch, run_environment(shards, tmp_path, **changes)) == 0
    assert {path: path.read_bytes() for path in kept} == kept
    assert (tmp_path / "artifact").read_bytes() != kept[shard]


@pytest.mark.parametrize("name", ["a.int6.lzma", "a.eval.txt", "a.jsonl", "a.txt", "data.bin"])
def test_an_evaluation_writes_over_nothing_that_is_there(
    monkeypatch, capsys, trained, shards, tmp_path, name
):
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    shutil.copy(shards / "words_val_000000.bin", tmp_path / "data.bin")
    before = {x.name: x.read_bytes() for x in tmp_path.iterdir()}
    environment = run_environment(shards, tmp_path, eval_only=True, eval_nll_path=tmp_path / name)
    assert "EVAL_NLL_PATH" in mistake(monkeypatch, capsys, environment)
    if name == "a.eval.txt":
        (tmp_path / name).write_bytes(trained.artifact.read_bytes())
        before[name] = trained.artifact.read_bytes()
        environment = run_environment(shards, tmp_path, eval_only=True, artifact=tmp_path / name)
        assert "both a log and ARTIFACT" in mistake(monkeypatch, capsys, environment)
    assert {x.name: x.read_bytes() for x in tmp_path.iterdir()} == before
    nats = trained.folder / "nll.npy"  # scores are written over
    shutil.copy(nats, tmp_path / "other")
    t.check_outputs(tiny(log_dir=str(tmp_path), eval_nll_path=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("split", "tokens", "options", "said"),
    [
        ("train", range(9, 400), {"magic": 7}, "wrong magic number"),
        ("train", range(9, 400), {"version": 2}, "or version"),
        ("train", range(9, 400), {"count": 1000}, "its header says 3024"),
        ("train", [600] * 400, {}, "token id 600, but VOCAB_SIZE=512"),
        ("train", range(9, 15), {}, "no training shard holds TRAIN_SEQ_LEN"),
        ("train", [], {}, "no training shard holds TRAIN_SEQ_LEN"),
        ("val", range(9, 400), {"magic": 7}, "wrong magic number"),
        ("val", [600] * 400, {}, "token id 600, but VOCAB_SIZE=512"),
        ("val", range(9, 30), {}, "the validation shards hold 21 tokens"),
        ("val", [], {}, "the validation shards hold 0 tokens"),
        ("val", [t.BOS_ID] * 200, {}, "the validation shards hold no text"),
        ("val", range(9, 400), {"count": 200}, "1806 bytes, but its header says 1424"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_shard_ends_in_one_line(
    monkeypatch, capsys, shards, tmp_path, split, tokens, options, said
):
    for other in ("train", "val"):
        shutil.copy(shards / f"words_{other}_000000.bin", tmp_path)
    write_shard(tmp_path / f"words_{split}_000000.bin", tokens, **options)
    environment = run_environment(shards, tmp_path / "logs", data_path=tmp_path)
    assert said in mistake(monkeypatch, capsys, environment)


def test_a_training_folder_without_training_shards_ends_in_one_line(
    monkeypatch, capsys, shards, tmp_path
):
    shutil.copy(shards / "words_val_000000.bin", tmp_path)
    environment = run_environment(shards, tmp_path / "logs", data_path=tmp_path)
    assert "no *_train_*.bin shards" in mistake(monkeypatch, capsys, environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_a_gpu_where_there_is_none_ends_in_one_line(
    monkeypatch, capsys, shards, tmp_path
):
    assert "sees no GPU" in mistake(
        monkeypatch, capsys, run_environment(shards, tmp_path, device="cuda")
    )


@pytest.mark.parametrize("arguments", [["--iterations=5"], ["ITERATIONS=5"], ["x", "y"]], ids=str)
def test_arguments_are_refused(monkeypatch, capsys, arguments):
    assert "environment variables" in mistake(monkeypatch, capsys, {}, *arguments)


@pytest.mark.parametrize("arguments", [["--rehearse", "--k", "8"], ["--presets"]], ids=str)
def test_two_commands_at_once_are_told_as_such(monkeypatch, capsys, arguments):
    """The second was an unknown argument of the first."""
    said = mistake(monkeypatch, capsys, {}, *arguments, "--dry-run")
    assert f"--dry-run and {arguments[0]} are commands each by itself: give one of them" in said


@pytest.mark.parametrize("command", [[], ["--dry-run"]], ids=str)
def test_what_is_missing_is_named_with_what_to_set(shards, tmp_path, command):
    """Of an artifact, RESUME was named, which no evaluation reads; a dry run did not miss it."""

    def told(**changes) -> str:
        environment = run_environment(shards, tmp_path / "logs", **changes)
        done = forked.run(
            [sys.executable, str(SCRIPT), *command], env=process_environment(environment),
            capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path,
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        return done.stderr

    evaluation = {"eval_only": True, "run_id": "nope"}
    said = told(**evaluation)
    assert (
        f"no artifact at {tmp_path}/logs/nope.int6.lzma: set ARTIFACT to a file, or RUN_ID" in said
    )
    assert "RESUME" not in said
    assert "no checkpoint at nope: set RESUME to the file of one" in told(resume="nope")


def test_an_evaluation_of_a_run_that_has_a_checkpoint_alone_says_so(
    monkeypatch, capsys, shards, tmp_path
):
    (tmp_path / "a.checkpoint").touch()
    said = mistake(monkeypatch, capsys, run_environment(shards, tmp_path, eval_only=True))
    told = f"yet, but {tmp_path}/a.checkpoint is there: without EVAL_ONLY=1 the run goes on from it"
    assert f"no artifact at {tmp_path}/a.int6.lzma {told}\n" in said


def test_a_damaged_or_contradicted_artifact_ends_in_one_line(
    monkeypatch, capsys, trained, shards, tmp_path
):
    data = trained.artifact.read_bytes()
    path = tmp_path / "x.lzma"
    environment = run_environment(shards, tmp_path, eval_only=True, artifact=path)
    for damaged in (b"", data[:11], data[: len(data) // 2], data[:-1], data + b"\0"):
        path.write_bytes(damaged)
        assert "is not a usable artifact" in mistake(monkeypatch, capsys, environment)
    path.write_bytes(data)
    wrong = environment | {"MODEL_DIM": "64"}
    assert "MODEL_DIM=64 contradicts the artifact, which has 32" in mistake(
        monkeypatch, capsys, wrong
    )


def test_a_score_that_is_no_number_is_an_error(monkeypatch, capsys, trained, shards, tmp_path):
    """It was claimed, with status 0."""
    usual = t.Model.nats
    monkeypatch.setattr(t.Model, "nats", lambda *arguments: usual(*arguments) * math.nan)
    environment = run_environment(shards, tmp_path, eval_only=True, artifact=trained.artifact)
    said = mistake(monkeypatch, capsys, environment | {"RUN_ID": "nan"})
    assert "the score is nan: numbers overflow in PRECISION=auto, or training diverged" in said
    assert said.rstrip().endswith("SCALAR_LR or TIED_EMBED_LR; or TTT_LR"), said
    (log,) = tmp_path.rglob("nan.eval.jsonl")
    assert [record["event"] for record in t.read_records(log)][-1] == "error"


def test_shards_of_another_tokenizer_are_not_trained_on(
    monkeypatch, capsys, trained, shards, tmp_path
):
    """Of fewer pieces than VOCAB_SIZE, so that all their tokens are known. Nor are they scored,
    unless it is said that tokens were replaced on purpose.
    """
    larger = train_tokenizer(tmp_path / "larger.model", 560)
    changes = {"tokenizer_path": larger, "vocab_size": 560}
    said = mistake(monkeypatch, capsys, run_environment(shards, tmp_path, **changes))
    where = f"TOKENIZER_PATH={larger} does not fit the validation shards"
    assert where in said
    mixed = tmp_path / "mixed"
    shutil.copytree(shards, mixed)
    tokens = np.random.default_rng(0).permutation(t.open_shards(str(shards), "train")[0].read())
    last = sorted(mixed.glob("*_train_*.bin"))[-1]  # every shard is looked at
    write_shard(last, tokens[: t.open_shards(str(shards), "train")[-1].count])
    said = mistake(monkeypatch, capsys, run_environment(mixed, tmp_path))
    assert "does not fit the training shards: decoded and encoded again" in said
    tokens = np.random.default_rng(0).permutation(t.open_shards(str(shards), "val")[0].read())
    write_shard(mixed / "words_val_000000.bin", tokens)
    alone = run_environment(mixed, tmp_path, eval_only=True, artifact=trained.artifact)
    said = mistake(monkeypatch, capsys, alone)
    assert "does not fit the validation shards: decoded and encoded again" in said
    assert run_here(monkeypatch, alone | {"EVAL_ANY_TOKENS": "1"}) == 0


def test_an_artifact_is_scored_with_its_own_tokenizer_alone(
    monkeypatch, capsys, trained, shards, tmp_path, plain_tokenizer, byte_tokenizer
):
    """Neither with one of another size, though a preset or VOCAB_SIZE says so, nor with another of
    the same size.
    """
    path = tmp_path / "x.lzma"
    shutil.copy(trained.artifact, path)
    environment = run_environment(shards, tmp_path, eval_only=True, artifact=path)
    environment["TOKENIZER_PATH"] = str(plain_tokenizer)  # 200 pieces
    said = mistake(monkeypatch, capsys, environment)
    assert f"TOKENIZER_PATH={plain_tokenizer} is another tokenizer" in said
    assert hashlib.sha256(byte_tokenizer.read_bytes()).hexdigest() in said
    said = mistake(monkeypatch, capsys, environment | {"VOCAB_SIZE": "200"})
    assert "VOCAB_SIZE=200 contradicts the artifact, which has 512" in said
    del environment["VOCAB_SIZE"]  # PRESET=tiny's is 1,024, the artifact's counts
    environment["TOKENIZER_PATH"] = str(shards / "tokenizer.model")
    assert run_here(monkeypatch, environment) == 0
    other = tmp_path / "other.model"
    other.write_bytes(byte_tokenizer.read_bytes() + b"\xc2>\x01x")  # a field nobody knows
    environment["TOKENIZER_PATH"] = str(other)
    assert "is another tokenizer" in mistake(monkeypatch, capsys, environment)

    data = path.read_bytes()
    line, payload = data[8:-32].split(b"\n", 1)
    header = json.loads(line) | {"tokenizer_sha256": ""}  # as one of an older version
    path.write_bytes(b"".join(t.seal(data[:8], header, payload)))
    assert run_here(monkeypatch, environment) == 0
    environment["TOKENIZER_PATH"] = str(plain_tokenizer)
    assert "has 200 tokens, but VOCAB_SIZE=512" in mistake(monkeypatch, capsys, environment)


@pytest.mark.parametrize("bad_steps", [range(5, 99), range(30, 99)], ids=str)
def test_a_run_that_diverged_ends_in_one_line(monkeypatch, capsys, shards, tmp_path, bad_steps):
    """At the tenth bad step, whatever is logged; a single one before is only counted."""
    loss = t.Model.loss
    calls = iter(range(99))

    def spoil():
        return float("nan") if (call := next(calls)) in bad_steps or call == 1 else 1.0

    monkeypatch.setattr(t.Model, "loss", lambda *arguments: loss(*arguments) * spoil())
    settings = {"iterations": 40, "warmup_steps": 0, "train_log_every": 25}
    said = mistake(monkeypatch, capsys, run_environment(shards, tmp_path, **settings))
    assert "10 steps in a row had gradients that are not finite: training diverged" in said
    checkpoint, _, _ = (tmp_path / "a.checkpoint").read_bytes()[8:].partition(b"\n")
    assert json.loads(checkpoint)["steps"] == bad_steps[0] + 10
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    counts = {
        record["step"]: record["skipped_steps"] for record in records if record["event"] == "train"
    }
    assert counts == dict.fromkeys(range(2, 6), 1) | {1: 0} | ({} if 5 in bad_steps else {25: 1})
    text = (tmp_path / "a.txt").read_text()
    assert "step:2/40 train_loss:nan" in text
    assert len(re.findall(r"s left score in \d+s skipped_steps:1$", text, re.M)) == len(counts) - 1


def test_a_start_that_is_refused_leaves_the_log_of_a_finished_run_as_it_was(
    monkeypatch, capsys, trained, shards, tmp_path
):
    """Of several runs in it, the last one counts."""
    for name in ("a.txt", "a.jsonl"):
        shutil.copy(trained.folder / name, tmp_path)
    for changes in (
        {"vocab_size": 300},
        {"data_path": tmp_path},
        {"train_seq_len": 1024, "train_batch_tokens": 1024},
        {"resume": tmp_path / "none"},
        {"bigram_vocab_size": 1 << 20, "bigram_dim": 100},
    ):
        changes["overwrite"] = True
        mistake(monkeypatch, capsys, run_environment(shards, tmp_path, **changes))
    for name in ("a.txt", "a.jsonl"):
        assert (tmp_path / name).read_bytes() == (trained.folder / name).read_bytes()


def test_a_start_that_is_refused_leaves_no_log(monkeypatch, capsys, shards, tmp_path):
    """The next one begins with the script; a name that was found for it is free again."""
    folder = tmp_path / "logs"
    folder.mkdir()
    for changes in (
        {"vocab_size": 300},
        {"data_path": tmp_path},
        {"tokenizer_path": tmp_path / "none"},
        {"target_mb": 0.01},
        {"resume": tmp_path / "none"},
        {"run_id": None, "data_path": tmp_path},
        {"eval_only": True, "artifact": tmp_path / "none"},
    ):
        mistake(monkeypatch, capsys, run_environment(shards, folder, **changes))
        assert list(folder.iterdir()) == []
    (folder / "a.txt").touch()
    with (folder / "a.txt").open("ab") as living:  # of a run that has not begun: it is let be
        fcntl.flock(living, fcntl.LOCK_EX)
        assert "has not ended" in mistake(monkeypatch, capsys, run_environment(shards, folder))
        assert [path.name for path in folder.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("prompt", ["", "a"], ids=["scores", "sample"])
def test_an_evaluation_that_is_refused_leaves_no_log(
    monkeypatch, capsys, trained, shards, tmp_path, prompt
):
    """Also by what only its artifact tells: which kernels the model has, what it cannot be."""
    changes = {"eval_only": True, "sample_prompt": prompt or None}
    for more in (
        {"run_id": "nope"},
        {"artifact": trained.artifact, "vocab_size": 300},
        {"artifact": trained.artifact, "attention_backend": "fa3"},
        {"artifact": trained.artifact, "scan_backend": "fused"},
    ):
        environment = run_environment(shards, tmp_path, **changes | more)
        mistake(monkeypatch, capsys, environment)
        assert list(tmp_path.iterdir()) == []


def test_records_name_script_machine_and_artifact(trained):
    events = {record["event"]: record for record in trained.records}
    assert events["settings"]["script_sha256"] == t.file_sha256(SCRIPT)
    assert events["settings"]["machine"]["host"] == platform.node()
    sums = {events[name]["artifact_sha256"] for name in ("trained", "final")}
    assert sums == {t.file_sha256(trained.artifact)}
    assert events["trained"]["starts"] == 1


def manifest_of(folder: Path, overlap: int) -> dict:
    """What data/prepare.py writes down of a folder, as far as a run reads it."""
    shards = {}
    for path in sorted(folder.glob("*.bin")):
        entry = {"size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
        entry["sampled_sha256"] = hashlib.sha256(t.Shard(path).sample).hexdigest()
        # A run hashes validation shards itself, and takes this file's word for the others.
        entry["sha256"] = t.file_sha256(path) if "_val_" in path.name else path.name[::-1]
        shards[path.name] = entry
    return {"shards": shards, "overlap": {"documents": overlap}}


def warnings_in(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("warning: ")]


def log_hashes(settings: t.Settings, log: Callable) -> None:
    """t.log_hashes() of the shards in DATA_PATH."""
    opened = [t.open_shards(settings.data_path, split) for split in ("train", "val")]
    t.log_hashes(settings, *opened, log)


def test_a_start_opens_each_shard_once_and_hashes_validation_once(monkeypatch, shards, tmp_path):
    """Also one that goes on to an evaluation, which compares it with what the run began with."""
    opened, hashed, shard, file_sha256 = [], [], t.Shard, t.file_sha256
    monkeypatch.setattr(t, "Shard", lambda path: opened.append(path.name) or shard(path))
    monkeypatch.setattr(t, "file_sha256", lambda p: hashed.append(Path(p)) or file_sha256(p))
    monkeypatch.setattr(t, "evaluate_artifact", lambda *_: None)
    for _ in range(2):
        assert run_here(monkeypatch, run_environment(shards, tmp_path, iterations=1)) == 0
        assert len(opened) == len(set(opened)) == 3
        assert hashed.count(shards / "words_val_000000.bin") == 1
        opened.clear()
        hashed.clear()
    assert "no score: evaluation starts over" in (tmp_path / "a.txt").read_text()


def test_the_log_names_every_file_that_is_read_by_its_hash(trained, shards):
    """Without a manifest: validation shards are hashed, training shards are not, with a remedy."""
    found = {record["event"]: record for record in trained.records}["hashes"]
    name = "words_val_000000.bin"
    assert found["validation"] == {name: t.file_sha256(shards / name)}
    assert found["tokenizer"] == {"tokenizer.model": t.file_sha256(shards / "tokenizer.model")}
    assert found["training"] == {"words_train_000000.bin": "", "words_train_000001.bin": ""}
    assert found["overlap_documents"] is None
    assert f"\nSHA-256, validation: {name} {found['validation'][name]}\n" in trained.text
    remedy = f"python data/prepare.py manifest {shards}, once, does that"
    assert f"\nSHA-256, training: 2 not hashed ({remedy})\n" in trained.text
    assert "\nvalidation documents that are training documents too: not known\n" in trained.text


@pytest.mark.parametrize(
    "case",
    ["whole", "changed", "more", "more to score", "other text", "older", "another validation text"]
    + ["not JSON", "a list", "no sum", "nested"],
)
def test_a_manifest_is_believed_of_files_of_its_size_time_and_sample(shards, tmp_path, case):
    """Of a shard that has changed since, it is not; nor is an overlap with other shards.

    One that names another SHA-256 of a validation shard than the run's own is not at all.
    """
    folder = tmp_path / "data"
    shutil.copytree(shards, folder)
    manifest = manifest_of(folder, overlap=3)
    train = [f"words_train_00000{number}.bin" for number in (0, 1)]
    sums = {name: name[::-1] for name in train}
    if case == "changed":
        os.utime(folder / train[1], ns=(1, 1))
        sums[train[1]] = ""
    elif case == "other text":  # size and time are put back: the sample gives it away
        path = folder / train[1]
        with path.open("r+b") as file:
            file.seek(t.SHARD_HEADER_BYTES)
            file.write(b"\x07\x00\x08\x00")
        os.utime(path, ns=(1, manifest["shards"][train[1]]["mtime_ns"]))
        sums[train[1]] = ""
    elif case == "older":  # without samples
        del manifest["shards"][train[1]]["sampled_sha256"]
        sums[train[1]] = ""
    elif case == "another validation text":
        manifest["shards"]["words_val_000000.bin"]["sha256"] = "0" * 64
    elif case == "more":
        manifest["shards"]["words_train_000002.bin"] = manifest["shards"][train[0]]
    elif case == "more to score":
        manifest["shards"]["words_val_000001.bin"] = manifest["shards"][train[0]]
    elif case == "no sum":
        del manifest["shards"][train[0]]["sha256"]
    text = {"not JSON": "{", "a list": "[]", "nested": "[" * 100_000}
    (folder / "manifest.json").write_text(text.get(case, json.dumps(manifest)))
    opened = t.open_shards(str(folder), "train")
    validation = {path.name: t.file_sha256(path) for path in folder.glob("*_val_*.bin")}
    hashes, overlap, absent = t.recorded_hashes(str(folder), opened, validation)
    believed = case in ("whole", "changed", "more", "more to score", "other text", "older")
    assert absent == (["words_val_000001.bin"] if case == "more to score" else [])
    if believed:
        assert hashes == sums
        assert overlap == (3 if case == "whole" else None)
    else:
        assert (set(hashes.values()), overlap) == ({""}, None)
    said = []
    settings = tiny(data_path=str(folder), tokenizer_path=str(folder / "tokenizer.model"))
    log_hashes(settings, lambda line, *_, **record: said.append((line, record)))
    assert said[-1][1]["training"] == {name: hashes[name] for name in train}
    assert said[-1][1]["validation"] == validation
    assert said[-1][1]["computed"] == ["tokenizer", "validation"]
    known = "3 (by manifest.json)" if case == "whole" else "not known"
    assert said[-1][0] == f"validation documents that are training documents too: {known}"
    lines = [line for line, _ in said]
    assert any(line.startswith("SHA-256, validation: words") for line in lines)
    taken = [line.startswith("SHA-256, training (by manifest.json): words") for line in lines]
    assert sum(taken) == believed
    warnings = [line for line in lines if line.startswith("warning: ")]
    lacks = f"warning: {folder} lacks words_val_000001.bin, which its manifest.json lists"
    assert warnings == [lacks] * len(absent)


def test_a_training_shard_that_is_a_validation_shard_is_refused(shards, tmp_path):
    """Whatever it is called, and whatever manifest.json says of it."""
    folder = tmp_path / "data"
    shutil.copytree(shards, folder)
    settings = tiny(data_path=str(folder), tokenizer_path=str(folder / "tokenizer.model"))
    log_hashes(settings, lambda *_, **record: None)
    shutil.copy(folder / "words_val_000000.bin", folder / "words_train_000002.bin")
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder, overlap=0)))
    problem = r"words_train_000002\.bin holds the text of words_val_000000\.bin, which is scored"
    with pytest.raises(t.UserError, match=problem):
        log_hashes(settings, lambda *_, **record: None)


def test_a_copy_of_a_validation_shard_is_refused(shards, tmp_path):
    """Its text would be scored twice. Empty shards are alike, and hold none."""
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    settings = tiny(data_path=str(tmp_path), tokenizer_path=str(tmp_path / "tokenizer.model"))
    for number in (1, 2):
        write_shard(tmp_path / f"words_val_00000{number}.bin", [])
    log_hashes(settings, lambda *_, **record: None)
    shutil.copy(tmp_path / "words_val_000000.bin", tmp_path / "words_val_000000 (1).bin")
    with pytest.raises(t.UserError, match="holds the text of words_val_000000.*, which is scored"):
        log_hashes(settings, lambda *_, **record: None)


def test_a_shard_that_both_splits_name_is_told_to_be_renamed(shards, tmp_path):
    """It was to be taken away, for holding its own text."""
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    (tmp_path / "words_train_000001.bin").rename(tmp_path / "words_val_train_000001.bin")
    settings = tiny(data_path=str(tmp_path), tokenizer_path=str(tmp_path / "tokenizer.model"))
    with pytest.raises(
        t.UserError, match=r"val_train_000001\.bin is training text and is scored, by"
    ):
        log_hashes(settings, lambda *_, **record: None)


@pytest.mark.parametrize("name", ["words_val_000000.bin", "words_train_val_000000.bin"])
def test_an_evaluation_may_score_training_text(
    monkeypatch, capsys, trained, shards, tmp_path, name
):
    """Whoever asks for the training text's BPB gets it; a run that trains does not."""
    text = shards / "words_train_000000.bin"
    shutil.copy(text, tmp_path / name)
    shutil.copy(text, tmp_path)
    changes = {"data_path": tmp_path, "artifact": trained.artifact}
    changes |= {"eval_mode": "plain", "ttt_enabled": False}
    environment = run_environment(shards, tmp_path / "logs", eval_only=True, **changes)
    assert run_here(monkeypatch, environment) == 0
    out = capsys.readouterr().out
    assert f"SHA-256, validation: {name} {t.file_sha256(text)}" in out
    problem = f"holds the text of {tmp_path / text.name}, a training shard"
    problem = "is training text by its name" if "_train_" in name else problem
    assert warnings_in(out) == [f"warning: {name} {problem}, and is scored"]
    environment = run_environment(shards, tmp_path / "logs", data_path=tmp_path)
    told = mistake(monkeypatch, capsys, environment)
    assert "which is scored: take it away" in told or "is scored, by its name: rename it" in told


@pytest.mark.parametrize(
    "case", ["hashed", "not hashed", "other text", "another's log", "null", "list", "unhashable"]
)
def test_training_text_is_known_by_the_log_of_the_run_where_that_has_its_sum(
    monkeypatch, capsys, trained, shards, tmp_path, case
):
    """Wherever it is scored, and whatever it is called there. A broken training shard beside it,
    which nothing reads, is none of an evaluation's business.
    """
    text = shards / "words_train_000001.bin"
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(
        shards / "words_val_000000.bin" if case == "other text" else text, data / "x_val_0.bin"
    )
    (data / "x_train_0.bin").write_bytes(b"no shard")
    artifact = tmp_path / "b.int6.lzma"
    shutil.copy(trained.artifact, artifact)
    records = trained.records
    for record in records:
        if record["event"] == "hashes" and case != "not hashed":
            hashed = {text.name: t.file_sha256(text)}
            damaged = {"null": None, "list": [1], "unhashable": {text.name: [1]}}
            record["training"] = damaged.get(case, hashed)
        if record["event"] == "trained" and case == "another's log":
            record["artifact_sha256"] = "0" * 64
    log = tmp_path / "b.jsonl"
    log.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    changes = {"data_path": data, "artifact": artifact, "eval_mode": "plain", "ttt_enabled": False}
    environment = run_environment(shards, tmp_path / "logs", eval_only=True, **changes)
    assert run_here(monkeypatch, environment) == 0
    told = [f"warning: x_val_0.bin is training text by {log}, and is scored"]
    assert warnings_in(capsys.readouterr().out) == (told if case == "hashed" else [])


def test_two_runs_with_one_artifact_are_told_apart_at_the_start(
    monkeypatch, capsys, shards, tmp_path
):
    """The second one is refused before it trains; the file is free when the first has ended."""
    artifact = tmp_path / "shared.lzma"
    first = run_environment(shards, tmp_path, artifact=artifact, iterations=1)
    second = first | {"RUN_ID": "b"}
    train, said = t.train_and_export, []

    def while_it_trains(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(t, "train_and_export", pytest.fail)
            said.append(mistake(patch, capsys, second))
        return train(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(t, "train_and_export", while_it_trains)
        assert run_here(patch, first) == 0
    remedy = "wait for it, or choose another ARTIFACT"
    assert f"{artifact}.lock belongs to a run that has not ended: {remedy}" in said[0]
    assert not list(tmp_path.glob("b.*"))
    assert not list(tmp_path.glob("*.lock"))
    assert run_here(monkeypatch, second | {"OVERWRITE": "1"}) == 0


def test_a_lock_that_left_its_name_before_it_was_taken_is_no_claim(monkeypatch, tmp_path):
    """Its last holder unlinks it between another one's open() and flock()."""
    path, flock = tmp_path / "a.lock", t.fcntl.flock

    def unlinked_meanwhile(file, how):
        monkeypatch.setattr(t.fcntl, "flock", flock)
        path.unlink()
        flock(file, how)

    monkeypatch.setattr(t.fcntl, "flock", unlinked_meanwhile)
    with t.claim_file(path, "ARTIFACT"), pytest.raises(t.UserError, match="has not ended"):
        t.claim_file(path, "ARTIFACT")


def test_hosts_of_all_ranks_are_in_the_log(monkeypatch):
    monkeypatch.setattr(t.platform, "node", lambda: str(threading.get_ident()))
    machines = run_ranks(2, t.describe_machine)
    assert machines[0] == machines[1]
    assert len(set(machines[0]["host"].split(", "))) == 2


def test_an_artifact_that_another_run_has_replaced_is_not_scored(
    monkeypatch, capsys, trained, shards, tmp_path
):
    """Two runs with one ARTIFACT: the later one's would get the earlier one's claim."""
    artifact = tmp_path / "shared.lzma"
    export = t.train_and_export

    def replaced(*arguments):
        written = export(*arguments)
        shutil.copy(trained.artifact, artifact)
        return written

    monkeypatch.setattr(t, "train_and_export", replaced)
    changes = {"artifact": artifact, "iterations": 1}
    said = mistake(monkeypatch, capsys, run_environment(shards, tmp_path, **changes))
    assert "another run has the same ARTIFACT" in said
    assert "final" not in (tmp_path / "a.jsonl").read_text()


def test_a_path_that_is_no_text_is_shown_by_its_bytes(monkeypatch, capsys, shards, tmp_path):
    for name in ("data_path", "tokenizer_path"):
        changes = {name: os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfc\xdfe")}
        said = mistake(monkeypatch, capsys, run_environment(shards, tmp_path, **changes))
        assert r"/gr\xfc\xdfe" in said


def test_two_runs_of_one_second_have_two_names(monkeypatch, tmp_path):
    monkeypatch.setattr(t.time, "strftime", lambda form: "20300101-000000")
    settings = tiny(log_dir=str(tmp_path / "logs"))
    names = [t.choose_run_id(settings, {}) for _ in range(3)]
    assert names == [f"20300101-000000-tiny-1337{end}" for end in ("", "-2", "-3")]
    again = {"TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_RUN_ID": "mine"}
    assert t.choose_run_id(settings, again) == t.choose_run_id(settings, again)
    with pytest.raises(t.UserError, match="needs a RUN_ID"):
        t.choose_run_id(settings, again | {"TORCHELASTIC_RUN_ID": "none"})


def test_the_name_of_a_run_that_still_lives_is_refused(monkeypatch, capsys, shards, tmp_path):
    """And free again once that has ended, however it did."""
    environment = run_environment(shards, tmp_path, iterations=1)
    hold = "import pathlib, sys, train_gpt as t; "
    hold += "f = t.claim_file(pathlib.Path(sys.argv[1]), 'RUN_ID'); "
    hold += "print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "a.txt")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    place = {"cwd": SCRIPT.parent, "env": process_environment({})}
    with forked.Popen(command, **pipes, **place) as other:
        other.stdout.readline()
        said = mistake(monkeypatch, capsys, environment)
        assert "a.txt belongs to a run that has not ended" in said
        other.kill()
    assert run_here(monkeypatch, environment) == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1251"])
def test_a_console_without_some_signs_ends_no_tool(trained, encoding):
    console = process_environment({"PYTHONIOENCODING": encoding})
    command = [sys.executable, "-m", "tools.summary", trained.folder / "a.jsonl"]
    done = subprocess.run(command, env=console, capture_output=True, cwd=SCRIPT.parent)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"1 ? CPU" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1251"])
def test_a_console_without_some_signs_ends_nothing(trained, shards, tmp_path, encoding):
    console = process_environment({"PYTHONIOENCODING": encoding})
    command = [sys.executable, str(SCRIPT)]
    options = {"capture_output": True, "timeout": PATIENCE}
    done = forked.run([*command, "--help"], env=console, **options)
    assert (done.returncode, done.stderr) == (0, b"")
    changes = {"eval_only": True, "artifact": trained.artifact, "eval_max_seconds": 1e-6}
    environment = run_environment(shards, tmp_path, **changes)
    done = forked.run(command, env=environment | console, **options)
    assert done.returncode == 2
    assert b"hardware=1 \\xd7 CPU" in done.stdout
    assert done.stderr.startswith(b"train_gpt.py: error: no score in EVAL_MAX_SECONDS")
    assert done.stderr.count(b"\n") == 1
    told = (tmp_path / "a.eval.txt").read_text(encoding="utf-8")
    assert "hardware=1 × CPU" in told
    # All settings are for the log, and in one line.
    assert "  ttt_lora_slots=" in told.rsplit("=" * 100, 1)[1]
    assert b"ttt_lora_slots=" not in done.stdout


def test_a_console_that_was_closed_from_the_start_ends_nothing(trained, shards, tmp_path):
    """Neither a run, whose log is whole and holds no word of the console's, nor a tool."""
    changes = {"eval_only": True, "artifact": trained.artifact, "eval_mode": "plain"}
    environment = run_environment(shards, tmp_path, **changes)
    shell = ["bash", "-c", '"$@" >&- 2>&- <&-', "bash", sys.executable]
    done = subprocess.run([*shell, str(SCRIPT)], env=environment)
    assert done.returncode == 0
    *_, last = (tmp_path / "a.eval.txt").read_text(encoding="utf-8").splitlines()
    assert FINAL.fullmatch(last)
    *_, record = (tmp_path / "a.eval.jsonl").read_text().splitlines()
    assert json.loads(record)["event"] == "final_profile"
    tool = [*shell, "-m", "tools.summary", trained.folder / "a.jsonl"]
    assert subprocess.run(tool, env=process_environment({}), cwd=SCRIPT.parent).returncode == 0


def test_help_needs_nothing_and_lists_everything(monkeypatch, capsys):
    for argument in ("--help", "-h"):
        assert run_here(monkeypatch, {"VOCAB_SIZES": "nonsense"}, argument) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        for field in dataclasses.fields(t.Settings):
            assert re.search(rf"^ *{field.name.upper()} ", captured.out, re.M), field.name
        for preset in t.PRESETS:
            assert f"PRESET={preset}: " in captured.out


def test_a_mistake_in_a_real_process_has_status_2_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=tmp_path,
        env=process_environment({"PRESET": "tiny", "TRAIN_BATCH_TOKEN": "4096"}),
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "train_gpt.py: error: TRAIN_BATCH_TOKEN is not a setting; did you mean TRAIN_BATCH_TO"
    )
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_that_only_another_rank_sees_is_told(monkeypatch, capsys):
    """A bad token in rank 1's half of the batch: rank 0 knows nothing of it. Rank 1 waits, and if
    rank 0 has not ended the run by then, it speaks itself.
    """

    def main(log: t.Log) -> None:
        raise t.UserError("the training shards hold token id 600")

    said_before = []
    monkeypatch.setattr(t, "main", main)
    monkeypatch.setattr(
        t.time, "sleep", lambda seconds: said_before.append((seconds, capsys.readouterr().err))
    )
    monkeypatch.setattr(os, "environ", {"RANK": "1", "WORLD_SIZE": "2"})
    monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
    assert t.run() == 2
    assert [(seconds >= 1, said) for seconds, said in said_before] == [(True, "")]
    said = "train_gpt.py: error: rank 1: the training shards hold token id 600\n"
    assert capsys.readouterr().err == said


FAIL_ON_RANK_1 = """
import sys
import train_gpt as t
gradients = t.Trainer.accumulate_gradients
def fail(trainer, *arguments):
    if trainer.ranks.rank == 1 and trainer.steps_done == 2:
        t.WAIT_FOR_MAIN = 0.0
        raise t.UserError("a bad token")
    return gradients(trainer, *arguments)
t.Trainer.accumulate_gradients = fail
sys.exit(t.run())
"""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "train_gpt.py: error: rank 1: a bad token"),
        ({"vocab_size": 300}, "train_gpt.py: error: "),
    ],
    ids=["one rank's", "all ranks'"],
)
def test_torchrun_ends_with_the_one_line_once_and_the_log_of_a_run_has_it(
    shards, tmp_path, changes, said
):
    """Behind it stands only the border of the block in which torchrun tells the cause."""
    (tmp_path / "fail.py").write_text(FAIL_ON_RANK_1)
    done = forked.run(
        torchrun("--nproc_per_node=2", str(tmp_path / "fail.py")),
        env=process_environment(run_environment(shards, tmp_path, **changes)),
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode != 0
    *_, line, border = (done.stdout + done.stderr).splitlines()
    assert set(border) == {"="}
    assert line.strip().startswith(said)
    assert done.stderr.count(line.strip()) == 1
    if changes:  # refused at the start, which leaves no log
        assert list(tmp_path.glob("a.*")) == []
        return
    text = (tmp_path / "a.txt").read_text(encoding="utf-8").splitlines()
    assert text.count(line.strip()) == 1
    records = [json.loads(record) for record in (tmp_path / "a.jsonl").read_text().splitlines()]
    first = next(record for record in records if record["event"] == "error")
    assert first["rank"] == 1
    assert line.endswith(first["error"])


@pytest.mark.parametrize("rank", [0, 1])
def test_what_stops_all_ranks_at_once_is_told_by_rank_0_alone(monkeypatch, capsys, rank):
    """Where a signal ends torchrun, it lets them end by themselves. A mistake is any rank's."""
    settings = tiny()
    trainer = t.Trainer(random_model(settings), settings, SOLO, 64, 1e6, Quiet())
    with pytest.raises(t.UserError) as caught:
        trainer.stop("stopped by SIGTERM at step 3")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(t, "WAIT_FOR_MAIN", -rank)
    for error in (caught.value, t.UserError("stopped by a mistake")):
        t.tell_failure(error, str(error), Quiet())
    told = capsys.readouterr().err.splitlines()
    assert (
        told
        == [
            [
                "train_gpt.py: error: " + text
                for text in ("stopped by SIGTERM at step 3", "stopped by a mistake")
            ],
            ["train_gpt.py: error: rank 1: stopped by a mistake"],
        ][rank]
    )


def test_what_ends_a_run_stands_in_its_log_even_if_it_is_a_bug(monkeypatch, shards, tmp_path):
    def spoil(*arguments):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(t, "export", spoil)
    with pytest.raises(ZeroDivisionError):
        run_here(monkeypatch, run_environment(shards, tmp_path, iterations=1))
    *_, last = (tmp_path / "a.jsonl").read_text().splitlines()
    assert json.loads(last)["error"] == "ZeroDivisionError: by zero"
    text = (tmp_path / "a.txt").read_text(encoding="utf-8")
    assert text.endswith("\ntrain_gpt.py: error: ZeroDivisionError: by zero\n")


def test_where_torchrun_will_restart_a_rank_it_tells_its_mistake_itself(monkeypatch, tmp_path):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    for restarts in (0, 1):
        assert not path.exists()
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        assert t.left_to_torchrun("a line") == (restarts == 1)
    assert json.loads(path.read_text())["message"]["message"] == "\na line"


# Each case is a process that has imported the script, and nothing of the compiler.
FUSION_OF_SUMS = """
import os, sys, train_gpt
import torch.fx.experimental.symbolic_shapes  # which the compiler imports: once, not in each below
assert "torch._inductor.config" not in sys.modules
for wanted in ("", "1"):
    for early in (False, True):
        if os.fork() == 0:
            if wanted:
                os.environ["TORCHINDUCTOR_MIX_ORDER_REDUCTION"] = wanted
            if early:
                import torch._inductor.config
            train_gpt.prepare_torch()
            import torch._inductor.config as config
            fused = getattr(config.triton, "mix_order_reduction", "unknown")
            print(repr(wanted), early, fused, flush=True)
            os._exit(0)
        os.wait()
"""


def test_torchs_fusion_of_sums_is_off_unless_it_is_asked_for():
    """The compiler reads the variable when it is first imported, which may be before or after."""
    done = subprocess.run(
        [sys.executable, "-c", FUSION_OF_SUMS],
        env=process_environment({}),
        capture_output=True,
        text=True,
        cwd=SCRIPT.parent,
    )
    lines = [
        f"{wanted!r} {early} {fused}"
        for wanted, fused in (("", False), ("1", True))
        for early in (False, True)
    ]
    found = done.stdout.splitlines()
    assert found in (lines, [f"{line.rpartition(' ')[0]} unknown" for line in lines]), done.stderr


def test_a_process_that_waits_for_other_ranks_ends_at_a_signal(shards, tmp_path):
    """There is nothing to lose yet; torch waits in C++, where no handler of Python's runs."""
    port = free_port()
    launch = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    launch |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    environment = process_environment(run_environment(shards, tmp_path)) | launch
    process = forked.Popen([sys.executable, str(SCRIPT)], env=environment)
    try:
        listens, deadline = False, time.monotonic() + PATIENCE
        while not listens and time.monotonic() < deadline:
            time.sleep(0.1)
            with socket.socket() as probe:
                listens = probe.connect_ex(("localhost", int(port))) == 0
        assert listens
        process.terminate()
        assert process.wait(timeout=20) == -signal.SIGTERM
    finally:
        process.kill()


def test_two_machines_are_two_ranks(trained_by_two, shards, tmp_path):
    """Two agents of torchrun, as on two machines that share LOG_DIR: the artifact of one machine's
    two ranks, byte for byte.
    """
    port = free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--nnodes=2"]
    launch += ["--master_addr=localhost", f"--master_port={port}"]
    environment = process_environment(run_environment(shards, tmp_path, run_id="nodes"))
    agents = [
        forked.Popen(
            [*launch, f"--node_rank={rank}", str(SCRIPT)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert agents[0].wait(timeout=PATIENCE) == 0
    agents[1].wait(timeout=PATIENCE)  # torchrun may complain that the first has left
    artifact = (tmp_path / "nodes.int6.lzma").read_bytes()
    assert artifact == trained_by_two.artifact.read_bytes()


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("settings", "MATRIX_LR=0.03, not 0.02: give this rank what rank 0 has"),
        ("words_train_000001.bin", "training text="),
        ("words_val_000000.bin", "validation text="),
        ("tokenizer.model", "TOKENIZER_PATH="),
        ("nothing", ""),
    ],
)
def test_machines_whose_files_or_settings_differ_are_refused(shards, tmp_path, part, said):
    """What each reads for itself; other paths are no difference. Ranks are threads here."""
    ours = tiny(data_path=str(shards), tokenizer_path=str(shards / "tokenizer.model"))
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    paths = {"data_path": str(other), "tokenizer_path": str(other / "tokenizer.model")}
    theirs = with_settings(ours, **paths, log_dir="/elsewhere")
    if part == "settings":
        theirs = with_settings(theirs, matrix_lr=0.03)
    elif part == "tokenizer.model":  # a field that nobody knows
        (other / part).write_bytes((other / part).read_bytes() + b"\xc2>\x01x")
    elif part != "nothing":
        data = (other / part).read_bytes()
        (other / part).write_bytes(data[:-2] + b"\x07\0")

    def compare(ranks: t.Ranks) -> str:
        settings = (ours, theirs)[ranks.rank]
        tokenizer = t.Tokenizer(settings.tokenizer_path, settings.vocab_size)
        try:
            training = t.open_shards(settings.data_path, "train")
            t.check_alike(settings, ranks, training, t.load_validation(settings, tokenizer))
        except t.UserError as error:
            return str(error)
        return ""

    first, second = run_ranks(2, compare)
    assert first == ""
    assert second.startswith(said)
    assert bool(second) == bool(said)
