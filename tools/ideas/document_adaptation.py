"""Idea: documents adapt the model while they are scored, each by low-rank matrices of its own.

    PRESET=short DATA_PATH=data/development python -m tools.ideas.document_adaptation \\
        --artifact logs/RUN.int6.lzma --documents 512 \\
        --variant "as it is:" --variant "wider: rank=80 rate=2e-4" --variant "phase: phases=0.05"

Scores a finished artifact's validation text document by document, and prints a line of JSON for
each variant: BPB, and BPB of the same windows with the weights as they are, so that what adapting
gains is told apart from what windows within documents gain. Settings are those of EVAL_ONLY: what
the environment gives, then the artifact's and its log's. One process, one device.

Documents are scored 64 at a time, longest first, in pieces of some tokens. A piece is scored from
the window that ends with it and begins with the document or TRAIN_SEQ_LEN tokens back. Beside a
layer W stands a branch that each of the 64 slots has for itself (LoRA, arXiv 2106.09685):

    y = W x + gain B A x        A (rank, inputs), B (outputs, rank)

After a piece is scored, its mean nats make one step for A and B, unless the document ends with it.
B is 0 for each new document; A stays in its slot, so that it learns from batch to batch what such
branches are good for (carried=0: it is drawn anew, and batches have nothing in common). In global
phases, between two batches, all weights learn by SGD from documents that are scored to their end;
branches begin anew.

So a target's score depends on its document's earlier tokens and on documents of earlier batches.
The script itself does this as EVAL_MODE=documents: with carried=0, one draw of A for all slots, and
without phases. Here is what it could do besides.
A variant is a name, a colon and the fields of Choice that it changes, as FIELD=VALUE.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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
from tools.command import Parser, UserError, need, run_command

BETAS = 0.0, t.BRANCH_BETA2  # no mean of gradients, which pieces do not share
EPSILON = 1e-10
PHASE_MOMENTUM = 0.9  # SGD in global phases
PHASE_CLIP = 1.0  # most of a step's gradient there
LENGTHS = (256, 512, 1024, 2048, 2**31)  # documents below each are a row of the report
# Matrices that may have a branch, by the word in Choice.layers; "mlp" is a whole MLP's branch.
BRANCHED = {
    "attention": ("query", "key", "value", "out"),
    "in_proj": ("in_proj",),
    "out_proj": ("out_proj",),
    "mlp": ("mlp",),
    "head": (),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a variant adapts."""

    name: str
    layers: str = "mlp,head"  # that have branches: words of BRANCHED
    rank: int = 32  # 0: no branches
    gain: float = 1.8  # often written alpha / rank
    rate: float = 3e-4
    decay: float = 0.5  # decoupled
    rule: str = "matrix"  # whose usual gradient measures a step; rows: and columns; each: AdamW
    piece: int = 64  # tokens that are scored, then learnt from
    lesson: str = "piece"  # what is learnt from; window: all that the piece's window holds
    slots: int = 64  # documents at once
    start: str = "uniform"  # of A; orthogonal: directions of the input that stand on each other
    moves: float = 1.0  # of the rate, at which A learns; 0: B alone does
    momentum: float = 0.0  # of the gradient's running mean
    carried: int = 1  # A stays in its slot from batch to batch; 0: it is drawn anew
    phases: str = ""  # parts of the documents after which a phase stands; each: after every batch
    phase_text: str = "all"  # that is scored so far; new: since the phase before
    phase_rate: float = 1e-3  # falls along a cosine within the phase
    phase_tokens: int = 32_768  # of a step
    phase_epochs: int = 1


