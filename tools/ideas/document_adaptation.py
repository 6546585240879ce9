"""Idea: documents adapt in other ways than with EVAL_MODE=documents; variants are compared.

    PRESET=short DATA_PATH=data/development python -m tools.ideas.document_adaptation \\
        --artifact logs/RUN.int6.lzma --documents 512 \\
        --variant "as it is:" --variant "wider: rank=256 lr=1e-4" --variant "slow: momentum=0.5"

Scores a finished artifact's validation text document by document, and prints a line of JSON for
each variant: BPB, and BPB of the same windows with the weights as they are. The difference is the
gain of adapting, without that of windows within documents. Settings are those of EVAL_ONLY: the
environment's, then the artifact's and its log's. One process, one device.

A variant is a name, a colon and its changes, as FIELD=VALUE: a setting TTT_LORA_FIELD, or a field
of Choice that the script does not have. Without a change, scores are those of EVAL_MODE=documents
to the bit: plan, windows and steps are the script's, and classes here say in what a variant
differs.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m tools.ideas.document_adaptation",
        file=sys.stderr,
    )
    sys.exit(2)

import train_gpt as t
from tools.command import Parser, need, run_command

LENGTHS = (256, 512, 1024, 2048, 2**31)  # documents below each are a row of the report
PREFIX = "ttt_lora_"  # of the settings that a variant may change


# ---- Variants ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice(t.Settings):
    """All that a variant can be told. The default of what settings lack is the script's way."""

    lesson: str = t.env("piece", "what is learnt from; or the piece's whole window", "piece|window")
    start: str = t.env("uniform", "of A; or directions at right angles", "uniform|orthogonal")
    moves: bool = t.env(True, "A learns; 0: B alone does")
    momentum: float = t.env(0.0, "of the gradient's running mean", "part", 0, t.BELOW_1)


OWN = [field.name for field in dataclasses.fields(Choice) if field.name not in t.FIELDS]
FIELDS = {name.removeprefix(PREFIX): name for name in t.FIELDS if name.startswith(PREFIX)}
FIELDS |= {name: name for name in OWN}  # by the word on the command line


def read_variant(text: str, settings: t.Settings) -> tuple[str, Choice]:
    """A variant as it is written on the command line: its name, and its choice by the settings."""
    name, colon, changes = text.partition(":")
    need(colon and name.strip(), f'"{text}" should be a name, a colon and fields: "wide: rank=80"')
    values = dataclasses.asdict(settings)
    given = {}
    for part in changes.split():
        word, equals, value = part.partition("=")
        need(equals and word in FIELDS, f'"{name}": {part} should be one of {", ".join(FIELDS)}=…')
        field = FIELDS[word]
        given[field] = t.parse_value(word, value, type(getattr(Choice, field)))
    choice = Choice(**values | given)
    t.validate_settings(choice, world_size=1)
    return name.strip(), choice


class Branches(t.Branches):
    """The script's, unless their choice has them begin or learn otherwise."""

    def __init__(self, model: t.Model, choice: Choice):
        super().__init__(model, choice)
        generator = torch.Generator().manual_seed(0)  # one draw for all documents
        for branch in filter(None, (*self.beside.values(), self.head)):
            if choice.start == "orthogonal":
                draw_orthogonal(branch.down, generator)
            branch.down.requires_grad_(choice.moves)
        pairs = zip(self.matrices, self.squares, strict=True)
        learning = [pair for pair in pairs if pair[0].requires_grad]
        self.matrices, self.squares = zip(*learning, strict=True)
        self.momentum = choice.momentum
        self.means = {}  # by the matrix, of its gradients

    @torch.no_grad()
    def move(self, matrix: Tensor, square: Tensor, direction: Tensor) -> None:
        """With momentum, by the mean of the gradients so far, later ones with more weight."""
        if self.momentum:
            known = self.means.setdefault(matrix, torch.zeros_like(matrix))
            known.lerp_(direction, 1 - self.momentum)
            direction = known / (1 - self.momentum**self.steps)
        super().move(matrix, square, direction)


@torch.no_grad()
def draw_orthogonal(down: Tensor, generator: torch.Generator) -> None:
    """Other matrices A (slots, inputs, rank), alike in all slots, with orthogonal columns.

    These are as long as those of uniform numbers within one over the root of the inputs.
    """
    down.copy_(nn.init.orthogonal_(torch.empty(down.shape[1:]), 3**-0.5, generator))


