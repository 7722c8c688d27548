"""Options of `linvit eval`, some shared with predict and explain. Imports are light to keep `--help` fast."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linvit.data.options import CropMode, CropShare, InputRange, Interpolation, Mean, Std
from linvit.settings.fields import ImageSize, ModelKeywords, PositiveNumber, height_and_width


class ClassifierOptions(BaseModel):
    """A saved model, and what overrides the settings of its run; for all commands that use one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    use_ema: bool = Field(False, description="use the averaged (EMA) weights of a checkpoint file that has both")
    model: str | None = Field(
        None, description="timm name of the model, for a checkpoint file that does not contain it"
    )
    model_kwargs: ModelKeywords = Field(default_factory=dict, description="extra keyword arguments of the model")

    crop_pct: CropShare | None = Field(
        None, description="fraction of the image that the centre crop keeps (default: the run's)"
    )
    crop_mode: CropMode | None = Field(
        None,
        description="'center' crops the centre, 'squash' ignores the aspect ratio, 'border' pads (default: the run's)",
    )
    mean: Mean | None = Field(None, description="mean for normalising images (default: the run's)")
    std: Std | None = Field(None, description="standard deviation for normalising images (default: the run's)")
    interpolation: Interpolation | None = Field(None, description="interpolation of the resize (default: the run's)")
    input_range: InputRange | None = Field(
        None,
        title="two whole numbers LOW HIGH from 0 to 65535, such as 0 4095",
        description="values of 16-bit images that become black and white (default: the run's)",
    )

    trust_code: bool = Field(
        False, description="open a .pt2 file, which can run code; only for files from people you trust"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto uses a GPU if there is one")
    amp: bool = Field(False, description="use automatic mixed precision (default: the run's setting)")
    amp_dtype: Literal["bfloat16", "float16"] = Field(
        "bfloat16", description="data type of --amp (default: the run's, else bfloat16)"
    )


class SourceOptions(ClassifierOptions):
    """The one model that a command uses, and its size; `linvit.evaluation.inference.open_source` opens it."""

    source: str = Field(
        description="run folder, folder with config.json and weights, checkpoint, exported model or timm model name"
    )
    weights: Literal["best", "last"] = Field("best", description="which weights of a run folder to use")
    img_size: ImageSize | None = Field(
        None, description="image size of the model, as 384 or 768x512 (default: the model's own)"
    )
    class_map: Path | None = Field(
        None,
        description="classes of weights without class names, in label order: a text file with one name per line, or a "
        "JSON file such as class_to_idx.json",
    )

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of `img_size` in pixels."""
        return None if self.img_size is None else height_and_width(self.img_size)


class EvalOptions(ClassifierOptions):
    """Models to evaluate, images, and metrics."""

    source: str = Field(
        description="run folder, folder with config.json and weights, checkpoint, exported model or timm model name"
    )
    data_dir: Path = Field(description="folders DATA/SPLIT/CLASS/IMAGE, tars, a CSV list or hf:NAME (docs/data.md)")
    split: str = Field("val", description="split of DATA to evaluate on; '.' takes the class folders in DATA itself")
    val_fraction: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="evaluate on the validation images of a run with this --val-fraction; --split names the split that "
        "they were taken from (default: train, else DATA itself)",
    )
    compare: tuple[str, ...] = Field((), description="more sources to compare with the first, image by image")

    class_map: Path | None = Field(
        None,
        description="classes of weights without class names, in label order: a text file with one name per line, a "
        "JSON file, or 'timm' or 'torchvision' for the order in which these sort the folders of DATA",
    )
    allow_subset: bool = Field(
        False, description="allow classes that only the model or only the data has; evaluate on the common ones"
    )
    real_labels: bool = Field(False, description="report accuracy on ReaL labels too (ImageNet's validation images)")
    temperature: Literal["fit"] | PositiveNumber | None = Field(
        None,
        description="divide the logits by this number to calibrate probabilities; 'fit' finds it on images that are "
        "not in the report",
    )
    temperature_split: str | None = Field(
        None,
        description="split to fit the temperature on (default: a random half of the images, the other half reported)",
    )
    conformal: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="report sets of classes that miss the true class in this share of images, such as 0.1; a random "
        "half of the images calibrates the sets, the other half is in the report",
    )
    conformal_method: Literal["lac", "raps"] = Field(
        "lac", description="'lac' gives the smallest sets, 'raps' larger sets to images that are harder"
    )
    conformal_split: str | None = Field(None, description="split to calibrate the sets on (default: a random half)")
    tta: Literal["none", "hflip"] = Field(
        "none", description="test-time augmentation: average the probabilities of each image and its mirror image"
    )
    tta_scales: tuple[PositiveNumber, ...] = Field(
        (),
        description="average the probabilities at these multiples of the image size, such as 0.875 1.0 1.125, each "
        "rounded to whole patches",
    )
    bootstrap: int = Field(1000, ge=0, description="number of resamples for 95 % intervals; 0 disables them")
    seed: int = Field(0, ge=0, description="seed of the resamples and of random halves")

    weights: Literal["best", "last"] = Field("best", description="which weights of a run folder to use")
    img_size: tuple[ImageSize, ...] = Field(
        (), description="one or more image sizes in pixels, such as 384 or 768x512 (default: the model's own)"
    )
    batch_size: int | None = Field(None, gt=0, description="images per batch (default: the run's, else 64)")
    workers: int = Field(4, ge=0, description="number of processes that read images")
    on_bad_image: Literal["stop", "skip"] = Field(
        "stop", description="stop at an image that cannot be read, or skip and list it"
    )
    json_file: Path | None = Field(None, description="write the results to this JSON file")
    csv_file: Path | None = Field(
        None, description="write a row per image to this CSV file: label, prediction, probability, loss"
    )
    markdown_file: Path | None = Field(None, description="write the results as Markdown tables to this file")
    html_file: Path | None = Field(
        None, description="write a page with scores, confusion matrix, classes, calibration and the worst images"
    )
    conformal_file: Path | None = Field(
        None, description="write the calibrated rule of --conformal to this file, for linvit predict"
    )
    confusion: tuple[Path, ...] = Field((), description="write the confusion matrix to these files: .png, .csv or both")
    plot_file: Path | None = Field(None, description="write a plot of top-1 over --img-size to this .png file")

    @model_validator(mode="after")
    def _check(self) -> EvalOptions:
        if self.temperature_split is not None and self.temperature != "fit":
            raise ValueError("--temperature-split needs --temperature fit")
        if self.temperature_split == self.split:
            raise ValueError(
                f"--temperature-split {self.split} is the split to evaluate; choose another, or omit the option to fit "
                "on a random half"
            )
        if self.conformal is None and (self.conformal_split is not None or self.conformal_file is not None):
            raise ValueError("--conformal-split and --conformal-file need --conformal")
        if self.conformal_split == self.split:
            raise ValueError(
                f"--conformal-split {self.split} is the split to evaluate; choose another, or omit the option to "
                "calibrate on a random half"
            )
        num_results = (1 + len(self.compare)) * max(len(self.img_size), 1)
        if self.conformal_file is not None and num_results > 1:
            raise ValueError(
                "--conformal-file takes one source at one size; omit --compare and give at most one --img-size"
            )
        if self.conformal_file is not None and (self.tta != "none" or self.tta_scales):
            raise ValueError(
                "--conformal-file is for linvit predict, which sees one view of an image; remove --tta and --tta-scales"
            )
        if self.confusion and num_results > 1:
            raise ValueError("--confusion takes one source at one size; omit --compare and give at most one --img-size")
        for path in self.confusion:
            if path.suffix not in (".png", ".csv"):
                raise ValueError(f"--confusion {path}: the name must end in .png or .csv")
        if self.plot_file is not None and (self.plot_file.suffix != ".png" or len(self.img_size) < 2):
            raise ValueError("--plot takes a .png file and needs several sizes, such as --img-size 224 384")
        return self

    @property
    def files(self) -> list[tuple[str, Path | None]]:
        """The files to write, with their flags."""
        return [
            ("--json", self.json_file),
            ("--csv", self.csv_file),
            ("--markdown", self.markdown_file),
            ("--html", self.html_file),
            ("--conformal-file", self.conformal_file),
            *(("--confusion", path) for path in self.confusion),
            ("--plot", self.plot_file),
        ]
