"""Options for data, augmentation, loading and caching, under timm's names where timm has them.

They define the flags, the YAML fields and the settings of the pipelines. The module imports nothing heavy, so a command
line can be checked before torch is loaded.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from linvit.data.augment.policy import parse_policy
from linvit.settings.fields import Probability


def _as_tuple(value: Any) -> Any:
    """Turn a single number into a tuple of one: timm's files contain `color_jitter: 0.4`."""
    return (value,) if isinstance(value, int | float | str) and not isinstance(value, bool) else value


Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
Integers = Annotated[tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(_as_tuple)]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
CropMode = Literal["center", "squash", "border"]
CropShare = Annotated[float, Field(gt=0.0, le=2.0)]


def _per_channel(value: tuple[float, ...]) -> tuple[float, ...]:
    if len(value) not in (1, 3):
        raise ValueError(f"takes one number or three (R G B), not {len(value)}")
    return value * 3 if len(value) == 1 else value


def _positive(value: tuple[float, ...]) -> tuple[float, ...]:
    if min(value) <= 0:
        raise ValueError(f"std must be above 0 because pixels are divided by it, not {min(value)}")
    return value


Mean = Annotated[Numbers, AfterValidator(_per_channel)]
Std = Annotated[Numbers, AfterValidator(_per_channel), AfterValidator(_positive)]


def _rising(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] >= value[1]:
        raise ValueError(f"takes two rising numbers, the values of black and white, not {value[0]} {value[1]}")
    return value


# Values of 16-bit images that become black and white.
InputRange = Annotated[
    tuple[Annotated[int, Field(ge=-(2**15), lt=2**16)], Annotated[int, Field(ge=-(2**15), lt=2**16)]],
    AfterValidator(_rising),
]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataOptions(_Options):
    """Place of the images, splits, and numbering of the labels."""

    data_dir: Path | None = Field(
        None,
        description="image data: a folder SPLIT/CLASS/IMAGE, a folder of tar files or CSV lists, a CSV list with a "
        "'split' column, or hf:NAME for a Hugging Face data set (docs/data.md)",
    )
    train_split: str = Field(
        "train", description="training split: a folder or files in data_dir; 'train' also finds 'training'"
    )
    val_split: str = Field(
        "validation",
        description="validation split; 'val' and 'validation' also find each other, 'valid' and 'test'",
    )
    val_fraction: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="use this share of the training images for validation, chosen by a hash of their paths, where "
        "there is no validation split; data_dir may then also be a folder of class folders",
    )
    class_map: Path | None = Field(
        None,
        description="class names in the order of the labels: a text file with one per line, a JSON file such as "
        "class_to_idx.json, or 'timm' to number the classes as timm does (default: sorted names)",
    )


