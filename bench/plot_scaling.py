"""Plots the speed of one global batch on 1, 2, 4 ... GPUs of a host, with linear scaling beside it.

    python -m bench.plot_scaling 1:577.9 2:297.5 4:148.9 --tokens 1048576 --out docs/scaling.png

Each pair is a number of GPUs and the step's milliseconds, as `torchrun --nproc_per_node=N -m
bench.bench steps` prints them. Needs matplotlib (requirements-dev.txt).
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder: python -m bench.plot_scaling", file=sys.stderr
    )
    sys.exit(2)

from tools.command import Parser, need_place, run_command, write_picture


def pair(text: str) -> tuple[int, float]:
    """GPUs and milliseconds of "GPUS:MS". Raises ValueError, which argparse tells."""
    gpus, _, milliseconds = text.partition(":")
    if not gpus.isdecimal() or int(gpus) < 1 or float(milliseconds) <= 0:
        raise ValueError
    return int(gpus), float(milliseconds)


def plot(steps: list[tuple[int, float]], tokens: int, out: Path) -> None:
    """Writes the plot as PNG; each point bears its part of linear scaling."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    gpus = [number for number, _ in steps]
    rates = [tokens / milliseconds / 1e3 for _, milliseconds in steps]  # millions a second
    # Linear: as much for each GPU as on the fewest.
    linear = [rates[0] / gpus[0] * number for number in gpus]
    axes.plot(gpus, linear, linestyle="--", color="gray", label="linear")
    axes.plot(gpus, rates, marker="o", label="measured")
    beside = {"textcoords": "offset points", "xytext": (-6, 6), "ha": "right"}
    for number, rate, ideal in zip(gpus, rates, linear, strict=True):
        axes.annotate(f"{rate / ideal:.0%}", (number, rate), **beside)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(gpus, [str(number) for number in gpus])
    axes.set_yticks(linear, [f"{rate:.2f}" for rate in linear])
    axes.minorticks_off()
    axes.set(xlabel="GPUs", ylabel="million tokens a second")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write_picture(out, figure)


def main() -> int:
    """Plots the steps by rising number of GPUs."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("steps", nargs="+", type=pair, metavar="GPUS:MS", help="a number of GPUs and its step")
    add("--tokens", type=int, default=1_048_576, help="tokens of a step (%(default)s)")
    add("--out", type=Path, default=Path("docs/scaling.png"), help="the plot (%(default)s)")
    options = parser.parse_args()
    need_place(options.out, ending=".png")
    plot(sorted(options.steps), options.tokens, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("plot_scaling.py", main))
