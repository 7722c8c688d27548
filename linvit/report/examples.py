"""Pictures for a page: the worst images with heat maps of where the model looks, and augmented training images."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from linvit.data.augment.build import InputSpec, build_train_pipeline
from linvit.data.decode import UnreadableImage
from linvit.data.options import AugmentOptions
from linvit.data.sampler import sample_generators
from linvit.data.sources.base import ImageSet
from linvit.evaluation.classes import short_names
from linvit.evaluation.predictions import Predictions
from linvit.explanation.explain import Explainer
from linvit.explanation.overlay import blend
from linvit.output.files import reason
from linvit.output.page import image_uri
from linvit.report.evaluated import worst_rows
from linvit.runs.folder import Classifier
from linvit.runtimes.model import ExportedModel

# Pictures per page, shared by the runs on it, and at most this many per run.
PICTURES_PER_PAGE, MOST_WORST = 72, 12
# Longest side of a picture in pixels, and the quality of its JPEG.
_SIDE, _QUALITY = 200, 80
# Longest side of a heat map before it is reduced to a picture's size.
_HEAT_SIDE = 4 * _SIDE
# The percentile of a heat map that is shown at full brightness.
_BRIGHTEST = 98
# Heat maps of large images may take seconds each.
SECONDS_FOR_HEAT_MAPS = 60.0
AUGMENTED_IMAGES, VERSIONS_PER_IMAGE = 4, 4


@dataclass(frozen=True)
class Worst:
    """The images with the highest loss, each with its path, label, prediction and pictures; and what is missing."""

    images: list[dict[str, Any]]
    note: str | None


def worst_images(
    found: Predictions,
    images: ImageSet | None,
    classifier: Classifier | None,
    *,
    reason_without: str | None = None,
    most: int = MOST_WORST,
    seconds: float = SECONDS_FOR_HEAT_MAPS,
) -> Worst:
    """The images that the model got most wrong, with a heat map of the class that it predicted.

    Args:
        images: the images that the predictions are of, found by their paths; None shows no pictures.
        classifier: the model, on its device; None shows no heat maps.
        reason_without: why there are no images or no classifier, in one sentence.
        seconds: no heat map is started after this time.
    """
    rows = worst_rows(found.results, most=most)
    note = reason_without
    index_of: dict[str, int] = {}
    if images is not None:
        wanted = {found.paths[row] for row in rows}
        paths = map(os.fsdecode, images.relative_names())
        index_of = {path: index for index, path in enumerate(paths) if path in wanted}
        if len(index_of) < len(wanted):
            note = f"{len(wanted) - len(index_of)} of these images are no longer in {images.root}."
    explainer, problem = (None, None) if images is None or classifier is None else _explainer(classifier)
    note = note or problem
    deadline = time.monotonic() + seconds
    names = short_names(found.class_names)
    shown = []
    for row in rows:
        picture = heat = None
        index = index_of.get(found.paths[row])
        if images is not None and index is not None:
            try:
                image = _read(images, index, explainer)
                picture = image_uri(image, side=_SIDE, quality=_QUALITY)
                if explainer is not None and time.monotonic() > deadline:
                    explainer, note = None, note or f"Heat maps took {seconds:.0f} s; the last images have none."
                if explainer is not None:
                    heat = _heat_map(explainer, image, int(found.results.predictions[row]))
            except UnreadableImage as error:
                note = note or f"{reason(error)}."
            except (ValueError, RuntimeError) as error:
                explainer, note = None, note or f"There are no heat maps: {reason(error)}."
        shown.append({**_describe(found, row, names), "picture": picture, "heat": heat})
    return Worst(shown, note)


def _explainer(classifier: Classifier) -> tuple[Explainer | None, str | None]:
    """An object that draws heat maps of a model; None and the reason if the model has none."""
    if isinstance(classifier.model, ExportedModel):
        return None, "There are no heat maps: they need the model itself, not an exported one."
    try:
        return Explainer(classifier), None
    except ValueError as error:
        return None, f"There are no heat maps: {reason(error)}."


def _describe(found: Predictions, row: int, names: Sequence[str]) -> dict[str, Any]:
    results = found.results
    label, prediction = int(results.labels[row]), int(results.predictions[row])
    return {
        "path": found.paths[row],
        "label": names[label],
        "prediction": names[prediction],
        "is_correct": label == prediction,
        "probability": 100 * float(results.probabilities[row]),
        "loss": float(results.losses[row]),
    }


def _read(images: ImageSet, index: int, explainer: Explainer | None) -> np.ndarray:
    return images.read(index, input_range=None if explainer is None else explainer.spec.input_range)


def _heat_map(explainer: Explainer, image: np.ndarray, target: int) -> str:
    """The image under the map of a class, as a `data:` URI."""
    heat = explainer.explain(image, method="relevance", target=target, longest_side=_HEAT_SIDE).heat
    height, width = image.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small, small_heat = (cv2.resize(each, size, interpolation=cv2.INTER_AREA) for each in (image, heat))
    # A few patches often outweigh all others by far, which a thumbnail would not show.
    brightest = np.nanpercentile(small_heat, _BRIGHTEST)
    shown = np.minimum(small_heat, brightest) if brightest > 0 else small_heat
    return image_uri(blend(small, shown), side=None, quality=_QUALITY)


def augmented_images(
    images: ImageSet, augment: AugmentOptions, spec: InputSpec, *, seed: int, most: int = AUGMENTED_IMAGES
) -> list[dict[str, Any]]:
    """Some training images, each as it is and as the first epochs see it, before mixing and normalisation.

    Images that cannot be read are left out.
    """
    pipeline = build_train_pipeline(augment, spec)
    names = short_names(images.class_names)
    shown = []
    for index in _spread(images.labels, most):
        try:
            data = images.read_bytes(index)
            versions = []
            for epoch in range(VERSIONS_PER_IMAGE):
                pipeline.set_random_state(*sample_generators(seed, epoch, index))
                versions.append(image_uri(pipeline.read(data, name=images.path(index)), side=_SIDE, quality=_QUALITY))
            original = image_uri(images.read(index, input_range=spec.input_range), side=_SIDE, quality=_QUALITY)
        except UnreadableImage:
            continue
        label = names[images.label(index)]
        shown.append({"label": label, "original": original, "versions": versions})
    return shown


def _spread(labels: Sequence[int], most: int) -> list[int]:
    """The first image of each of the first classes, then of all."""
    first: dict[int, int] = {}
    for index, label in enumerate(labels):
        first.setdefault(label, index)
        if len(first) == most:
            break
    chosen = list(first.values())
    others = (index for index in range(len(labels)) if index not in chosen)
    return sorted([*chosen, *(index for index, _ in zip(others, range(most - len(chosen))))])
