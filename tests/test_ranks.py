"""Steps of several ranks beside those of one: what a timeline says, and the command, on the CPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import ranks
from tests.support import SOLO, WallClockEvent, tiny
from tools.command import UserError


def test_a_union_counts_what_overlaps_once():
    assert ranks.union([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == (4.0, [2.0])
    assert ranks.union([]) == (0.0, [])


def test_a_timeline_tells_idle_time_from_waiting_for_other_ranks():
    """Two steps in 2 ms: of the collectives' 600 µs, 200 are beside a product."""
    kernels = [
        ("gemm", 0.0, 500.0),
        ("ncclDevKernel_AllReduce", 300.0, 900.0),
        ("gemm", 1000.0, 1500.0),
        ("triton_poi_fused", 1501.0, 2000.0),
    ]
    row = ranks.timeline(kernels, steps=2)
    assert row["launches"] == 2
    assert row["busy_share"] == pytest.approx(1899 / 2000)
    assert row["idle_ms"] == pytest.approx(0.0505)
    assert row["gaps"] == 0  # one in two steps; one of 1 µs is none
    assert row["longest_gap_ms"] == pytest.approx(0.1)
    assert row["collective_ms"] == pytest.approx(0.3)
    assert row["exposed_ms"] == pytest.approx(0.2)
    assert ranks.timeline([], 2) == {}


class Profile:
    """Stands in for torch.profiler.profile: two kernels, and a row of the host's."""

    def __init__(self, activities):
        self.did = []
        self.start = lambda: self.did.append("start")
        self.stop = lambda: self.did.append("stop")

    def events(self) -> list[SimpleNamespace]:
        assert self.did == ["start", "stop"]
        gpu, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
        rows = ("gemm", 0, 30, gpu), ("nccl", 20, 50, gpu), ("aten::mm", 0, 99, host)
        return [
            SimpleNamespace(name=n, time_range=SimpleNamespace(start=a, end=b), device_type=kind)
            for n, a, b, kind in rows
        ]


def test_steps_are_timed_profiled_and_launched_behind_an_idle_gpu(monkeypatch):
    """A CPU stands in for the GPU."""
    monkeypatch.setattr(torch.cuda, "Event", WallClockEvent)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(ranks, "PROFILED", 2)
    settings = tiny(train_batch_tokens=64, micro_batch_tokens=64)
    row = ranks.measure(settings, SOLO, 2, graphed=True)
    assert not row["graphed"]
    assert 0 < row["fastest_ms"] <= row["step_ms"]
    assert row["host_ms"] > 0
    assert (row["launches"], row["busy_share"], row["exposed_ms"]) == (1, 1.0, 0.01)
    assert len(waits) == ranks.HOST_STEPS + 3  # before and behind the profile, and at the end


def test_the_command_leaves_out_what_is_no_other_case(monkeypatch, capsys, tmp_path):
    asked = []

    def answered(number, steps, eager):
        asked.append((number, eager))
        return [{"graphed": number == 1 and not eager, "step_ms": 40.0, "machine": {}}] * number

    monkeypatch.setattr(ranks, "run_ranks", answered)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    file = tmp_path / "ranks.json"
    assert ranks.main(["--ranks", "2", "--out", str(file)]) == 0
    assert asked == [(1, False), (1, True), (2, False)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 ranks, rank 1: graphed 0, step_ms 40.0"
    assert list(json.loads(file.read_text())) == ["1 rank", "1 rank, without graphs", "2 ranks"]
    with pytest.raises(UserError, match="3 ranks need as many GPUs: 2 here"):
        ranks.main(["--ranks", "3"])
    monkeypatch.setattr(ranks, "work", lambda options: (options.worker, options.steps))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # what torchrun starts asks nobody
    assert ranks.main(["--worker", "folder", "--steps", "3"]) == ("folder", 3)
