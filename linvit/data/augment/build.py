"""A user's own training pipeline, in albumentations' own YAML or JSON.

From an image file, or an image, to the model's input size: a crop first, then augmentation.

The training and evaluation pipelines, from one set of options.

Pipelines take an RGB image as (H, W, 3) uint8 of any size and give (height, width, 3) uint8 of the model's input size;
normalisation happens on the device.
"""

import difflib
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import numpy as np
import torch
from albumentations.core.serialization import SERIALIZABLE_REGISTRY, shorten_class_name

from linvit.data.augment.erasing import RandomErasing
from linvit.data.augment.randaugment import PolicyAugment
from linvit.data.decode import decode_image, reducible_size
from linvit.data.geometry import Crop, EvalCrop, RandomKeepRatioCrop, RandomResizedCrop, Size
from linvit.data.options import AugmentOptions, InputOptions
from linvit.settings.yaml import read_settings


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


class Pipeline:
    """A crop, then other transforms; a user's own pipeline has no such crop and takes whole images.

    Called with an image, as albumentations' pipelines are, `pipeline(image=image)["image"]`, or with the bytes of a
    file. It comes to the same, save that a JPEG of which little more than a quarter of the pixels each way is needed
    is decoded at a reduced size: see `Cut.reduction`. Draws from the generators last set.
    """

    def __init__(self, crop: Crop | None, augment: A.Compose) -> None:
        self.crop = crop
        self.augment = augment

    @property
    def transforms(self) -> list[A.BasicTransform]:
        """All in order; `A.Compose` of them can be saved, edited and given as `aug_file`."""
        return [*([] if self.crop is None else [self.crop]), *self.augment.transforms]

    def set_random_state(self, generator: np.random.Generator, draw: random.Random) -> None:
        if self.crop is not None:
            self.crop.set_random_state(generator, draw)
        self.augment.set_random_state(generator, draw)

    def __call__(self, *, image: np.ndarray) -> dict[str, Any]:
        """{"image": …} of an image (H, W, 3) uint8, which is left as it is."""
        return self._augmented(image.copy() if self.crop is None else self.crop.cut(*image.shape[:2]).of(image))

    def read(self, data: bytes, *, name: str | os.PathLike[str]) -> np.ndarray:
        """The result for an image file's bytes; UnreadableImage, with its `name`, as from `decode_image`."""
        image = decode_image(data, name=name) if self.crop is None else _decode_cut(data, self.crop, name)
        result: np.ndarray = self._augmented(image)["image"]
        return result

    def _augmented(self, image: np.ndarray) -> dict[str, Any]:
        result: dict[str, Any] = self.augment(image=image) if self.augment.transforms else {"image": image}
        return result


def _decode_cut(data: bytes, crop: Crop, name: str | os.PathLike[str]) -> np.ndarray:
    """A crop of an image file, which is decoded no larger than the crop needs."""
    size = reducible_size(data)
    if size is not None:
        before = crop.py_random.getstate()
        cut = crop.cut(*size)
        image = decode_image(data, name=name, reduction=cut.reduction)
        if image.shape[:2] == cut.reduced_shape:
            return cut.of(image)
        # The decoder understands a damaged header otherwise, and its word counts.
        crop.py_random.setstate(before)
    image = decode_image(data, name=name)
    return crop.cut(*image.shape[:2]).of(image)


