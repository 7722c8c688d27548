"""Write ONNX files, in floating point or quantised to int8 by ONNX Runtime."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linvit.export.graph import quiet, refusal
from linvit.runtimes.metadata import INPUT, KEY, ExportMetadata, need


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
