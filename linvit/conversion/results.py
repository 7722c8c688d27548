"""The result of a conversion: its tables, the check of its fidelity, and the folder that timm loads."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from linvit.conversion.comparison import Fidelity, Speed
from linvit.conversion.convert import projected_lengths
from linvit.conversion.fit import LayerFit
from linvit.data.augment.build import InputSpec
from linvit.model.transformer import LinformerTransformer
from linvit.output.files import write_json
from linvit.output.terminal import EMPTY, format_bytes, format_lengths, format_size, note, table
from linvit.runs.folder import Classifier, save_classifier
from linvit.version import __version__

# A lower cosine of any feature causes a warning.
DOUBTFUL_COSINE = 0.9
# A larger loss of the mean cosine by the fit causes a warning; less is rounding.
TOLERATED_LOSS = 0.001
REMEDY = "use a larger --k, fewer --layers, more --num-images or longer --distill-minutes"


@dataclass(frozen=True)
class ConversionResult:
    """A converted model with the fits of its layers, its fidelity by stage and its speed by size.

    The stages are "pooled", or "before" with an earlier conversion to start from; "fitted"; and "distilled", if the
    model was distilled.
    """

    converted: LinformerTransformer
    original: Classifier
    spec: InputSpec
    fits: list[LayerFit]
    fidelity: dict[str, Fidelity]
    speeds: list[Speed]

    @property
    def lowest_cosine(self) -> float:
        """The lowest cosine of the last stage."""
        cosines = list(self.fidelity.values())[-1].cosines
        # NaN counts as below every bound.
        return min(cosine if cosine == cosine else -1.0 for cosine in cosines)

    def to_dict(self) -> dict[str, Any]:
        """The entries of `convert.json` that describe the result."""
        return {
            "model": self.original.model.pretrained_cfg["architecture"],
            "weights": self.original.weights,
            "img_size": list(self.spec.size),
            "k": projected_lengths(self.converted),
            "layers": [asdict(fit) for fit in self.fits],
            "fidelity": {stage: asdict(each) for stage, each in self.fidelity.items()},
            "speed": [asdict(speed) for speed in self.speeds],
        }

    def show(self, console: Console) -> None:
        """Print the tables of layers, fidelity and speed."""
        console.print(layer_table(self.fits))
        console.print(fidelity_table(self.fidelity))
        if self.speeds:
            console.print(speed_table(self.speeds))

    def check(self, min_cosine: float | None, output: Path) -> None:
        """Raise ValueError if fidelity is below `min_cosine`; warn if it is doubtful or the fit lowered it."""
        lowest = self.lowest_cosine
        if min_cosine is not None and lowest < min_cosine:
            raise ValueError(
                f"{output} was not written: the lowest cosine of its features to the original's is {lowest:.3f}, below "
                f"--min-cosine {min_cosine:g}; {REMEDY}"
            )
        if lowest < DOUBTFUL_COSINE:
            note(f"warning: the lowest cosine of the features to the original's is {lowest:.3f}; {REMEDY}")
        before, *_, after = (each.mean_cosine for each in self.fidelity.values())
        if after < before - TOLERATED_LOSS:
            note(
                f"warning: the fit lowered the mean cosine of the features to the original's from {before:.3f} to "
                f"{after:.3f}, probably because of too few images; use more --num-images"
            )

    def save(self, output: Path, results: dict[str, Any]) -> None:
        """Write the folder that timm loads as `local-dir:`, with `results` beside the weights in `convert.json`.

        Raises OSError if it cannot be written.
        """
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
        write_json(output / "convert.json", results)


def layer_table(fits: Sequence[LayerFit]) -> Table:
    """A row per layer: relative errors of its tokens before and after the fit."""
    columns = ["layer", "k", "before fit", "after fit", "after MLP", "cosine"]
    rows = table(columns, title="relative error of tokens, on held-out images")
    for fit in fits:
        rows.add_row(
            str(fit.layer),
            format_lengths(fit.k),
            f"{fit.error_before:.3f}",
            f"{fit.error_after:.3f}",
            f"{fit.block_error:.3f}",
            f"{fit.cosine:.4f}",
        )
    return rows


def fidelity_table(fidelity: Mapping[str, Fidelity]) -> Table:
    """A row per stage: cosines of the features to the original's, and agreement of the top-1 class."""
    num_images = next(iter(fidelity.values())).num_images
    columns = ["stage", "class token", "patches", "features", "same top-1"]
    rows = table(columns, text=["stage"], title=f"cosine to the original, {num_images} unseen images")
    for stage, each in fidelity.items():
        cosines = (each.class_cosine, each.patch_cosine, each.feature_cosine)
        agreement = EMPTY if each.top1_agreement is None else f"{each.top1_agreement:.1%}"
        rows.add_row(stage, *(EMPTY if cosine is None else f"{cosine:.4f}" for cosine in cosines), agreement)
    return rows


def speed_table(speeds: Sequence[Speed]) -> Table:
    """A row per image size: seconds and memory of both models."""
    columns = ["size", "patches", "original", "converted", "times faster", "original memory", "converted memory"]
    images = "one image" if speeds[0].batch_size == 1 else f"{speeds[0].batch_size} images"
    title = f"forward pass of {images} in {speeds[0].dtype}: medians of {speeds[0].rounds} rounds, added memory"
    rows = table(columns, title=title)
    for speed in speeds:
        low, high = speed.spread
        rows.add_row(
            format_size(speed.img_size),
            f"{speed.patches:,}",
            f"{speed.original_seconds:.3g} s",
            f"{speed.converted_seconds:.3g} s",
            f"{speed.times_faster:.2f} ({low:.2f}–{high:.2f})",
            format_bytes(speed.original_bytes),
            format_bytes(speed.converted_bytes),
        )
    return rows
