"""Draws docs/layer.png and docs/run.png, the README's pictures of a layer and of a run.

    python docs/figures.py

Needs matplotlib (requirements-dev.txt). The backgrounds are white, so that dark pages show the
pictures too.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).resolve().parent
MAMBA = "#cfe2f3"
ATTENTION = "#fce0c0"
MLP = "#d9ead3"
PLAIN = "#f1f1f1"
STATE = "#fff2b3"
INK = "#222222"
FAINT = "#777777"


def canvas(width: float, height: float):
    """A white figure of this many inches, whose axes count in inches from the lower left."""
    figure, axes = pyplot.subplots(figsize=(width, height), facecolor="white")
    axes.set_position([0, 0, 1, 1])
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def box(axes, x: float, y: float, width: float, height: float, text: str, color=PLAIN, size=9):
    """A box around its centre (x, y), with text in it."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.06"
    patch = FancyBboxPatch(corner, width, height, style, facecolor=color, edgecolor=INK, lw=0.8)
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes, start: tuple, end: tuple, bend=0.0, color=INK, style="-|>"):
    """An arrow from start to end, bent to one side by a part of its length."""
    patch = FancyArrowPatch(
        start,
        end,
        arrowstyle=style,
        connectionstyle=f"arc3,rad={bend}",
        mutation_scale=9,
        shrinkA=0,
        shrinkB=0,
        lw=0.9,
        color=color,
    )
    axes.add_patch(patch)


def path(axes, *points: tuple, color=INK):
    """Straight lines through the points, the last one ending in an arrow."""
    xs = [point[0] for point in points]
    ys = [point[1] for point in points]
    axes.plot(xs[:-1], ys[:-1], color=color, lw=0.9, solid_joinstyle="miter")
    arrow(axes, points[-2], points[-1], color=color)


def title(axes, x: float, y: float, text: str):
    """A panel's heading."""
    axes.text(x, y, text, ha="center", va="center", fontsize=11, weight="bold", color=INK)


def note(axes, x: float, y: float, text: str, size=8, align="left", color=FAINT):
    """Small print."""
    axes.text(x, y, text, ha=align, va="center", fontsize=size, color=color, linespacing=1.35)


def draw_model(axes, x: float):
    """The default model from tokens to logits: nine blocks, with the U-Net's skips beside them."""
    title(axes, x, 6.75, "The model")
    box(axes, x, 6.3, 1.9, 0.36, "embedding + bigrams", size=8.5)
    box(axes, x, 5.8, 1.9, 0.3, "norm", size=8.5)
    arrow(axes, (x, 6.12), (x, 5.95))
    arrow(axes, (x, 5.65), (x, 5.5))
    top = 5.33
    distance = 0.47
    heights = [top - distance * layer for layer in range(9)]
    for layer, y in enumerate(heights):
        attention = layer in (2, 6)
        kind = "attention" if attention else "Mamba-3"
        box(axes, x, y, 1.9, 0.34, f"{layer}: {kind}, MLP", ATTENTION if attention else MAMBA, 8.5)
        arrow(axes, (x, y - 0.17), (x, y - distance + 0.17))
    for layer in range(4):
        outer = x - 1.05 - 0.13 * (4 - layer)
        edge = x - 0.95
        first = heights[layer] - 0.07
        last = heights[8 - layer] + 0.07
        path(axes, (edge, first), (outer, first), (outer, last), (edge, last), color=FAINT)
    box(axes, x, heights[8] - distance, 1.9, 0.34, "norm", size=8.5)
    arrow(axes, (x, heights[8] - distance - 0.17), (x, heights[8] - distance - 0.36))
    box(axes, x, heights[8] - distance - 0.56, 1.9, 0.4, "z = E x\nlogits: 15 tanh(z / 15)", size=8)


def draw_block(axes, x: float):
    """One layer: a mixer and an MLP, each adding to the residual stream."""
    title(axes, x, 6.75, "A layer")
    line = x - 0.75
    branch = x + 0.45
    axes.plot([line, line], [6.35, 5.93], color=INK, lw=0.9)
    note(axes, line, 6.47, "x, from the layer before", 8, "center", INK)
    box(axes, x - 0.15, 5.7, 2.3, 0.4, "keep · x + mix · embedded tokens", size=8)
    arrow(axes, (line, 6.05), (line, 5.9))
    parts = (
        (4.95, 4.1, "Mamba-3\nor attention", MAMBA),
        (2.75, 1.9, "MLP:\ndown(LeakyReLU(up x)$^2$)", MLP),
    )
    previous = 5.5
    for norm_height, mixer_height, name, color in parts:
        total = mixer_height - 0.75
        branching = norm_height + 0.33
        path(axes, (line, branching), (branch, branching), (branch, norm_height + 0.15))
        box(axes, branch, norm_height, 1.2, 0.3, "norm", size=8.5)
        arrow(axes, (branch, norm_height - 0.15), (branch, mixer_height + 0.28))
        box(axes, branch, mixer_height, 1.75, 0.56, name, color, 8.5)
        path(axes, (branch, mixer_height - 0.28), (branch, total), (line + 0.13, total))
        arrow(axes, (line, previous), (line, total + 0.13))
        axes.add_patch(pyplot.Circle((line, total), 0.13, facecolor="white", edgecolor=INK, lw=0.9))
        axes.text(line, total, "+", ha="center", va="center", fontsize=10, color=INK)
        previous = total - 0.13
    arrow(axes, (line, previous), (line, 0.65))
    note(axes, line, 0.5, "x, to the next layer", 8, "center", INK)


