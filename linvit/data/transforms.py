"""The training and evaluation pipelines, from one set of options.

Pipelines take an RGB image as (H, W, 3) uint8 of any size and give (height, width, 3) uint8 of the model's input size;
normalisation happens on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import albumentations as A
import torch

from linvit.data.augfile import load_pipeline
from linvit.data.erasing import RandomErasing
from linvit.data.geometry import Crop, EvalCrop, RandomKeepRatioCrop, RandomResizedCrop
from linvit.data.options import AugmentOptions, InputOptions
from linvit.data.pipeline import Pipeline
from linvit.data.randaugment import PolicyAugment

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
