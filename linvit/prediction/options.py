"""Options of `linvit predict`. Heavy imports are avoided to keep `--help` fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linvit.data.options import CropMode, CropShare, Interpolation, Mean, Std
from linvit.prediction.tiling import create_tiling
from linvit.settings.fields import ImageSize

# Extensions of the files that predictions can be written to.
FORMATS = (".csv", ".jsonl", ".parquet")


class PredictOptions(BaseModel):
    """What to predict with, on which images, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="run folder, folder with config.json and weights, checkpoint or timm model name")
    images: tuple[str, ...] = Field(
        description="images, folders (searched at any depth) or quoted globs; - reads paths from stdin, one per line"
    )
    topk: int = Field(5, ge=1, description="number of most probable classes to report")
    label_type: Literal["name", "description"] = Field(
        "name", description="report class names, or their descriptions if the names are WordNet ids"
    )
    output: Path | None = Field(
        None,
        description=f"write the predictions to this file: {', '.join(FORMATS)} (default: lines on stdout)",
    )

    weights: Literal["best", "last"] = Field("best", description="which weights of a run folder to use")
    use_ema: bool = Field(False, description="use the averaged (EMA) weights of a checkpoint file that has both")
    model: str | None = Field(None, description="model name for a checkpoint file that does not contain it")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="extra arguments of the model")

    img_size: ImageSize | None = Field(
        None, description="image size of the model, as 384 or 768x512 (default: the model's own)"
    )
    crop_pct: CropShare | None = Field(
        None, description="fraction of the image that the centre crop keeps (default: the run's)"
    )
    crop_mode: CropMode | None = Field(None, description="crop method (default: the run's)")
    mean: Mean | None = Field(None, description="mean for normalising images (default: the run's)")
    std: Std | None = Field(None, description="standard deviation for normalising images (default: the run's)")
    interpolation: Interpolation | None = Field(None, description="interpolation of the resize (default: the run's)")

    tile: ImageSize | None = Field(
        None, description="cut larger images into tiles of this size in pixels, as 1024 or 768x1024 (default: no tiles)"
    )
    overlap: int | None = Field(
        None, ge=0, description="minimum number of pixels that neighbouring tiles share (default: an eighth of a tile)"
    )
    merge: Literal["mean", "max"] = Field("mean", description="how to merge the tiles' probabilities of a class")
    tile_output: Path | None = Field(None, description="write the predictions of each tile to this file")

    batch_size: int | None = Field(
        None, gt=0, description="images or tiles per batch (default: by device and image size)"
    )
    workers: int = Field(4, ge=0, description="number of processes that read images")
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto uses a GPU if there is one")
    amp: bool = Field(False, description="use automatic mixed precision (default: the run's setting)")
    amp_dtype: Literal["bfloat16", "float16"] = Field(
        "bfloat16", description="precision under --amp (default: the run's, else bfloat16)"
    )

    @model_validator(mode="after")
    def _check(self) -> PredictOptions:
        for name, path in (("--output", self.output), ("--tile-output", self.tile_output)):
            if path is not None and path.suffix.lower() not in FORMATS:
                raise ValueError(f"{name} {path}: the name must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
        if self.output is not None and self.output == self.tile_output:
            raise ValueError(f"--output and --tile-output are both {self.output}; choose two files")
        if self.tile is None and (self.overlap is not None or self.tile_output is not None):
            raise ValueError("--overlap and --tile-output need --tile SIZE")
        create_tiling(self.tile, overlap=self.overlap)
        return self
