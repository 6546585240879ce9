"""Plots scores against training time, from the logs of finished runs.

    python -m tools.plot_scores logs/*.jsonl --out docs/scores.png --mark 1.3103 "published entry, 180 s"

Every run is a point at its training clock: BPB before quantization and the final one. Runs whose
settings differ in SEED and names only are one point, their mean, with the sample standard
deviation. A line joins the points of one kind. --mark draws a score that was measured elsewhere as
a horizontal line. Needs matplotlib (requirements-dev.txt).
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m tools.plot_scores", file=sys.stderr
    )
    sys.exit(2)

from tools.summary import last_run, spread

NAMES = {"run_id", "seed", "log_dir", "artifact", "sample"}  # no part of what was measured


def read_points(paths: list[Path]) -> dict[str, list[tuple[float, list[float]]]]:
    """For "before quantization" and "final": (seconds of the training clock, BPB of each seed), by
    rising seconds. Raises ValueError for a file that is not a finished run's.
    """
    groups: dict[tuple, dict[str, list[float]]] = {}
    for path in paths:
        try:
            events = last_run(path)
            settings = events["settings"]["settings"]
            scores = {
                "before quantization": events["trained"]["val_bpb"],
                "final": events["final"]["val_bpb"],
            }
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not the .jsonl log of a finished run") from None
        key = tuple(
            sorted((name, repr(value)) for name, value in settings.items() if name not in NAMES)
        )
        group = groups.setdefault(
            (settings["max_wallclock_seconds"], key), {name: [] for name in scores}
        )
        for name, score in scores.items():
            group[name].append(score)
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    return {
        name: [(seconds, group[name]) for (seconds, _), group in ordered]
        for name in ("before quantization", "final")
    }


def plot(
    points: dict[str, list[tuple[float, list[float]]]], marks: list[tuple[float, str]], out: Path
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, of_kind in points.items():
        spreads = [spread(scores) for _, scores in of_kind]
        axes.errorbar(
            [seconds for seconds, _ in of_kind], [s.mean for s in spreads], [s.std or 0 for s in spreads],
            marker="o", capsize=3, label=name,
        )  # fmt: skip
    for number, (score, text) in enumerate(marks):
        axes.axhline(score, color="gray", linestyle=("--", ":", "-.")[number % 3], label=text)
    axes.set(xlabel="training clock, seconds", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="a run's .jsonl")
    parser.add_argument("--out", required=True, type=Path, metavar="PNG")
    parser.add_argument("--mark", nargs=2, action="append", default=[], metavar=("BPB", "TEXT"))
    options = parser.parse_args()
    try:
        marks = [(float(score), text) for score, text in options.mark]
        plot(read_points(options.logs), marks, options.out)
    except OSError as error:
        print(f"plot_scores.py: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except (ValueError, ModuleNotFoundError) as error:
        print(f"plot_scores.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
