"""Fits a dry run's table of corrections: how much smaller than predicted finished artifacts are.

    python -m tools.fit_bytes

What t.predict_bytes() says of Gaussian weights is compared with the artifacts of the logs here and,
kind by kind, with the integers in data/tiny's artifact. The smallest corrections, by least squares,
that explain the differences are printed in the form that tools/dry_run.py has. A run does not count
if its text log shows that its script did not yet code by asymmetric numeral systems.
"""

import functools
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m tools.fit_bytes", file=sys.stderr
    )
    sys.exit(2)

import train_gpt as t
from tools import dry_run
from tools.command import UserError, run_command
from tools.logs import SEPARATOR, last_run, number_in
from tools.pack_script import source_of

ROOT = Path(t.__file__).resolve().parent
TINY = ROOT / "data" / "tiny"
KINDS = tuple(t.KINDS.values())
PRIOR_BITS = 0.02  # corrections of about this size are expected
PRIOR_BYTES = 500.0
FORMER_BYTES = 1.0  # that a row's step took more before there was t.coarse_steps()


# ---- What is known -------------------------------------------------------------------------------


class Finished(NamedTuple):
    """A run that has left an artifact."""

    name: str
    settings: t.Settings
    k: float
    size: int  # bytes of the artifact, with steps as they are today


def settings_of(values: dict) -> t.Settings:
    """A log's settings, by today's names; those that only older scripts had are let go."""
    values = dict(values)
    if values.get("layer_pattern"):  # M and A, before there was MAMBA_LAYERS
        letters = enumerate(values["layer_pattern"])
        values["mamba_layers"] = ",".join(str(layer) for layer, letter in letters if letter == "M")
    values["layer_order"] = values.get("layer_order") or "all"
    known = {name: value for name, value in t.FORMER_DEFAULTS.items() if name in t.FIELDS}
    known |= {name: value for name, value in values.items() if name in t.FIELDS}
    return t.Settings(**known)


def finished_runs(logs: Iterable[Path] | None = None) -> list[Finished]:
    """The runs of GPTQ in some logs, or all here, that say how large their artifact was."""
    runs = []
    logs = (ROOT / "logs").rglob("*.jsonl") if logs is None else logs
    for path in sorted([*logs, TINY / "tiny.jsonl"]):
        try:
            events = last_run(path)
        except UserError:
            continue  # lines of tools.explore, which are no records
        if not {"settings", "trained"} <= events.keys():
            continue  # it is not that of a whole run
        text = path.with_suffix(".txt")
        script = text.read_bytes().rpartition(SEPARATOR.encode())[0] if text.is_file() else b""
        coded = not script or b"ANS_LANES" in source_of(script)
        values, trained = events["settings"].get("settings", {}), events["trained"]
        names = ("bytes_total", "bytes_code", "sdclip_k")
        total, code, k = (number_in(trained, name) for name in names)
        if not coded or None in (total, code, k):
            continue
        settings = settings_of(values)
        size = int(total - code)
        if "shared_tables" not in values:  # which are as old
            size -= round(FORMER_BYTES * count_rows(settings))
        if settings.quantizer == "gptq":  # the table is for no other
            runs.append(Finished(path.stem, settings, k, size))
    return runs


@functools.cache
def skeleton_of(settings: t.Settings) -> t.Model:
    """A run's model without numbers, made once: the fit asks for it several times."""
    return t.model_skeleton(settings)


def count_rows(settings: t.Settings) -> int:
    """Rows of all matrices, each of which has a step."""
    return sum(map(len, t.grid_limits(skeleton_of(settings)).values()))


def counts_of(model: t.Model) -> tuple[dict[str, int], int]:
    """Numbers in matrices by kind, and how many matrices."""
    numbers = dict.fromkeys(KINDS, 0)
    matrices = t.grid_limits(model)
    for name in matrices:
        numbers[t.layer_kind(name)] += model.get_parameter(name).numel()
    return numbers, len(matrices)


