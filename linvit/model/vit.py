"""LinformerViT: timm's VisionTransformer with Linformer attention, and who owns E and F.

| share       | parameters                                        | paper (section 4)   |
|-------------|---------------------------------------------------|---------------------|
| `none`      | E and F for every head of every layer             | none                |
| `headwise`  | E and F for every layer                           | headwise sharing    |
| `kv`        | one E for every layer, for keys and values alike  | key-value sharing   |
| `layerwise` | one E for all layers, heads, keys and values      | layerwise sharing   |

A layerwise E is a submodule of every layer, and once in `parameters()` and in the state dict, under the first layer's
name.

E and F are exempt from weight decay: their rows start as averages over patches, and decay would shrink every key. Under
layer-wise learning-rate decay they train at the rate of the head: in a fine-tuned ViT they are the new parameters.

A projection that follows from k and the grid alone (`avgpool`, `maxpool`, `dct`) is the same for every head, and for E
and F: it goes with `kv` and `layerwise`, and with `none` where each head has a k of its own.
"""

import copy
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from timm.layers import PatchDropout, get_device_dtype
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models import VisionTransformer, checkpoint
from timm.models.vision_transformer import Block, feature_take_indices
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor, nn

from linvit.model.attention import LinformerAttention
from linvit.model.blocks import takes_layout, with_layout
from linvit.model.mlp import LayerLike, LeanMlp, mlp_class, norm_with_eps
from linvit.model.projections import GridSize, Projection, ProjectionInit, build_projection, maps_can_differ
from linvit.model.projections.base import are_several, whole_length
from linvit.model.tokens import TokenLayout, mask_of_kept
from linvit.settings.fields import none_of

_logger = logging.getLogger(__name__)

Share = Literal["none", "headwise", "kv", "layerwise"]
Checkpointing = Literal["mlp", "full"]
SHARES: tuple[str, ...] = ("none", "headwise", "kv", "layerwise")
# One length; one per layer (None: ordinary attention there); or, with share="none", one per layer and head.
ProjectedLength = int | Sequence[int | Sequence[int] | None]
_NORM_LAYERS = ("norm_layer", "embed_norm_layer")
_NOT_IN_A_PROJECTION = r"(?!.*\.(?:key|value)_projection\b)"


