"""Show results: tables on the terminal (100 columns), and a plot of time and memory over the number of patches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Console
from rich.text import Text

from linvit.bench.plan import Plan, Row
from linvit.output.plots import GREY, save_figure, series_style
from linvit.output.terminal import EMPTY, format_bytes, format_count, format_lengths, format_size, printable, table


class Gain(NamedTuple):
    """Factors by which a Linformer needs less time and memory than a Transformer."""

    time: float
    memory: float


# Wang et al. 2020, arXiv 2006.04768, Table 3, columns k = 256, by sequence length: inference on a 16 GB V100, one E for
# all layers, compared with attention that is not fused.
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
PAPER_LABEL = "baseline here divided by the gain in Linformer's paper (Table 3, k=256, over unfused attention)"
PAPER_STYLE: dict[str, Any] = {
    "linestyle": "none",
    "marker": "*",
    "markersize": 13,
    "markerfacecolor": "none",
    "markeredgecolor": GREY,
}
LINE_STYLES = {"forward": "-", "train": "--"}
# Key in the plot's metadata for the SHA-256 of the results.
DIGEST_KEY = "Results-SHA256"

# A row as the JSON file has it: the fields of `Row`.
JsonRow = dict[str, Any]


def show_models(console: Console, plan: Plan) -> None:
    """Print what is compared: one line per model and image size."""
    headings = ["model", "pixels", "patches", "k", "parameters", "of E, F", "kind", "share"]
    models = table(headings, text=["model", "kind", "share"], title="models")
    for (model, img_size), facts in plan.facts.items():
        models.add_row(
            _name(model),
            format_size(img_size),
            f"{facts.patches:,}",
            format_lengths(facts.k),
            format_count(facts.num_parameters),
            format_count(None if facts.k is None else facts.num_projection_parameters),
            facts.kind,
            facts.share or EMPTY,
        )
    console.print(models)


def show_rows(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Print the measurements of one group: one line per model."""
    has_memory = any(row.step_bytes is not None for row in rows)
    headings = ["model", "seconds", "times faster", "img/s", "tokens/s", "FLOPs", "of peak"]
    measured = table([*headings, "extra memory"] if has_memory else headings, text=["model"], title=title)
    for row in rows:
        measured.add_row(
            _name(row.model),
            row.status if row.seconds is None else f"{row.seconds:.3g}",
            _ratio(row),
            EMPTY if row.images_per_second is None else f"{row.images_per_second:.3g}",
            format_count(row.tokens_per_second),
            format_count(row.flops),
            EMPTY if row.peak_share is None else f"{row.peak_share:.0%}",
            *([format_bytes(row.step_bytes)] if has_memory else []),
        )
    console.print(measured)


def _name(model: str) -> Text:
    """A model's name and, on the next line, its keywords with spaces to wrap at."""
    return Text(printable(model).replace(":", ":\n", 1).replace(",", ", "))


def _ratio(row: Row) -> str:
    if row.ratio is None or row.ratio_spread is None:
        return EMPTY
    low, high = row.ratio_spread
    return f"{row.ratio:.2f}" + (f" ({low:.2f}–{high:.2f})" if low < high else "")


def save_plot(results: dict[str, Any], path: Path, *, digest: str) -> None:
    """Draw the rows of `results` and write a PNG with `digest` in its metadata.

    Raises OSError, naming the file, if it cannot be written.
    """
    save_figure(path, draw(results["rows"]), metadata={DIGEST_KEY: digest})


def draw(rows: Sequence[JsonRow]) -> Figure:
    """Two log-log panels with a line per model: time of a step, and extra memory of a training step.

    Only the first precision, and the first batch size of each image size, is drawn. If batch sizes differ between image
    sizes, time and memory are divided by them.
    """
    dtype, is_compiled = rows[0]["dtype"], rows[0]["compile"]
    rows = [row for row in rows if (row["dtype"], row["compile"]) == (dtype, is_compiled)]
    batches: dict[int, int] = {}
    for row in rows:
        batches.setdefault(row["patches"], row["batch_size"])
    rows = [row for row in rows if row["batch_size"] == batches[row["patches"]]]
    smallest, largest = min(batches.values()), max(batches.values())
    if smallest == largest:
        titles, batch = ("time of a step", "extra memory of a training step"), f"batch {smallest}"
    else:
        rows = [_per_image(row) for row in rows]
        titles, batch = ("time per image", "training memory per image"), f"batches of {smallest} to {largest}"
    conditions = f"{batch}, {dtype}" + (", compiled" if is_compiled else "")
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(11, 5.2 + 0.2 * len(models)), layout="constrained")
    time, memory = figure.subplots(1, 2)
    forward, train = ([row for row in rows if row["mode"] == mode] for mode in LINE_STYLES)
    _lines(time, forward, models, "seconds", 1.0, LINE_STYLES["forward"])
    _lines(time, train, models, "seconds", 1.0, LINE_STYLES["train"])
    _lines(memory, train, models, "step_bytes", 2.0**30, LINE_STYLES["train"])
    _paper(time, forward, "seconds", 1.0, lambda gain: gain.time)
    _paper(memory, train, "step_bytes", 2.0**30, lambda gain: gain.memory)
    _finish(time, f"{titles[0]}, {conditions}", "seconds")
    _finish(memory, f"{titles[1]}, {conditions}", "GiB")
    figure.legend(handles=_legend(models), loc="outside lower center", fontsize=9, frameon=False)
    return figure


def _per_image(row: JsonRow) -> JsonRow:
    return row | {name: row[name] and row[name] / row["batch_size"] for name in ("seconds", "step_bytes")}


def _lines(axes: Axes, rows: Sequence[JsonRow], models: Sequence[str], name: str, unit: float, style: str) -> None:
    for index, model in enumerate(models):
        points = sorted((row["patches"], row[name] / unit) for row in rows if row["model"] == model and row[name])
        if points:
            axes.plot(*zip(*points), style, label=model, markersize=5, linewidth=1.5, **series_style(index))


def _paper(axes: Axes, rows: Sequence[JsonRow], name: str, unit: float, gain: Callable[[Gain], float]) -> None:
    """Mark the baseline's values divided by the paper's gain."""
    points = [
        (row["patches"], row[name] / unit / gain(PAPER_GAINS[row["patches"]]))
        for row in rows
        if row["model"] == row["baseline"] and row["patches"] in PAPER_GAINS and row[name]
    ]
    if points:
        axes.plot(*zip(*sorted(points)), label=PAPER_LABEL, **PAPER_STYLE)


def _finish(axes: Axes, title: str, unit: str) -> None:
    """Set titles, labels and log scales, with a tick at every number of patches."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("patches N")
    axes.set_ylabel(unit)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=GREY)
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
    lines = [Line2D([], [], label=model, **series_style(index)) for index, model in enumerate(models)]
    modes = [Line2D([], [], color=GREY, linestyle=style, label=mode) for mode, style in LINE_STYLES.items()]
    return [*lines, *modes, Line2D([], [], label=PAPER_LABEL, **PAPER_STYLE)]
