"""Ranks ideas: trains variants one after another and scores each before it is quantized.

    export DATA_PATH=data/development PRESET=short MAX_WALLCLOCK_SECONDS=172
    python -m tools.explore "as it is:" "wide: NUM_LAYERS=7 MAMBA_LAYERS=0,1,3,4,6 MLP_MULT=5"
    python -m tools.explore --averages 0.03,0.06,0.12 --export "decay: WEIGHT_DECAY=0.2"

A variant is a name, a colon and the settings of train_gpt.py that override the environment's.
Choose on a development split (`python data/prepare.py development`, which prints its tokenizer's
variables), not on the validation text. train_gpt.py trains and scores; checkpoints are not written.
On several GPUs, start a process for each, with CUDA_VISIBLE_DEVICES.

For what is not a setting, --idea takes a Python file, which holds for all variants: its
install(script) changes train_gpt.py's module, as those in tools/ideas do.

Each variant becomes a line of JSON on the standard output and in --out: steps, milliseconds of
each, the mean training loss of the last tenth, and BPB in plain windows. With --averages there is
one BPB for each of these parts of a run, over which an exponential average of the weights looks
back; without, one for the average that AVERAGE chooses. With --export, the line also has the grid's
k and BPB after quantization, in plain windows and as EVAL_MODE and TTT_ENABLED say, for the best of
these averages; or the error with which export ended. Each --requantize, a variant of quantization's
settings, exports every model once more, off the training clock: so exports are compared on the same
weights and calibration text.

    python -m tools.explore --export "as it is:" \\
        --requantize "7 bits: SDCLIP_K_INT8=32" --requantize "damped: GPTQ_DAMP=0.03"
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
from tools.command import Parser, UserError, need, need_place, run_command

# So begin the settings that --requantize may change.
QUANTIZATION = ("quantizer", "trellis_", "target_mb", "sdclip_", "gptq_", "calibration")

# What a variant's line holds under its own names: --requantize's are beside them.
LINE = {"name", "steps", "step_ms", "last_loss", "bpb", "k", "quantized", "final", "error"}


class Averages:
    """Several exponential averages of a model's weights, in place of a trainer's one.

    They are taken in every few steps, which costs less, and behind the last one.
    """

    def __init__(self, model, settings: t.Settings, ranks: t.Ranks, parts: list[float], every: int):
        self.every = every
        self.steps_done = 0
        self.skip = None  # 1 if all steps since the latest intake were skipped
        self.each = {}
        for part in parts:  # which alone decides: EMA_DECAY bounds nothing
            one = dataclasses.replace(
                settings, average="ema", average_horizon=part, ema_decay=1 - 1e-9
            )
            self.each[part] = t.WeightAverage(model, one, ranks)

    def rate(self, steps_done: int) -> float:
        """Nothing is taken in as a part of the step."""
        return 0.0

    def update(self, rate: float | torch.Tensor, skip: torch.Tensor) -> None:
        """Nothing, as rate() says."""

    def after_step(self, steps_done: int, skip: torch.Tensor, snapshot: bool) -> None:
        """Takes in the weights after every few steps; not if skip was 1 for all of these."""
        first = (steps_done - 1) % self.every == 0
        self.steps_done = steps_done
        self.skip = skip if first else self.skip * skip
        if steps_done % self.every == 0:
            self.take_in()

    def take_in(self) -> None:
        """Takes in the weights of the latest step."""
        for average in self.each.values():
            average.update(average.rate(self.steps_done / self.every), self.skip)

    def apply(self) -> str:
        """Takes in the last weights, if they are not; each average is applied and scored later."""
        if self.steps_done % self.every:
            self.take_in()
        return f"ema over {', '.join(map(str, self.each))} of the run"


class Tally:
    """A log that keeps the training losses; what the script says goes to the standard error."""

    def __init__(self, name: str):
        self.name = name
        self.started = time.perf_counter()
        self.losses: list[tuple[float, float]] = []  # progress of the run, loss

    def __call__(self, text: str, event: str = "", **values) -> None:
        """Takes what a run's log takes."""
        if event == "train":
            self.losses.append((values["progress"], values["train_loss"]))
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def progress(self, what: str, part: float, seconds: float, note: str = "") -> None:
        """Nothing: the losses say how far it is."""

    def track(self, what: str, items):
        """The items, and nothing said of them."""
        return items

    def last_loss(self) -> float:
        """The mean loss of the run's last tenth, or its last one if none was logged there."""
        last = [loss for progress, loss in self.losses if progress >= 0.9]
        return statistics.mean(last or [self.losses[-1][1]])


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