def read_choice(text: str) -> Choice:
    """A variant as it is written on the command line."""
    name, colon, changes = text.partition(":")
    need(colon and name.strip(), f'"{text}" should be a name, a colon and fields: "wide: rank=80"')
    kinds = {field.name: field.type for field in dataclasses.fields(Choice) if field.name != "name"}
    values = {}
    for part in changes.split():
        field, equals, value = part.partition("=")
        need(equals and field in kinds, f'"{name}": {part} should be one of {", ".join(kinds)}=…')
        try:
            values[field] = kinds[field](value)
        except ValueError:
            raise UserError(f'"{name}": {part} is no number') from None
    choice = Choice(name.strip(), **values)
    unknown = set(choice.layers.split(",")) - set(BRANCHED)
    need(not unknown, f'"{name}": layers are of {",".join(BRANCHED)}')
    least = min(choice.piece, choice.slots, choice.phase_tokens, choice.phase_epochs)
    need(least > 0 <= choice.rank, f'"{name}": counts are above 0, a rank is 0 or more')
    factors = [value for value in dataclasses.astuple(choice) if isinstance(value, float)]
    sound = all(0 <= factor < math.inf for factor in factors)
    need(sound, f'"{name}": gain, rates and decay are numbers from 0')
    need(choice.lesson in ("piece", "window"), f'"{name}": lesson is piece or window')
    rules = ("each", "matrix", "rows")
    need(choice.rule in rules, f'"{name}": rule is one of {", ".join(rules)}')
    starts = ("uniform", "orthogonal")
    need(choice.start in starts, f'"{name}": start is uniform or orthogonal')
    need(choice.momentum < 1, f'"{name}": momentum is below 1')
    coarse = choice.rule != "each" or (choice.moves == 1 and not choice.momentum)
    need(coarse, f'"{name}": moves and momentum are for rule=matrix and rows')
    need(choice.phase_text in ("all", "new"), f'"{name}": phase_text is all or new')
    phase_parts(choice)
    return choice


def phase_parts(choice: Choice) -> list[float]:
    """The parts of the documents after which global phases stand, in order; "each" has none."""
    if choice.phases in ("", "each"):
        return []
    try:
        parts = sorted(float(part) for part in choice.phases.split(","))
    except ValueError:
        parts = [0.0]
    need(parts[0] > 0 and parts[-1] < 1, f'"{choice.name}": phases are parts such as 0.05,0.1')
    return parts


# ---- Documents -----------------------------------------------------------------------------------


class Documents(NamedTuple):
    """Documents in the order in which they are scored, longest first."""

    begins: np.ndarray  # (D,) int64: where each one's BOS stands in the stream
    lengths: np.ndarray  # (D,) int64: targets that follow its tokens; the last is the next BOS

    def part(self, first: int, last: int) -> "Documents":
        """Documents first to last, last left out."""
        return Documents(self.begins[first:last], self.lengths[first:last])

    def longer_than(self, offset: int) -> int:
        """How many documents have a target at this offset: the first ones."""
        return int((self.lengths > offset).sum())

    def filled(self, count: int) -> "Documents":
        """With empty documents behind them, so that there are count."""
        none = np.zeros(count - len(self.begins), dtype=np.int64)
        return Documents(*(np.concatenate([numbers, none]) for numbers in self))


def find_documents(tokens: np.ndarray, most: int = 0) -> Documents:
    """The documents of a stream (N + 1,); if most, so many of them, evenly from all lengths."""
    batches = t.plan_batches(tokens, t.Settings())
    begins, lengths = (np.concatenate(parts)[:, 0] for parts in zip(*batches, strict=True))
    chosen = np.arange(np.count_nonzero(lengths))  # empty ones fill the last batch
    if 0 < most < len(chosen):
        chosen = ((np.arange(most) + 0.5) * (len(chosen) / most)).astype(np.int64)
    return Documents(begins[chosen], lengths[chosen])


def plan_pieces(
    longest: int, piece: int, window: int, merged: bool = False
) -> Iterator[tuple[int, int, int]]:
    """(context, begin, end) of each piece of a document: targets begin to end, read from context.

    merged: pieces whose windows begin with the document become one, which scores them alike as
    long as nothing is learnt in between.
    """
    first = window // piece * piece if merged else piece
    begin, end = 0, first
    while begin < longest:
        yield max(0, end - window), begin, min(end, longest)
        begin, end = end, end + piece


# ---- Branches ------------------------------------------------------------------------------------


class LowRank(t.LowRank):
    """gain B A x, with matrices of its own for each slot, all drawn apart."""

    def __init__(self, choice: Choice, inputs: int, outputs: int, device):
        self.gain = choice.gain
        slots, rank = choice.slots, choice.rank
        self.down = torch.empty(
            slots, inputs, rank, device=device
        ).requires_grad_()  # A, transposed
        self.up = torch.zeros(slots, rank, outputs, device=device, requires_grad=True)  # B likewise
        self.draw(choice.start)

    @torch.no_grad()
    def draw(self, start: str) -> None:
        """Other matrices A, of numbers of one size either way."""
        bound = self.down.shape[1] ** -0.5
        if start == "uniform":
            nn.init.uniform_(self.down, -bound, bound)
        else:  # columns of length 1, as long as uniform ones then, the same for all slots
            self.down.copy_(nn.init.orthogonal_(torch.empty_like(self.down[0])) / 3**0.5)


