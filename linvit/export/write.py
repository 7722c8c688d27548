"""Write a model in any of the formats, and open what was written as its readers would."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from linvit.data.augment.build import InputSpec
from linvit.export.card import Origin
from linvit.export.folder import write_folder, write_safetensors
from linvit.export.graph import trace
from linvit.export.onnx import quantize, write_onnx
from linvit.export.openvino import write_openvino
from linvit.export.options import WEIGHTS, ExportOptions
from linvit.export.torch_export import write_torch_export
from linvit.runs.folder import Classifier, load_classifier
from linvit.runtimes.metadata import ExportMetadata
from linvit.runtimes.model import open_exported, to_pixels


def write_model(
    classifier: Classifier,
    spec: InputSpec,
    metadata: ExportMetadata,
    options: ExportOptions,
    path: Path,
    calibration: Iterable[Tensor],
) -> None:
    """Write the model to `path`, alone in its folder.

    Args:
        calibration: normalised images for int8.

    Raises ValueError, naming the model, if the exporter cannot take it.
    """
    kind = options.resolved_format
    if kind == "hf":
        write_folder(classifier, path, spec, Origin(options.output.name), precision=metadata.precision)
        return
    if kind == "safetensors":
        write_safetensors(classifier, path, spec, precision=metadata.precision)
        return
    # Quantisation starts from the float model, and OpenVINO stores halves itself.
    in_float = metadata.precision == "int8" or kind == "openvino"
    program = trace(classifier.model, metadata.model_copy(update={"precision": "float32"}) if in_float else metadata)
    if kind == "torch-export":
        write_torch_export(program, path, metadata, compiled=options.aot_inductor)
        return
    if kind == "onnx" and not options.int8:
        write_onnx(program, path, metadata, opset=options.opset)
        return
    as_input = (to_pixels(batch, metadata) if metadata.input == "uint8" else batch for batch in calibration)
    with TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / "model.onnx"
        write_onnx(program, written, metadata, opset=options.opset)
        if kind == "onnx":
            quantize(written, path, metadata, as_input)
        else:
            path.mkdir()
            write_openvino(written, path, metadata, calibration=as_input if options.int8 else None)


def open_written(path: Path, options: ExportOptions) -> nn.Module:
    """The written model, opened as `linvit eval` opens it: a module from normalised images to logits."""
    if options.resolved_format in WEIGHTS:
        return load_classifier(str(path)).model
    return open_exported(str(path), device="cpu", trust_code=True).model
