"""The options of the data part, under timm's names: shown by `--help`, held by YAML, read by the pipelines.

Imports nothing heavy, so that a command line can be checked before torch is loaded.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from linvit.data.augment.policy import parse_policy
from linvit.settings.fields import Probability


def _as_tuple(value: Any) -> Any:
    """Takes a lone number for a tuple of one: timm's files say `color_jitter: 0.4`."""
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
        raise ValueError(f"std divides the pixels, so each must be above 0, not {min(value)}")
    return value


Mean = Annotated[Numbers, AfterValidator(_per_channel)]
Std = Annotated[Numbers, AfterValidator(_per_channel), AfterValidator(_positive)]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataOptions(_Options):
    data_dir: Path | None = Field(
        None,
        description="the images: a folder with a subfolder per split and, in each, one per class; a folder of tars or "
        "of CSV lists; a list with a column 'split'; or hf:NAME, a Hugging Face set (docs/data.md)",
    )
    train_split: str = Field(
        "train", description="training images: a folder or files of data_dir; 'train' also finds 'training'"
    )
    val_split: str = Field(
        "validation",
        description="validation images; 'val' and 'validation' also find each other, 'valid' and 'test'",
    )
    class_map: Path | None = Field(
        None,
        description="text file, one class name a line, that orders the labels (default: sorted names)",
    )


class InputOptions(_Options):
    img_size: Integers | None = Field(
        None, description="input size in pixels, one number or height and width (default: the model's own)"
    )
    in_chans: int | None = Field(None, description="input channels; images are read as RGB, so 3 or nothing")
    crop_pct: CropShare | None = Field(
        None,
        description="evaluation: the crop's share of the resized image (default: the model's own)",
    )
    crop_mode: CropMode | None = Field(
        None,
        description="evaluation: 'center' crops the middle, 'squash' ignores the aspect ratio, "
        "'border' pads the whole image (default: the model's own)",
    )
    mean: Mean | None = Field(
        None,
        description="mean of pixels in 0..1, one number or R G B (default: the model's own)",
    )
    std: Std | None = Field(
        None, description="their standard deviation, one number or R G B (default: the model's own)"
    )
    interpolation: Interpolation | None = Field(
        None, description="evaluation: how images are resized, antialiased (default: the model's own)"
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
            raise ValueError(f"in_chans {value} is not built: images are read as RGB; leave it out or set 3")
        return value


class AugmentOptions(_Options):
    no_aug: bool = Field(False, description="resize and crop the centre alone, without any augmentation")
    train_crop_mode: Literal["rrc", "rkrc", "rkrr"] | None = Field(
        None,
        description="training crop: 'rrc' a random resized crop (the default); 'rkrc', 'rkrr' keep the aspect "
        "ratio, then crop the centre or anywhere (set scale 0.8 1.0 and ratio 0.9 1.11 with them)",
    )
    scale: tuple[float, float] = Field((0.08, 1.0), description="area of the random crop, as shares of the image")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="aspect ratios (width/height) of the random crop")
    hflip: Probability = Field(0.5, description="probability of a horizontal flip")
    vflip: Probability = Field(0.0, description="probability of a vertical flip")
    color_jitter: Numbers | None = Field(
        (0.4,),
        description="colour jitter: one strength for brightness, contrast and saturation, or three, or four "
        "with hue; beside aa it is applied with 3a alone",
    )
    color_jitter_prob: Probability | None = Field(None, description="probability of colour jitter (default: always)")
    grayscale_prob: Probability | None = Field(None, description="probability of turning the image grey")
    gaussian_blur_prob: Probability | None = Field(None, description="probability of a Gaussian blur")
    aa: str | None = Field(
        None,
        description="automatic augmentation as timm writes it: rand-m9-mstd0.5-inc1, 3a, original, v0; or ta_wide",
    )
    train_interpolation: Interpolation | Literal["random"] = Field(
        "random",
        description="training: how crops are resized, antialiased; 'random' is bilinear or bicubic",
    )
    reprob: Probability = Field(0.0, description="probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = Field(
        "pixel", description="what erased boxes hold: the mean colour, one random colour, or noise"
    )
    recount: int = Field(1, ge=1, description="largest number of erased boxes in an image")
    aug_file: Path | None = Field(
        None,
        description="your own training pipeline, saved by albumentations as YAML or JSON; replaces all above",
    )

    @field_validator("scale", "ratio")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"is a range of two rising numbers above 0, not {value[0]} {value[1]}")
        return value

    @field_validator("color_jitter")
    @classmethod
    def _jitter(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is None:
            return None
        if len(value) not in (1, 3, 4):
            raise ValueError(f"takes one, three or four numbers, not {len(value)}")
        if min(value) < 0 or (len(value) == 4 and value[3] > 0.5):
            raise ValueError("strengths are at least 0, hue at most 0.5")
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
    def _own_pipeline_alone(self) -> "AugmentOptions":
        if self.aug_file is None:
            return self
        fields = AugmentOptions.model_fields
        ours = [name for name in fields if name != "aug_file" and getattr(self, name) != fields[name].default]
        if ours:
            raise ValueError(f"aug_file replaces the whole training pipeline: remove {', '.join(ours)} or aug_file")
        return self


class CacheOptions(_Options):
    cache: Literal["memory", "disk"] | None = Field(
        None, description="keep decoded images for the epochs after the first, shared by all processes of a machine"
    )
    cache_dir: Path | None = Field(None, description="folder on a fast disk for --cache disk; later runs use it, too")
    cache_size: int | None = Field(
        None,
        ge=1,
        description="cached training images are shrunk to this shorter side in pixels (default: twice the input's "
        "longer side), in the first epoch, too",
    )

    @model_validator(mode="after")
    def _a_folder_for_the_disk(self) -> Self:
        if self.cache == "disk" and self.cache_dir is None:
            raise ValueError("cache disk needs a folder: set cache_dir")
        if self.cache != "disk" and self.cache_dir is not None:
            raise ValueError("cache_dir is for cache disk; set it, or leave cache_dir out")
        if self.cache is None and self.cache_size is not None:
            raise ValueError("cache_size is for cached images; set cache, or leave cache_size out")
        return self


class LoaderOptions(CacheOptions):
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        128,
        title="a whole number of at least 1, or auto",
        description="images in a training batch, per process; auto: the largest that fits in the GPU's memory",
    )
    validation_batch_size: int | None = Field(
        None, ge=1, description="images in an evaluation batch, per process (default: batch_size)"
    )
    workers: int = Field(4, ge=0, description="processes that read and augment images, per training process")
    on_bad_image: Literal["stop", "skip"] = Field(
        "stop", description="an image that cannot be read ends the run, or is left out and listed in bad_images.txt"
    )
    pin_mem: bool = Field(False, description="page-locked host memory, for faster copies to a GPU")
    aug_repeats: float = Field(
        0.0,
        ge=0.0,
        description="show each image of an epoch so many times, each time augmented anew, and so fewer of the images; "
        "0 and 1 are off",
    )
    sampler: Literal["shuffle", "balanced"] = Field(
        "shuffle", description="draw every image once an epoch, or every class equally often"
    )

    @field_validator("aug_repeats")
    @classmethod
    def _repeats(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError(f"takes at least 1, or 0 for none, not {value}")
        return value
