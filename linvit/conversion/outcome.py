"""The tables that `linvit convert` prints.

What a conversion came to: its numbers, the bound they are held against, the folder that comes out.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from linvit.conversion.convert import projected_lengths
from linvit.conversion.distil import Fidelity
from linvit.conversion.fit import LayerFit
from linvit.conversion.speed import Speed
from linvit.data.augment.build import InputSpec
from linvit.model.vit import LinformerViT
from linvit.output.files import write_text
from linvit.runs.folder import Classifier, save_classifier
from linvit.version import __version__

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


# Below this cosine of any feature a warning is due.
DOUBTFUL_COSINE = 0.9
# What a fit may lose of the mean cosine before that is said: less is rounding.
NOTICED_LOSS = 0.001
MEND = "take a larger k, fewer --layers, more --num-images or --distill-minutes"


@dataclass(frozen=True)
class Outcome:
    """A converted model, its layers, its fidelity by stage (pooled, fitted, distilled), its speed at each size."""

    converted: LinformerViT
    original: Classifier
    spec: InputSpec
    fits: list[LayerFit]
    fidelity: dict[str, Fidelity]
    speeds: list[Speed]

    @property
    def lowest_cosine(self) -> float:
        """Of the features in the end."""
        cosines = list(self.fidelity.values())[-1].cosines
        # What is not a number is below every bound.
        return min(cosine if cosine == cosine else -1.0 for cosine in cosines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.original.model.pretrained_cfg["architecture"],
            "weights": self.original.weights,
            "img_size": list(self.spec.size),
            "k": projected_lengths(self.converted),
            "layers": [asdict(fit) for fit in self.fits],
            "fidelity": {stage: asdict(each) for stage, each in self.fidelity.items()},
            "speed": [asdict(speed) for speed in self.speeds],
        }

    def check(self, min_cosine: float | None, output: Path) -> None:
        """Raise ValueError where fidelity is below the bound; warn where it is doubtful, or was better before."""
        lowest = self.lowest_cosine
        if min_cosine is not None and lowest < min_cosine:
            raise ValueError(
                f"{output} is not written: the lowest cosine of its features to the original's is {lowest:.3f}, below "
                f"--min-cosine {min_cosine:g}; {MEND}"
            )
        if lowest < DOUBTFUL_COSINE:
            print(
                f"warning: the lowest cosine of the features to the original's is {lowest:.3f}: {MEND}", file=sys.stderr
            )
        before, *_, after = (each.mean_cosine for each in self.fidelity.values())
        if after < before - NOTICED_LOSS:
            print(
                f"warning: the fit took the features farther from the original's, from a cosine of {before:.3f} to "
                f"{after:.3f}, as one to too few images does: give more --num-images",
                file=sys.stderr,
            )

    def save(self, output: Path, results: dict[str, Any]) -> None:
        """Write the folder that timm takes as `local-dir:`, and the results beside the weights."""
        save_classifier(
            output,
            self.converted,
            class_names=self.original.class_names or [],
            spec=self.spec,
            about={
                "version": __version__,
                "converted_from": self.original.model.pretrained_cfg["architecture"],
                "weights": self.original.weights,
            },
        )
        write_text(output / "convert.json", json.dumps(results, indent=2) + "\n")
