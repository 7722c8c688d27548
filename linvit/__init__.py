"""Vision Transformers with Linformer attention for long patch sequences, as timm models.

Importing this package registers its models: `timm.create_model("linvit_small_patch16_512", num_classes=10)`.
"""

import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# Where each public name lives; `__getattr__` imports it on first use.
_PUBLIC = {
    "LinformerAttention": "linvit.model.attention",
    "LinformerViT": "linvit.model.vit",
    "PROJECTIONS": "linvit.model.projections",
    "Predictor": "linvit.prediction.predictor",
    "Spectrum": "linvit.spectrum.result",
    "attention_spectrum": "linvit.spectrum.measure",
    "build_projection": "linvit.model.projections",
    "convert_vit": "linvit.conversion.convert",
    "plan_k": "linvit.spectrum.plan",
}
__all__ = [
    "PROJECTIONS",
    "LinformerAttention",
    "LinformerViT",
    "Predictor",
    "Spectrum",
    "__version__",
    "attention_spectrum",
    "build_projection",
    "convert_vit",
    "plan_k",
]


def _is_light_command() -> bool:
    """The `linvit` script imports what its command needs, and `--help` must not wait for torch."""
    return Path(sys.argv[0]).name == "linvit" or not {"-h", "--help"}.isdisjoint(sys.argv[1:])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'linvit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)


if not _is_light_command():
    from linvit import models  # noqa: F401
