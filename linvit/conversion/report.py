"""The tables that `linvit convert` prints."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from linvit.conversion.fidelity import Fidelity
from linvit.conversion.fit import LayerFit
from linvit.conversion.speed import Speed

EMPTY = "–"


def show_layers(console: Console, fits: Sequence[LayerFit]) -> None:
    """A line per layer: how far its tokens are from the original's, before and after its fit."""
    headings = ["layer", "k", "error before", "fitted", "behind MLP", "cosine"]
    table = _table("relative errors, on images that chose penalties", headings)
    for fit in fits:
        table.add_row(
            str(fit.layer),
            _length(fit.k),
            f"{fit.error_before:.3f}",
            f"{fit.error_after:.3f}",
            f"{fit.block_error:.3f}",
            f"{fit.cosine:.4f}",
        )
    console.print(table)


def show_fidelity(console: Console, fidelity: Mapping[str, Fidelity]) -> None:
    """A line per stage: cosines of the features to the original's, and how often both give the same first class."""
    count = next(iter(fidelity.values())).num_images
    headings = ["", "class token", "patches", "features", "same top-1"]
    table = _table(f"cosine to the original's, {count} other images", headings)
    for stage, each in fidelity.items():
        cosines = (each.class_cosine, each.patch_cosine, each.feature_cosine)
        agreement = EMPTY if each.top1_agreement is None else f"{each.top1_agreement:.1%}"
        table.add_row(stage, *(EMPTY if cosine is None else f"{cosine:.4f}" for cosine in cosines), agreement)
    console.print(table)


def show_speed(console: Console, speeds: Sequence[Speed]) -> None:
    """A line per size: seconds and memory of both models."""
    if not speeds:
        return
    headings = ["pixels", "patches", "original", "converted", "times faster", "adds, original", "converted"]
    images = "one image" if speeds[0].batch_size == 1 else f"{speeds[0].batch_size} images"
    table = _table(f"forward, {images}, {speeds[0].dtype}, medians of {speeds[0].rounds} rounds", headings)
    for speed in speeds:
        height, width = speed.img_size
        low, high = speed.spread
        table.add_row(
            str(height) if height == width else f"{height}×{width}",
            f"{speed.patches:,}",
            f"{speed.original_seconds:.3g} s",
            f"{speed.converted_seconds:.3g} s",
            f"{speed.times_faster:.2f} ({low:.2f}–{high:.2f})",
            _bytes(speed.original_bytes),
            _bytes(speed.converted_bytes),
        )
    console.print(table)


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _length(k: int | list[int] | None) -> str:
    if k is None:
        return EMPTY
    return str(k) if isinstance(k, int) else f"{min(k)}…{max(k)}"


def _bytes(count: int | None) -> str:
    return EMPTY if count is None else f"{count / 2**20:.0f} MiB"
