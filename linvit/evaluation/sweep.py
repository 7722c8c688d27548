"""One set of weights at several image sizes, as a picture."""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from linvit.evaluation.report import Report
from linvit.evaluation.show import short_names
from linvit.files import write_file

# Okabe and Ito's, told apart without red and green; markers tell lines apart without colour.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def write_sweep(reports: Sequence[Report], path: Path) -> None:
    """Draw top-1 and its interval over the size, a line a source, and write the PNG."""
    figure = draw(reports)
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=150))


def draw(reports: Sequence[Report]) -> Figure:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (source, name) in enumerate(short_names(reports).items()):
        points = sorted((_side(found), (found["masked"] or found)) for found in reports if found["source"] == source)
        sides = [side for side, _ in points]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        values = [scores["top1"] for _, scores in points]
        axes.plot(sides, values, label=name, markersize=5, color=colour, marker=marker)
        intervals = [scores["confidence"].get("top1") for _, scores in points]
        if all(interval is not None for interval in intervals):
            low, high = zip(*intervals)
            axes.fill_between(sides, low, high, color=colour, alpha=0.2, linewidth=0)
    sides = sorted({_side(found) for found in reports})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sides, [f"{side:.0f}" for side in sides])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="image size, px (shaded: 95 % interval)", ylabel="top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _side(found: Report) -> float:
    """The side of a square of the image's area."""
    size = found["img_size"]
    return float(size) if isinstance(size, int) else sqrt(size[0] * size[1])