class Branches:
    """The branches of a model's layers, and their optimizer."""

    def __init__(self, model: t.Model, choice: Choice):
        self.model = model
        self.choice = choice
        self.beside = {}  # by the module
        self.head = None
        self.renew()

    def renew(self) -> None:
        """Draws all matrices A."""
        words = self.choice.layers.split(",")
        names = {name for word in words for name in BRANCHED[word]}
        modules = self.model.named_modules()
        chosen = [module for name, module in modules if name.rpartition(".")[2] in names]
        self.beside = {module: self.new_branch(*sizes_of(module)) for module in chosen}
        vocabulary, width = self.model.output_matrix.shape
        self.head = self.new_branch(width, vocabulary) if "head" in words else None
        self.begin_batch()

    def new_branch(self, inputs: int, outputs: int) -> LowRank:
        """A branch beside a layer of this many inputs and outputs."""
        return LowRank(self.choice, inputs, outputs, self.model.embedding.weight.device)

    def begin_batch(self) -> None:
        """Other documents are in the slots: B is 0, and nothing is known of gradients."""
        each = [*self.beside.values(), self.head]
        each = [branch for branch in each if branch is not None]
        for branch in each:
            nn.init.zeros_(branch.up)
            if not self.choice.carried:
                branch.draw(self.choice.start)
        parameters = [matrix for branch in each for matrix in (branch.down, branch.up)]
        fused = parameters[0].is_cuda
        rates = {"lr": self.choice.rate, "weight_decay": self.choice.decay}
        if self.choice.rule == "each":
            self.optimizer = torch.optim.AdamW(
                parameters, betas=BETAS, eps=EPSILON, fused=fused, **rates
            )
        else:
            self.optimizer = Coarse(parameters, self.choice)

    def step(self, loss: Tensor) -> None:
        """One step of all branches."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Coarse:
    """As AdamW without momentum, but steps are measured by gradients of more than one number.

    rule matrix is the script's: mean squares are of a slot's whole matrix. rule rows: a number's is
    the product of its row's and its column's, over the matrix's (Adafactor, arXiv 1804.04235).
    """

    def __init__(self, parameters: list[Tensor], choice: Choice):
        self.parameters = parameters  # A and B in turn
        self.choice = choice
        self.means = [torch.zeros_like(p) if choice.momentum else None for p in parameters]
        self.sums = [
            (p.new_zeros(*p.shape[:2], 1), p.new_zeros(len(p), 1, p.shape[2])) for p in parameters
        ]
        self.weight = 0.0  # of what the sums have taken in
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """A step of all slots, each by its own gradients."""
        keep, momentum = BETAS[1], self.choice.momentum
        self.weight = keep * self.weight + 1 - keep
        self.steps += 1
        each = zip(self.parameters, self.means, self.sums, strict=True)
        for number, (p, mean, (rows, columns)) in enumerate(each):
            squares = p.grad.square()
            rows.lerp_(squares.mean(dim=2, keepdim=True), 1 - keep)
            columns.lerp_(squares.mean(dim=1, keepdim=True), 1 - keep)
            whole = rows.mean(dim=1, keepdim=True)
            usual = whole if self.choice.rule == "matrix" else rows * columns / (whole + 1e-30)
            if mean is not None:
                mean.lerp_(p.grad, 1 - momentum)
            gradient = p.grad if mean is None else mean / (1 - momentum**self.steps)
            change = gradient / ((usual / self.weight).sqrt() + EPSILON)
            rate = self.choice.rate * (1 if number % 2 else self.choice.moves)
            p.mul_(1 - rate * self.choice.decay).sub_(rate * change)

    def zero_grad(self) -> None:
        """Gradients are of one piece."""
        for p in self.parameters:
            p.grad = None


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a Linear or of an MLP."""
    first, last = (module.up, module.down) if isinstance(module, t.MLP) else (module, module)
    return first.in_features, last.out_features


