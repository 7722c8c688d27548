"""What Linformer's authors measured: Wang et al. 2020, arXiv 2006.04768, Table 3, columns k = 256.

The tables that `linvit bench` prints; they fit 100 columns.

Time and memory over the number of patches, from the numbers of a results file, as a PNG.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from linvit.bench.plan import Plan, Row
from linvit.output.files import write_file


class Gain(NamedTuple):
    """How many times less a Linformer takes than the Transformer that the paper compares it with."""

    time: float
    memory: float


# By sequence length: inference on a 16 GB V100, one E for all layers, against attention that is not fused.
PAPER_GAINS = {
    512: Gain(1.3, 1.5),
    1024: Gain(1.6, 2.9),
    2048: Gain(2.4, 5.6),
    4096: Gain(3.2, 13),
    8192: Gain(5.0, 26),
    16384: Gain(7.8, 48),
    32768: Gain(12, 48),
    65536: Gain(18, 52),
}


EMPTY = "–"


def show_models(console: Console, plan: Plan) -> None:
    """What is compared: a line per model and image size."""
    table = _table("models", ["pixels", "patches", "k", "parameters", "of E, F"])
    table.add_column("kind", no_wrap=True)
    table.add_column("share", no_wrap=True)
    for (model, (height, width)), facts in plan.facts.items():
        table.add_row(
            _name(model),
            str(height) if height == width else f"{height}×{width}",
            f"{facts.patches:,}",
            _length(facts.k),
            _scaled(facts.num_parameters),
            _scaled(facts.num_projection_parameters) if facts.k is not None else EMPTY,
            facts.kind,
            facts.share or EMPTY,
        )
    console.print(table)


def show_rows(console: Console, title: str, rows: Sequence[Row]) -> None:
    """What one group took: a line per model."""
    has_memory = any(row.step_bytes is not None for row in rows)
    headings = ["seconds", "times faster", "img/s", "tokens/s", "FLOPs", "of peak"]
    table = _table(title, [*headings, "adds"] if has_memory else headings)
    for row in rows:
        cells = [
            f"{row.seconds:.3g}" if row.seconds is not None else row.status,
            _ratio(row),
            _each(row.images_per_second, lambda value: f"{value:.3g}"),
            _each(row.tokens_per_second, _scaled),
            _scaled(row.flops),
            _each(row.peak_share, lambda value: f"{value:.0%}"),
        ]
        table.add_row(_name(row.model), *cells, *([_each(row.step_bytes, _bytes)] if has_memory else []))
    console.print(table)


def _table(title: str, numbers: Sequence[str]) -> Table:
    """A table whose first column is the model's, followed by columns of numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _name(model: str) -> str:
    """A model's name and, on a line of their own, its keywords, with blanks to wrap at."""
    return model.replace(":", ":\n", 1).replace(",", ", ")


def _length(k: int | tuple[int, int] | None) -> str:
    if k is None:
        return EMPTY
    return str(k) if isinstance(k, int) else f"{k[0]}…{k[1]}"


def _ratio(row: Row) -> str:
    if row.ratio is None or row.ratio_spread is None:
        return EMPTY
    low, high = row.ratio_spread
    return f"{row.ratio:.2f}" + (f" ({low:.2f}–{high:.2f})" if low < high else "")


def _each(value: float | None, words: Callable[[float], str]) -> str:
    return EMPTY if value is None else words(value)


