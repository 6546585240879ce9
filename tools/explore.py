"""Ranks ideas: trains variants, one after another in one process, and scores each before it is quantized.

    export DATA_PATH=data/development PRESET=short MAX_WALLCLOCK_SECONDS=172
    python -m tools.explore "as it is:" "eleven layers: NUM_LAYERS=11 MAMBA_LAYERS=0,1,3-6,8-10 MLP_MULT=2"
    python -m tools.explore --averages 0.03,0.06,0.12 --export "decay: WEIGHT_DECAY=0.2"

A variant is a name, a colon and the settings of train_gpt.py that it has in place of the environment's. Choose on a
development split (`python data/prepare.py development`), not on the validation text. What trains and scores is
train_gpt.py; checkpoints are not written. On several GPUs, start a process for each, with CUDA_VISIBLE_DEVICES.

What no setting says, --idea does for all variants: a Python file whose install(script) changes train_gpt.py's module, as those
in tools/ideas do.

Each variant becomes a line of JSON on the standard output and in --out: steps, milliseconds of each, the mean training loss
of the last tenth, and BPB in plain windows for each of --averages, the parts of a run over which weights are averaged. With
--export also the grid's k and BPB after quantization, in plain windows and as EVAL_MODE and TTT_ENABLED say, of the average
that was best; or the error that export ended with.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.explore", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from tools.command import Parser, UserError, need


class Averages:
    """Several averages of a model's weights in place of a trainer's one, taken in every few steps, which costs less."""

    def __init__(self, model, settings: t.Settings, parts: list[float], every: int):
        self.every, self.each = every, {}
        for part in parts:  # which alone decides: EMA_DECAY bounds nothing
            one = dataclasses.replace(
                settings, average="ema", average_horizon=part, ema_decay=1 - 1e-9
            )
            self.each[part] = t.WeightAverage(model, one)

    def update(self, steps_done: int, skip: torch.Tensor, snapshot: bool = False) -> None:
        """Takes in the weights after every few steps; not if skip is 1."""
        if steps_done % self.every == 0:
            for average in self.each.values():
                average.update(steps_done // self.every, skip)

    def apply(self) -> str:
        """Nothing: each is applied and scored in turn."""
        return f"ema over {', '.join(map(str, self.each))} of the run"


class Tally:
    """A log that keeps the training losses; what the script says goes to the standard error."""

    def __init__(self, name: str):
        self.name, self.started, self.losses = name, time.perf_counter(), []

    def __call__(self, text: str, event: str = "", **values) -> None:
        if event == "train":
            self.losses.append((values["progress"], values["train_loss"]))
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def progress(self, text: str) -> None: ...


def read_variant(text: str, environment: dict[str, str]) -> tuple[str, t.Settings]:
    """Name and settings of a variant as it is written on the command line."""
    name, colon, settings = text.partition(":")
    need(
        colon and name.strip(),
        f'"{text}" should be a name, a colon and settings, such as "wide: MLP_MULT=4"',
    )
    changes = {}
    for part in settings.split():
        variable, equals, value = part.partition("=")
        need(equals, f'"{name}": {part} should be SETTING=VALUE')
        need(
            variable.lower() in t.FIELDS or variable in t.ALIASES,
            f'"{name}": {variable} is not a setting (see train_gpt.py --help)',
        )
        changes[variable] = value
    try:
        chosen, _ = t.read_settings(environment | changes)
        chosen = dataclasses.replace(chosen, checkpoint_every=0.0, resume="never")
        t.validate_settings(chosen, 1)
    except t.UserError as error:
        raise UserError(f'"{name}": {error}') from None
    return name.strip(), chosen


def read_parts(text: str) -> list[float]:
    """The parts of a run that --averages names."""
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        parts = []
    need(
        parts and all(0 < part < 1 for part in parts),
        f"--averages {text}: write numbers below 1, such as 0.03,0.06",
    )
    return parts


def install_idea(path: Path) -> None:
    """Changes train_gpt.py as a file of --idea does."""
    need(path.is_file(), f"--idea {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    idea = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(idea)
    need(hasattr(idea, "install"), f"--idea {path} has no install(script)")
    idea.install(t)


def explore(name: str, settings: t.Settings, parts: list[float], every: int, export: bool) -> dict:
    """Trains one variant; returns what its line holds."""
    torch._dynamo.reset()  # or the variants before count as recompilations
    ranks, log = t.start_ranks(settings), Tally(name)
    plain = dataclasses.replace(settings, eval_mode="plain", ttt_enabled=False)
    validation = t.load_validation(
        settings, t.Tokenizer(settings.tokenizer_path, settings.vocab_size)
    )
    target = int(settings.target_mb * 1e6) - Path(t.__file__).stat().st_size
    model = t.build_model(settings, ranks)
    micro_batch = t.choose_micro_batch(settings, ranks)
    averages = functools.partial(Averages, parts=parts, every=every)
    trainer = t.Trainer(model, settings, ranks, micro_batch, target, log, make_average=averages)
    trainer.announce()
    batches = t.Batches(settings, ranks)
    trainer.warm_up()
    log(f"ready after {time.perf_counter() - log.started:.1f}s", "ready")
    try:
        trainer.run(batches, None)
    except t.UserError as error:
        raise UserError(f'"{name}": {error}') from None
    steps, last = (
        trainer.steps_done,
        [loss for progress, loss in log.losses if progress >= 0.9] or log.losses[-1][1:],
    )
    line = {
        "name": name, "steps": steps, "step_ms": round(1000 * trainer.clock.seconds() / steps, 3),
        "last_loss": round(statistics.mean(last), 4), "bpb": {},
    }  # fmt: skip
    for part, average in trainer.average.each.items():
        average.apply()
        line["bpb"][part] = round(
            t.Evaluator(model, plain, ranks, validation).evaluate().val_bpb, 5
        )
    if not export:
        return line
    trainer.average.each[min(line["bpb"], key=line["bpb"].get)].apply()
    trainer.average.each.clear()
    try:
        line["k"] = round(t.export(trainer, batches)["sdclip_k"], 3)
    except t.UserError as error:  # what was scored is not lost
        return line | {"error": str(error)}
    for label, chosen in (("quantized", plain), ("final", settings)):
        model, chosen = t.load_model(settings.artifact_path, chosen, set(), ranks)
        score = t.Evaluator(model, chosen, ranks, validation).evaluate()
        line[label] = round(score.val_bpb, 5)
    return line


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", metavar="NAME: SETTING=VALUE ...")
    parser.add_argument(
        "--averages",
        default=str(t.Settings.average_horizon),
        metavar="PART,PART",
        help="of a run; 0.1 if left out",
    )
    parser.add_argument(
        "--every",
        type=int,
        default=10,
        metavar="STEPS",
        help="between weights that are averaged (10)",
    )
    parser.add_argument(
        "--export", action="store_true", help="quantize, and score what the artifact holds"
    )
    parser.add_argument(
        "--idea",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="changes the script first",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="gets the lines of JSON, behind those it has"
    )
    try:
        given = parser.parse_args()
        parts = read_parts(given.averages)
        need(given.every > 0, f"--every {given.every} should be above 0")
        variants = [read_variant(text, dict(os.environ)) for text in given.variants]
        t.prepare_torch()
        for path in given.idea:
            install_idea(path)
        with given.out.open("a") if given.out else contextlib.nullcontext() as file:
            for name, settings in variants:
                with tempfile.TemporaryDirectory() as folder:
                    settings = dataclasses.replace(settings, artifact=str(Path(folder, "artifact")))
                    line = json.dumps(explore(name, settings, parts, given.every, given.export))
                for output in (sys.stdout, file) if file else (sys.stdout,):
                    print(line, file=output, flush=True)
    except (UserError, t.UserError) as error:
        print(f"explore.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"explore.py: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
