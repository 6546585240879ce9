"""train_gpt.py, which stays in one phase of its run until a signal ends it: for kill_table.py.

    held_run.py PHASE FOLDER

It does what the phase does over and over, rather than sleep, for a signal finds a program in the
midst of work. What it may not do twice it does slowly. Each rank writes its process id into
FOLDER/RANK.started, and once it is in the phase FOLDER/RANK.held appears.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 900.0  # after which nobody will send a signal any more
SLOW_SECONDS = 3.0  # of what is done once: a checkpoint's writing, a validation between two steps
STEP_SECONDS = 0.1  # more that a step takes, so that one finds the training it is to interrupt
STEPS_BEFORE = 10  # steps made before a signal is welcome


class Run:
    """The script as a module, held in a phase, by functions of it that are replaced."""

    def __init__(self, script, mark: Path):
        self.script = script
        self.mark = mark
        self.until = time.monotonic() + SECONDS

    def held(self) -> None:
        """Says that the phase has begun."""
        self.mark.touch()

    def repeat(self, owner, name: str, skipped: int = 0) -> None:
        """Has a function called for ever, but for the first calls of it that are skipped."""
        function, calls = getattr(owner, name), []

        def repeated(*arguments, **options):
            calls.append(name)
            if len(calls) <= skipped:
                return function(*arguments, **options)
            self.held()
            while time.monotonic() < self.until:
                function(*arguments, **options)
            raise TimeoutError("no signal came")

        setattr(owner, name, repeated)

    def slow_steps(self, ready: Callable) -> None:
        """Steps take longer; the phase has begun when ready(trainer) holds."""
        trainer_class = self.script.Trainer
        function = trainer_class.accumulate_gradients

        def slow(trainer, *arguments):
            if ready(trainer):
                self.held()
            time.sleep(STEP_SECONDS)
            return function(trainer, *arguments)

        trainer_class.accumulate_gradients = slow

    def slow_writing(self, ending: str) -> None:
        """What is written to a file of this name stays long in its .part, a second checkpoint."""
        fsync = os.fsync

        def slow(descriptor: int) -> None:
            part = os.readlink(f"/proc/self/fd/{descriptor}")
            path = part.removesuffix(".part")
            first = ending == ".checkpoint" and not os.path.exists(path)
            if part != path and path.endswith(ending) and not first:
                self.held()
                time.sleep(SLOW_SECONDS)
            fsync(descriptor)

        os.fsync = slow

    def slow_validation(self) -> None:
        """The one that comes between two steps takes long."""
        score = self.script.plain_score

        def slow(settings, ranks, *arguments, **options):
            self.held()
            end = time.monotonic() + SLOW_SECONDS
            while ranks.from_main(time.monotonic() < end):  # all score equally often
                score(settings, ranks, *arguments, **options)
            return score(settings, ranks, *arguments, **options)

        self.script.plain_score = slow

    def final_evaluation(self, method: str) -> None:
        """Repeats a method of the evaluator that scores the artifact, none of others before."""
        evaluate = self.script.evaluate_artifact

        def held(*arguments):
            self.repeat(self.script.Evaluator, method)
            return evaluate(*arguments)

        self.script.evaluate_artifact = held


def hold(run: Run, phase: str) -> None:
    """Has the run stay in a phase; SystemExit for an unknown one."""
    t = run.script
    phase = phase.removeprefix("EVAL_ONLY=1, ")
    repeated = {
        "data": (t, "load_validation"),
        "warm-up": (t.Trainer, "warm_up"),
        "score before": (t, "plain_score"),
        "calibration": (t, "collect_costs"),
        "GPTQ": (t, "quantize_model"),
        "packing": (t, "pack_artifact"),
        "sample": (t, "generate"),
    }
    if phase in repeated:
        run.repeat(*repeated[phase])
    elif phase == "score after":
        run.repeat(t, "plain_score", skipped=1)
    elif phase == "training":
        run.slow_steps(lambda trainer: trainer.steps_done >= STEPS_BEFORE)
    elif phase == "QAT":
        run.slow_steps(lambda trainer: trainer.qat_k > 0)
    elif phase == "validation":
        run.slow_validation()
    elif phase == "checkpoint":
        run.slow_writing(".checkpoint")
    elif phase == "artifact":
        run.slow_writing(".lzma")
    elif phase == "after the score":
        run.slow_writing(".npy")
    elif "documents" in phase:
        run.final_evaluation("_score_batch")
    elif phase.endswith("adapting"):
        run.final_evaluation("_adapt")
    elif phase.startswith("evaluation"):
        run.final_evaluation("_score_chunk")
    elif phase != "compile":  # which takes long enough
        raise SystemExit(f"unknown phase: {phase}")


def main() -> int:
    """Starts the script as its own command line would."""
    phase, folder = sys.argv[1:]
    del sys.argv[1:]
    rank = os.environ.get("RANK", "0")
    Path(folder, f"{rank}.started").write_text(str(os.getpid()))
    mark = Path(folder, f"{rank}.held")
    if phase == "start":
        mark.touch()
    import train_gpt

    if phase != "start":
        hold(Run(train_gpt, mark), phase)
    return train_gpt.run()


if __name__ == "__main__":
    sys.exit(main())
