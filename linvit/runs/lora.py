"""Weights with low-rank adapters (LoRA), merged: W + B A in place of W, A and B.

PEFT names them `X.base_layer.weight`, `X.lora_A.default.weight` (r, in) and `X.lora_B.default.weight` (out, r) where
the layer without adapters is called `X`. linvit trains adapters with a scale of 1.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from linvit.output.files import printable

_BASE, _A, _B = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def merge_adapters(state_dict: Mapping[str, Tensor], *, path: Path) -> dict[str, Tensor]:
    """The weights of the model without adapters that computes the same; weights without adapters are unchanged.

    Raises ValueError, naming `path` and the layer, if its adapters are missing or do not fit.
    """
    merged = {}
    for name, tensor in state_dict.items():
        if _A in name or _B in name:
            continue
        layer, base, kind = name.partition(_BASE)
        if base and kind == "weight":
            try:
                # In the base's precision and at least float32: the adapters of a model in bfloat16 are in float32.
                change = state_dict[f"{layer}{_B}weight"] @ state_dict[f"{layer}{_A}weight"]
                tensor = (tensor.to(change.dtype) + change).to(tensor.dtype)
            except (KeyError, RuntimeError) as error:
                raise ValueError(f"{path}: the adapters of {printable(layer)} are missing or do not fit it") from error
        merged[f"{layer}.{kind}" if base else name] = tensor
    return merged
