"""Options of `linvit probe`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from linvit.data.options import DataOptions
from linvit.evaluation.options import ClassifierOptions
from linvit.settings.fields import ImageSize, Seed


class ProbeOptions(DataOptions, ClassifierOptions):
    """The model, the images, and where to write the run."""

    source: str = Field(description="run folder, folder with config.json and weights, checkpoint or timm model name")
    data_dir: Path | None = Field(
        description="image data: a folder SPLIT/CLASS/IMAGE, tars, a CSV list or hf:NAME (docs/data.md)"
    )
    output: Path = Field(description="folder of the new run")
    flip: bool = Field(False, description="also train on the mirror image of each training image")
    features_dir: Path | None = Field(
        None,
        description="folder that keeps the features; later probes of the same model and images reuse them (default: "
        "the folder features beside RUN)",
    )
    weights: Literal["best", "last"] = Field("best", description="which weights of a run folder to use")
    img_size: ImageSize | None = Field(
        None, description="image size of the model, as 384 or 768x512 (default: the model's own)"
    )
    batch_size: int | None = Field(None, gt=0, description="images per batch (default: the source run's, else 64)")
    workers: int = Field(4, ge=0, description="number of processes that read images")
    on_bad_image: Literal["stop", "skip"] = Field(
        "stop", description="stop at an image that cannot be read, or skip it"
    )
    seed: Seed = Field(0, description="seed of the parts for cross-validation and of the confidence interval")
    json_file: Path | None = Field(None, description="write the results to this JSON file")

    @property
    def features_folder(self) -> Path:
        """`features_dir`, or the folder features beside the run."""
        return self.features_dir or self.output.parent / "features"
