"""The curves of runs over their epochs, as values for chart.js."""

from collections.abc import Sequence
from typing import Any

from linvit.report.run import Run

# Colours of the quantities of one run, and of several runs, by their place in the palette.
_KIND_COLOURS = {"train": 7, "raw": 1, "ema": 5}
_RUN_COLOURS = (1, 5, 3, 7, 4, 0, 2, 6)
_KIND_DASHES = {"train": "2 3", "raw": "", "ema": "7 4"}
_KIND_NAMES = {"train": "training", "raw": "validation", "ema": "validation, averaged (EMA)"}

# Title, columns by kind, factor and unit of each chart.
_CHARTS: list[tuple[str, dict[str, str], float, str]] = [
    ("Loss", {"train": "train_loss", "raw": "eval_loss", "ema": "eval_ema_loss"}, 1, ""),
    ("Top-1 accuracy", {"raw": "eval_top1", "ema": "eval_ema_top1"}, 1, "%"),
    ("Top-5 accuracy", {"raw": "eval_top5", "ema": "eval_ema_top5"}, 1, "%"),
    ("Learning rate", {"train": "lr"}, 1, ""),
    ("Images per second", {"train": "images_per_second"}, 1, ""),
    ("Waiting for data, share of the time", {"train": "data_wait"}, 100, "%"),
    ("Updates skipped by the loss scaler, in total", {"train": "skipped_updates"}, 1, ""),
    ("Updates refused because they were not finite, in total", {"train": "bad_updates"}, 1, ""),
    ("Peak memory", {"train": "peak_memory"}, 1 / 2**30, "GiB"),
]
# Charts of counts that are zero are left out, and `describe_idle_counts` reports them.
_COUNTS = ("skipped_updates", "bad_updates")


def build_charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Charts for `chart.js`: the quantities in summary.csv that any of the runs has."""
    epochs = sorted({int(epoch) for run in runs for epoch in run.numbers("epoch")})
    charts = []
    for title, columns, factor, unit in _CHARTS:
        if columns.get("raw") == "eval_top5" and not any(len(run.class_names) > 5 for run in runs):
            continue
        series = [
            _series(run, kind, column, factor, epochs, index if len(runs) > 1 else None, num_kinds=len(columns))
            for index, run in enumerate(runs)
            for kind, column in columns.items()
            if run.numbers(column) and not (column in _COUNTS and not any(run.numbers(column)))
        ]
        if series:
            charts.append({"title": title, "unit": unit, "x": epochs, "series": series})
    return charts


def describe_idle_counts(runs: Sequence[Run]) -> str | None:
    """A sentence about the counts that are zero throughout; None if there are none."""
    if not any(run.rows for run in runs):
        return None
    kinds = {"skipped_updates": "skipped", "bad_updates": "refused"}
    zero = [word for column, word in kinds.items() if not any(any(run.numbers(column)) for run in runs)]
    return f"No update was {' or '.join(zero)}." if zero else None


def _series(
    run: Run, kind: str, column: str, factor: float, epochs: list[int], index: int | None, *, num_kinds: int
) -> dict[str, Any]:
    values = {int(row["epoch"] or 0): row.get(column) for row in run.rows}
    scaled = [None if (value := values.get(epoch)) is None else value * factor for epoch in epochs]
    if index is None:
        return {"name": _KIND_NAMES[kind], "colour": _KIND_COLOURS[kind], "dash": "", "values": scaled}
    name = run.name if num_kinds == 1 else f"{run.name}, {_KIND_NAMES[kind]}"
    dash = "" if num_kinds == 1 else _KIND_DASHES[kind]
    return {"name": name, "colour": _RUN_COLOURS[index % len(_RUN_COLOURS)], "dash": dash, "values": scaled}
