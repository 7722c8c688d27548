"""An earlier conversion of the same model, at another size, for the fit to go on from."""

from pathlib import Path

from timm.models import VisionTransformer

from linvit.conversion.convert import without_counterpart
from linvit.runs import Classifier, load_classifier
from linvit.vit import LinformerViT
from linvit.weights import compact


def load_earlier(folder: Path, original: VisionTransformer) -> Classifier:
    """The converted model in `folder`, at the size that the original has; E and F cover larger or smaller cells there.

    Raises ValueError where it is none, or of another model, or its projections would not shorten the sequence.
    """
    earlier = load_classifier(str(folder), img_size=original.patch_embed.img_size)
    model = earlier.model
    if not isinstance(model, LinformerViT):
        raise ValueError(f"--start-from {folder} is no converted model: give the folder that a conversion wrote")
    if differing := without_counterpart(original, model):
        raise ValueError(f"--start-from {folder} is of another model: its {compact(differing)} differ from this one's")
    return earlier
