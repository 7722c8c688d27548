"""What a conversion came to: its numbers, the bound they are held against, the folder that comes out."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import linvit
from linvit.conversion.convert import projected_lengths
from linvit.conversion.fidelity import Fidelity
from linvit.conversion.fit import LayerFit
from linvit.conversion.speed import Speed
from linvit.data.transforms import InputSpec
from linvit.files import write_text
from linvit.runs import Classifier, save_classifier
from linvit.vit import LinformerViT

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
                "version": linvit.__version__,
                "converted_from": self.original.model.pretrained_cfg["architecture"],
                "weights": self.original.weights,
            },
        )
        write_text(output / "convert.json", json.dumps(results, indent=2) + "\n")