def read_requantized(variant: str, trained: t.Settings, texts: list[str]) -> dict[str, t.Settings]:
    """The settings of each --requantize for a variant, both as on the command line, by its name.

    trained: read_variant()'s of the variant.
    """
    _, _, own = variant.partition(":")
    found = {}
    for text in texts:
        name, colon, changes = text.partition(":")
        name, settings = read_variant(f"{name}{colon}{own} {changes}", dict(os.environ))
        need(name not in LINE, f'--requantize "{name}": a line has a figure of that name already')
        need(name not in found, f'--requantize "{name}" is there twice: give each its own name')
        for field in dataclasses.fields(t.Settings):
            same = getattr(settings, field.name) == getattr(trained, field.name)
            allowed = field.name.startswith(QUANTIZATION)
            need(same or allowed, f'"{name}": {field.name.upper()} is no setting of quantization')
        # The training clock is over.
        found[name] = dataclasses.replace(settings, max_wallclock_seconds=0.0)
    return found


class Repeated:
    """Batches that can be had again, so that each export is calibrated on the same text."""

    def __init__(self, batches: t.Batches):
        self.batches = batches
        self.taken = []
        self.place = 0

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch, as the script takes it."""
        if self.place == len(self.taken):
            self.taken.append(self.batches.next())
        self.place += 1
        return self.taken[self.place - 1]

    def rewind(self) -> None:
        """What comes next is the first batch again."""
        self.place = 0


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
    need(path.suffix == ".py", f"--idea {path} is no Python file: its name should end in .py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    idea = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = idea  # by which name the compiler imports it
    spec.loader.exec_module(idea)
    need(hasattr(idea, "install"), f"--idea {path} has no install(script)")
    idea.install(t)


def explore(
    name: str, settings: t.Settings, given: argparse.Namespace, requantized: dict[str, t.Settings]
) -> dict:
    """Trains one variant; returns what its line holds.

    given: read_arguments()'s. Without --averages the run has its own; else the best one is
    exported, with its settings and with each of requantized's.
    """
    parts, every = given.averages, given.every
    torch._dynamo.reset()  # or the variants before count as recompilations
    ranks = t.start_ranks(settings)
    log = Tally(name)
    tokenizer = t.Tokenizer(settings.tokenizer_path, settings.vocab_size)
    validation = t.load_validation(settings, tokenizer)

    def bpb(model) -> float:
        with trainer.weights_of(settings.quantizer == "ternary"):  # the weights that it trained
            return round(t.plain_score(settings, ranks, validation, model).val_bpb, 5)

    model = t.build_model(settings, ranks)
    averages = functools.partial(Averages, parts=parts, every=every) if parts else t.WeightAverage
    micro_batch = t.choose_micro_batch(settings, ranks)
    target = int(settings.target_mb * 1e6) - t.code_bytes()
    trainer = t.Trainer(model, settings, ranks, micro_batch, target, log, make_average=averages)
    trainer.announce(t.model_skeleton(settings))
    batches = t.Batches(settings, ranks)
    t.check_tokenizer(settings, tokenizer, batches.shards, "training")
    trainer.warm_up()
    log(f"ready after {time.perf_counter() - log.started:.1f}s", "ready")
    try:
        trainer.run(batches, None)
    except t.UserError as error:
        raise UserError(f'"{name}": {error}') from None
    need(trainer.steps_done, f'"{name}": MAX_WALLCLOCK_SECONDS leaves no time for a step')
    line = {
        "name": name,
        "steps": trainer.steps_done,
        "step_ms": round(trainer.step_ms(), 3),
        "last_loss": round(log.last_loss(), 4),
        "bpb": {},
    }
    if not parts:
        line["bpb"][settings.average] = bpb(model)
    else:
        each = trainer.average.each
        for part, average in each.items():
            average.apply()
            line["bpb"][part] = bpb(model)
        each[min(each, key=line["bpb"].get)].apply()
        each.clear()  # export may need the memory
    log(f"{line}")  # what comes now may fail, and takes its time
    if given.export:
        again = Repeated(batches)
        line |= export_and_score(trainer, again, validation)
        for other, chosen in requantized.items():
            trainer.settings = dataclasses.replace(chosen, artifact=settings.artifact)
            again.rewind()
            line[other] = export_and_score(trainer, again, validation)
            log(f"{other}: {line[other]}")
    return line


def export_and_score(trainer, batches, validation: t.ValidationSet) -> dict:
    """The grid's k and BPB of what the artifact holds; or why there is none, in one line."""
    settings, ranks = trainer.settings, trainer.ranks
    try:
        found = {"k": round(t.export(trainer, batches)["sdclip_k"], 3)}
    except t.UserError as error:  # what was scored is not lost
        return {"error": str(error)}
    plain = dataclasses.replace(settings, eval_mode="plain", ttt_enabled=False)
    for label, chosen in (("quantized", plain), ("final", settings)):
        if label == "final" and settings == plain:
            found[label] = found["quantized"]
            continue
        model, chosen = t.load_model(settings.artifact_path, chosen, set(), ranks)
        score = t.Evaluator(model, chosen, ranks, validation).evaluate()
        found[label] = round(score.val_bpb, 5)
    return found


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; UserError if it makes no sense."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("variants", nargs="+", metavar="NAME: SETTING=VALUE ...")
    parts = "average over these parts of a run (default: as AVERAGE says)"
    add("--averages", default="", metavar="PART,PART", help=parts)
    every = "steps between updates of --averages (10)"
    add("--every", type=int, default=10, metavar="STEPS", help=every)
    add("--export", action="store_true", help="quantize, and score the artifact")
    again = "quantize the same weights once more"
    add("--requantize", action="append", default=[], metavar="NAME: SETTING=VALUE ...", help=again)
    idea = "change the script by this file first"
    add("--idea", type=Path, action="append", default=[], metavar="FILE", help=idea)
    add("--out", type=Path, metavar="FILE", help="append the lines of JSON to this file")
    given = parser.parse_args(arguments)
    given.averages = read_parts(given.averages) if given.averages else []
    if given.out:
        need_place(given.out, *given.idea)
    need(given.every > 0, f"--every {given.every} should be above 0")
    need(given.export or not given.requantize, "--requantize needs --export")
    return given


