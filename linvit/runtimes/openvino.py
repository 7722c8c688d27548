"""Open a model in OpenVINO: a folder with `openvino_model.xml` and `openvino_model.bin`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linvit.output.files import reason
from linvit.output.terminal import printable
from linvit.runtimes.metadata import KEY, ExportMetadata, need, parse_metadata

XML = "openvino_model.xml"


def find_xml(folder: Path) -> Path | None:
    """The model in a folder; None if there is none."""
    path = folder / XML
    return path if path.is_file() else None


def open_openvino(source: Path) -> tuple[Callable[[Tensor], list[Tensor]], ExportMetadata]:
    """A function from batches to the model's outputs, and its record. `source` is the folder or its .xml file.

    Computes in float32, or in int8 where the model is quantised, on the CPU with torch's number of threads. Raises
    ValueError if the files are damaged or of another origin.
    """
    openvino = need("openvino", source)
    path = source if source.is_file() else source / XML
    weights = path.with_suffix(".bin")
    if weights.is_symlink() or not weights.is_file():
        raise ValueError(f"{path} needs its weights in {weights.name} beside it; export the model again")
    core = openvino.Core()
    try:
        model = core.read_model(path, weights)
        text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None
    except Exception as error:
        raise ValueError(f"{path} cannot be read as OpenVINO's IR: it is damaged, or another kind of file") from error
    metadata = parse_metadata(text, source=path)
    expected = [metadata.input_shape, *metadata.output_shapes.values()]
    if [_shape(each) for each in (*model.inputs, *model.outputs)] != expected:
        raise ValueError(f"{path} has another input or output than its record says; export it again")
    try:
        # On some CPUs OpenVINO would choose bfloat16.
        compiled = core.compile_model(
            model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        )
    except Exception as error:
        raise ValueError(f"{path} cannot be opened by OpenVINO: {printable(reason(error))}") from error

    def execute(batch: Tensor) -> list[Tensor]:
        try:
            found = compiled(batch.cpu().numpy())
            return [torch.from_numpy(found[index].copy()) for index in range(len(metadata.output_shapes))]
        except RuntimeError as error:
            raise ValueError(f"{path} fails in OpenVINO: {printable(reason(error))}") from error

    return execute, metadata


def _shape(port: Any) -> list[int | None]:
    """The shape of one input or output without the batch; None for a side of any length."""
    sides = list(port.get_partial_shape())[1:]
    return [side.get_length() if side.is_static else None for side in sides]