def measured_bits() -> dict[str, float]:
    """Bits that each number of data/tiny's artifact takes less than a Gaussian one, by kind."""
    header, payload = t.read_artifact(TINY / "tiny.int6.lzma")
    k = last_run(TINY / "tiny.jsonl")["trained"]["sdclip_k"]
    settings = t.Settings(**{name: header[name] for name in t.MODEL_FIELDS})
    skeleton = t.model_skeleton(settings)
    record, _ = t.read_record(payload, skeleton)
    numbers, _ = counts_of(skeleton)
    bits = dict.fromkeys(KINDS, 0.0)
    matrices = t.grid_limits(skeleton)
    tables = dict(zip(matrices, record["frequencies"][:, 0], strict=True))
    for name, _, limits, rows, columns in t.grids(skeleton, settings, matrices, k):
        weight, _ = t.stand_in(matrices[name])
        integers = t.round_to_grid(weight, rows * columns, limits)
        share = skeleton.get_parameter(name).numel() / numbers[t.layer_kind(name)]
        gaussian = np.unique(integers.numpy(), return_counts=True)[1]
        less = entropy(gaussian) - entropy(tables[name])
        bits[t.layer_kind(name)] += share * less
    return bits


def entropy(counts: np.ndarray) -> float:
    """Bits of a value that comes as often as counts say."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


# ---- The table -----------------------------------------------------------------------------------
#
# With n numbers of each kind and m matrices, a run's artifact is smaller than predicted by about
#
#     sum over kinds of BITS_SAVED[kind] n[kind] / 8  +  BYTES_SAVED m
#
# Five layouts cannot tell six kinds apart: the tiny artifact's kinds are six equations more.


def fit(runs: list[Finished]) -> tuple[dict[str, float], float]:
    """BITS_SAVED and BYTES_SAVED: least squares, in thousandths of each artifact's size.

    Of runs whose grid steps are the usual ones: see SHARED_ERROR.
    """
    rows = []
    wanted = []
    for run in runs:
        if run.settings.shares_bits:
            continue
        skeleton = skeleton_of(run.settings)
        numbers, matrices = counts_of(skeleton)
        unit = run.size / 1000
        bits = [PRIOR_BITS * numbers[kind] / 8 / unit for kind in KINDS]
        rows.append([*bits, PRIOR_BYTES * matrices / unit])
        wanted.append((t.predict_bytes(skeleton, run.settings, run.k) - run.size) / unit)
    measured = measured_bits()
    for place, kind in enumerate(KINDS):  # each kind is about what it is in the tiny artifact
        rows.append(np.eye(len(KINDS) + 1)[place].tolist())
        wanted.append(measured[kind] / PRIOR_BITS)
    *bits, each = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0].tolist()
    found = {kind: round(PRIOR_BITS * x, 4) for kind, x in zip(KINDS, bits, strict=True)}
    return found, round(PRIOR_BYTES * each)


def error_of(run: Finished) -> float:
    """The error of a dry run that does not know the weights, as a part of the artifact's size."""
    skeleton = skeleton_of(run.settings)
    told = sum(dry_run.expected_parts(skeleton, run.settings, run.k).values())
    return told / run.size - 1


def main() -> int:
    """Prints the table, and each run's error with it."""
    runs = finished_runs()
    dry_run.BITS_SAVED, dry_run.BYTES_SAVED = fit(runs)
    errors = {run.name: error_of(run) for run in runs}
    print(f"BITS_SAVED = {dry_run.BITS_SAVED}")
    print(f"BYTES_SAVED = {dry_run.BYTES_SAVED}")
    for run in runs:
        print(f"{run.name:20}{run.size:12,} bytes, k={run.k:<9}{errors[run.name]:+8.2%}")
    shared = {run.name for run in runs if run.settings.shares_bits}
    for label, names in (("SIZE", errors.keys() - shared), ("SHARED", shared)):
        most = max(abs(errors[name]) for name in names)
        print(f"{label}_ERROR = {math.ceil(1000 * most) / 1000}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("fit_bytes", main, t.UserError))
