"""Options of `linvit eval`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linvit.data.options import CropMode, CropShare, Interpolation, Mean, Std
from linvit.settings.fields import ImageSize, PositiveNumber


class EvalOptions(BaseModel):
    """What to evaluate, on which images, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        description="a run's folder, a folder with config.json and weights, a checkpoint, or a timm model name"
    )
    data_dir: Path = Field(description="folders DATA/SPLIT/CLASS/IMAGE, tars, a CSV list or hf:NAME (docs/data.md)")
    split: str = Field("val", description="split of DATA to evaluate on; . is DATA itself")
    compare: tuple[str, ...] = Field((), description="further sources, each compared with the first, image by image")

    allow_subset: bool = Field(
        False, description="evaluate on the classes that both the model and the data have, where one has more"
    )
    real_labels: bool = Field(False, description="ImageNet's validation images: accuracy on ReaL labels, too")
    temperature: Literal["fit"] | PositiveNumber | None = Field(
        None, description="calibrate: divide the logits by this number, or by one fitted on other images"
    )
    temperature_split: str | None = Field(
        None, description="split to fit the temperature on; a random half of the images if none, the other half judged"
    )
    tta: Literal["none", "hflip"] = Field("none", description="average the probabilities of images and mirrored ones")
    tta_scales: tuple[PositiveNumber, ...] = Field(
        (), description="average over image sizes, as 0.875 1.0 1.125, rounded to whole patches"
    )
    bootstrap: int = Field(1000, ge=0, description="resamples of the images for 95 % intervals; 0: no intervals")
    seed: int = Field(0, ge=0, description="of the resamples, and of the half to fit the temperature on")

    weights: Literal["best", "last"] = Field("best", description="which weights of a run's folder")
    use_ema: bool = Field(False, description="take the averaged weights of a checkpoint file that has both")
    model: str | None = Field(None, description="model name for a checkpoint file that does not say it")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of the model")

    img_size: tuple[ImageSize, ...] = Field(
        (), description="one or more sizes, as 384 or 768x512; the model's own if not given"
    )
    crop_pct: CropShare | None = Field(None, description="share of the image that the centre crop keeps")
    crop_mode: CropMode | None = Field(None, description="how the crop is taken: center, squash or border")
    mean: Mean | None = Field(None, description="mean that images are normalised by")
    std: Std | None = Field(None, description="standard deviation that images are normalised by")
    interpolation: Interpolation | None = Field(None, description="how images are resized")

    batch_size: int | None = Field(None, gt=0, description="images a batch; the run's own, else 64")
    workers: int = Field(4, ge=0, description="processes that read images")
    on_bad_image: Literal["stop", "skip"] = Field(
        "stop", description="an image that cannot be read ends the evaluation, or is left out and listed"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    amp: bool = Field(False, description="evaluate under automatic mixed precision")
    amp_dtype: Literal["bfloat16", "float16"] = Field("bfloat16", description="precision under --amp")
    json_file: Path | None = Field(None, description="file that the results are written to")
    csv_file: Path | None = Field(None, description="file for a row per image: label, prediction, probability, loss")
    markdown_file: Path | None = Field(None, description="file for the results as tables to paste")
    confusion: tuple[Path, ...] = Field((), description="file for the confusion matrix, .png or .csv, or both")
    plot_file: Path | None = Field(None, description="PNG file for top-1 over --img-size")

    @model_validator(mode="after")
    def _check(self) -> EvalOptions:
        if self.temperature_split is not None and self.temperature != "fit":
            raise ValueError("--temperature-split needs --temperature fit")
        if self.temperature_split == self.split:
            raise ValueError(
                f"--temperature-split {self.split} is what is reported: give another split, or none for a half of it"
            )
        num_results = (1 + len(self.compare)) * max(len(self.img_size), 1)
        if self.confusion and num_results > 1:
            raise ValueError("--confusion is of one source at one size: leave out --compare and further sizes")
        for path in self.confusion:
            if path.suffix not in (".png", ".csv"):
                raise ValueError(f"--confusion {path}: name a .png or .csv file")
        if self.plot_file is not None and (self.plot_file.suffix != ".png" or len(self.img_size) < 2):
            raise ValueError("--plot is a .png file and takes several sizes: give --img-size 224 384, for example")
        return self

    @property
    def files(self) -> list[tuple[str, Path | None]]:
        """All that is written, by its flag."""
        return [
            ("--json", self.json_file),
            ("--csv", self.csv_file),
            ("--markdown", self.markdown_file),
            *(("--confusion", path) for path in self.confusion),
            ("--plot", self.plot_file),
        ]
