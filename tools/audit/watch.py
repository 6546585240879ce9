"""Evaluates an artifact by a script and reports from the inside what the script does meanwhile.

    python -m tools.audit.watch SCRIPT SEED

Settings are environment variables, as for the script. tools/audit/case.py starts this in a cell. It
shares the script's process: its report is evidence if the script leaves it alone, as the project's
own does, and a claim if it is another one.
"""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.audit", file=sys.stderr)
    sys.exit(2)

from tools.audit.observation import Event, Observation, Sampled, Weight

SAMPLED_TARGETS = 4096  # whose whole distribution is computed
SAMPLED_TOGETHER = 16  # of these: their hidden states cost one forward pass
SUMMED_EVERY = 16  # of the sampled positions: there, every token's probability is asked for
CANDIDATES = 1024  # of tokens at once


def load_script(path: Path) -> ModuleType:
    """The script as a module; it is not run."""
    spec = importlib.util.spec_from_file_location("audited_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def draw_positions(count: int, seed: int) -> np.ndarray:
    """Targets to sample, of so many: runs of neighbours anywhere; all of a short text."""
    if count <= SAMPLED_TARGETS:
        return np.arange(count)
    generator = np.random.default_rng(seed)
    starts = generator.choice(count, SAMPLED_TARGETS // SAMPLED_TOGETHER, replace=False)
    runs = starts[:, None] + np.arange(SAMPLED_TOGETHER)
    return np.unique(runs[runs < count])


class Watcher:
    """An observer of the script's Evaluator, which tells it of what it does while it does it.

    What it is told it holds against what it can see for itself: the stream's tokens, the weights,
    and (by torch's hook, which the script has no part in) every step of an optimizer.
    """

    def __init__(self, script: ModuleType, model, ranks, validation, seed: int):
        self.script = script
        self.ranks = ranks
        self.model = model
        self.stream = validation.tokens
        self.count = len(self.stream) - 1
        self.wanted = np.zeros(self.count, dtype=bool)
        self.wanted[draw_positions(self.count, seed)] = True
        self.weights = fingerprint(model)
        self.stepped = False  # since the weights were last looked at
        self.scored = 0  # targets so far
        self.seen = Observation(
            times_written=np.zeros(self.count, dtype=np.int64),
            written=np.zeros(self.count, dtype=np.float32),
            target_bytes=validation.target_bytes,
            nats=np.zeros(self.count, dtype=np.float32),
        )

    def on_read(self, excerpt: Any) -> None:
        """Looks at the weights before they are used."""
        self.note_change()

    def on_score(self, excerpt: Any, scored: np.ndarray, nats: Tensor) -> None:
        """Counts the scores, and computes a few of them anew."""
        self.seen.with_gradients |= torch.is_grad_enabled()
        self.note_change()
        positions = excerpt.positions[scored]
        np.add.at(self.seen.times_written, positions, 1)
        self.scored += len(positions)
        print(f"{self.scored:,} of {self.count:,} targets are scored", flush=True)
        self.seen.written[positions] = nats.detach().float().cpu().numpy()[scored]
        self.seen.events.append(Event("score", positions))
        sampled = scored.copy()
        sampled[scored] = self.wanted[positions]
        if sampled.any():
            self.seen.sampled += self.sample(excerpt, sampled, nats)

    def on_train(self, excerpt: Any) -> None:
        """An update sees the excerpt's targets, or else any of the stream."""
        self.seen.events.append(Event("train", self.targets_in(excerpt)))

    def on_step(self, *_: Any) -> None:
        """torch's hook behind every step of an optimizer."""
        self.stepped = True
        self.seen.events.append(Event("step", np.empty(0, dtype=np.int64)))

    def note_change(self) -> None:
        """Weights may change by steps only."""
        now = fingerprint(self.model)
        if now != self.weights and not self.stepped:
            self.seen.events.append(Event("changed", np.empty(0, dtype=np.int64)))
        self.weights = now
        self.stepped = False

    def targets_in(self, excerpt: Any) -> np.ndarray:
        """Positions of the targets; all of them if these are not the stream's tokens there."""
        for tokens, ahead in ((excerpt.tokens, 0), (excerpt.targets, 1)):
            places = np.minimum(excerpt.positions + ahead, self.count)
            if not np.array_equal(tokens.cpu().numpy(), self.stream[places]):
                return np.arange(self.count)
        return np.unique(np.minimum(excerpt.positions, self.count - 1))

    @torch.no_grad()
    def sample(self, excerpt: Any, where: np.ndarray, nats: Tensor) -> list[Sampled]:
        """Compares the scores where (B, T) is true with the distribution of the model as it is."""
        hidden = self.hidden(excerpt)
        sampled = []
        for row in np.flatnonzero(where.any(axis=1)):
            with branch_of_row(self.model, row):
                sampled += self.sample_row(excerpt, row, np.flatnonzero(where[row]), hidden, nats)
        return sampled

    def sample_row(
        self, excerpt: Any, row: int, columns: np.ndarray, hidden: Tensor, nats: Tensor
    ) -> list[Sampled]:
        """sample() of some columns of a row; hidden (B, T, width)."""
        sampled = []
        positions = excerpt.positions[row, columns]
        some = hidden[row : row + 1, columns]
        before = excerpt.tokens[row : row + 1, columns]
        logits = self.model.logits(some, before)[0].double()
        targets = torch.from_numpy(self.stream[positions + 1].astype(np.int64))
        chosen = targets.to(logits.device)[:, None]
        expected = -torch.log_softmax(logits, dim=-1).gather(1, chosen)[:, 0]
        for index, position in enumerate(positions.tolist()):
            total = None
            if position % SUMMED_EVERY == 0:
                one = slice(index, index + 1)
                total = self.total_probability(some[:, one], before[:, one], logits.shape[1])
            kept = float(nats[row, columns[index]])
            sampled.append(Sampled(position, kept, float(expected[index]), total))
        return sampled

    def hidden(self, excerpt: Any) -> Tensor:
        """The model's hidden states at an excerpt's tokens, by the weights and states as they are.

        Where evaluation is stateful, an excerpt begins with tokens of an earlier part: zeros here.
        """
        order = self.model.order(True)
        if excerpt.resumed is None:
            return self.model(excerpt.tokens, order)
        seen, states = excerpt.resumed
        held = self.script.StateRelay(self.ranks, list(states))
        hidden = self.model.resume(excerpt.tokens, seen, order, held)
        return torch.nn.functional.pad(hidden, (0, 0, excerpt.tokens.shape[1] - hidden.shape[1], 0))

    def total_probability(self, hidden: Tensor, before: Tensor, vocabulary: int) -> float:
        """Sum over all tokens of the probability that the script's own nats() gives to each."""
        total = 0.0
        for tokens in torch.arange(vocabulary, device=hidden.device).split(CANDIDATES):
            every = hidden.expand(1, len(tokens), -1).contiguous()
            nats = self.model.nats(every, tokens[None], before.expand(1, len(tokens)))
            total += float(nats.double().neg().exp().sum())
        return total


@contextlib.contextmanager
def branch_of_row(model: torch.nn.Module, row: int) -> Iterator[None]:
    """While entered, the output matrix's branch, if there is one, is that of a row's document."""
    every = getattr(model, "head_branch", None)
    if every is not None:
        own = copy.copy(every)
        own.down = every.down[row : row + 1]
        own.up = every.up[row : row + 1]
        model.head_branch = own
    yield
    if every is not None:
        model.head_branch = every


def fingerprint(model: torch.nn.Module) -> list[int]:
    """A number for each parameter, which a change to any one of its bits changes.

    The sum, modulo 2**64, of its bits in parts of 16, each times an odd number of its own; computed
    where the parameter lies, as it is asked for with every batch.
    """
    sums = []
    for parameter in model.parameters():
        parts = parameter.detach().contiguous().view(-1).view(torch.int16).to(torch.int64)
        place = torch.arange(len(parts), device=parts.device)
        factors = (place * 0x5851F42D4C957F2D + 0x14057B7EF767814F) | 1
        sums.append((parts * factors).sum())
    return torch.stack(sums).tolist()


def weights_of(script: ModuleType, model: torch.nn.Module) -> list[Weight]:
    """Every parameter's name, shape and hash, in the artifact's order."""
    on_grid = script.grid_limits(model)
    weights = []
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().float().cpu().contiguous().numpy()
        digest = hashlib.sha256(numbers.tobytes()).hexdigest()
        weights.append(Weight(name, tuple(parameter.shape), name in on_grid, digest))
    return weights


def observe(script: ModuleType, environment: dict[str, str], seed: int) -> Observation:
    """Evaluates the whole validation set and records every score, update and step, in order.

    There is no clock: all epochs are made.
    """
    settings, given, ranks = script.prepare_run(environment)
    if hasattr(script, "settings_to_score"):  # what is not given, as the script itself takes it
        settings, _ = script.settings_to_score(settings, given, ranks.world_size)
    model, settings = script.load_model(settings.artifact_path, settings, given, ranks)
    settings = dataclasses.replace(settings, eval_max_seconds=2.0**40)
    tokenizer = script.Tokenizer(settings.tokenizer_path, settings.vocab_size)
    validation = script.load_validation(settings, tokenizer)
    watcher = Watcher(script, model, ranks, validation, seed)
    watcher.seen.weights = weights_of(script, model)
    evaluator = script.Evaluator(model, settings, ranks, validation, observer=watcher)
    hook = register_optimizer_step_post_hook(watcher.on_step)
    try:
        score = evaluator.evaluate()
    finally:
        hook.remove()
    seen = watcher.seen
    seen.nats = score.nats
    seen.val_loss = score.val_loss
    seen.val_bpb = score.val_bpb
    return seen


def main() -> None:
    """Observes, and leaves the file behind."""
    path, seed = sys.argv[1:]
    script = load_script(Path(path))
    observe(script, dict(os.environ), int(seed)).save(Path())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("error: no command by itself; start python -m tools.audit", file=sys.stderr)
        sys.exit(2)
    main()