class LinformerViT(VisionTransformer):
    """A timm `VisionTransformer` whose attention layers are Linformer projections.

    Takes every keyword of timm's class except `attn_layer`, and:

    Args:
        k: projected length: an int; or one per layer, where None means ordinary attention in that layer; or, with
            `share="none"`, one per layer and head. Must be below the number of patches.
        projection: kind of E and F, a key of `linvit.PROJECTIONS`; `"identity"` is ordinary attention throughout.
        share: who shares E and F, see the module's table.
        projection_init: `"pool"`, `"average"` or `"jl"`, see `Projection`.
        norm_eps: of every normalisation layer; None leaves timm's own.
        mlp_layer: a class as in timm, or a name: `"mlp"`, `"swiglu"`, `"swiglu_packed"`.
        block_fn: timm's `Block`, `ResPostBlock`, or a block with one `attn_layer`. With `dynamic_img_size` or
            `patch_drop_rate`, its `forward` must take `layout` and pass it to that layer, as `linvit.model.blocks` does.

    Raises ValueError where k does not shorten the sequence (here and on every change of size) and for sharings that
    do not go together with k; TypeError for an unknown keyword.
    """

    def __init__(
        self,
        *args: Any,
        k: ProjectedLength = 64,
        projection: str = "separable",
        share: Share = "kv",
        projection_init: ProjectionInit = "pool",
        norm_eps: float | None = None,
        mlp_layer: LayerLike = "mlp",
        block_fn: Callable[..., nn.Module] = Block,
        weight_init: Literal["skip", "reset", "jax", "jax_nlhb", "moco", ""] = "",
        **vit_kwargs: Any,
    ) -> None:
        if "attn_layer" in vit_kwargs:
            raise TypeError("LinformerViT brings its own attention: choose it by projection=, not by attn_layer=")
        if norm_eps is not None:
            own = {"norm_layer": None} | vit_kwargs
            vit_kwargs |= {name: norm_with_eps(own[name], norm_eps) for name in _NORM_LAYERS if name in own}
        super().__init__(
            *args,
            attn_layer=LinformerAttention,
            block_fn=with_layout(block_fn),
            mlp_layer=mlp_class(mlp_layer),
            weight_init="skip",
            **vit_kwargs,
        )
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        self.share = share
        self._build_projections(k, projection, projection_init)
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _build_projections(self, k: ProjectedLength, kind: str, init: ProjectionInit) -> None:
        if self.share not in SHARES:
            raise ValueError(none_of("share", self.share, SHARES))
        attentions = self._attentions()
        num_heads = attentions[0].num_heads
        lengths = _length_per_layer(k, depth=len(attentions), share=self.share)
        can_differ = maps_can_differ(kind)
        if not can_differ:
            _check_share_of_fixed(kind, self.share, lengths)

        def build(length: int | Sequence[int], num_maps: int) -> Projection:
            return build_projection(
                kind,
                k=length,
                grid_size=self.patch_embed.grid_size,
                num_maps=num_maps,
                dim=self.embed_dim,
                init=init,
                **get_device_dtype(self),
            )

        linformer_lengths = [length for length in lengths if length is not None]
        everyones = build(linformer_lengths[0], 1) if self.share == "layerwise" and linformer_lengths else None
        for attention, length in zip(attentions, lengths):
            attention.num_prefix_tokens = self.num_prefix_tokens
            if length is None:
                attention.set_projections(None)
            elif everyones is not None:
                attention.set_projections(everyones)
            else:
                num_maps = num_heads if self.share == "none" else 1
                value = build(length, num_maps) if self.share != "kv" and can_differ else None
                attention.set_projections(build(length, num_maps), value)
        if everyones is not None:
            self.register_state_dict_post_hook(_drop_aliases)
            self.register_load_state_dict_pre_hook(_add_aliases)
            self.register_load_state_dict_post_hook(_report_once)

    def _attentions(self) -> list[LinformerAttention]:
        attentions = [module for module in self.blocks.modules() if isinstance(module, LinformerAttention)]
        if len(attentions) != len(self.blocks):
            raise ValueError("block_fn must be a block with one `attn_layer`, such as timm's Block")
        if self.dynamic_img_size or isinstance(self.patch_drop, PatchDropout):
            for block in self.blocks:
                if not takes_layout(block):
                    raise ValueError(
                        f"{type(block).__name__}.forward takes no `layout`, which dynamic_img_size and patch_drop_rate "
                        f"need: let it take one and pass it to its attention layer, as linvit.model.blocks.LayoutBlock does"
                    )
        return attentions

    def _named_projections(self) -> dict[str, Projection]:
        """Every projection that has parameters or a grid of its own, outermost, by its name."""
        found: dict[str, Projection] = {}
        for name, module in self.named_modules():
            if isinstance(module, Projection) and not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = module
        return found

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        own = {
            f"{name}.{parameter}"
            for name, projection in self._named_projections().items()
            for parameter, _ in projection.named_parameters()
        }
        return set(super().no_weight_decay()) | own

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters by depth, E and F in the last one, which is the head's."""
        groups: dict[str, Any] = super().group_matcher(coarse=coarse)
        # What no expression matches comes last.
        blocks = [(f"{_NOT_IN_A_PROJECTION}{expression}", suffix) for expression, suffix in groups["blocks"]]
        return groups | {"blocks": blocks}

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change image or patch size: position embedding resampled as in timm, E and F remapped by overlap area."""
        projections = self._named_projections().values()
        new_grid = self._grid_at(img_size, patch_size)
        for projection in projections:
            projection.check_grid_size(new_grid)
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for projection in projections:
            if projection.grid_size != self.patch_embed.grid_size:
                projection.set_grid_size(self.patch_embed.grid_size)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool | Checkpointing = True) -> None:
        """What the backward pass computes again instead of keeping it.

        "full" (or True): whole blocks, which then keep their input alone. "mlp": the hidden activations of the MLPs,
        half of what a block keeps for an eighth of its arithmetic. False: nothing, on a CPU
        the GELU.
        """
        if enable not in (True, False, "mlp", "full"):
            raise ValueError(none_of("gradient checkpointing", enable, get_args(Checkpointing)))
        super().set_grad_checkpointing(enable in (True, "full"))
        mlps = [module for module in self.blocks.modules() if isinstance(module, LeanMlp)]
        if enable == "mlp" and not mlps:
            raise ValueError("gradient checkpointing 'mlp' is for models with the default mlp_layer: choose 'full'")
        for mlp in mlps:
            mlp.recompute = "hidden" if enable == "mlp" else "activation"

    def _grid_at(self, img_size: tuple[int, int] | None, patch_size: tuple[int, int] | None) -> GridSize:
        height, width = _pair(img_size or self.patch_embed.img_size)
        patch_h, patch_w = _pair(patch_size or self.patch_embed.patch_size)
        return height // patch_h, width // patch_w

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens after the last block and norm (B, T, D); `attn_mask` as in `LinformerAttention`."""
        if torch.jit.is_scripting():
            return self.norm(self.blocks(self.norm_pre(self._pos_embed(self.patch_embed(x)))))
        else:
            x, attn_mask, layout = self._embed(x, attn_mask)
            x, _ = self._run_blocks(x, attn_mask, is_causal, layout)
            return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's `forward_intermediates`: tokens after the blocks `indices`, and of the last block that ran.

        At any image size if the model takes any; gradient checkpointing as in `forward_features`, with masks too.
        Patch dropout in training leaves the kept tokens, which are no map: ValueError for `output_fmt="NCHW"` then,
        and for an unknown `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"unknown output_fmt {output_fmt!r}: choose 'NCHW' or 'NLC'")
        height, width = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        taken, last = feature_take_indices(len(self.blocks), indices)
        x, attn_mask, layout = self._embed(x, attn_mask)
        if output_fmt == "NCHW" and layout is not None and layout.kept is not None:
            raise ValueError(
                "patch dropout leaves tokens that do not fill a grid, so there are no NCHW features: pass "
                "output_fmt='NLC', or call eval() on the model or on its patch_drop"
            )
        num_blocks = last + 1 if stop_early else len(self.blocks)
        x, features = self._run_blocks(x, attn_mask, is_causal, layout, num_blocks=num_blocks, taken=taken)
        if norm:
            features = [self.norm(each) for each in features]
        prefix = [each[:, : self.num_prefix_tokens] for each in features] if self.num_prefix_tokens else None
        features = [each[:, self.num_prefix_tokens :] for each in features]
        if output_fmt == "NCHW":
            features = [each.unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous() for each in features]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": features}
            if prefix is not None and return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        found = list(zip(features, prefix)) if prefix is not None and return_prefix_tokens else features
        return found if intermediates_only else (self.norm(x), found)

    def _embed(self, images: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, Tensor | None, TokenLayout | None]:
        """Tokens before the first block, the mask of those tokens, and where they lie.

        The layout is None where they fill the model's own grid.
        """
        # The grid of these images may differ from the model's.
        grid_size = self.patch_embed.dynamic_feat_size(images.shape[-2:]) if self.dynamic_img_size else None
        x, kept = self._drop_patches(self._pos_embed(self.patch_embed(images)))
        x = self.norm_pre(x)
        if kept is None:
            return x, attn_mask, None if grid_size is None else TokenLayout(grid_size)
        layout = TokenLayout(grid_size or self.patch_embed.grid_size, kept)
        return x, None if attn_mask is None else mask_of_kept(attn_mask, layout, self.num_prefix_tokens), layout

    def _run_blocks(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        layout: TokenLayout | None,
        *,
        num_blocks: int | None = None,
        taken: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens after the first `num_blocks` blocks (None: all), and after those whose index is in `taken`."""
        where = {} if layout is None else {"layout": layout}
        features = []
        for index, block in enumerate(itertools.islice(self.blocks, num_blocks)):
            if self.grad_checkpointing:
                x = checkpoint(block, x, attn_mask=attn_mask, is_causal=is_causal, **where)
            else:
                x = block(x, attn_mask=attn_mask, is_causal=is_causal, **where)
            if index in taken:
                features.append(x)
        return x, features

    def _drop_patches(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """timm's patch dropout, and which patches (B, n) it kept; None where it dropped nothing."""
        drop = self.patch_drop
        if not isinstance(drop, PatchDropout):
            return x, None
        return patch_dropout_forward(x, drop.prob, drop.num_prefix_tokens, drop.ordered, drop.training)

    def __prepare_scriptable__(self) -> nn.Module:
        # TorchScript swaps modules in place, and would do so in the model that trains on.
        return copy.deepcopy(self)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Where layers share one projection: each further name of a parameter or buffer, and the name that counts."""
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
    """A shared projection that a checkpoint lacks is missing once."""
    aliases = tuple(_aliases(model))
    incompatible_keys.missing_keys[:] = [key for key in incompatible_keys.missing_keys if not key.endswith(aliases)]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: LinformerViT) -> dict[str, Tensor]:
    """Fit a checkpoint of this or of a timm ViT to `model`: patch and position embedding as timm does, E and F by area.

    What a checkpoint's E and F fix beside their values (the rows and columns of a separable one) `model` takes on. A
    checkpoint that has no E and F at all is a plain ViT's: the model's own are kept, and a warning says so.
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
        _logger.warning("the checkpoint has no projections: %d tensors of E and F start fresh", len(own))
        return {**out, **{key: value.detach().clone() for key, (_, _, value) in own.items()}}
    for key, (module, parameter, _) in own.items():
        if key in out:
            out[key] = module.remap_weight(parameter, out[key], module.grid_size)
    return out


def plain_lengths(k: ProjectedLength) -> int | list[int | list[int] | None]:
    """`k` in Python's own ints and lists; ValueError, naming it, for what is no length."""
    if k is None:
        raise ValueError("k=None: ordinary attention in all layers is projection='identity'; a length is as k=16")
    if not are_several(k):
        return whole_length(k)
    return [
        None
        if length is None
        else [whole_length(each) for each in length]
        if are_several(length)
        else whole_length(length)
        for length in k
    ]


def _length_per_layer(k: ProjectedLength, *, depth: int, share: Share) -> list[int | list[int] | None]:
    """Check the forms that `k` can take and write it out, one entry per layer."""
    lengths = plain_lengths(k)
    if isinstance(lengths, int):
        return [lengths] * depth
    if len(lengths) != depth:
        raise ValueError(f"k names {len(lengths)} layers, but the model has {depth}")
    if share != "none" and any(isinstance(length, list) for length in lengths):
        raise ValueError(f"one k per head needs share='none': with share={share!r} all heads use the same E")
    distinct = {length for length in lengths if isinstance(length, int)}
    if share == "layerwise" and len(distinct) > 1:
        raise ValueError(f"share='layerwise' means one E for all layers, so one k; got {sorted(distinct)}")
    return lengths


def _check_share_of_fixed(kind: str, share: Share, lengths: Sequence[int | list[int] | None]) -> None:
    """Raise ValueError where `share` asks for several maps of a projection that is the same for all."""
    if share == "headwise" or (share == "none" and any(isinstance(length, int) for length in lengths)):
        raise ValueError(
            f"projection={kind!r} follows from k and the grid alone, so share={share!r} has nothing to tell apart: "
            f"use share='kv' or 'layerwise', or share='none' with one k per head in every layer"
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
