"""ReaL labels: ImageNet's validation images with every label that is right (Beyer et al. 2020, "Are we done ...?")."""

import re
from typing import Any

import numpy as np

from linvit.data.imageset import ImageSet
from linvit.evaluation.confidence import bootstrap
from linvit.evaluation.imagenet import real_labels, synsets
from linvit.training.metrics import ImageResults

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\b")


def image_numbers(images: ImageSet) -> list[int]:
    """The number of each image among ImageNet's validation images; ValueError for an image that is none of them."""
    numbers = []
    for index in range(len(images)):
        name = images.path(index).name
        found = _NUMBER.match(name)
        if found is None or not 1 <= int(found[1]) <= len(real_labels()):
            raise ValueError(
                f"--real-labels: {images.path(index)} is no image of ImageNet's validation set, which are named "
                "ILSVRC2012_val_00000001.JPEG and so on"
            )
        numbers.append(int(found[1]))
    return numbers


def real_accuracy(
    results: ImageResults, numbers: list[int], class_names: list[str], *, num_resamples: int, seed: int
) -> dict[str, Any]:
    """The share of images whose most probable class is among the right ones, in percent; images without any are out."""
    allowed = [{synsets()[label] for label in real_labels()[numbers[i] - 1]} for i in results.indices.tolist()]
    hits = np.array(
        [class_names[label] in names for label, names in zip(results.predictions.tolist(), allowed) if names], float
    )
    if not len(hits):
        raise ValueError("--real-labels: none of these images has a ReaL label")

    def share(counts: np.ndarray) -> dict[str, float]:
        return {"top1": 100 * float(counts @ hits / counts.sum())}

    intervals = bootstrap(share, len(hits), num_resamples=num_resamples, seed=seed)
    return {**share(np.ones(len(hits))), "num_images": len(hits), "confidence": intervals}
