"""Plots the speed of one global batch on 1, 2, 4 ... GPUs of a host beside linear scaling.

    python -m bench.plot_scaling 1:577.9 2:297.5 4:148.9 --tokens 1048576 --out docs/scaling.png

Each pair is a number of GPUs and the step's milliseconds, as `torchrun --nproc_per_node=N -m
bench.bench steps` prints them. Needs matplotlib (requirements-dev.txt).
"""

import argparse
from pathlib import Path


def pair(text: str) -> tuple[int, float]:
    gpus, _, milliseconds = text.partition(":")
    if not gpus.isdecimal() or int(gpus) < 1 or float(milliseconds) <= 0:
        raise ValueError
    return int(gpus), float(milliseconds)


def plot(steps: list[tuple[int, float]], tokens: int, out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    gpus = [number for number, _ in steps]
    rates = [tokens / milliseconds / 1e3 for _, milliseconds in steps]  # millions a second
    linear = [rates[0] / gpus[0] * number for number in gpus]
    axes.plot(gpus, linear, linestyle="--", color="gray", label="linear")
    axes.plot(gpus, rates, marker="o", label="measured")
    for number, rate, ideal in zip(gpus, rates, linear, strict=True):
        axes.annotate(
            f"{rate / ideal:.0%}",
            (number, rate),
            textcoords="offset points",
            xytext=(-6, 6),
            ha="right",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(gpus, [str(number) for number in gpus])
    axes.set_yticks(linear, [f"{rate:.2f}" for rate in linear])
    axes.minorticks_off()
    axes.set(xlabel="GPUs", ylabel="million tokens a second")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "steps", nargs="+", type=pair, metavar="GPUS:MS", help="a number of GPUs and its step"
    )
    parser.add_argument("--tokens", type=int, default=1_048_576, help="of a step (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/scaling.png"), help="the plot (%(default)s)"
    )
    options = parser.parse_args()
    plot(sorted(options.steps), options.tokens, options.out)


if __name__ == "__main__":
    main()
