"""Options of `linvit.Predictor`, which `linvit predict` shares."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linvit.data.tiling import create_tiling
from linvit.settings.fields import ImageSize


class PredictorOptions(BaseModel):
    """How images are predicted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    topk: int = Field(5, ge=1, description="number of most probable classes to report")
    weights: Literal["best", "last"] = Field("best", description="which weights of a run folder to use")
    img_size: ImageSize | None = Field(
        None, description="image size of the model, as 384 or 768x512 (default: the model's own)"
    )
    tile: ImageSize | None = Field(
        None, description="cut larger images into tiles of this size in pixels, as 1024 or 768x1024 (default: no tiles)"
    )
    overlap: int | None = Field(
        None, ge=0, description="minimum number of pixels that neighbouring tiles share (default: an eighth of a tile)"
    )
    merge: Literal["mean", "max"] = Field("mean", description="how to merge the tiles' probabilities of a class")
    batch_size: int | None = Field(
        None, gt=0, description="images or tiles per batch (default: by device and image size)"
    )
    workers: int = Field(4, ge=0, description="number of processes that read images")

    @model_validator(mode="after")
    def _check_tiles(self) -> "PredictorOptions":
        if self.tile is None and self.overlap is not None:
            raise ValueError("`overlap` needs `tile`")
        create_tiling(self.tile, overlap=self.overlap)
        return self
