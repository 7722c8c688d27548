"""Predictions on stdout, a line per image, for a reader or for a program."""

from collections.abc import Callable, Sequence

from linvit.prediction.writers import Row


def show_row(row: Row, *, show: Callable[[str], None]) -> None:
    """Print a line for a reader."""
    best = [f"{label} {100 * probability:.1f} %" for label, probability in zip(row["labels"], row["probabilities"])]
    error = [] if row["error"] is None else [row["error"]]
    unsure = [f"unsure: {row['label_set'] or 'no class fits'}"] if row.get("unsure") == "yes" else []
    show(f"{row['path']}: {'; '.join([*best, *unsure, *error])}")


def print_row(row: Row, *, columns: Sequence[str], topk: int, show: Callable[..., None]) -> None:
    """Print a line for a program: the columns of a CSV file, separated by tabs."""
    best = [*row["labels"], *map(str, row["probabilities"])] or [""] * (2 * topk)
    show(
        row["path"],
        *best,
        *(row.get(name) or "" for name in columns if name not in ("path", "labels", "probabilities")),
    )
