"""Options of `linvit eval`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def parse_size(value: Any) -> Any:
    """Read a size as 384, "384", "768x512" (height x width) or (768, 512)."""
    if not isinstance(value, str):
        return value
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"image size {value!r} is neither a number nor HEIGHTxWIDTH, such as 384 or 768x512")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


Side = Annotated[int, Field(gt=0)]
ImageSize = Annotated[Side | tuple[Side, Side], BeforeValidator(parse_size)]


class EvalOptions(BaseModel):
    """What to evaluate, on which images, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        description="a run's folder, a folder with config.json and weights, a checkpoint, or a timm model name"
    )
    data_dir: Path = Field(description="folder of images: DATA/SPLIT/CLASS/IMAGE")
    split: str = Field("val", description="folder of DATA to evaluate on")

    weights: Literal["best", "last"] = Field("best", description="which weights of a run's folder")
    use_ema: bool = Field(False, description="take the averaged weights of a checkpoint file that has both")
    model: str | None = Field(None, description="model name for a checkpoint file that does not say it")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of the model")

    img_size: tuple[ImageSize, ...] = Field(
        (), description="one or more sizes, as 384 or 768x512; the model's own if not given"
    )
    crop_pct: float | None = Field(None, gt=0, description="share of the image that the centre crop keeps")
    crop_mode: str | None = Field(None, description="how the crop is taken: center, squash or border")
    mean: tuple[float, ...] | None = Field(None, description="mean that images are normalised by")
    std: tuple[float, ...] | None = Field(None, description="standard deviation that images are normalised by")
    interpolation: str | None = Field(None, description="resize interpolation, as bilinear or bicubic")

    batch_size: int | None = Field(None, gt=0, description="images a batch; the run's own, else 64")
    workers: int = Field(4, ge=0, description="processes that read images")
    on_bad_image: Literal["stop", "skip"] = Field(
        "stop", description="an image that cannot be read ends the evaluation, or is left out and listed"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    amp: bool = Field(False, description="evaluate under automatic mixed precision")
    amp_dtype: Literal["bfloat16", "float16"] = Field("bfloat16", description="precision under --amp")
    json_file: Path | None = Field(None, description="file that the results are written to")
