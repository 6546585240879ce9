"""Makes the files in tests/data with an older version of train_gpt.py, and notes what it computed
from them.

    python -m tests.make_former_files COMMIT

test_former_files.py reads them with today's script: an artifact and a checkpoint must mean the same
for good. A commit whose files differ in layout gets files of its own beside the older ones, by this
file as of that commit: it calls the script's functions, which change. (Those of b6028ee were made
so; a test has today's script write files by today's.)
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m tests.make_former_files COMMIT",
        file=sys.stderr,
    )
    sys.exit(2)

from tests.support import Quiet
from tools.command import Parser, UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "data"

# One Mamba-3 layer and one of attention, in files of some kilobytes.
MODEL = {
    "preset": "tiny",
    "vocab_size": 256,
    "train_seq_len": 32,
    "train_batch_tokens": 64,
    "num_layers": 2,
    "mamba_layers": "0",
    "mlp_layers": "1",
    "mlp_mult": 2.0,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mamba_d_state": 8,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 8,
    "bigram_vocab_size": 32,
    "bigram_dim": 8,
    "document_reset": True,
    "layer_order": "0,1,0,1",
    "recur_start": 0.0,
    "calibration_tokens": 64,
    "eval_stride": 8,
    "ttt_chunk_tokens": 64,
}
# A checkpoint holds every number in float32, four or five times.
SMALLER = {
    "vocab_size": 64,
    "model_dim": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mamba_head_dim": 8,
    "mamba_expand": 1.0,
}
RUN = {
    "iterations": 5, "max_wallclock_seconds": 0.0, "warmup_steps": 0, "checkpoint_every": 0.0,
    "train_log_every": 1, "warmdown_fraction": 0.9,
}  # fmt: skip


def fixed_tokens(vocab_size: int, sequences: int = 2, length: int = 33, step: int = 0):
    """Tokens (sequences, length) int64 by a formula, so that no generator's version matters."""
    places = torch.arange(sequences * length).view(sequences, length) + 1000 * step
    return places * places * 7919 % 10_007 % (vocab_size - 4) + 3


def fixed_weights(model) -> None:
    """Gives every parameter another value, by a formula of its place."""
    for number, p in enumerate(model.parameters()):
        wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 12.9898 + number)
        noise = (wave * 43_758.5453).frac().float().view(p.shape)
        p.data += noise * (0.3 if p.dim() < 2 else 1.5 * p.shape[-1] ** -0.5)


class FixedBatches:
    """Batches of fixed tokens, from a step on."""

    def __init__(self, settings, step: int):
        self.settings, self.step = settings, step

    def next(self):
        tokens = fixed_tokens(self.settings.vocab_size, step=self.step)
        self.step += 1
        return tokens[:, :-1], tokens[:, 1:]


def nats(model) -> list[list[float]]:
    """Of every target in fixed tokens, with recurrence."""
    tokens = fixed_tokens(model.settings.vocab_size)
    tokens[:, 11] = 1  # a document begins
    with torch.no_grad():
        return model.score(tokens[:, :-1], tokens[:, 1:], model.order(True)).tolist()


def load_script(commit: str, folder: Path):
    """train_gpt.py of a commit as a module; UserError if git finds none."""
    show = ["git", "show", f"{commit}:train_gpt.py"]
    done = subprocess.run(show, cwd=ROOT, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").partition("\n")[0].rstrip(".")
        raise UserError(f"git show {commit}:train_gpt.py: {said}; give a commit of this repository")
    path = folder / "train_gpt.py"
    path.write_bytes(done.stdout)
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    script = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def train_steps(trainer, script, batches, count: int) -> None:
    """So many steps as Trainer.run() makes them."""
    settings = trainer.settings
    for _ in range(count):
        now = script.schedule_at(settings, trainer.steps_done, 0.0)
        kind = trainer.model.order(now.recurrent), now.quantized
        rates = now.lr_factor, now.momentum, trainer.average.rate(trainer.steps_done + 1)
        trainer.graphed_steps(kind, *batches.next(), *rates)
        trainer.steps_done += 1
        trainer.average.after_step(trainer.steps_done, trainer.optimizers.skip, now.snapshot)


def make_files(script, name: str, folder: Path) -> None:
    """Writes NAME.artifact, NAME.checkpoint and NAME.json into a folder."""
    solo = script.Ranks(0, 1, torch.device("cpu"))
    settings = script.Settings(**script.PLAIN | MODEL)
    model = script.build_model(settings, solo)
    fixed_weights(model)
    tokens = fixed_tokens(settings.vocab_size)[:, :-1]
    hessians, _ = script.collect_costs(model, tokens.split(2), solo)
    solvers = {name: script.factor_hessian(x) for name, x in hessians.items()}
    stored = script.quantize_model(model, settings, solo, solvers, 8.0)
    artifact = folder / f"{name}.artifact"
    artifact.write_bytes(script.pack_artifact(settings, stored))
    loaded, _ = script.load_model(artifact, settings, set(), solo)

    with tempfile.TemporaryDirectory() as logs:
        run = script.PLAIN | MODEL | SMALLER | RUN
        settings = script.Settings(**run, log_dir=logs, run_id="former")
        model = script.build_model(settings, solo)
        fixed_weights(model)
        trainer = script.Trainer(model, settings, solo, 64, 1e6, Quiet())
        batches = FixedBatches(settings, 0)
        train_steps(trainer, script, batches, 3)
        trainer.qat_k, trainer.clock.counted = 6.5, 1.25
        with script.Checkpoints(settings, solo, trainer.log) as trainer.checkpoints:
            trainer.save()
        trainer.checkpoints = None
        checkpoint = settings.checkpoint_paths[0].read_bytes()
        (folder / f"{name}.checkpoint").write_bytes(checkpoint)
        trainer.run(batches, None)
    known = {"artifact": nats(loaded), "checkpoint": nats(model)}
    (folder / f"{name}.json").write_text(json.dumps(known) + "\n")


def main() -> int:
    """Writes COMMIT's files."""
    parser = Parser(prog="python -m tests.make_former_files", description=__doc__.split("\n\n")[0])
    parser.add_argument("commit", metavar="COMMIT", help="name it as its files are to be named")
    commit = parser.parse_args().commit
    FOLDER.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        script = load_script(commit, Path(folder))
        try:
            make_files(script, commit, FOLDER)
        except AttributeError as error:
            if error.obj is not script:
                raise
            remedy = f"start this file as of {commit}, which calls what was there"
            raise UserError(f"{commit}'s script has no {error.name}: {remedy}") from None
    return 0


if __name__ == "__main__":
    sys.exit(run_command("make_former_files.py", main))
