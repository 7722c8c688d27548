"""Build the training and evaluation pipelines from the options, or from a user's own albumentations file.

Pipelines take an RGB image (H, W, 3) uint8 of any size and return (height, width, 3) uint8 of the model's input size.
Normalisation is done later, on the device.
"""

import difflib
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from linvit.data.decode import InputRange, decode_image, reducible_size
from linvit.data.geometry import Crop, EvalCrop, RandomKeepRatioCrop, RandomResizedCrop, Size
from linvit.data.options import AugmentOptions, InputOptions
from linvit.settings.yaml import read_settings

# Options that override the model's setting of the same name.
_OVERRIDES = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_CROPS: dict[str, Callable[..., Crop]] = {
    "rrc": RandomResizedCrop,
    "rkrc": partial(RandomKeepRatioCrop, crop="centre"),
    "rkrr": partial(RandomKeepRatioCrop, crop="random"),
}

# Saved pipelines contain the full names of classes; these are the names from before the classes moved here.
SERIALIZABLE_REGISTRY["linvit.data.erasing.RandomErasing"] = RandomErasing
SERIALIZABLE_REGISTRY["linvit.data.randaugment.PolicyAugment"] = PolicyAugment


@dataclass(frozen=True)
class InputSpec:
    """The images that a model expects, and how they are resized and cropped for evaluation.

    `size` is (height, width) in pixels. `mean` and `std` are red, green, blue, for pixels in 0..1. `crop_pct` is the
    side of the evaluation crop as a fraction of the resized image's. `input_range` is that of `decode_image`.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]
    input_range: InputRange | None = None

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        red, green, blue = (min(255, round(255 * value)) for value in self.mean)
        return red, green, blue


def resolve_input(model: torch.nn.Module, options: InputOptions) -> InputSpec:
    """The input of a timm model, with overrides from the options.

    Raises:
        ValueError: if the model does not take RGB, its interpolation is not supported, or it would cut off the edge of
            images of the requested size.
    """
    from timm.data import resolve_model_data_config
    from timm.models import get_model_input_config

    config: dict[str, Any] = resolve_model_data_config(model)
    # The size that the model was built with or resized to, which its pretrained configuration does not contain.
    channels, *size = get_model_input_config(model)["input_size"]
    if channels != 3:
        raise ValueError(f"the model takes {channels} channels, but images are read as RGB; build it with in_chans 3")
    config |= {"size": size} | {name: value for name in _OVERRIDES if (value := getattr(options, name)) is not None}
    if options.img_size is not None:
        _check_patches(model, options.img_size, published=config["input_size"][1:])
        config["size"] = options.img_size
    for name in ("mean", "std"):
        if len(config[name]) != 3:
            raise ValueError(f"the model's {name} is not for red, green and blue: set --{name}")
    if config["interpolation"] not in ("nearest", "bilinear", "bicubic"):
        raise ValueError(f"the model's interpolation '{config['interpolation']}' is not supported; set bicubic")
    return InputSpec(
        size=tuple(config["size"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        input_range=options.input_range if isinstance(options.input_range, tuple) else None,
    )


def _check_patches(model: torch.nn.Module, size: Sequence[int], *, published: Sequence[int]) -> None:
    """Raise ValueError for a size that is not a multiple of the patch size, unless the model pads.

    A few published models, such as vit_so400m_patch14_siglip_384, were trained with the edge cut off.
    """
    from timm.layers import PatchEmbed

    embedding = getattr(model, "patch_embed", None)
    if not isinstance(embedding, PatchEmbed) or embedding.dynamic_img_pad or tuple(size) == tuple(published):
        return
    patch = embedding.patch_size
    lower, upper = (
        "×".join(str(max(-(-side // each) if up else side // each, 1) * each) for side, each in zip(size, patch))
        for up in (False, True)
    )
    if any(side % each for side, each in zip(size, patch)):
        choices = upper if lower == upper else f"{lower} or {upper}"
        raise ValueError(
            f"image size {size[0]}×{size[1]} is not a multiple of the patch size {patch[0]}×{patch[1]}, so the model "
            f"would not see the right and lower edge: use {choices}"
        )


class Pipeline:
    """A crop, then other transforms; a user's own pipeline has no such crop and takes full images.

    Like an albumentations pipeline, call it with an image, `pipeline(image=image)["image"]`; or use `read` with the
    bytes of a file. Both give the same result, except that `read` decodes a JPEG at a reduced size if the crop needs
    much fewer pixels (see `CropPlan.reduction`). Random numbers come from the generators last set.
    """

    def __init__(self, crop: Crop | None, augment: A.Compose, *, input_range: InputRange | None = None) -> None:
        self.crop = crop
        self.augment = augment
        self.input_range = input_range

    @property
    def transforms(self) -> list[A.BasicTransform]:
        """All transforms in order; an `A.Compose` of them can be saved, edited and used as `aug_file`."""
        return [*([] if self.crop is None else [self.crop]), *self.augment.transforms]

    def set_random_state(self, generator: np.random.Generator, draw: random.Random) -> None:
        if self.crop is not None:
            self.crop.set_random_state(generator, draw)
        self.augment.set_random_state(generator, draw)

    def __call__(self, *, image: np.ndarray) -> dict[str, Any]:
        """Return {"image": result} for an image (H, W, 3) uint8, which is not modified."""
        return self._augment(image.copy() if self.crop is None else self.crop.plan(*image.shape[:2]).apply(image))

    def read(self, data: bytes, *, name: str | os.PathLike[str]) -> np.ndarray:
        """Return the result for the bytes of an image file.

        Raises:
            UnreadableImage: as `decode_image` does, with `name` in the message.
        """
        if self.crop is None:
            image = decode_image(data, name=name, input_range=self.input_range)
        else:
            image = _decode_crop(data, self.crop, name, self.input_range)
        result: np.ndarray = self._augment(image)["image"]
        return result

    def _augment(self, image: np.ndarray) -> dict[str, Any]:
        result: dict[str, Any] = self.augment(image=image) if self.augment.transforms else {"image": image}
        return result


def _decode_crop(data: bytes, crop: Crop, name: str | os.PathLike[str], input_range: InputRange | None) -> np.ndarray:
    """Crop an image file, decoding it at the smallest size that the crop allows."""
    size = reducible_size(data)
    if size is not None:
        state = crop.py_random.getstate()
        plan = crop.plan(*size)
        image = decode_image(data, name=name, reduction=plan.reduction)
        if image.shape[:2] == plan.reduced_shape:
            return plan.apply(image)
        # The decoder read a different size from a damaged header, and its size counts.
        crop.py_random.setstate(state)
    image = decode_image(data, name=name, input_range=input_range)
    return crop.plan(*image.shape[:2]).apply(image)


def build_eval_pipeline(spec: InputSpec) -> Pipeline:
    """Resize and crop as timm does for evaluation."""
    crop = EvalCrop(
        size=spec.size,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        interpolation=spec.interpolation,
        fill=spec.mean_colour,
    )
    return Pipeline(crop, A.Compose([]), input_range=spec.input_range)


def build_train_pipeline(augment: AugmentOptions, spec: InputSpec) -> Pipeline:
    """Build the augmentation that the options describe, in timm's order, or load the one in `aug_file`.

    Raises:
        ValueError: if `aug_file` is invalid, or if `transpose` is combined with an input that is not square.
    """
    if augment.aug_file is not None:
        pipeline = load_pipeline(augment.aug_file, size=spec.size, interpolation=spec.interpolation)
        return Pipeline(None, pipeline, input_range=spec.input_range)
    if augment.no_aug:
        interpolation = "bilinear" if augment.train_interpolation == "random" else augment.train_interpolation
        return build_eval_pipeline(replace(spec, crop_pct=1.0, crop_mode="center", interpolation=interpolation))
    crop = _CROPS[augment.train_crop_mode or "rrc"](
        size=spec.size, scale=augment.scale, ratio=augment.ratio, interpolation=augment.train_interpolation
    )
    transforms: list[A.BasicTransform] = []
    if augment.hflip > 0:
        transforms.append(A.HorizontalFlip(p=augment.hflip))
    if augment.vflip > 0:
        transforms.append(A.VerticalFlip(p=augment.vflip))
    if augment.transpose > 0:
        height, width = spec.size
        if height != width:
            raise ValueError(f"transpose needs a square input, and the input size is {height} x {width}: remove it")
        transforms.append(A.Transpose(p=augment.transpose))
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
    return Pipeline(crop, A.Compose(transforms), input_range=spec.input_range)


def _colour_transforms(augment: AugmentOptions) -> list[A.BasicTransform]:
    transforms: list[A.BasicTransform] = []
    # timm's rule: an automatic policy jitters colours itself, so only 3-Augment is combined with colour jitter.
    policy_jitters = augment.aa is not None and "3a" not in augment.aa
    if augment.color_jitter and any(augment.color_jitter) and not policy_jitters:
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


def load_pipeline(path: Path, *, size: Size, interpolation: str) -> A.Compose:
    """Load a pipeline that `albumentations.save` wrote, and append a resize and centre crop to `size`.

    The pipeline is tested on one image, without the appended crop.

    Raises:
        ValueError: if the file does not contain an `albumentations.Compose`, if albumentations does not know a
            transform or argument, or if the pipeline does not return (height, width, 3) uint8 images.
    """
    document = read_settings(path)
    if not isinstance(document.get("transform"), dict):
        raise ValueError(f"aug_file {path}: has no 'transform'; write it with albumentations.save(pipeline, file)")
    try:
        names = list(_class_names(document["transform"]))
    except ValueError as error:
        raise ValueError(f"aug_file {path}: {error}") from error
    for name in names:
        if shorten_class_name(name) not in SERIALIZABLE_REGISTRY:
            near = difflib.get_close_matches(name, SERIALIZABLE_REGISTRY, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"aug_file {path}: albumentations {A.__version__} has no transform '{name}'{hint}")
    try:
        with warnings.catch_warnings():
            # albumentations only warns about unknown arguments.
            warnings.simplefilter("error", UserWarning)
            pipeline = A.from_dict(document)
    except Exception as error:
        # albumentations fails with any error at a document that it has not written.
        raise ValueError(f"aug_file {path}: {_one_line(error)}") from error
    if not isinstance(pipeline, A.Compose):
        raise ValueError(f"aug_file {path}: contains {type(pipeline).__name__}; save an albumentations.Compose")
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
    """Raise ValueError if the result of a pipeline is not an image (H, W, 3) uint8."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{getattr(image, 'dtype', type(image).__name__)} {tuple(getattr(image, 'shape', ()))}"
        raise ValueError(
            f"returns {kind} instead of (height, width, 3) uint8; remove transforms that change the type or the "
            "channels, such as Normalize and ToTensorV2 (images are normalised on the device)"
        )


def _class_names(transform: Any) -> Iterator[str]:
    inner = transform.get("transforms") or [] if isinstance(transform, dict) else None
    if not isinstance(inner, list):
        raise ValueError(f"{str(transform)[:50]!r} is not a transform; write the file with albumentations.save")
    yield str(transform.get("__class_fullname__"))
    for each in inner:
        yield from _class_names(each)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    # albumentations passes on pydantic's text with its heading, the types and a link.
    return re.sub(r"^\d+ validation errors? for \w+ | \[type=.*", "", text)
