"""Write OpenVINO's IR: a folder with `openvino_model.xml` and `openvino_model.bin`."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from linvit.export.graph import quiet, refusal
from linvit.runtimes.metadata import KEY, ExportMetadata, need
from linvit.runtimes.openvino import XML


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
