"""timm models: made by name, with errors that say what to do, and what linvit relies on in them."""

import json
from typing import Any

import timm
from timm.models import resolve_model_input_args
from torch import Tensor, nn

import linvit.models  # noqa: F401  registers the linvit_* names
from linvit.commandline import UsageError
from linvit.files import reason
from linvit.validation import unknown


class TimmModel(nn.Module):
    """Any model that `timm.create_model` makes, for the type checker, since timm is not typed; never made itself."""

    pretrained_cfg: dict[str, Any]
    # Where timm's checkpoint filters look for the size that weights come from.
    pretrained_model_args: dict[str, Any]
    num_classes: int

    def get_classifier(self) -> nn.Module:
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        raise NotImplementedError

    def forward_intermediates(
        self, x: Tensor, indices: int, norm: bool, output_fmt: str, intermediates_only: bool
    ) -> list[Tensor]:
        raise NotImplementedError


def check_model_name(name: str) -> None:
    """Raise UsageError, with the nearest name, where timm has no model `name`; folders and hub names pass."""
    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        raise UsageError(f"{unknown('model', name, timm.list_models())} (`linvit models` lists them)")


def create_model(
    name: str, *, num_classes: int | None = None, img_size: tuple[int, int] | None = None, **model_kwargs: Any
) -> TimmModel:
    """A timm model by its name, also `local-dir:FOLDER` or `hf-hub:ID`, at `img_size` where it has a fixed size.

    Raises ValueError for an unknown name, with the nearest one, for a folder that describes no model, for arguments
    that the model does not take, and where published weights are asked for and there are none.
    """
    check_model_name(name)
    try:
        sized = resolve_model_input_args(name, {"img_size": img_size}, num_classes=num_classes)
        given = {key: sized[key] for key in ("img_size", "num_classes") if key in sized}
        return timm.create_model(name, **{**given, **model_kwargs})
    except (json.JSONDecodeError, KeyError) as error:
        if ":" not in name:
            raise
        raise ValueError(f"{name}: its config.json describes no model ({reason(error)}); restore it") from error
    except TypeError as error:
        raise ValueError(f"{name} does not take these arguments: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{name} cannot be built so: {' '.join(str(error).split())}") from error
