"""The weights of a Vision Transformer that depend on its tokens: prefix tokens and the grid of positions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.models.eva import Eva
from torch import Tensor

Size = tuple[int, int]
PATCH_EMBEDDING = "patch_embed.proj.weight"
# The names of the register tokens in timm, in DINOv2 and in DINOv3.
REGISTERS = ("reg_token", "register_tokens", "storage_tokens")


@dataclass(frozen=True)
class _Prefix:
    """The tokens before the patches."""

    has_class: bool
    has_distillation: bool
    num_registers: int

    @classmethod
    def of(cls, state_dict: Mapping[str, Tensor]) -> "_Prefix":
        registers = next((state_dict[name] for name in REGISTERS if name in state_dict), None)
        return cls(
            "cls_token" in state_dict, "dist_token" in state_dict, 0 if registers is None else registers.shape[1]
        )

    @property
    def count(self) -> int:
        return self.has_class + self.has_distillation + self.num_registers

    def __str__(self) -> str:
        tokens = [
            *(["a class token"] if self.has_class else []),
            *(["a distillation token"] if self.has_distillation else []),
            *([f"{self.num_registers} register tokens"] if self.num_registers else []),
        ]
        return " and ".join(tokens) or "no prefix tokens"


def match_prefix(model: Any, state_dict: Mapping[str, Tensor], recorded: Size | None) -> dict[str, Tensor]:
    """The weights with their prefix tokens named as the model's.

    The distillation token of DeiT, which has a position of its own, becomes the register token of a model that has one.

    Args:
        recorded: (height, width) of the images that the weights are for, if their file records it.

    Raises ValueError, naming what to set, if the prefix tokens or their positions differ.
    """
    own_state, weights = model.state_dict(), dict(state_dict)
    if PATCH_EMBEDDING not in own_state or PATCH_EMBEDDING not in weights:
        return weights
    own, saved = _Prefix.of(own_state), _Prefix.of(weights)
    if saved.has_distillation and not own.has_distillation and own.num_registers == 1 and not saved.num_registers:
        weights["reg_token"] = weights.pop("dist_token")
        saved = _Prefix.of(weights)
    if own.has_distillation and not saved.has_distillation:
        raise ValueError(f"its weights have {saved}, the model has {own}: choose a model without distillation token")
    settings = []
    num_registers = saved.num_registers + (saved.has_distillation and not own.has_distillation)
    if num_registers != own.num_registers:
        keyword = "num_reg_tokens" if isinstance(model, Eva) else "reg_tokens"
        settings.append(f"{keyword}={num_registers}")
    if saved.has_class != own.has_class:
        settings.append("class_token=true" if saved.has_class else "class_token=false global_pool=avg")
    differing = f"the model has {own}"
    has_no_positions = _lacks_prefix_positions(model, weights, saved.count, recorded)
    # Models without this argument, such as CaiT, can only have one kind of positions.
    own_choice = getattr(model, "no_embed_class", has_no_positions)
    if saved.count and has_no_positions is not None and has_no_positions != own_choice:
        differing = differing if settings else "in the model these have other positions"
        settings.append(f"no_embed_class={str(has_no_positions).lower()}")
    if not settings:
        return weights
    remedy = f"set --model-kwargs {' '.join(settings)}"
    if saved.has_distillation:
        distilled = "choose a model with 'distilled' in its name"
        # Without the second classifier the outputs would be others.
        as_register = f", or {remedy} to keep the token as a register" if "head_dist.weight" not in weights else ""
        remedy = distilled + as_register
    raise ValueError(f"its weights have {saved}, {differing}: {remedy}")


def source_size(model: Any, state_dict: Mapping[str, Tensor], recorded: Size | None) -> tuple[Size | None, str | None]:
    """(height, width) in pixels of the images that weights are for, and a sentence if that had to be assumed.

    It is the size recorded in the file, if the number of positions agrees; else the size implied by its E and F; else
    the model's own size, if it has as many patches; else a square. None for a model without positions on a grid.

    Raises ValueError if none of these has as many patches as the weights.
    """
    if not _has_grid(model, state_dict):
        return recorded, None
    own = model.patch_embed.grid_size
    # The model's own positions determine how many prefix tokens have one.
    count = state_dict["pos_embed"].shape[1] - (model.pos_embed.shape[1] - _count(own))
    height, width = state_dict[PATCH_EMBEDDING].shape[-2:]
    certain, likely = _grids(model, state_dict, recorded)
    if recorded is not None and count > 0:
        # Behind convolutions, as in a hybrid model, the kernel is smaller than a patch.
        patch = math.sqrt(_count(recorded) / count)
        certain.append((round(recorded[0] / patch), round(recorded[1] / patch)))
    grid = next((grid for grid in certain if _count(grid) == count), None)
    if grid is not None:
        return (grid[0] * height, grid[1] * width), None
    side = math.isqrt(max(count, 0))
    fitting = list(dict.fromkeys(grid for grid in [*likely, (side, side)] if _count(grid) == count > 0))
    if not fitting:
        raise ValueError(
            f"it does not record its image size, and its {count:,} patches are neither a square nor the model's "
            f"{own[0]}×{own[1]}: choose the image size that it was trained with"
        )
    grid = fitting[0]
    assumed = f"it does not record its image size; its {count:,} patches are taken as a {grid[0]}×{grid[1]} grid"
    return (grid[0] * height, grid[1] * width), None if fitting == [own] else assumed


def _lacks_prefix_positions(
    model: Any, weights: Mapping[str, Tensor], num_prefix: int, recorded: Size | None
) -> bool | None:
    """Whether prefix tokens have no positions, judged by the number of patches; None if both are possible."""
    if not _has_grid(model, weights):
        return None
    certain, likely = _grids(model, weights, recorded)
    counts = {_count(grid) for grid in [*certain, *likely]}
    with_them, without = (
        count in counts or (count > 0 and math.isqrt(count) ** 2 == count)
        for count in (weights["pos_embed"].shape[1] - num_prefix, weights["pos_embed"].shape[1])
    )
    return without if with_them != without else None


def _has_grid(model: Any, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether weights and model have a position for every patch of a grid."""
    positions, kernel = state_dict.get("pos_embed"), state_dict.get(PATCH_EMBEDDING)
    if positions is None or positions.ndim != 3 or kernel is None or kernel.ndim != 4:
        return False
    own, grid = getattr(model, "pos_embed", None), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return isinstance(own, Tensor) and own.ndim == 3 and grid is not None and own.shape[1] >= _count(grid)