# Options that replace what the model says under the same name.
_OVERRIDES = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class InputSpec:
    """What a model expects of its images, and how images are evaluated.

    `size` is (height, width) in pixels; `mean` and `std` are of pixels in 0..1, red, green, blue; `crop_pct` is the
    crop's share of the resized image.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        red, green, blue = (min(255, round(255 * value)) for value in self.mean)
        return red, green, blue


def resolve_input(model: torch.nn.Module, options: InputOptions) -> InputSpec:
    """The input of a timm model, where the options do not say otherwise.

    Raises:
        ValueError: for a model that does not take RGB, or whose interpolation is not built.
    """
    from timm.data import resolve_model_data_config
    from timm.models import get_model_input_config

    config: dict[str, Any] = resolve_model_data_config(model)
    # The size the model was built or resized to, of which its pretrained configuration knows nothing.
    channels, *size = get_model_input_config(model)["input_size"]
    if channels != 3:
        raise ValueError(f"the model takes {channels} channels, but images are read as RGB; build it with in_chans 3")
    config |= {"size": size} | {name: value for name in _OVERRIDES if (value := getattr(options, name)) is not None}
    if options.img_size is not None:
        config["size"] = options.img_size
    if config["interpolation"] not in ("nearest", "bilinear", "bicubic"):
        raise ValueError(f"interpolation '{config['interpolation']}' of the model is not built; set bicubic")
    return InputSpec(
        size=tuple(config["size"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def build_eval_pipeline(spec: InputSpec) -> Pipeline:
    """Resize and crop as timm does for evaluation."""
    crop = EvalCrop(
        size=spec.size,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        interpolation=spec.interpolation,
        fill=spec.mean_colour,
    )
    return Pipeline(crop, A.Compose([]))


def build_train_pipeline(augment: AugmentOptions, spec: InputSpec) -> Pipeline:
    """The augmentation that the options describe, in timm's order, or the one of `aug_file`.

    Raises:
        ValueError: for an `aug_file` that cannot be used.
    """
    if augment.aug_file is not None:
        return Pipeline(None, load_pipeline(augment.aug_file, size=spec.size, interpolation=spec.interpolation))
    if augment.no_aug:
        interpolation = "bilinear" if augment.train_interpolation == "random" else augment.train_interpolation
        return build_eval_pipeline(replace(spec, crop_pct=1.0, crop_mode="center", interpolation=interpolation))
    transforms: list[A.BasicTransform] = []
    if augment.hflip > 0:
        transforms.append(A.HorizontalFlip(p=augment.hflip))
    if augment.vflip > 0:
        transforms.append(A.VerticalFlip(p=augment.vflip))
    if augment.aa is not None:
        transforms.append(
            PolicyAugment(policy=augment.aa, interpolation=augment.train_interpolation, fill=spec.mean_colour)
        )
    transforms.extend(_colour_transforms(augment))
    if augment.reprob > 0:
        transforms.append(
            RandomErasing(
                mode=augment.remode, max_count=augment.recount, mean=spec.mean, std=spec.std, p=augment.reprob
            )
        )
    return Pipeline(_train_crop(augment, spec), A.Compose(transforms))


def _train_crop(augment: AugmentOptions, spec: InputSpec) -> Crop:
    crops: dict[str, Callable[..., Crop]] = {
        "rrc": RandomResizedCrop,
        "rkrc": partial(RandomKeepRatioCrop, crop="centre"),
        "rkrr": partial(RandomKeepRatioCrop, crop="random"),
    }
    crop = crops[augment.train_crop_mode or "rrc"]
    return crop(size=spec.size, scale=augment.scale, ratio=augment.ratio, interpolation=augment.train_interpolation)


def _colour_transforms(augment: AugmentOptions) -> list[A.BasicTransform]:
    transforms: list[A.BasicTransform] = []
    # timm's rule: beside an automatic policy, which jitters colours itself, only 3-Augment takes colour jitter.
    beside_policy = augment.aa is not None and "3a" not in augment.aa
    if augment.color_jitter and any(augment.color_jitter) and not beside_policy:
        strengths = augment.color_jitter * 3 if len(augment.color_jitter) == 1 else augment.color_jitter
        brightness, contrast, saturation, hue = (*strengths, 0.0)[:4]
        prob = 1.0 if augment.color_jitter_prob is None else augment.color_jitter_prob
        transforms.append(
            A.ColorJitter(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, p=prob)
        )
    if augment.grayscale_prob:
        transforms.append(A.ToGray(p=augment.grayscale_prob))
    if augment.gaussian_blur_prob:
        transforms.append(A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=augment.gaussian_blur_prob))
    return transforms
