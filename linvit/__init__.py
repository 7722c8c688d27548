"""Vision Transformers with Linformer attention for long patch sequences, as timm models.

Importing this package registers its models: `timm.create_model("linvit_small_patch16_512", num_classes=10)`.
"""

import importlib
import sys
from typing import Any

from linvit.version import __version__

# The module of each public name, which `__getattr__` imports on first use.
_PUBLIC = {
    "LinformerAttention": "linvit.model.attention",
    "LinformerEva": "linvit.model.eva",
    "LinformerViT": "linvit.model.vit",
    "PROJECTIONS": "linvit.model.projections",
    "Predictor": "linvit.prediction.predictor",
    "Spectrum": "linvit.spectrum.result",
    "attention_maps": "linvit.explanation.maps",
    "attention_spectrum": "linvit.spectrum.measure",
    "build_projection": "linvit.model.projections",
    "convert_vit": "linvit.conversion.convert",
    "plan_k": "linvit.spectrum.plan",
}
__all__ = [
    "PROJECTIONS",
    "LinformerAttention",
    "LinformerEva",
    "LinformerViT",
    "Predictor",
    "Spectrum",
    "__version__",
    "attention_maps",
    "attention_spectrum",
    "build_projection",
    "convert_vit",
    "plan_k",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'linvit' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


# The commands register the models when they need them, because `--help` must not wait for torch. While Python looks for
# the module of `python -m linvit`, the name of the script is "-m".
_IS_COMMAND = "linvit_command" in sys.modules or (sys.argv[:1] == ["-m"] and "linvit" in sys.orig_argv)
if not _IS_COMMAND:
    from linvit.model import registry  # noqa: F401