def explore_all(given: argparse.Namespace) -> None:
    """Explores one variant after another and prints its line; a mistake in any ends it at once."""
    variants = [read_variant(text, dict(os.environ)) for text in given.variants]
    requantized = [
        read_requantized(text, settings, given.requantize)
        for text, (_, settings) in zip(given.variants, variants, strict=True)
    ]
    for name, settings in variants:
        one_kind = not given.averages or settings.average == "ema"
        need(one_kind, f'"{name}": AVERAGE={settings.average}, but --averages are all of kind ema')
    t.prepare_torch()
    for path in given.idea:
        install_idea(path)
    with given.out.open("a") if given.out else contextlib.nullcontext() as file:
        for (name, settings), others in zip(variants, requantized, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                settings = dataclasses.replace(settings, artifact=str(Path(folder, "artifact")))
                found = explore(name, settings, given, others)
            for output in (sys.stdout, file) if file else (sys.stdout,):
                print(json.dumps(found), file=output, flush=True)


def main() -> int:
    """The command: 0, or 2 for a mistake of the user, which ends in one line."""
    return run_command("explore.py", command, t.UserError)


def command() -> int:
    """Explores what the command line says."""
    explore_all(read_arguments())
    return 0


if __name__ == "__main__":
    sys.exit(main())