class InputOptions(_Options):
    """Input of the model: size, normalisation and evaluation crop."""

    img_size: Integers | None = Field(
        None, description="input size in pixels: one number, or height and width (default: the model's)"
    )
    in_chans: int | None = Field(None, description="input channels; only 3, because images are read as RGB")
    crop_pct: CropShare | None = Field(
        None,
        description="evaluation: side of the crop as a fraction of the resized image's (default: the model's)",
    )
    crop_mode: CropMode | None = Field(
        None,
        description="evaluation: 'center' crops the centre, 'squash' ignores the aspect ratio, 'border' pads the full "
        "image (default: the model's)",
    )
    mean: Mean | None = Field(
        None,
        description="mean of the pixels, from 0 to 1: one number or R G B (default: the model's)",
    )
    std: Std | None = Field(
        None, description="standard deviation of the pixels: one number or R G B (default: the model's)"
    )
    interpolation: Interpolation | None = Field(
        None, description="evaluation: interpolation of the antialiased resize (default: the model's)"
    )

    input_range: InputRange | Literal["auto"] | None = Field(
        None,
        title="two whole numbers LOW HIGH from 0 to 65535, such as 0 4095, auto, or none",
        description="values of 16-bit images that become black and white, as 0 4095 for 12-bit data; 'auto' measures "
        "them once, before training (default: 0 65535)",
    )

    @field_validator("img_size")
    @classmethod
    def _height_and_width(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is None:
            return None
        if len(value) > 2 or not value:
            raise ValueError(f"img_size takes one number or height and width, not {len(value)} numbers")
        return (value[0], value[-1])

    @field_validator("in_chans")
    @classmethod
    def _rgb(cls, value: int | None) -> int | None:
        if value not in (None, 3):
            raise ValueError(f"in_chans {value} is not supported: images are read as RGB; remove it or set 3")
        return value


class AugmentOptions(_Options):
    """Crop and augmentation of training images."""

    no_aug: bool = Field(False, description="only resize and crop the centre, without any augmentation")
    train_crop_mode: Literal["rrc", "rkrc", "rkrr"] | None = Field(
        None,
        description="training crop: 'rrc' is a random resized crop (the default); 'rkrc' and 'rkrr' nearly keep the "
        "aspect ratio and crop the centre or a random place (use them with scale 0.8 1.0 and ratio 0.9 1.11)",
    )
    scale: tuple[float, float] = Field((0.08, 1.0), description="range of the crop's area, as fractions of the image")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="range of the crop's aspect ratio (width/height)")
    hflip: Probability = Field(0.5, description="probability of a horizontal flip")
    vflip: Probability = Field(0.0, description="probability of a vertical flip")
    transpose: Probability = Field(
        0.0,
        description="probability of swapping rows and columns; needs a square input. With hflip, vflip and transpose "
        "of 0.5, all eight rotations and reflections are equally likely, as suits images without an upright direction",
    )
    color_jitter: Numbers | None = Field(
        (0.4,),
        description="strength of colour jitter: one number for brightness, contrast and saturation, or three numbers, "
        "or four with hue; with aa it is applied only for 3a",
    )
    color_jitter_prob: Probability | None = Field(None, description="probability of colour jitter (default: always)")
    grayscale_prob: Probability | None = Field(None, description="probability of a conversion to greyscale")
    gaussian_blur_prob: Probability | None = Field(None, description="probability of a Gaussian blur")
    aa: str | None = Field(
        None,
        description="automatic augmentation in timm's notation, such as rand-m9-mstd0.5-inc1, 3a, original or v0; or "
        "ta_wide (TrivialAugment)",
    )
    train_interpolation: Interpolation | Literal["random"] = Field(
        "random",
        description="training: interpolation of the antialiased resize; 'random' draws bilinear or bicubic",
    )
    reprob: Probability = Field(0.0, description="probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = Field(
        "pixel", description="fill of erased boxes: 'const' the mean colour, 'rand' one random colour, 'pixel' noise"
    )
    recount: int = Field(1, ge=1, description="maximum number of erased boxes per image")
    aug_file: Path | None = Field(
        None,
        description="training pipeline that albumentations saved as YAML or JSON; replaces all augmentation options",
    )

    @field_validator("scale", "ratio")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"takes two rising numbers above 0, not {value[0]} {value[1]}")
        return value

    @field_validator("color_jitter")
    @classmethod
    def _jitter(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is None:
            return None
        if len(value) not in (1, 3, 4):
            raise ValueError(f"takes one, three or four numbers, not {len(value)}")
        if min(value) < 0 or (len(value) == 4 and value[3] > 0.5):
            raise ValueError("takes strengths of at least 0, and a hue of at most 0.5")
        return value

    @field_validator("aa")
    @classmethod
    def _known_policy(cls, value: str | None) -> str | None:
        # timm's own scripts write "no augmentation policy" as an empty string.
        if not value:
            return None
        parse_policy(value)
        return value

    @model_validator(mode="after")
    def _aug_file_alone(self) -> Self:
        if self.aug_file is None:
            return self
        fields = AugmentOptions.model_fields
        replaced = [name for name in fields if name != "aug_file" and getattr(self, name) != fields[name].default]
        if replaced:
            raise ValueError(f"aug_file replaces the whole training pipeline: remove {', '.join(replaced)} or aug_file")
        return self


class CacheOptions(_Options):
    """Cache of decoded images."""

    cache: Literal["memory", "disk"] | None = Field(
        None, description="cache decoded images for later epochs, shared by all processes of a machine"
    )
    cache_dir: Path | None = Field(None, description="folder for --cache disk, on a fast disk; later runs reuse it")
    cache_size: int | None = Field(
        None,
        ge=1,
        description="shorter side in pixels that cached training images are shrunk to, from the first epoch on "
        "(default: twice the input's longer side)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cache == "disk" and self.cache_dir is None:
            raise ValueError("cache disk needs a folder: set cache_dir")
        if self.cache != "disk" and self.cache_dir is not None:
            raise ValueError("cache_dir needs cache disk: set it, or remove cache_dir")
        if self.cache is None and self.cache_size is not None:
            raise ValueError("cache_size needs a cache: set cache, or remove cache_size")
        return self


class LoaderOptions(CacheOptions):
    """Batches, worker processes, sampling and cache."""

    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        128,
        title="a whole number of at least 1, or auto",
        description="images per training batch and process; 'auto' finds the largest batch that fits in GPU memory",
    )
    validation_batch_size: int | None = Field(
        None, ge=1, description="images per evaluation batch and process (default: batch_size)"
    )
    workers: int = Field(4, ge=0, description="worker processes that read and augment images, per training process")
    on_bad_image: Literal["stop", "skip"] = Field(
        "stop", description="'stop' ends the run at an image that cannot be read; 'skip' lists it in bad_images.txt"
    )
    pin_mem: bool = Field(False, description="use page-locked host memory, for faster copies to a GPU")
    aug_repeats: float = Field(
        0.0,
        ge=0.0,
        description="draw each image this many times per epoch, augmented differently each time, and fewer distinct "
        "images; 0 and 1 disable it",
    )
    sampler: Literal["shuffle", "balanced"] = Field(
        "shuffle", description="'shuffle' draws every image once per epoch, 'balanced' every class equally often"
    )

    @field_validator("aug_repeats")
    @classmethod
    def _repeats(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError(f"takes at least 1, or 0 to disable it, not {value}")
        return value
