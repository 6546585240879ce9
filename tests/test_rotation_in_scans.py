"""tools/ideas/rotation_in_scans.py: its kernels compute what the reference does, and fit a GPU."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt as t
from reference.scan_cases import errors, in_two_calls, random_case, results
from tests.support import PATIENCE, interpreted

idea = pytest.importorskip("tools.ideas.rotation_in_scans", reason="needs triton")
ROOT = Path(__file__).resolve().parent.parent
SHARED_OF_TWO = 115_712  # bytes of a program, where two are to share a multiprocessor of an H100
CHUNK = 16
CHANGED = ("launch_scan", "rotate_features", "scan_forward", "scan_backward")
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow"),  # of decays that lie ahead, which a mask removes
    pytest.mark.filterwarnings("ignore:Conversion of an array"),  # the interpreter's own
]
CASES = {  # chunk and case; a start is a position in the last sequence
    "two tokens": (16, random_case(2, 2, 1, 16, 16, carried=True)),
    "one token more than a chunk": (16, random_case(2, 17, 3, 16, 16, carried=True)),
    "everything rotates": (16, random_case(1, 20, 3, 16, 16, rope_fraction=1.0, carried=True)),
    "heads of 64": (64, random_case(1, 65, 2, 64, 64, carried=True)),
    "documents": (16, random_case(2, 40, 2, 16, 16, starts=(0, 16, 20, 21), carried=True)),
}


@pytest.fixture(params=["neither", "written", "before"])
def installed(request, monkeypatch):
    """The idea in train_gpt.py, for one test."""
    for name in CHANGED:
        monkeypatch.setattr(t, name, getattr(t, name))
    monkeypatch.setattr(idea, "ROTATED", request.param)
    idea.install(t)
    return request.param


def scan(projected, parameters, sizes, document_start, state, backend="triton", chunk=CHUNK):
    return t.mamba_scan(projected, parameters, sizes, document_start, state, backend, chunk)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_every_gradient(name, installed):
    chunk, case = CASES[name]
    expected = results(functools.partial(scan, backend="sequential"), case, torch.float64)
    found = results(functools.partial(scan, chunk=chunk), case, torch.float32)
    # Sums of logarithms that hold a document start's lose digits.
    tolerance = 1e-5 if case.document_start is None else 5e-4
    off = errors(found, expected)
    assert {name: error for name, error in off.items() if not error <= tolerance} == {}


@interpreted
def test_a_sequence_in_two_calls_equals_one_call(installed):
    """Gradients too, which flow through the state between the calls."""
    case = random_case(2, 24, 1, 16, 16, starts=(20, 21), carried=True)
    expected = results(functools.partial(scan, backend="sequential"), case, torch.float64)
    off = errors(results(in_two_calls(scan, 17), case, torch.float32), expected)
    assert {name: error for name, error in off.items() if not error <= 5e-4} == {}


@interpreted
def test_keys_and_queries_of_heads_are_not_read_unless_written(installed, monkeypatch):
    """What they lie in begins as no numbers, and remains so."""
    case = random_case(1, 32, 2, 16, 16)
    expected = results(functools.partial(scan, backend="sequential"), case, torch.float64)
    empty, made = t.fused_scan_fake, []

    def no_numbers(*arguments):
        found = empty(*arguments)
        rotated = found[t.SAVED.index("rotated") - len(t.SAVED)]
        made.append(rotated.fill_(torch.nan))
        return found

    monkeypatch.setattr(t, "fused_scan_fake", no_numbers)
    off = errors(results(scan, case, torch.float32), expected)
    assert max(off.values()) < 1e-5
    (rotated,) = made
    assert rotated.isnan().all() if installed == "neither" else rotated.isfinite().all()


@interpreted
def test_shapes_that_it_does_not_know_are_refused(installed):
    for channels, state, fraction in ((32, 16, 0.5), (16, 16, 0.25)):
        case = random_case(1, 17, 1, channels, state, rope_fraction=fraction)
        with pytest.raises(t.UserError, match=r"rotation_in_scans.py needs"):
            results(scan, case, torch.float32)


@pytest.mark.parametrize("rotated", ["neither"])
def test_two_programs_share_a_multiprocessor(rotated, tmp_path):
    """Of a thread's numbers a few wait in memory; the script's kernels have none that do."""
    words = ("--idea", idea.__file__, "scans", "16,64,64,64", "90")
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", *words],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "IDEA_ROTATED": rotated},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)["kernels"]
    assert set(kernels) == {"scan_forward", "scan_backward"}
    assert max(usage["shared"] for usage in kernels.values()) <= SHARED_OF_TWO
    assert kernels["scan_forward"]["local"] == 0
    assert kernels["scan_backward"]["local"] <= 100


def test_another_form_is_refused(monkeypatch):
    monkeypatch.setattr(idea, "ROTATED", "both")
    with pytest.raises(
        t.UserError, match="IDEA_ROTATED=both should be one of neither, written, before"
    ):
        idea.install(t)
