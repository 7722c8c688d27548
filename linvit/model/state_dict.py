"""State dicts of LinformerViT: a shared E is stored once, and checkpoints of other models are adapted.

A layerwise E is a submodule of every layer. In the state dict it appears once, under the first layer's name; the names
of the other layers are aliases.
"""

import itertools
import logging
from typing import Any

from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor, nn

from linvit.model.projections import Projection

_logger = logging.getLogger(__name__)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapt a checkpoint of a LinformerViT or a timm ViT to `model`, a LinformerViT.

    Patch and position embeddings are resampled as in timm, E and F by overlap area. `model` takes over the shapes that
    a checkpoint's E and F fix, such as the rows and columns of `separable`. A checkpoint without E and F comes from a
    plain ViT: the model keeps its own, and a warning is logged. Raises ValueError if the shapes do not fit the grid.
    """
    out: dict[str, Tensor] = vit_checkpoint_filter_fn(state_dict, model)
    projections = {name: module for name, module in model.named_modules() if isinstance(module, Projection)}
    for name, module in projections.items():
        module.adopt({key.removeprefix(f"{name}."): value for key, value in out.items() if key.startswith(f"{name}.")})
    own = {
        f"{name}.{parameter}": (module, parameter, value)
        for name, module in projections.items()
        for parameter, value in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        )
    }
    if own and out.keys().isdisjoint(own):
        _logger.warning("the checkpoint has no projections: %d tensors of E and F keep their initial values", len(own))
        return {**out, **{key: value.detach().clone() for key, (_, _, value) in own.items()}}
    for key, (module, parameter, _) in own.items():
        if key in out:
            out[key] = module.remap_weight(parameter, out[key], module.grid_size)
    return out


def store_shared_once(model: nn.Module) -> None:
    """Make `model` save tensors that several layers share under one name, and load them from it."""
    model.register_state_dict_post_hook(_drop_aliases)
    model.register_load_state_dict_pre_hook(_add_aliases)
    model.register_load_state_dict_post_hook(_report_once)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Maps every further name of a shared parameter or buffer to its first name."""
    names: dict[int, str] = {}
    return {
        name: names[id(parameter)]
        for name, parameter in itertools.chain(
            model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
        )
        if names.setdefault(id(parameter), name) != name
    }


def _drop_aliases(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for alias in _aliases(model):
        state_dict.pop(prefix + alias, None)


def _add_aliases(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for alias, name in _aliases(model).items():
        if prefix + name in state_dict:
            state_dict.setdefault(prefix + alias, state_dict[prefix + name])


def _report_once(model: nn.Module, incompatible_keys: Any) -> None:
    """Report a shared tensor that a checkpoint lacks only once."""
    aliases = tuple(_aliases(model))
    incompatible_keys.missing_keys[:] = [key for key in incompatible_keys.missing_keys if not key.endswith(aliases)]
