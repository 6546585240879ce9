"""A small run on the same data, machine and ranks as the whole one, before that is paid for.

    torchrun --standalone --nproc_per_node=8 train_gpt.py --rehearse

With the environment's settings, it starts a run that ends after 20 steps. Halfway, the run is told
to stop, as by a scheduler, leaves a checkpoint, and goes on from that. It exports, loads what it
has exported, scores three chunks of the validation text and adapts to two. All of this is done by
the run's own functions. Files go to a folder in LOG_DIR, which is removed at the end. Then it says
how much time, memory and disk the whole run will need, and ends with status 2 if that is not there.
"""

import contextlib
import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

if not __package__:  # started by its path
    print("error: start it as python train_gpt.py --rehearse", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from tools import dry_run
from tools.command import run_command

STEPS = 20
CHUNKS = 3  # the first one's seconds hold what compiling takes
GRID_MOST = 64.0  # weights that are hardly trained may need a coarser grid than SDCLIP_MOST
FILES_OF_A_CHECKPOINT = 3  # the last, the one before it, and one that is being written


class StoppingBatches(t.Batches):
    """Batches of which the one in the middle of a rehearsal comes with a signal to stop."""

    asked_for = 0

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch, as of other batches; in the middle, a signal to stop comes with it."""
        self.asked_for += 1
        if self.asked_for == STEPS // 2:
            signal.raise_signal(signal.SIGTERM)
        return super().next()


def in_small(settings: t.Settings, folder: str) -> t.Settings:
    """The settings of the rehearsal, which writes into a folder of its own."""
    changes = {"log_dir": folder, "artifact": "", "resume": "auto", "eval_nll_path": ""}
    changes |= {"iterations": STEPS, "train_log_every": 5, "val_loss_every": 0}
    changes |= {"sdclip_k": 0.0, "sdclip_most": max(GRID_MOST, settings.sdclip_most)}
    return replace(settings, **changes, quantization_report=False)


def few_targets(validation: t.ValidationSet, settings: t.Settings) -> t.ValidationSet:
    """The beginning of the validation text, of CHUNKS chunks."""
    count = CHUNKS * max(settings.ttt_chunk_tokens, settings.train_seq_len)
    tokens = validation.tokens[: count + 1]
    return validation._replace(tokens=tokens, target_bytes=validation.target_bytes[:count])


def describe_changes(settings: t.Settings, short: t.Settings) -> str:
    """What the rehearsal has in place of the run's settings, in a line."""
    changed = [name for name in t.FIELDS if getattr(settings, name) != getattr(short, name)]
    pairs = [f"{name.upper()}={dry_run.shown(getattr(short, name))}" for name in changed]
    why = "weights that are hardly trained need a k of their own"
    return f"the rehearsal alone has {' '.join(pairs)}; {why}"


def train_in_part(
    settings: t.Settings, given: set[str], ranks: t.Ranks, changes: str
) -> t.ValidationSet:
    """main() as far as the artifact, or to the signal; returns the whole validation text.

    given: the settings that are the run's own; changes: what the log is to say of the others.
    """
    with contextlib.closing(t.Log()) as log:
        log.open(settings, ranks, settings.run_id)
        t.log_settings(log, settings, given, ranks, changes)
        tokenizer = t.Tokenizer(settings.tokenizer_path, settings.vocab_size)
        training = t.open_shards(settings.data_path, "train")
        validation = t.text_to_score(settings, tokenizer, [], training, log, ranks.rank == 0)
        # What a whole run of several machines would be refused for.
        t.check_alike(settings, ranks, training, validation)
        t.train_and_export(settings, ranks, training, few_targets(validation, settings), log)
    return validation


def train_and_be_stopped(
    settings: t.Settings, given: set[str], ranks: t.Ranks, changes: str
) -> None:
    """The first half of training, which leaves a checkpoint; then memory is as before it."""
    usual = t.Batches
    t.Batches = StoppingBatches
    try:
        train_in_part(settings, given, ranks, changes)
    except t.UserError as error:
        if "stopped by SIGTERM" not in str(error):
            raise
    finally:
        t.Batches = usual
    torch._dynamo.reset()  # or what it compiled counts as recompilations
    gc.collect()  # the model and its trainer refer to each other
    if ranks.gpu:
        torch.cuda.empty_cache()


class Needs(NamedTuple):
    """What a whole run needs, as its rehearsal tells."""

    start_seconds: float  # to the first step, before anything is compiled
    again_seconds: float  # likewise, with what the first start has compiled
    step_ms: float
    export_seconds: float  # on the training clock
    scoring_seconds: float
    adapting_seconds: float
    memory_bytes: int  # at most at once, on a rank
    disk_bytes: int  # in LOG_DIR

    def problems(self, settings: t.Settings, free: int) -> list[str]:
        """What will end the run, or spoil it; free: bytes of disk."""
        s = settings
        found = []
        if s.max_wallclock_seconds and self.export_seconds > s.export_reserve_seconds:
            found.append("export takes longer: raise EXPORT_RESERVE_SECONDS")
        if self.scoring_seconds > s.eval_max_seconds:
            longer = "TTT_LORA_PIECE" if s.eval_mode == "documents" else "EVAL_STRIDE"
            found.append(f"scoring takes longer than EVAL_MAX_SECONDS: raise {longer}, or plain")
        # In other modes test-time training gives epochs up. Documents learn while all that is left
        # could be read in time without, and not in the clock's last tenth.
        alone = s.eval_mode == "documents" and s.adapts
        if alone and self.adapting_seconds > 0.9 * s.eval_max_seconds:
            found.append("documents need over 0.9 EVAL_MAX_SECONDS to adapt: raise TTT_LORA_PIECE")
        if self.disk_bytes > free:
            found.append("there is not enough disk space in LOG_DIR")
        return found

    def describe(self, settings: t.Settings, memory: int, free: int) -> list[str]:
        """Lines for whoever will pay for the run; memory and free: bytes that are there."""
        s = settings
        # Whichever comes first, as of a run: ITERATIONS or the clock.
        training = s.iterations * self.step_ms / 1000 + self.export_seconds
        training = min(training, s.max_wallclock_seconds or training)
        reserve = s.export_reserve_seconds
        evaluation = f"{self.scoring_seconds:.0f} s to score, {self.adapting_seconds:.0f} to adapt"
        # Before and after quantization the text is scored, too, in plain windows and off the
        # clocks: no slower than this. The final score may be the one after quantization.
        times = 2 if s.score_mode == "plain" else 3
        scoring = times * self.scoring_seconds
        total = self.start_seconds + training + scoring + self.adapting_seconds
        parts = f"{self.start_seconds:.0f} s to start, {training:.0f} of training and GPTQ, "
        parts += f"{times} × {self.scoring_seconds:.0f} to score before and after quantization"
        parts += " and in the end" if times == 3 else ""
        parts += f", {self.adapting_seconds:.0f} to adapt"
        return [
            f"start: {self.start_seconds:.0f} s; {self.again_seconds:.0f} s once it is compiled",
            f"steps: {self.step_ms:.1f} ms each",
            *dry_run.describe_clock(s, self.step_ms),
            f"export: {self.export_seconds:.1f} of EXPORT_RESERVE_SECONDS={reserve:g}",
            f"evaluation: {evaluation} of EVAL_MAX_SECONDS={s.eval_max_seconds:g}",
            f"memory: {self.memory_bytes / 1e9:.1f} GB of {memory / 1e9:.0f}",
            f"disk: {self.disk_bytes / 1e9:.2f} GB of {free / 1e9:.0f} that LOG_DIR has left",
            f"in all: about {total / 60:.1f} minutes ({parts})",
        ]


def measure(settings: t.Settings, evaluator: t.Evaluator, targets: int, gpu: bool) -> Needs:
    """What the rehearsal's log and files, and its evaluation, tell of a run that scores targets.

    A step's time is that of the last five, which are past compiling and recording a graph.
    """
    lines = Path(settings.log_dir, f"{settings.run_id}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    clock_ms = {r["step"]: r["train_ms"] for r in records if r["event"] == "train"}
    t.need(len(clock_ms) > 1, "MAX_WALLCLOCK_SECONDS leaves no time for steps")
    before, last = sorted(clock_ms)[-2:]
    step_ms = (clock_ms[last] - clock_ms[before]) / (last - before)
    starts = [r["seconds"] for r in records if r["event"] == "ready"]
    (trained,) = (r for r in records if r["event"] == "trained")
    training_seconds = trained["steps"] * trained["step_avg_ms"] / 1000
    export_seconds = trained["train_clock_seconds"] - training_seconds
    chunks = targets / evaluator.chunk
    scoring_seconds = chunks * evaluator.scoring_seconds
    adapting_seconds = settings.ttt_epochs * evaluator.epoch_seconds * max(0.0, chunks - 1)
    if settings.eval_mode == "documents":  # scoring and adapting take one time together, of all
        scoring_seconds = targets / evaluator.total * evaluator.scoring_seconds
        adapting_seconds = 0.0
        if settings.adapts:
            adapting_seconds = scoring_seconds
            scoring_seconds = 0.0
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if gpu else peak
    checkpoint_bytes = FILES_OF_A_CHECKPOINT * settings.checkpoint_paths[0].stat().st_size
    return Needs(
        start_seconds=starts[0],
        again_seconds=starts[-1],
        step_ms=step_ms,
        export_seconds=export_seconds,
        scoring_seconds=scoring_seconds,
        adapting_seconds=adapting_seconds,
        memory_bytes=peak,
        disk_bytes=checkpoint_bytes + 2 * t.ARTIFACT_CAP,
    )


def rehearse(_) -> None:
    """Does as the module says, in place of train_gpt.py's main(log). Raises UserError."""
    settings, given, ranks = t.prepare_run({"RUN_ID": "rehearsal"} | dict(os.environ))
    t.need(not settings.eval_only, "--rehearse trains a little: unset EVAL_ONLY")
    t.check_outputs(settings)
    skeleton = t.model_skeleton(settings)
    target = int(settings.target_mb * 1e6) - t.code_bytes()
    memory = t.device_memory(ranks.device)
    t.check_size(skeleton, target, memory)
    made = tempfile.mkdtemp(prefix="rehearsal-", dir=settings.log_dir) if ranks.rank == 0 else ""
    try:
        needs = rehearse_in(ranks.from_main(made), settings, given, ranks)
    except t.LateExportError:
        # What it says of a checkpoint and of a model that is kept holds for a run alone.
        late = "GPTQ ended after MAX_WALLCLOCK_SECONDS: raise EXPORT_RESERVE_SECONDS, or both"
        raise t.UserError(late) from None
    finally:
        if made:
            shutil.rmtree(made, ignore_errors=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if ranks.rank == 0:
        free = shutil.disk_usage(settings.log_dir).free
        lines = ["the rehearsal went well; the run needs", *needs.describe(settings, memory, free)]
        fitted = t.fit_sdclip(skeleton, settings, target)
        of_trained = f"{dry_run.describe_artifact(skeleton, target, fitted)}, once it is trained"
        lines.append(of_trained)
        print("\n  ".join(lines), flush=True)
        problems = needs.problems(settings, free)
        t.need(not problems, "; ".join(problems))


def rehearse_in(folder: str, settings: t.Settings, given: set[str], ranks: t.Ranks) -> Needs:
    """Trains, is stopped, goes on, exports, scores and adapts; on rank 0, what a run needs."""
    short = in_small(settings, folder)
    changes = describe_changes(settings, short)
    typed = given & t.FIELDS.keys()
    own = {name for name in typed if getattr(settings, name) == getattr(short, name)}
    train_and_be_stopped(short, own, ranks, changes)
    validation = train_in_part(short, own, ranks, changes)
    model, scored = t.load_model(short.artifact_path, short, given, ranks)
    evaluator = t.Evaluator(model, scored, ranks, few_targets(validation, scored))
    evaluator.evaluate()
    needs = None
    if ranks.rank == 0:
        needs = measure(short, evaluator, len(validation.target_bytes), ranks.gpu)
    ranks.from_main(None)  # all have read what is removed now
    return needs


def main() -> int:
    """The exit status of a rehearsal, which fails as a run does."""
    dry_run.make_parser("--rehearse", __doc__).parse_args()
    t.main = rehearse  # so that what goes wrong is told as of a run
    return t.run()


if __name__ == "__main__":
    sys.exit(run_command("train_gpt.py", main))
