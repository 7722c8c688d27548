"""What an exported model records about itself, so that the file alone is enough: classes, input and versions.

It is JSON: in ONNX the metadata property `linvit`, in OpenVINO's IR the runtime information `linvit`, in a `.pt2` file
the extra file `linvit.json`, in `.safetensors` the header entry `linvit`. The modules that write and read it import
their optional packages by `need`.
"""

import importlib
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from linvit.data.augment.build import InputSpec
from linvit.data.options import CropMode, CropShare, InputRange, Interpolation, Mean, Std
from linvit.output.files import parse_json
from linvit.output.terminal import printable
from linvit.settings.fields import Side

KEY = "linvit"
# Names of the graph's input and outputs.
INPUT, OUTPUT, HEATMAPS = "images", "output", "heatmaps"

Precision = Literal["float32", "fp16", "bf16", "int8"]


class ExportMetadata(BaseModel):
    """The record of an exported model.

    Attributes:
        input: "normalized" for float32 (N, 3, H, W), (pixel / 255 - mean) / std; "uint8" for RGB pixels (N, H, W, 3).
        output: logits (N, C), or probabilities with "uint8".
        heatmaps: rows and columns of the second output (N, C, rows, columns), what each patch adds to each logit; None
            if the file has no such output.
        img_size: (height, width) of the input in pixels.
        class_names: class name of every label; None if unknown.
        precision: number format of the weights and, for int8, of the matrix products.
        weights: SHA-256 of the weights before the export, and of the precision if it is int8; None if unknown.
        versions: of the packages that exported the model.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    version: Literal[1] = 1
    architecture: str
    num_classes: int = Field(gt=0)
    class_names: list[str] | None = None
    input: Literal["normalized", "uint8"] = "normalized"
    output: Literal["logits", "probabilities"] = "logits"
    heatmaps: tuple[Side, Side] | None = None
    img_size: tuple[Side, Side]
    mean: Mean
    std: Std
    interpolation: Interpolation
    crop_pct: CropShare
    crop_mode: CropMode
    input_range: InputRange | None = None
    precision: Precision = "float32"
    weights: str | None = None
    versions: dict[str, str] = {}

    @property
    def input_shape(self) -> list[int]:
        """The shape of one input of the graph."""
        height, width = self.img_size
        return [height, width, 3] if self.input == "uint8" else [3, height, width]

    @property
    def output_shapes(self) -> dict[str, list[int]]:
        """The shape of each output of the graph for one image, by name."""
        shapes = {OUTPUT: [self.num_classes]}
        return shapes if self.heatmaps is None else {**shapes, HEATMAPS: [self.num_classes, *self.heatmaps]}

    @property
    def preparation(self) -> dict[str, Any]:
        """The preprocessing under the names of a run's settings."""
        names = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_range")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to_json(self) -> str:
        return self.model_dump_json(exclude_none=True)


def describe(
    *,
    architecture: str,
    num_classes: int,
    class_names: list[str] | None,
    spec: InputSpec,
    with_preprocessing: bool,
    precision: Precision,
    versions: dict[str, str],
    heatmaps: tuple[int, int] | None = None,
    weights: str | None = None,
) -> ExportMetadata:
    """The record of a model that takes the images of `spec`, and has `heatmaps` of this grid."""
    return ExportMetadata(
        architecture=architecture,
        num_classes=num_classes,
        class_names=class_names,
        input="uint8" if with_preprocessing else "normalized",
        output="probabilities" if with_preprocessing else "logits",
        heatmaps=heatmaps,
        img_size=spec.size,
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,  # type: ignore[arg-type]
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        input_range=spec.input_range,
        precision=precision,
        weights=weights,
        versions=versions,
    )


def parse_metadata(text: str | bytes | None, *, source: object) -> ExportMetadata:
    """Read a record. Raises ValueError, naming `source`, if there is none or it does not describe a classifier."""
    if not text:
        raise ValueError(
            f"{source} has no record of its classes and input: only files that linvit export wrote can be used here"
        )
    try:
        found = ExportMetadata.model_validate(parse_json(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "record"
        raise ValueError(
            f"{source}: its record of classes and input is wrong at {printable(where)}; export it again"
        ) from None
    except ValueError:
        raise ValueError(f"{source}: its record of classes and input is not JSON; export it again") from None
    if found.class_names is not None and len(found.class_names) != found.num_classes:
        raise ValueError(
            f"{source} names {len(found.class_names)} classes, but has {found.num_classes}; export it again"
        )
    return found


def need(package: str, for_what: object) -> ModuleType:
    """Import an optional package. Raises ValueError, naming the extra that installs it, if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{for_what} needs the package {package}: pip install 'linvit[export]'") from error