def _grids(model: Any, state_dict: Mapping[str, Tensor], recorded: Size | None) -> tuple[list[Size], list[Size]]:
    """The grids that the file records or implies, and those that the model suggests: its own and its default size's."""
    height, width = state_dict[PATCH_EMBEDDING].shape[-2:]
    default = model.pretrained_cfg.get("input_size", (3, 0, 0))[1:]
    known = [] if recorded is None else [(recorded[0] // height, recorded[1] // width)]
    projected = _grid_of_projections(state_dict)
    suggested = [tuple(model.patch_embed.grid_size), (default[0] // height, default[1] // width)]
    return known if projected is None else [*known, projected], suggested


def _count(grid: Size) -> int:
    return grid[0] * grid[1]


def _grid_of_projections(state_dict: Mapping[str, Tensor]) -> Size | None:
    """The patch grid that E or F lies on; None without E and F, or if they hold for every grid."""
    for name, tensor in state_dict.items():
        if "key_projection." not in name:
            continue
        across = state_dict.get(name.replace(".weight_h", ".weight_w"))
        if name.endswith(".weight_h") and across is not None:
            return tensor.shape[-1], across.shape[-1]
        if name.endswith(".weight") and tensor.ndim == 4:
            return tensor.shape[-2], tensor.shape[-1]
    return None
