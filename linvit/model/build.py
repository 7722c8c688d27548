"""Building timm models by name or from a model specification, with errors that name the problem and a fix.

A specification is a model as written on the command line: `NAME` or `NAME:keyword=value,keyword=value`.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import VisionTransformer, get_pretrained_cfg, is_model_pretrained, parse_model_name
from timm.models._hub import download_from_hf
from timm.models.eva import Eva
from torch import Tensor, nn

import linvit.model.registry  # noqa: F401  registers the linvit_* names
from linvit.model.description import CONFIG, ModelDescription, check_arguments, read_config
from linvit.model.transformer import LinformerTransformer
from linvit.output.files import reason
from linvit.output.terminal import printable
from linvit.settings.fields import one_of, unknown
from linvit.settings.flags import UsageError

CHECKPOINTING = ("none", "mlp", "full")
# Before the folder of a model, as timm writes it.
LOCAL = "local-dir:"
# Before the name of a model on the Hugging Face hub.
HUB = "hf-hub:"
ONLY_VITS = "only timm's VisionTransformer and Eva, and linvit's models, are compared here"


class TimmModel(nn.Module):
    """The type of any model from `timm.create_model`, for the type checker only, since timm has no types."""

    pretrained_cfg: dict[str, Any]
    # timm's checkpoint filters look here for the image size of the pretrained weights.
    pretrained_model_args: dict[str, Any]
    num_classes: int
    num_features: int

    def get_classifier(self) -> nn.Module:
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        raise NotImplementedError

    def forward_intermediates(
        self, x: Tensor, indices: int, norm: bool, output_fmt: str, intermediates_only: bool
    ) -> list[Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class ModelSpec:
    """A timm model name, its keywords, and what the backward pass recomputes: one of `CHECKPOINTING`."""

    text: str
    name: str
    kwargs: dict[str, Any]
    grad_checkpointing: str


def check_model_name(name: str) -> None:
    """Raise UsageError, suggesting the nearest name, if timm has no model `name`; local and hub names pass."""
    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        raise UsageError(f"{unknown('model', name, timm.list_models())} (`linvit models` lists them)")


def create_model(
    model: str | ModelDescription,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    img_size: tuple[int, int] | None = None,
    **model_kwargs: Any,
) -> TimmModel:
    """Create a model from its timm name, `local-dir:FOLDER`, `hf-hub:ID` or description, at `img_size` if it is fixed.

    Only a name can lead to a download: of the description for `hf-hub:ID`, of weights with `pretrained`. Weights in a
    `local-dir:` folder are read by `linvit.runs.weights`, not here.

    Raises ValueError for an unknown name, suggesting the nearest one, for a folder that does not describe a model, for
    arguments that the model does not take, and if pretrained weights are not published or cannot be downloaded.
    """
    weights: dict[str, str] = {}
    if isinstance(model, str):
        check_model_name(model)
        origin, location = parse_model_name(model)
        description = ModelDescription("", location)
        if origin == "local-dir":
            description = read_config(Path(location) / CONFIG)
        elif origin == "hf-hub":
            description = read_config(download_config(location))
            weights = {"source": "hf-hub", "hf_hub_id": location}
    else:
        description = model
    name, arguments = description.architecture, dict(description.model_args)
    if ":" in name or not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"{description.source}: {unknown('model', name, timm.list_models())}")
    source = f"{description.source}: " if description.source else ""
    try:
        cfg = description.pretrained_cfg
        is_fixed = cfg["fixed_input_size"] if cfg is not None else _has_fixed_size(name)
        if img_size is not None and (is_fixed or "img_size" in arguments):
            arguments["img_size"] = img_size
        if num_classes is not None:
            arguments["num_classes"] = num_classes
        arguments |= {key: value for key, value in model_kwargs.items() if value is not None}
        check_arguments(name, arguments)
        if weights and cfg is not None:
            arguments["pretrained_model_args"] = description.model_args
            cfg = cfg | weights
        if pretrained and not weights and cfg is None and not is_model_pretrained(name):
            raise ValueError(f"no weights of {name} are published; give a file with those of a ViT of the same size")
        return timm.create_model(name, pretrained=pretrained, pretrained_cfg=cfg, **arguments)
    except OSError as error:
        if not pretrained:
            raise
        raise ValueError(
            f"{source}the weights of {name} cannot be downloaded ({type(error).__name__}): check connection and disk, "
            f"or download them elsewhere and give the file"
        ) from error
    except TypeError as error:
        raise ValueError(f"{source}{name} does not take these arguments: {printable(reason(error))}") from error
    except ValueError as error:
        raise ValueError(f"{source}{error}") from error
    except KeyError as error:
        raise ValueError(f"{source}{name} cannot be built: unknown value {printable(str(error))}") from error
    except (RuntimeError, AssertionError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(f"{source}{name} cannot be built: {printable(reason(error))}") from error


def download_config(name: str) -> Path:
    """The config.json of a model on the hub, from the cache if it is there; ValueError if it cannot be had."""
    try:
        return Path(download_from_hf(name, CONFIG))
    # The package has its own errors for names, access and the network.
    except Exception as error:
        raise ValueError(
            f"hf-hub:{name} cannot be downloaded ({type(error).__name__}): check the name and the connection"
        ) from error


def _has_fixed_size(name: str) -> bool:
    known = get_pretrained_cfg(name)
    return known is not None and known.fixed_input_size


def parse_spec(text: str) -> ModelSpec:
    """Read a specification. Raises UsageError for an unknown model and for anything that is not keyword=value."""
    name, _, keywords = text.partition(":")
    check_model_name(name)
    kwargs: dict[str, Any] = {}
    # A comma inside a list, as in k=(64,32), is not followed by a keyword.
    for pair in re.split(r",(?=\s*[A-Za-z_]\w*=)", keywords) if keywords else []:
        keyword, equals, value = pair.strip().partition("=")
        if not (equals and value and keyword.isidentifier()):
            raise UsageError(f"{text}: {pair!r} is not keyword=value")
        kwargs[keyword] = _parse_value(value)
    if "img_size" in kwargs:
        raise UsageError(f"{text}: image sizes are given by --img-size, not by the model")
    checkpointing = kwargs.pop("grad_checkpointing", "none")
    if checkpointing not in CHECKPOINTING:
        raise UsageError(f"{text}: grad_checkpointing takes {one_of(CHECKPOINTING)}, not {checkpointing!r}")
    return ModelSpec(text, name, kwargs, checkpointing)


def build(
    spec: ModelSpec, img_size: tuple[int, int], *, device: Literal["cpu", "meta"] = "cpu"
) -> VisionTransformer | Eva:
    """Build the model for images of (height, width) with weights drawn from seed 0; on the meta device it has none.

    Raises UsageError, naming the specification, for unknown keywords, for values that do not fit, such as k ≥ N, and
    for a model that is not a Vision Transformer.
    """
    torch.manual_seed(0)
    try:
        check_arguments(spec.name, spec.kwargs)
        with torch.device(device):
            model = _without_weights(spec, img_size) if device == "meta" else _with_weights(spec, img_size)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(f"{spec.text} at {img_size[0]}×{img_size[1]} px: {_explain(error)}") from error
    if not isinstance(model, VisionTransformer | Eva):
        raise UsageError(f"{spec.text}: {ONLY_VITS}")
    if spec.grad_checkpointing == "mlp" and not isinstance(model, LinformerTransformer):
        raise UsageError(f"{spec.text}: only linvit's models can recompute just the mlp; take grad_checkpointing=full")
    if spec.grad_checkpointing != "none":
        model.set_grad_checkpointing("mlp" if spec.grad_checkpointing == "mlp" else True)
    return model


def _with_weights(spec: ModelSpec, img_size: tuple[int, int]) -> nn.Module:
    model: nn.Module = timm.create_model(spec.name, img_size=img_size, **spec.kwargs)
    return model


def _without_weights(spec: ModelSpec, img_size: tuple[int, int]) -> nn.Module:
    """Build on the meta device; drawing weights there takes seconds per model."""
    try:
        model: nn.Module = timm.create_model(spec.name, img_size=img_size, **{"weight_init": "skip", **spec.kwargs})
    except TypeError as error:
        # Rotary models do not have this keyword.
        if "'weight_init'" not in str(error):
            raise
        return _with_weights(spec, img_size)
    return model


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _explain(error: Exception) -> str:
    # Every model takes the keywords of the specification, but only a ViT those that are added here.
    return (
        ONLY_VITS if re.search(r"unexpected keyword argument '(img_size|weight_init)'", str(error)) else reason(error)
    )
