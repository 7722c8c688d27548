"""The tables that `linvit bench` prints; they fit 100 columns."""

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from linvit.bench.plan import Plan
from linvit.bench.rows import Row

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