class Evaluator(t.Evaluator):
    """The script's, whose branches may learn from whole windows."""

    known = 0  # targets before a piece, in its window, that have scores and are learnt from again

    def _score_piece(self, batch: t.DocumentBatch, context: int, begin: int, end: int) -> tuple:
        """The piece, or its whole window if that is the lesson: what it returns is learnt from."""
        if self.settings.lesson == "piece":
            return super()._score_piece(batch, context, begin, end)
        self.known = begin - context
        rows = t.round_up(batch.longer_than(begin), t.ROW_STEP)
        going_on = t.DocumentBatch(*(part[:rows] for part in batch))
        return super()._score_piece(going_on, context, context, end)

    def _read_again(self, batch: t.DocumentBatch, place: tuple, part: slice) -> None:
        """Likewise, where memory has no room for all documents at once."""
        context, begin, end = place
        begin = begin if self.settings.lesson == "piece" else context
        super()._read_again(batch, (context, begin, end), part)

    def _keep(self, excerpt: t.Excerpt, first, last, nats: Tensor) -> None:
        """Scores are those that a target got first."""
        super()._keep(excerpt, first + self.known, last, nats)


# ---- Documents and figures -----------------------------------------------------------------------


class Documents(NamedTuple):
    """Some of a stream's documents."""

    validation: t.ValidationSet  # they alone, in the stream's order
    places: np.ndarray  # (N,) int64: where its targets are in the stream
    begins: np.ndarray  # (D,) int64: where each one's begin among these

    def sums(self, numbers: np.ndarray) -> np.ndarray:
        """Of one number for each target (N,), each document's sum (D,), float64 or int64."""
        wide = np.float64 if numbers.dtype.kind == "f" else np.int64
        return np.add.reduceat(numbers.astype(wide), self.begins)


def choose_documents(validation: t.ValidationSet, most: int = 0) -> Documents:
    """All documents of a stream; if most, so many of them, evenly from all lengths."""
    batches = t.plan_batches(validation.tokens, t.Settings())
    facts = np.concatenate([np.hstack(batch) for batch in batches])
    facts = facts[facts[:, 1] > 0]  # empty ones fill the last batch
    if 0 < most < len(facts):
        chosen = (np.arange(most) + 0.5) * (len(facts) / most)
        facts = facts[chosen.astype(np.int64)]
    facts = facts[facts[:, 0].argsort()]
    places = np.concatenate([begin + np.arange(length) for begin, length in facts])
    tokens = validation.tokens[np.append(places, places[-1] + 1)]
    begins = np.cumsum(facts[:, 1]) - facts[:, 1]
    return Documents(t.ValidationSet(tokens, validation.target_bytes[places]), places, begins)


def compare(documents: Documents, frozen: t.Score, adapted: t.Score) -> dict:
    """BPB of both, what was gained and its standard error over documents, and by their lengths."""
    sizes = documents.sums(documents.validation.target_bytes)
    before, after = (documents.sums(score.nats) / math.log(2) for score in (frozen, adapted))
    gain = frozen.val_bpb - adapted.val_bpb
    spread = before - after - gain * sizes
    error = float(np.sqrt((spread**2).sum()) / sizes.sum())
    rows = []
    lengths = np.diff(documents.begins, append=len(documents.places))
    row_of = np.searchsorted(LENGTHS, lengths, side="right")
    for row in np.unique(row_of):
        chosen = row_of == row
        figures = {"below": LENGTHS[row], "documents": int(chosen.sum())}
        for name, bits in (("frozen_bpb", before), ("bpb", after)):
            figures[name] = round(float(bits[chosen].sum() / sizes[chosen].sum()), 5)
        rows.append(figures)
    figures = {"bpb": adapted.val_bpb, "frozen_bpb": frozen.val_bpb}
    figures |= {"gain": gain, "gain_error": error}
    return {name: round(x, 6) for name, x in figures.items()} | {"by_length": rows}