def _scaled(value: float) -> str:
    """Three digits and a unit: 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


# Okabe and Ito's colours and a wine red, told apart without red and green; markers tell lines apart without colour.
COLOURS = ("#000000", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
STYLES = {"forward": "-", "train": "--"}
DIGEST_KEY = "Results-SHA256"
PAPER_LABEL = "Linformer's paper, Table 3, k=256: its gain over unfused attention, taken off the baseline here"

PlotRow = dict[str, Any]


def save_plot(results: dict[str, Any], path: Path, *, digest: str) -> None:
    """Draw the rows of `results` and write the picture, which carries `digest` in its metadata.

    Of several batch sizes and precisions, the first is drawn.
    """
    figure = draw(results["rows"])
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=150, metadata={DIGEST_KEY: digest}))


def draw(rows: Sequence[PlotRow]) -> Figure:
    """Two panels, log-log: seconds of a step, and bytes that a training step adds; a line a model.

    Where the batch is not the same at all sizes, both are those of an image.
    """
    dtype, is_compiled = rows[0]["dtype"], rows[0]["compile"]
    rows = [row for row in rows if (row["dtype"], row["compile"]) == (dtype, is_compiled)]
    batches: dict[int, int] = {}
    for row in rows:
        batches.setdefault(row["patches"], row["batch_size"])
    rows = [row for row in rows if row["batch_size"] == batches[row["patches"]]]
    smallest, largest = min(batches.values()), max(batches.values())
    titles, batch = ("time of a step", "memory that a training step adds"), f"batch {smallest}"
    if smallest != largest:
        rows = [_of_an_image(row) for row in rows]
        titles, batch = (
            ("time of an image", "memory for training an image"),
            f"batches of {smallest} to {largest}",
        )
    conditions = f"{batch}, {dtype}" + (", compiled" if is_compiled else "")
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(11, 5.2 + 0.2 * len(models)), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for mode, style in STYLES.items():
        _lines(time, [row for row in rows if row["mode"] == mode], models, "seconds", 1.0, style)
    trained = [row for row in rows if row["mode"] == "train"]
    _lines(memory, trained, models, "step_bytes", 2.0**30, STYLES["train"])
    _paper(time, [row for row in rows if row["mode"] == "forward"], "seconds", 1.0, lambda gain: gain.time)
    _paper(memory, trained, "step_bytes", 2.0**30, lambda gain: gain.memory)
    _label(time, f"{titles[0]}, {conditions}", "seconds")
    _label(memory, f"{titles[1]}, {conditions}", "GiB")
    figure.legend(handles=_legend(models), loc="outside lower center", fontsize=9, frameon=False)
    return figure


def _of_an_image(row: PlotRow) -> PlotRow:
    return row | {name: row[name] and row[name] / row["batch_size"] for name in ("seconds", "step_bytes")}


def _lines(axes: Axes, rows: Sequence[PlotRow], models: Sequence[str], name: str, unit: float, style: str) -> None:
    for index, model in enumerate(models):
        points = sorted((row["patches"], row[name] / unit) for row in rows if row["model"] == model and row[name])
        if points:
            axes.plot(*zip(*points), style, label=model, markersize=5, linewidth=1.5, **_look(index))


def _paper(axes: Axes, rows: Sequence[PlotRow], name: str, unit: float, gain: Callable[[Gain], float]) -> None:
    """What the baseline's numbers would be, divided by the paper's gain."""
    points = [
        (row["patches"], row[name] / unit / gain(PAPER_GAINS[row["patches"]]))
        for row in rows
        if row["model"] == row["baseline"] and row["patches"] in PAPER_GAINS and row[name]
    ]
    if points:
        axes.plot(*zip(*sorted(points)), label=PAPER_LABEL, **_PAPER_LOOK)


_PAPER_LOOK: dict[str, Any] = {
    "linestyle": "none",
    "marker": "*",
    "markersize": 13,
    "markerfacecolor": "none",
    "markeredgecolor": "#444444",
}


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("patches N")
    axes.set_ylabel(unit)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#666666")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    patches = sorted({int(x) for line in axes.lines for x in np.asarray(line.get_xdata())})
    axes.set_xticks(patches, [f"{count:,}" for count in patches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(patches[0] / 1.3, patches[-1] * 1.3)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def _legend(models: Sequence[str]) -> list[Line2D]:
    styles = [Line2D([], [], color="#666666", linestyle=style, label=mode) for mode, style in STYLES.items()]
    lines = [Line2D([], [], label=model, **_look(index)) for index, model in enumerate(models)]
    return [*lines, *styles, Line2D([], [], label=PAPER_LABEL, **_PAPER_LOOK)]
