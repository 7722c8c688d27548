"""A user's own training pipeline, in albumentations' own YAML or JSON."""

import difflib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
from albumentations.core.serialization import SERIALIZABLE_REGISTRY, shorten_class_name

from linvit.data.geometry import EvalCrop, Size
from linvit.yamlfile import read_settings


def load_pipeline(path: Path, *, size: Size, interpolation: str) -> A.Compose:
    """Reads a pipeline that `albumentations.save` wrote and brings its images to `size`.

    Images that come out at another size are resized and centre cropped. The pipeline is tried on one image.

    Raises:
        ValueError: for a file that does not hold an `albumentations.Compose`, for a transform or argument that
            albumentations does not know, or a pipeline that does not give (height, width, 3) uint8 images.
    """
    document = read_settings(path)
    if not isinstance(document.get("transform"), dict):
        raise ValueError(f"aug_file {path}: holds no 'transform'; write it with albumentations.save(pipeline, file)")
    for name in _class_names(document["transform"]):
        if shorten_class_name(name) not in SERIALIZABLE_REGISTRY:
            near = difflib.get_close_matches(name, SERIALIZABLE_REGISTRY, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"aug_file {path}: albumentations {A.__version__} has no transform '{name}'{hint}")
    try:
        with warnings.catch_warnings():
            # albumentations only warns of arguments that it does not know.
            warnings.simplefilter("error", UserWarning)
            pipeline = A.from_dict(document)
    except (ValueError, TypeError, KeyError, UserWarning) as error:
        raise ValueError(f"aug_file {path}: {_one_line(error)}") from error
    if not isinstance(pipeline, A.Compose):
        raise ValueError(f"aug_file {path}: holds {type(pipeline).__name__}; save an albumentations.Compose")
    side = max(1024, 2 * max(size))
    try:
        image = pipeline(image=np.zeros((side, side, 3), np.uint8))["image"]
    except Exception as error:
        raise ValueError(f"aug_file {path}: fails on a {side} x {side} image: {_one_line(error)}") from error
    try:
        check_image(image)
    except ValueError as error:
        raise ValueError(f"aug_file {path}: {error}") from error
    return A.Compose([pipeline, EvalCrop(size=size, interpolation=interpolation)])


def check_image(image: Any) -> None:
    """Raises ValueError for what is not an image as (H, W, 3) uint8."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{getattr(image, 'dtype', type(image).__name__)} {tuple(getattr(image, 'shape', ()))}"
        raise ValueError(
            f"gives {kind} instead of (height, width, 3) uint8; remove what changes the type or the channels, "
            "such as Normalize and ToTensorV2 (images are normalised on the device)"
        )


def _class_names(transform: dict[str, Any]) -> Iterator[str]:
    yield str(transform.get("__class_fullname__"))
    for inner in transform.get("transforms") or ():
        yield from _class_names(inner)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