class Trial:
    """An artifact's model and the documents on which variants are compared."""

    def __init__(self, model: t.Model, ranks: t.Ranks, validation: t.ValidationSet, most: int = 0):
        self.model = model
        self.ranks = ranks
        self.targets = len(validation.target_bytes)
        self.documents = choose_documents(validation, most)
        self.frozen = {}  # by piece and slots: the score without adapting

    def score(self, choice: Choice) -> t.Score:
        """The documents' score by a choice, which is all that the evaluator's settings are."""
        arguments = self.model, choice, self.ranks, self.documents.validation
        with mock.patch.object(t, "Branches", Branches):
            return Evaluator(*arguments).evaluate()

    def bits_per_byte(self, path: Path) -> float:
        """The documents' BPB by a file of nats of all the stream's targets."""
        nats = np.load(path)
        fits = nats.shape == (self.targets,)
        need(fits, f"{path} has no score for each target of this text")
        bits = nats[self.documents.places].sum(dtype=np.float64) / math.log(2)
        return round(float(bits / self.documents.validation.target_bytes.sum()), 6)

    def run(self, name: str, choice: Choice) -> dict:
        """A variant's line of the report."""
        windows = choice.ttt_lora_piece, choice.ttt_lora_slots
        if windows not in self.frozen:
            still = dataclasses.replace(choice, ttt_enabled=False, lesson="piece")
            self.frozen[windows] = self.score(still)
        frozen = self.frozen[windows]
        if self.ranks.gpu:
            torch.cuda.reset_peak_memory_stats()
        adapted = self.score(choice)
        line = {"variant": name} | compare(self.documents, frozen, adapted)
        line |= {"documents": len(self.documents.begins), "tokens": len(adapted.nats)}
        line |= {"given_up": adapted.epochs_given_up}  # documents, as the clock was at its end
        line |= {"seconds": adapted.seconds, "frozen_seconds": frozen.seconds}
        if self.ranks.gpu:
            line["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        return line | {"choice": {word: getattr(choice, name) for word, name in FIELDS.items()}}


# ---- Command -------------------------------------------------------------------------------------


def settings_of(artifact: str) -> tuple[t.Settings, set[str]]:
    """What EVAL_ONLY would score an artifact's documents with, and the given settings' names."""
    forced = {"EVAL_ONLY": "1", "EVAL_MODE": "documents", "TTT_ENABLED": "1"}
    named = {"ARTIFACT": artifact} if artifact else {}
    settings, given = t.read_settings(dict(os.environ) | forced | named)
    t.check_values(settings)
    need(settings.artifact or settings.run_id, "say which artifact: --artifact FILE")
    settings, source = t.settings_to_score(settings, given, world_size=1)
    print(source, file=sys.stderr, flush=True)
    return settings, given


def open_trial(settings: t.Settings, given: set[str], most_documents: int) -> Trial:
    """The trial of an artifact with its settings."""
    t.prepare_torch(settings.deterministic)
    ranks = t.start_ranks(settings)
    need(ranks.world_size == 1, "it runs in one process: start it without torchrun")
    model, settings = t.load_model(settings.artifact_path, settings, given, ranks)
    tokenizer = t.Tokenizer(settings.tokenizer_path, settings.vocab_size)
    validation = t.load_validation(settings, tokenizer)
    return Trial(model, ranks, validation, most_documents)


def command() -> int:
    """Prints a line for each variant of the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="python -m tools.ideas.document_adaptation", description=__doc__, formatter_class=form
    )
    parser.add_argument("--artifact", default="", help="file (default: ARTIFACT, or RUN_ID's)")
    number = "how many documents to score, of all lengths alike (default: all)"
    parser.add_argument("--documents", type=int, default=0, help=number)
    parser.add_argument("--variant", action="append", help="a name, a colon, FIELD=VALUE ...")
    parser.add_argument("--nats", type=Path, help="file of an EVAL_NLL_PATH, to print its BPB, too")
    options = parser.parse_args()
    settings, given = settings_of(options.artifact)
    variants = [read_variant(text, settings) for text in options.variant or ["as it is:"]]
    trial = open_trial(settings, given, options.documents)
    beside = {"nats_bpb": trial.bits_per_byte(options.nats)} if options.nats else {}
    for name, choice in variants:
        print(json.dumps(trial.run(name, choice) | beside), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("document_adaptation", command, t.UserError))
