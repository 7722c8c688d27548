"""Write a model as ONNX, OpenVINO, `.pt2` or weights, and open what was written as its readers would."""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from linvit.data.augment.build import InputSpec
from linvit.export.card import Origin
from linvit.export.folder import write_folder, write_safetensors
from linvit.export.graph import quiet, refusal, trace
from linvit.export.options import WEIGHTS, ExportOptions
from linvit.runs.folder import Classifier, load_classifier
from linvit.runtimes.metadata import INPUT, KEY, ExportMetadata, need
from linvit.runtimes.model import open_exported, to_pixels
from linvit.runtimes.openvino import XML
from linvit.runtimes.torch_export import RECORD


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


def write_onnx(program: torch.export.ExportedProgram, path: Path, metadata: ExportMetadata, *, opset: int) -> None:
    """Write the program, with its record as the property `linvit`. Weights beyond 2 GB go to a file beside it.

    Raises ValueError, naming the model, if torch's exporter cannot take it.
    """
    need("onnxscript", "ONNX")
    try:
        with quiet():
            exported: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=[INPUT],
                output_names=list(metadata.output_shapes),
                opset_version=opset,
                verbose=False,
            )
            exported.model.metadata_props[KEY] = metadata.to_json()
            exported.save(path)
    # What the exporter raises depends on the operation.
    except Exception as error:
        raise refusal("the ONNX exporter", metadata, error) from error


class _Reader:
    """Gives batches to ONNX Runtime's calibration, which only calls `get_next`."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def quantize(source: Path, target: Path, metadata: ExportMetadata, batches: Iterable[Tensor]) -> None:
    """Quantise the matrix products with weights to int8: per channel, activations by the range seen in `batches`.

    `batches` are in the file's own input format. Attention's products of activations, softmax and norms stay float32.
    """
    onnx, quantization = need("onnx", "--int8"), need("onnxruntime.quantization", "--int8")

    prepared = source.with_name("prepared.onnx")
    try:
        with quiet():
            quantization.shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                target,
                _Reader(batches),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm", "Conv"],
                per_channel=True,
                # Without this, sums of products overflow on CPUs without VNNI.
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
    except ValueError:
        raise
    except Exception as error:
        raise refusal("ONNX Runtime's quantisation", metadata, error) from error
    model = onnx.load(target)
    onnx.helper.set_model_props(model, {KEY: metadata.to_json()})
    onnx.save(model, target)


def write_openvino(
    source: Path, folder: Path, metadata: ExportMetadata, *, calibration: Iterable[Tensor] | None = None
) -> None:
    """Convert an ONNX file by OpenVINO's own reader; fp16 halves the weights, which are computed with in float32.

    `openvino.convert_model` would read the file by the same code, but reports its use over the network.

    Args:
        calibration: images in the file's own input format to quantise to int8 with; None keeps floating point.

    Raises ValueError, naming the model, if OpenVINO cannot take it.
    """
    openvino = need("openvino", "OpenVINO's IR")
    try:
        with quiet():
            model = openvino.Core().read_model(source)
            if calibration is not None:
                model = _quantized(model, calibration)
            model.set_rt_info(metadata.to_json(), KEY)
            openvino.save_model(model, folder / XML, compress_to_fp16=metadata.precision == "fp16")
    except RuntimeError as error:
        raise refusal("OpenVINO", metadata, error) from error


def _quantized(model: Any, calibration: Iterable[Tensor]) -> Any:
    """The model in int8, by NNCF. (ONNX Runtime's int8 graphs lose several times as much in OpenVINO.)"""
    # Otherwise NNCF reports its use over the network.
    os.environ.setdefault("NNCF_CI", "1")
    nncf = need("nncf", "--int8 with openvino")
    nncf.set_log_level("ERROR")
    batches = [batch.numpy() for batch in calibration]
    return nncf.quantize(
        model,
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(batches),
    )


def write_torch_export(
    program: torch.export.ExportedProgram, path: Path, metadata: ExportMetadata, *, compiled: bool
) -> None:
    """Write the program, or compile it for this machine's processor, with its record as an extra file.

    Raises ValueError, naming the model, if it cannot be written or compiled.
    """
    try:
        with quiet():
            if not compiled:
                torch.export.save(program, path, extra_files={RECORD: metadata.to_json()})
                return
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
            with zipfile.ZipFile(path, "a") as archive:
                root = archive.namelist()[0].partition("/")[0]
                archive.writestr(f"{root}/extra/{RECORD}", metadata.to_json())
    except Exception as error:
        raise refusal("AOTInductor" if compiled else "torch.export", metadata, error) from error
