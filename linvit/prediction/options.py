"""Options of `linvit predict`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linvit.data.options import CropMode, CropShare, Interpolation, Mean, Std
from linvit.prediction.tiling import create_tiling
from linvit.settings.fields import ImageSize

# What a file of predictions can be, by its extension.
FORMATS = (".csv", ".jsonl", ".parquet")


class PredictOptions(BaseModel):
    """What to predict with, on which images, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        description="a run's folder, a folder with config.json and weights, a checkpoint, or a timm model name"
    )
    images: tuple[str, ...] = Field(
        description="images, folders (searched at any depth), quoted globs; - reads image files from stdin, one a line"
    )
    topk: int = Field(5, ge=1, description="number of most probable classes shown (all, where there are fewer)")
    label_type: Literal["name", "description"] = Field(
        "name", description="classes by their names, or, where those are WordNet ids, in words"
    )
    output: Path | None = Field(
        None,
        description=f"file that the predictions are written to: {', '.join(FORMATS)}; default: lines on stdout",
    )

    weights: Literal["best", "last"] = Field("best", description="which weights of a run's folder")
    use_ema: bool = Field(False, description="take the averaged weights of a checkpoint file that has both")
    model: str | None = Field(None, description="model name for a checkpoint file that does not say it")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of the model")

    img_size: ImageSize | None = Field(
        None, description="size that the model gets, as 384 or 768x512 (default: the model's own)"
    )
    crop_pct: CropShare | None = Field(
        None, description="share of the image that the centre crop keeps (default: the run's)"
    )
    crop_mode: CropMode | None = Field(None, description="how the crop is taken (default: the run's)")
    mean: Mean | None = Field(None, description="mean that images are normalised by (default: the run's)")
    std: Std | None = Field(None, description="standard deviation that images are normalised by (default: the run's)")
    interpolation: Interpolation | None = Field(None, description="how images are resized (default: the run's)")

    tile: ImageSize | None = Field(
        None, description="cut larger images into tiles of so many pixels, as 1024 or 768x1024 (default: whole images)"
    )
    overlap: int | None = Field(
        None, ge=0, description="pixels that neighbouring tiles share, at least (default: an eighth of a tile)"
    )
    merge: Literal["mean", "max"] = Field("mean", description="what the tiles' probabilities of a class become")
    tile_output: Path | None = Field(None, description="file that each tile's predictions are written to")

    batch_size: int | None = Field(None, gt=0, description="images or tiles a batch (default: by the device and size)")
    workers: int = Field(4, ge=0, description="processes that read images")
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    amp: bool = Field(False, description="predict under automatic mixed precision (default: the run's)")
    amp_dtype: Literal["bfloat16", "float16"] = Field("bfloat16", description="precision under --amp")

    @model_validator(mode="after")
    def _fits_together(self) -> PredictOptions:
        for name, path in (("--output", self.output), ("--tile-output", self.tile_output)):
            if path is not None and path.suffix.lower() not in FORMATS:
                raise ValueError(f"{name} {path}: the name must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
        if self.output is not None and self.output == self.tile_output:
            raise ValueError(f"--output and --tile-output are both {self.output}: give two files")
        if self.tile is None and (self.overlap is not None or self.tile_output is not None):
            raise ValueError("--overlap and --tile-output are for tiles: give --tile SIZE as well")
        create_tiling(self.tile, overlap=self.overlap)
        return self
