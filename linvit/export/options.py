"""Options of `linvit export`. Imports are light to keep `--help` fast."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from linvit.evaluation.options import SourceOptions
from linvit.settings.fields import PositiveNumber

Format = Literal["onnx", "openvino", "torch-export", "hf", "safetensors"]
# Formats that are one file, and its extension; the others are folders.
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
# Formats that hold weights without a graph.
WEIGHTS = ("hf", "safetensors")


class ExportOptions(SourceOptions):
    """What to export, to which format, and what to compare it on."""

    source: str = Field(description="run folder, folder with config.json and weights, checkpoint or timm model name")
    output: Path = Field(description="file to write, or folder for openvino and hf")
    format: Format | None = Field(
        None,
        description="onnx; openvino (IR); torch-export (.pt2); hf (folder that timm loads, with a model card); "
        "safetensors (default: by the extension of the file)",
    )
    half: Literal["fp16", "bf16"] | None = Field(
        None, description="store weights in half precision; onnx and torch-export also compute in it"
    )
    int8: bool = Field(
        False,
        description="quantise to int8 (onnx, openvino), calibrated on --calibration-split of --data-dir, and compare "
        "its accuracy on --split with the float model's",
    )
    with_preprocessing: bool = Field(
        False,
        description="take RGB pixels (N, H, W, 3) uint8 of the model's size and return probabilities, instead of "
        "normalised images (N, 3, H, W) and logits",
    )
    with_heatmap: bool = Field(
        False,
        description="also return what each patch adds to the logit of each class, for linvit predict --heatmap and "
        "linvit explain; the model must pool all patches",
    )
    aot_inductor: bool = Field(
        False, description="with torch-export: compile a package for this machine's kind of processor by AOTInductor"
    )
    opset: int = Field(20, ge=18, le=23, description="ONNX opset")
    data_dir: Path | None = Field(None, description="image data for --int8 and for the comparison (docs/data.md)")
    split: str = Field("val", description="split of --data-dir to compare on")
    calibration_split: str = Field("train", description="split of --data-dir to calibrate --int8 on")
    calibration_images: int = Field(256, ge=1, description="number of images to calibrate on")
    images: Path | None = Field(None, description="folder of images to compare on, without labels")
    tolerance: PositiveNumber | None = Field(
        None,
        description="largest difference of a probability from the model's before the export fails (default: 0.0001, "
        "0.02 with --half)",
    )
    max_drop: PositiveNumber = Field(2.0, description="with --int8: largest loss of top-1 accuracy, in points")
    benchmark: bool = Field(False, description="time the exported model beside the original, batch 1, on the CPU")
    rounds: int = Field(10, ge=1, description="with --benchmark: number of timed runs of each")
    workers: int = Field(4, ge=0, description="number of processes that read images")
    seed: int = Field(0, ge=0, description="seed of the random images")
    json_file: Path | None = Field(None, description="write the differences, sizes and times to this JSON file")

    @model_validator(mode="after")
    def _check(self) -> ExportOptions:
        kind = self.resolved_format
        suffix = SUFFIXES.get(kind)
        if suffix is not None and self.output.suffix.lower() != suffix:
            raise ValueError(f"--output {self.output}: the name of {kind} files must end in {suffix}")
        if self.amp:
            raise ValueError("--amp does not apply to exported models: use --half fp16 or --half bf16")
        if self.half == "bf16" and kind in ("onnx", "openvino"):
            raise ValueError(f"--half bf16: {kind} runtimes do not take bfloat16 on CPUs; use --half fp16")
        if self.int8 and kind not in ("onnx", "openvino"):
            raise ValueError(f"--int8 is for onnx and openvino, not for {kind}")
        if self.int8 and self.half is not None:
            raise ValueError("--int8 and --half exclude each other; remove one")
        if self.int8 and self.data_dir is None:
            raise ValueError("--int8 needs --data-dir: images to calibrate on, and to measure accuracy on")
        if self.with_preprocessing and kind in WEIGHTS:
            raise ValueError(f"--with-preprocessing needs a graph, and {kind} holds weights alone; choose onnx")
        if self.with_heatmap and kind in WEIGHTS:
            raise ValueError(f"--with-heatmap needs a graph, and {kind} holds weights alone; choose onnx")
        if self.aot_inductor and kind != "torch-export":
            raise ValueError(f"--aot-inductor is for torch-export, not for {kind}")
        return self

    @property
    def resolved_format(self) -> Format:
        """The format, by the extension of the output if it is not given. Raises ValueError if that does not tell."""
        if self.format is not None:
            return self.format
        for kind, suffix in SUFFIXES.items():
            if self.output.suffix.lower() == suffix:
                return kind  # type: ignore[return-value]
        raise ValueError(f"--output {self.output}: choose --format, or a name in .onnx, .pt2 or .safetensors")