# ---- Scoring -------------------------------------------------------------------------------------


class Scorer:
    """Scores documents once, with or without branches."""

    def __init__(self, model: t.Model, tokens: np.ndarray, branches: Branches | None = None):
        self.model = model
        self.tokens = tokens
        self.branches = branches
        self.order = model.order(recurrent=True)
        self.window = model.settings.train_seq_len
        self.device = model.embedding.weight.device
        self.nats = torch.zeros(len(tokens) - 1, device=self.device)
        self.times_scored = np.zeros(len(tokens) - 1, dtype=np.int64)
        self.tokens_read = 0

    def read(self, documents: Documents, context: int, end: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets (n, T) int64, from offset context on; BOS behind a document's end."""
        wide = t.round_up(end - context, t.WIDTH_STEP)
        offsets = context + np.arange(min(self.window, wide) + 1)
        positions = documents.begins[:, None] + offsets
        rows = self.tokens[np.minimum(positions, len(self.tokens) - 1)].astype(np.int64)
        rows[offsets > documents.lengths[:, None]] = t.BOS_ID
        self.tokens_read += rows[:, 1:].size
        rows = torch.from_numpy(rows).to(self.device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def score_piece(
        self, documents: Documents, context: int, begin: int, end: int, heard: int = 0
    ) -> Tensor:
        """Scores the targets of a piece, as far as they exist, and writes that down.

        Returns nats (n, L) of the last L targets, of the piece and of `heard` more before it.
        """
        count = t.round_up(documents.longer_than(begin), t.ROW_STEP)
        documents = documents.part(0, count)
        tokens, targets = self.read(documents, context, end)
        hidden = self.model(tokens, self.order)
        last = slice(begin - context - heard, end - context)
        nats = self.model.nats(hidden[:, last], targets[:, last], tokens[:, last])
        offsets = np.arange(begin - heard, end)
        scored = (offsets >= begin) & (offsets < documents.lengths[:, None])
        cells = np.flatnonzero(scored)
        places = (documents.begins[:, None] + offsets).flatten()[cells]
        np.add.at(self.times_scored, places, 1)
        self.nats[places] = nats.detach().flatten()[cells]
        return nats

    @torch.no_grad()
    def score_frozen(self, documents: Documents, piece: int) -> None:
        """Scores a batch by the windows of pieces, and learns nothing."""
        for context, begin, end in plan_pieces(documents.lengths[0], piece, self.window, True):
            self.score_piece(documents, context, begin, end)

    def score_adapting(self, documents: Documents, choice: Choice) -> None:
        """Scores a batch; after each piece, the branches of documents that go on learn from it."""
        self.branches.begin_batch()
        for context, begin, end in plan_pieces(documents.lengths[0], choice.piece, self.window):
            longer = documents.longer_than(end)
            heard = begin - context if choice.lesson == "window" else 0
            with torch.set_grad_enabled(longer > 0):
                nats = self.score_piece(documents, context, begin, end, heard)
            if longer:
                self.branches.step(nats[:longer].mean(dim=1).sum())

    def collect(self, documents: Documents) -> np.ndarray:
        """Nats (N,) of all targets; RuntimeError unless each of the documents' has one score."""
        if self.times_scored.max() > 1 or self.times_scored.sum() != documents.lengths.sum():
            raise RuntimeError("a target was not scored exactly once")
        return self.nats.cpu().numpy()


# ---- Global phases -------------------------------------------------------------------------------


def phase_rows(tokens: np.ndarray, documents: Documents, length: int, step_tokens: int) -> Tensor:
    """The documents one behind the other, in rows (R, length + 1) int64; rows of whole steps."""
    texts = [
        tokens[begin : begin + count]
        for begin, count in zip(documents.begins, documents.lengths, strict=True)
    ]
    stream = np.concatenate(texts).astype(np.int64)
    step_rows = max(1, step_tokens // length)
    rows = (len(stream) - 1) // (step_rows * length) * step_rows
    places = np.arange(rows)[:, None] * length + np.arange(length + 1)
    return torch.from_numpy(stream[places])


def learn_globally(model: t.Model, rows: Tensor, choice: Choice) -> int:
    """All weights learn from rows (R, T + 1) by SGD; returns the number of steps."""
    model.requires_grad_(True)
    order = model.order(recurrent=True)
    step_rows = max(1, choice.phase_tokens // (rows.shape[1] - 1))
    batches = [*rows.split(step_rows)] * choice.phase_epochs
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=PHASE_MOMENTUM)
    for number, batch in enumerate(batches):
        falling = 0.5 + 0.5 * math.cos(math.pi * number / len(batches))
        sgd.param_groups[0]["lr"] = choice.phase_rate * falling
        batch = batch.to(model.embedding.weight.device)
        model.loss(batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), order).backward()
        nn.utils.clip_grad_norm_(model.parameters(), PHASE_CLIP)
        sgd.step()
        sgd.zero_grad()
    model.requires_grad_(False)
    return len(batches)


# ---- Variants ------------------------------------------------------------------------------------


def score_variant(
    model: t.Model, tokens: np.ndarray, documents: Documents, choice: Choice
) -> tuple[Scorer, int]:
    """Scores all documents, and adapts as chosen; the scorer, and steps of global phases."""
    branches = Branches(model, choice) if choice.rank else None
    scorer = Scorer(model, tokens, branches)
    count = len(documents.begins)
    due = [part * count for part in phase_parts(choice)]
    steps = learnt = 0
    for first in range(0, count, choice.slots):
        done = min(first + choice.slots, count)
        batch = documents.part(first, done).filled(choice.slots)
        with t.documents_alone(model, branches):
            if branches:
                scorer.score_adapting(batch, choice)
            else:
                scorer.score_frozen(batch, choice.piece)
        passed = [part for part in due if part <= done]
        if done == count or not (passed or choice.phases == "each"):
            continue
        due = due[len(passed) :]
        known = documents.part(learnt if choice.phase_text == "new" else 0, done)
        rows = phase_rows(tokens, known, scorer.window, choice.phase_tokens)
        if len(rows):
            steps += learn_globally(model, rows, choice)
            learnt = done
            if branches:
                branches.renew()
    return scorer, steps


class Sums(NamedTuple):
    """Of each document."""

    nats: np.ndarray  # (D,) float64
    bytes: np.ndarray  # (D,) int64


def sum_up(documents: Documents, nats: np.ndarray, target_bytes: np.ndarray) -> Sums:
    """Sums of nats and of bytes (N,) over each document's targets."""
    parts = [
        slice(begin, begin + count)
        for begin, count in zip(documents.begins, documents.lengths, strict=True)
    ]
    sums = np.array([nats[part].sum(dtype=np.float64) for part in parts])
    return Sums(sums, np.array([target_bytes[part].sum() for part in parts]))


def bits_per_byte(sums: Sums, chosen=slice(None)) -> float:
    """BPB of some of the documents."""
    return float(sums.nats[chosen].sum() / math.log(2) / sums.bytes[chosen].sum())


def compare(documents: Documents, frozen: Sums, adapted: Sums) -> dict:
    """BPB of both, what was gained and its standard error over documents, and by their lengths."""
    bpb, before = bits_per_byte(adapted), bits_per_byte(frozen)
    gained = (frozen.nats - adapted.nats) / math.log(2)
    spread = gained - (before - bpb) * frozen.bytes
    error = float(np.sqrt((spread**2).sum()) / frozen.bytes.sum())
    rows = []
    row_of = np.searchsorted(LENGTHS, documents.lengths, side="right")
    for row in np.unique(row_of):
        chosen = row_of == row
        figures = {"below": LENGTHS[row], "documents": int(chosen.sum())}
        figures["frozen_bpb"] = round(bits_per_byte(frozen, chosen), 5)
        figures["bpb"] = round(bits_per_byte(adapted, chosen), 5)
        rows.append(figures)
    figures = {"bpb": bpb, "frozen_bpb": before, "gain": before - bpb, "gain_error": error}
    return {name: round(x, 6) for name, x in figures.items()} | {"by_length": rows}


def timed(function, *arguments) -> tuple:
    """What a function returns, and the seconds that it took."""
    started = t.synchronized_time()
    result = function(*arguments)
    return result, round(t.synchronized_time() - started, 2)


class Trial:
    """An artifact's model and the documents on which variants are compared."""

    def __init__(self, model: t.Model, validation: t.ValidationSet, most_documents: int = 0):
        need(model.compute_dtype != torch.float16, "float16 is not for this: take a newer GPU")
        self.model = model.requires_grad_(False)
        self.validation = validation
        self.documents = find_documents(validation.tokens, most_documents)
        self.weights = {name: x.clone() for name, x in model.state_dict().items()}
        self.frozen = {}  # by piece and slots: the sums without adapting, and the seconds

    def sums(self, nats: np.ndarray) -> Sums:
        """Each document's sums of nats (N,)."""
        return sum_up(self.documents, nats, self.validation.target_bytes)

    def score_frozen(self, choice: Choice) -> tuple[Sums, float]:
        """The documents' sums by the windows of this choice, and the seconds that took."""
        key = choice.piece, choice.slots
        if key not in self.frozen:
            still = dataclasses.replace(choice, rank=0, phases="")
            arguments = self.model, self.validation.tokens, self.documents, still
            (scorer, _), seconds = timed(score_variant, *arguments)
            self.frozen[key] = self.sums(scorer.collect(self.documents)), seconds
        return self.frozen[key]

    def run(self, choice: Choice) -> dict:
        """A variant's line of the report; the model has its first weights again afterwards."""
        window = self.model.settings.train_seq_len
        need(choice.piece <= window, f'"{choice.name}": a piece is 1 to {window} tokens, a window')
        torch.manual_seed(self.model.settings.seed)
        if self.model.embedding.weight.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        frozen, frozen_seconds = self.score_frozen(choice)
        arguments = self.model, self.validation.tokens, self.documents, choice
        (scorer, steps), seconds = timed(score_variant, *arguments)
        self.model.load_state_dict(self.weights)
        adapted = self.sums(scorer.collect(self.documents))
        line = {"variant": choice.name} | compare(self.documents, frozen, adapted)
        line |= {"documents": len(adapted.nats), "tokens": int(self.documents.lengths.sum())}
        line |= {"tokens_read": scorer.tokens_read, "phase_steps": steps}
        line |= {"seconds": seconds, "frozen_seconds": frozen_seconds}
        if self.model.embedding.weight.is_cuda:
            line["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        return line | {"choice": dataclasses.asdict(choice)}


# ---- Command -------------------------------------------------------------------------------------


def open_trial(artifact: str, most_documents: int) -> Trial:
    """The trial of an artifact, by the settings that EVAL_ONLY would score it with."""
    named = {"ARTIFACT": artifact} if artifact else {}
    settings, given = t.read_settings(dict(os.environ) | {"EVAL_ONLY": "1"} | named)
    t.check_values(settings)
    need(settings.artifact or settings.run_id, "say which artifact: --artifact FILE")
    t.prepare_torch(settings.deterministic)
    ranks = t.start_ranks(settings)
    need(ranks.world_size == 1, "it runs in one process: start it without torchrun")
    settings, source = t.settings_to_score(settings, given, ranks.world_size)
    print(source, file=sys.stderr, flush=True)
    model, settings = t.load_model(settings.artifact_path, settings, given, ranks)
    tokenizer = t.Tokenizer(settings.tokenizer_path, settings.vocab_size)
    return Trial(model, t.load_validation(settings, tokenizer), most_documents)


def command() -> int:
    """Prints a line for each variant of the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="python -m tools.ideas.document_adaptation", description=__doc__, formatter_class=form
    )
    parser.add_argument("--artifact", default="", help="file; left out: ARTIFACT or RUN_ID's")
    parser.add_argument("--documents", type=int, default=0, help="so many, of all lengths alike")
    parser.add_argument("--variant", action="append", help="a name, a colon, FIELD=VALUE ...")
    parser.add_argument("--nats", type=Path, help="scores of an EVAL_NLL_PATH, told beside")
    options = parser.parse_args()
    choices = [read_choice(text) for text in options.variant or ["mlp and head:"]]
    trial = open_trial(options.artifact, options.documents)
    beside = {}
    if options.nats:
        nats = np.load(options.nats)
        fits = nats.shape == (len(trial.validation.target_bytes),)
        need(fits, f"{options.nats} has no score for each target of this text")
        beside = {"nats_bpb": round(bits_per_byte(trial.sums(nats)), 6)}
    for choice in choices:
        print(json.dumps(trial.run(choice) | beside), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("document_adaptation", command, t.UserError))
