"""Open a model in OpenVINO: a folder with `openvino_model.xml` and `openvino_model.bin`."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from linvit.output.files import reason
from linvit.output.terminal import printable
from linvit.runtimes.metadata import KEY, ExportMetadata, parse_metadata
from linvit.runtimes.packages import need

XML = "openvino_model.xml"


def find_xml(folder: Path) -> Path | None:
    """The model in a folder; None if there is none."""
    path = folder / XML
    return path if path.is_file() else None


def open_openvino(source: Path) -> tuple[Callable[[Tensor], Tensor], ExportMetadata]:
    """A function from batches to the model's output, and its record. `source` is the folder or its .xml file.

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
    height, width = metadata.img_size
    shape = [height, width, 3] if metadata.input == "uint8" else [3, height, width]
    sides = [[each.get_partial_shape()[axis] for axis in range(1, len(each.get_partial_shape()))]
             for each in (*model.inputs, *model.outputs)]  # fmt: skip
    if [[side.get_length() if side.is_static else None for side in each] for each in sides] != [
        shape,
        [metadata.num_classes],
    ]:
        raise ValueError(f"{path} has another input or output than its record says; export it again")
    try:
        # On some CPUs OpenVINO would choose bfloat16.
        compiled = core.compile_model(
            model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        )
    except Exception as error:
        raise ValueError(f"{path} cannot be opened by OpenVINO: {printable(reason(error))}") from error

    def execute(batch: Tensor) -> Tensor:
        try:
            return torch.from_numpy(compiled(batch.cpu().numpy())[0].copy())
        except RuntimeError as error:
            raise ValueError(f"{path} fails in OpenVINO: {printable(reason(error))}") from error

    return execute, metadata
