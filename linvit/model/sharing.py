"""Sharing of E and F, projected lengths of layers and heads, and their form in state dicts.

| share       | parameters                                        | paper (section 4)   |
|-------------|---------------------------------------------------|---------------------|
| `none`      | E and F for every head of every layer             | none                |
| `headwise`  | E and F for every layer                           | headwise sharing    |
| `kv`        | one E for every layer, for keys and values alike  | key-value sharing   |
| `layerwise` | one E for all layers, heads, keys and values      | layerwise sharing   |

A projection that follows from k and the grid alone (`avgpool`, `maxpool`, `dct`) is the same for every head, and for E
and F. It can be used with `kv` and `layerwise`, and with `none` if each head has a k of its own.

A layerwise E is a submodule of every layer. In the state dict it appears once, under the first layer's name; the names
of the other layers are aliases. `checkpoint_filter_fn` fits checkpoints of other sizes, and of plain ViTs, to a model.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any, Literal

from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_checkpoint_filter_fn
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor, nn

from linvit.model.local import LocalConv
from linvit.model.projections import IdentityProjection, MatrixProjection, Projection
from linvit.model.projections.base import is_list_of_lengths, parse_length
from linvit.model.stem import ConvPatchEmbed
from linvit.settings.fields import unknown_choice

Share = Literal["none", "headwise", "kv", "layerwise"]
SHARES: tuple[str, ...] = ("none", "headwise", "kv", "layerwise")
# One length; one per layer (None for ordinary attention there); or, with share="none", one per layer and head.
ProjectedLength = int | Sequence[int | Sequence[int] | None]


def plain_lengths(k: ProjectedLength) -> int | list[int | list[int] | None]:
    """`k` as Python ints and lists. Raises ValueError, quoting the value, for anything that is not a length."""
    if k is None:
        raise ValueError("k=None is not a length: ordinary attention in all layers is projection='identity'")
    if not is_list_of_lengths(k):
        return parse_length(k)
    return [
        None
        if length is None
        else [parse_length(each) for each in length]
        if is_list_of_lengths(length)
        else parse_length(length)
        for length in k
    ]


def length_per_layer(k: ProjectedLength, *, depth: int, share: Share) -> list[int | list[int] | None]:
    """`k` with one entry per layer.

    Raises ValueError for an unknown `share`, a wrong number of layers, and a k that `share` excludes.
    """
    if share not in SHARES:
        raise ValueError(unknown_choice("share", share, SHARES))
    lengths = plain_lengths(k)
    if isinstance(lengths, int):
        return [lengths] * depth
    if len(lengths) != depth:
        raise ValueError(f"k names {len(lengths)} layers, but the model has {depth}; give one k, or one per layer")
    if share != "none" and any(isinstance(length, list) for length in lengths):
        raise ValueError(f"one k per head needs share='none': with share={share!r} all heads use the same E")
    distinct = {length for length in lengths if isinstance(length, int)}
    if share == "layerwise" and len(distinct) > 1:
        raise ValueError(f"share='layerwise' means one E for all layers, so one k; got {sorted(distinct)}")
    return lengths


def check_share_of_fixed(kind: str, share: Share, lengths: Sequence[int | list[int] | None]) -> None:
    """Raise ValueError if `share` needs several maps of a `kind` that is the same for every head, and for E and F."""
    if share == "headwise" or (share == "none" and any(isinstance(length, int) for length in lengths)):
        raise ValueError(
            f"projection={kind!r} follows from k and the grid alone, so with share={share!r} all maps would be the "
            f"same: use share='kv' or 'layerwise', or share='none' with one k per head in every layer"
        )


def check_pair(key: Projection | None, value: Projection | None, *, num_heads: int) -> None:
    """Raise ValueError if E `key` and F `value` (None for E as well) cannot be used together in one attention layer.

    Two kinds of matrix can, on the same grid and with the same number of rows in each head.
    """
    if key is None:
        if value is not None:
            raise ValueError("value_projection (F) needs a key_projection (E): pass E too, or neither")
        return
    for name, projection in (("key_projection", key), ("value_projection", value)):
        if projection is not None and projection.num_maps not in (1, num_heads):
            raise ValueError(
                f"{name} has {projection.num_maps} maps for {num_heads} heads: build it with num_maps=1 or {num_heads}"
            )
    if value is None:
        return
    if _family(key) != _family(value):
        raise ValueError(
            f"key_projection {key.kind!r} and value_projection {value.kind!r} do not go together: use two "
            "matrices on the patches, or two projections of the same kind"
        )
    if key.grid_size != value.grid_size:
        raise ValueError(f"key_projection is for a grid {key.grid_size}, value_projection for {value.grid_size}")
    key_lengths, value_lengths = (each.lengths * (num_heads // each.num_maps) for each in (key, value))
    if key_lengths != value_lengths:
        raise ValueError(
            f"key_projection has k={_compact(key_lengths)}, value_projection k={_compact(value_lengths)}: "
            "every projected key needs a value"
        )


def _family(projection: Projection) -> str:
    is_matrix = isinstance(projection, MatrixProjection) and not isinstance(projection, IdentityProjection)
    return "matrix" if is_matrix else projection.kind


def _compact(lengths: list[int]) -> int | list[int]:
    """One number if all heads have the same length."""
    return lengths[0] if len(set(lengths)) == 1 else lengths


_logger = logging.getLogger(__name__)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapt a checkpoint of a linvit model, a timm ViT or a timm `Eva` to `model`, a LinformerViT or LinformerEva.

    Names are those of linvit, of timm, or of an original that timm reads (DINOv3, Perception Encoder, EVA, …). Patch
    and position embeddings are resampled as in timm, E and F by overlap area. `model` takes over the shapes that a
    checkpoint's E and F fix, such as the rows and columns of `separable`. A checkpoint without E and F comes from a
    plain ViT: the model keeps its own, and a warning is logged; likewise for convolutions beside attention. Raises
    ValueError if the shapes do not fit the grid, and if only one of the two has a convolutional stem.
    """
    _check_stem(state_dict, model)
    timms_filter = eva_checkpoint_filter_fn if isinstance(model, Eva) else vit_checkpoint_filter_fn
    return _fit_projections(timms_filter(state_dict, model), model)


def _fit_projections(out: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    convolutions = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, LocalConv)}
    lacking = convolutions.keys() - out.keys()
    if lacking:
        _logger.warning(
            "the checkpoint has no convolutions beside attention: %d keep their initial zeros", len(lacking)
        )
        out.update({name: convolutions[name].weight.detach().clone() for name in lacking})
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


def _check_stem(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    has_stem = isinstance(getattr(model, "patch_embed", None), ConvPatchEmbed)
    if has_stem and "patch_embed.proj.weight" in state_dict:
        raise ValueError("its patch embedding is one matrix, and the model has stem='conv': leave stem out")
    if not has_stem and "patch_embed.proj.0.conv.weight" in state_dict:
        raise ValueError("it has a convolutional stem, and the model has none: set stem='conv'")


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
