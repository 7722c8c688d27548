"""Open a model in ONNX Runtime.

An ONNX file runs no code, but it may keep its weights in other files, whose paths are in it. These may only be regular
files in the same folder.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linvit.output.files import reason
from linvit.output.terminal import printable
from linvit.runtimes.metadata import INPUT, KEY, ExportMetadata, need, parse_metadata

if TYPE_CHECKING:
    import onnx


def open_onnx(
    path: Path, *, device: str, is_required: bool = False
) -> tuple[Callable[[Tensor], list[Tensor]], ExportMetadata]:
    """A function from batches to the file's outputs, and its record.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        is_required: whether to refuse a GPU that ONNX Runtime does not support here, instead of using the CPU.

    Raises ValueError if the file is damaged, of another origin, or refers to files elsewhere.
    """
    runtime = need("onnxruntime", path)
    proto = _read(path)
    properties = {each.key: each.value for each in proto.metadata_props}
    metadata = parse_metadata(properties.get(KEY), source=path)
    target = torch.device(device)
    providers: list[Any] = ["CPUExecutionProvider"]
    if target.type == "cuda":
        if "CUDAExecutionProvider" in runtime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": target.index or 0}))
        elif is_required:
            raise ValueError(
                f"--device {device}: ONNX Runtime has no CUDA here; install onnxruntime-gpu or remove --device"
            )
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise ValueError(f"{path} cannot be opened by ONNX Runtime: {printable(reason(error))}") from error
    _check_graph(session, metadata, path)

    def execute(batch: Tensor) -> list[Tensor]:
        try:
            outputs = session.run(list(metadata.output_shapes), {INPUT: batch.cpu().numpy()})
        except Exception as error:
            raise ValueError(f"{path} fails in ONNX Runtime: {printable(reason(error))}") from error
        return [torch.from_numpy(output) for output in outputs]

    return execute, metadata


def _read(path: Path) -> "onnx.ModelProto":
    """The graph, without its external weights. Raises ValueError if it is damaged or refers to files elsewhere."""
    onnx = need("onnx", path)
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as ONNX: it is damaged, or another kind of file") from error
    for location in sorted(set(_external_files(proto))):
        file = path.parent / location
        if Path(location).name != location or file.is_symlink() or not file.is_file():
            raise ValueError(f"{path} keeps weights in {printable(location)!r}: only files in its own folder are read")
    return proto


def _external_files(message: Any) -> Iterator[str]:
    """The paths of external data in a message and in all messages inside of it."""
    if message.DESCRIPTOR.name == "TensorProto":
        # Also if the tensor does not say that it is external: readers differ in what they look at.
        yield from (entry.value for entry in message.external_data if entry.key == "location")
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _external_files(each)


def _check_graph(session: Any, metadata: ExportMetadata, path: Path) -> None:
    """Raise ValueError if the graph has another input or output than the record says."""
    inputs, outputs = (
        {each.name: list(each.shape[1:]) for each in found} for found in (session.get_inputs(), session.get_outputs())
    )
    if inputs != {INPUT: metadata.input_shape} or outputs != metadata.output_shapes:
        raise ValueError(f"{path} has another input or output than its record says; export it again")