def draw_mamba(axes, x: float):
    """Mamba-3 between its two matrices."""
    title(axes, x, 6.75, "Mamba-3")
    box(axes, x, 6.3, 4.6, 0.36, "in_proj", MAMBA)
    names = (
        ("gate", r"$gate_t$"),
        ("value", r"$v_t$"),
        ("key", r"$k_t$"),
        ("query", r"$q_t$"),
        ("step", r"$dt_t$"),
        ("decay", r"$A_t$"),
        ("trape-\nzoid", r"$\lambda_t$"),
        ("angle\nrate", r"$rate_t$"),
    )
    places = [x - 2.03 + 0.58 * number for number in range(len(names))]
    for place, (name, letter) in zip(places, names, strict=True):
        arrow(axes, (place, 6.12), (place, 5.95))
        box(axes, place, 5.7, 0.53, 0.5, name, size=8)
        axes.text(place + 0.05, 5.3, letter, ha="left", va="center", fontsize=9, color=INK)
    for place in places[1:]:
        arrow(axes, (place, 5.45), (place, 4.98))
    gate = places[0]

    middle = x + 0.25
    box(axes, middle, 3.98, 4.15, 2.0, "", STATE)
    note(axes, middle - 1.95, 4.8, "keys and queries: normed, biased, turned by", 8, "left", INK)
    angle = r"$\theta_t = \theta_{t-1} + \pi\,\tanh(rate_t)\,dt_t$"
    decay = r"$a_t = \exp(A_t\,dt_t)$"
    equations = (
        (4.52, f"{angle},    {decay}"),
        (4.05, r"$S_t = a_t\,(S_{t-1} + (1-\lambda_t)\,dt_t\,v_{t-1}k_{t-1}^\top)$"),
        (3.6, r"$\qquad\quad +\ \lambda_t\,dt_t\,v_t k_t^\top$"),
        (3.2, r"$S_t\,q_t + D\,v_t$"),
    )
    for height, equation in equations:
        axes.text(middle - 1.95, height, equation, va="center", fontsize=10, color=INK)
    note(
        axes,
        middle + 1.95,
        3.2,
        "state $S$: one matrix a head,\nhanded from token to token",
        7.5,
        "right",
    )
    arrow(axes, (middle, 2.98), (middle, 2.68))
    box(axes, middle, 2.48, 2.8, 0.4, r"$y_t = (S_t\,q_t + D\,v_t)\ \mathrm{silu}(gate_t)$")
    path(axes, (gate, 5.45), (gate, 2.48), (middle - 1.4, 2.48))
    arrow(axes, (middle, 2.28), (middle, 1.98))
    box(axes, middle, 1.8, 2.2, 0.36, "norm")
    arrow(axes, (middle, 1.62), (middle, 1.32))
    box(axes, middle, 1.12, 2.2, 0.4, "out_proj (begins at 0)", MAMBA)
    arrow(axes, (middle, 0.92), (middle, 0.65))


def draw_layer():
    """The model, one of its layers, and what Mamba-3 is: docs/layer.png."""
    figure, axes = canvas(11.2, 7.0)
    draw_model(axes, 1.95)
    draw_block(axes, 4.75)
    draw_mamba(axes, 8.65)
    figure.savefig(FOLDER / "layer.png", dpi=130)
    pyplot.close(figure)


def draw_clock(axes, left: float, right: float, text: str):
    """A frame around what a clock counts."""
    style = "round,pad=0,rounding_size=0.1"
    corner = (left, 1.22)
    frame = FancyBboxPatch(
        corner, right - left, 1.6, style, facecolor="none", edgecolor=FAINT, lw=1, ls="--"
    )
    axes.add_patch(frame)
    note(axes, right - 0.15, 1.38, text, 9, "right", INK)


def draw_run():
    """What happens from shards to a score, and which clock counts it: docs/run.png."""
    figure, axes = canvas(11.2, 3.5)
    draw_clock(axes, 2.0, 5.35, "training clock: 600 s")
    draw_clock(axes, 7.6, 10.05, "evaluation clock: 600 s")
    middle = 2.05
    steps = (
        (0.95, 1.35, "compile,\nwarm-up steps\nof rate 0", PLAIN),
        (2.9, 1.5, "training steps:\nloss, Muon, Adam,\nmoving average", MAMBA),
        (4.5, 1.4, "calibrate, GPTQ:\nint6 and int8\nintegers", MAMBA),
        (6.45, 1.5, "entropy-code,\nwrite the artifact", PLAIN),
        (
            8.85,
            2.2,
            "load the artifact; then,\npiece by piece of a document:\nscore it, then learn from it",
            MLP,
        ),
        (10.62, 0.75, "BPB", STATE),
    )
    for x, width, text, color in steps:
        box(axes, x, middle, width, 0.85, text, color, 8.5)
    for before, after in zip(steps, steps[1:], strict=False):
        start = (before[0] + before[1] / 2, middle)
        end = (after[0] - after[1] / 2, middle)
        arrow(axes, start, end)
    inputs = (
        (2.9, "training shards"),
        (4.5, "a little training text"),
        (8.85, "validation shards, tokenizer"),
    )
    for x, text in inputs:
        note(axes, x, 3.3, text, 8.5, "center", INK)
        arrow(axes, (x, 3.2), (x, middle + 0.43))
    outputs = (
        (2.9, "checkpoints"),
        (6.45, "logs/RUN_ID.int6.lzma:\nwith the script at most\n16,000,000 bytes"),
        (10.62, "the log's\nlast line"),
    )
    for x, text in outputs:
        arrow(axes, (x, middle - 0.43), (x, 0.95))
        note(axes, x, 0.6, text, 8.5, "center", INK)
    figure.savefig(FOLDER / "run.png", dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    draw_layer()
    draw_run()
