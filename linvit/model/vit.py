"""LinformerViT: timm's VisionTransformer with Linformer attention.

`linvit.model.sharing` describes who shares E and F. E and F are exempt from weight decay: their rows start as averages
over patches, and decay would shrink every key. So is the convolution beside attention, of nine weights per channel.
Under layer-wise learning-rate decay all of them train at the head's rate, because in a fine-tuned ViT they are the new
parameters.

B batch, T tokens, D width.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from timm.layers import LayerNorm, PatchDropout, get_device_dtype, get_norm_layer
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models import VisionTransformer, checkpoint
from timm.models.vision_transformer import Block, feature_take_indices
from torch import Tensor, nn

from linvit.model.attention import LinformerAttention
from linvit.model.local import LocalConv
from linvit.model.mlp import LeanMlp, MlpLayer, mlp_class
from linvit.model.projections import GridSize, Projection, ProjectionInit, build_projection, maps_can_differ
from linvit.model.sharing import ProjectedLength, Share, check_share_of_fixed, length_per_layer, store_shared_once

# Where timm keeps the filter of a model: in the module of its class.
from linvit.model.sharing import checkpoint_filter_fn as checkpoint_filter_fn
from linvit.model.stem import ConvPatchEmbed
from linvit.model.tokens import TokenLayout, mask_of_kept, takes_layout, with_layout
from linvit.settings.fields import unknown_choice

Checkpointing = Literal["mlp", "full"]
Stem = Literal["patch", "conv"]
_NORM_LAYERS = ("norm_layer", "embed_norm_layer")
_NOT_NEW = r"(?!.*\.(?:key_projection|value_projection|local)\b)"


class LinformerViT(VisionTransformer):
    """A timm `VisionTransformer` whose attention layers are Linformer projections.

    Takes every keyword of timm's class except `attn_layer`, and these:

    Args:
        k: projected length, below the number of patches: an int; or one per layer, where None means ordinary attention
            in that layer; or, with `share="none"`, one per layer and head.
        projection: kind of E and F, a key of `linvit.PROJECTIONS`; `"identity"` gives ordinary attention in all layers.
        share: who shares E and F, see the table in `linvit.model.sharing`.
        projection_init: `"pool"`, `"average"` or `"jl"`, see `Projection`.
        local: side of the kernel of a depth-wise convolution beside attention, in patches (3 is usual), see
            `linvit.model.local`; None for the paper's attention alone.
        stem: `"patch"` for timm's patch embedding, or `"conv"` for a stem of convolutions, see `linvit.model.stem`.
        norm_eps: epsilon of every normalisation layer; None keeps timm's.
        mlp_layer: a class as in timm, or a name: `"mlp"`, `"swiglu"`, `"swiglu_packed"`.
        block_fn: timm's `Block`, `ResPostBlock`, or a block with one `attn_layer`. With `dynamic_img_size` or
            `patch_drop_rate`, its `forward` must take `layout` and pass it to that layer, as those in
            `linvit.model.tokens` do.

    Raises ValueError if k does not shorten the sequence (here and on every change of size) or does not match `share`,
    and for a `stem` that is unknown or does not fit the patch; TypeError for an unknown keyword.
    """

    def __init__(
        self,
        *args: Any,
        k: ProjectedLength = 64,
        projection: str = "separable",
        share: Share = "kv",
        projection_init: ProjectionInit = "pool",
        local: int | None = None,
        stem: Stem = "patch",
        norm_eps: float | None = None,
        mlp_layer: MlpLayer = "mlp",
        block_fn: Callable[..., nn.Module] = Block,
        weight_init: Literal["skip", "reset", "jax", "jax_nlhb", "moco", ""] = "",
        **vit_kwargs: Any,
    ) -> None:
        if "attn_layer" in vit_kwargs:
            raise TypeError("LinformerViT has its own attention layer: choose it by projection=, not by attn_layer=")
        if stem not in get_args(Stem):
            raise ValueError(unknown_choice("stem", stem, get_args(Stem)))
        if stem == "conv":
            if "embed_layer" in vit_kwargs:
                raise TypeError("stem='conv' is the embedding layer: leave embed_layer= out")
            vit_kwargs["embed_layer"] = ConvPatchEmbed
        if norm_eps is not None:
            given = {"norm_layer": None} | vit_kwargs
            vit_kwargs |= {
                name: partial(get_norm_layer(given[name]) or LayerNorm, eps=norm_eps)
                for name in _NORM_LAYERS
                if name in given
            }
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
        if local is not None:
            self._add_convolutions(local)
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _build_projections(self, k: ProjectedLength, kind: str, init: ProjectionInit) -> None:
        attentions = self._attentions()
        num_heads = attentions[0].num_heads
        lengths = length_per_layer(k, depth=len(attentions), share=self.share)
        can_differ = maps_can_differ(kind)
        if not can_differ:
            check_share_of_fixed(kind, self.share, lengths)

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
        shared = build(linformer_lengths[0], 1) if self.share == "layerwise" and linformer_lengths else None
        for attention, length in zip(attentions, lengths):
            attention.num_prefix_tokens = self.num_prefix_tokens
            if length is None:
                attention.set_projections(None)
            elif shared is not None:
                attention.set_projections(shared)
            else:
                num_maps = num_heads if self.share == "none" else 1
                value = build(length, num_maps) if self.share != "kv" and can_differ else None
                attention.set_projections(build(length, num_maps), value)
        if shared is not None:
            store_shared_once(self)

    def _add_convolutions(self, size: int) -> None:
        for attention in self._attentions():
            attention.local = LocalConv(
                self.embed_dim, size=size, grid_size=self.patch_embed.grid_size, **get_device_dtype(self)
            )

    def _convolutions(self) -> dict[str, LocalConv]:
        """The convolutions beside attention, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, LocalConv)}

    def _attentions(self) -> list[LinformerAttention]:
        attentions = [module for module in self.blocks.modules() if isinstance(module, LinformerAttention)]
        if len(attentions) != len(self.blocks):
            raise ValueError("block_fn must be a block with one `attn_layer`, such as timm's Block")
        if self.dynamic_img_size or isinstance(self.patch_drop, PatchDropout):
            for block in self.blocks:
                if not takes_layout(block):
                    raise ValueError(
                        f"{type(block).__name__}.forward takes no `layout`, which dynamic_img_size and patch_drop_rate "
                        f"need: add that keyword and pass it to the attention layer, as "
                        f"linvit.model.tokens.LayoutBlock does"
                    )
        return attentions

    def _named_projections(self) -> dict[str, Projection]:
        """The projections by name; the projections of single heads inside of another are left out."""
        found: dict[str, Projection] = {}
        for name, module in self.named_modules():
            if isinstance(module, Projection) and not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = module
        return found

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        own = {
            f"{name}.{parameter}"
            for name, module in {**self._named_projections(), **self._convolutions()}.items()
            for parameter, _ in module.named_parameters()
        }
        return set(super().no_weight_decay()) | own

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters by depth, with E, F and `local` in the last group, which is the head's."""
        groups: dict[str, Any] = super().group_matcher(coarse=coarse)
        # timm puts parameters that no expression matches into the last group.
        blocks = [(f"{_NOT_NEW}{expression}", suffix) for expression, suffix in groups["blocks"]]
        return groups | {"blocks": blocks}

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change the image or patch size; the position embedding is resampled as in timm, E and F by overlap area.

        Raises ValueError, and changes nothing, if a projection cannot work on the new grid.
        """
        projections = self._named_projections().values()
        new_grid = self._grid_at(img_size, patch_size)
        for projection in projections:
            projection.check_grid_size(new_grid)
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for projection in projections:
            if projection.grid_size != self.patch_embed.grid_size:
                projection.set_grid_size(self.patch_embed.grid_size)
        for convolution in self._convolutions().values():
            convolution.grid_size = self.patch_embed.grid_size

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool | Checkpointing = True) -> None:
        """Choose what the backward pass recomputes instead of keeping it. Raises ValueError for an unknown choice.

        "full" (or True) recomputes whole blocks, which then keep only their input. "mlp" recomputes the hidden
        activations of the MLPs: half of what a block keeps, for an eighth of its arithmetic. False recomputes nothing
        (on a CPU, only the GELU).
        """
        if enable not in (True, False, "mlp", "full"):
            raise ValueError(unknown_choice("gradient checkpointing", enable, get_args(Checkpointing)))
        super().set_grad_checkpointing(enable in (True, "full"))
        mlps = [module for module in self.blocks.modules() if isinstance(module, LeanMlp)]
        if enable == "mlp" and not mlps:
            raise ValueError("gradient checkpointing 'mlp' needs the default mlp_layer: choose 'full'")
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
        """timm's `forward_intermediates`: tokens after the blocks `indices`, and after the last block that ran.

        Image sizes, masks and gradient checkpointing work as in `forward_features`. Raises ValueError for
        `indices` that are not blocks, for an unknown `output_fmt`, and for "NCHW" if patch dropout is active: the kept
        tokens do not fill a grid.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"unknown output_fmt {output_fmt!r}: choose 'NCHW' or 'NLC'")
        height, width = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        taken, last = _take_indices(len(self.blocks), indices)
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
        """The tokens before the first block, their mask, and their layout (None if they fill the model's own grid)."""
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
        """Tokens after the first `num_blocks` blocks (None for all), and after each block whose index is in `taken`."""
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
        """Apply timm's patch dropout; also returns the indices (B, n) of the kept patches, or None if all were kept."""
        drop = self.patch_drop
        if not isinstance(drop, PatchDropout):
            return x, None
        return patch_dropout_forward(x, drop.prob, drop.num_prefix_tokens, drop.ordered, drop.training)

    def __prepare_scriptable__(self) -> nn.Module:
        # TorchScript swaps modules in place, which must not happen in the model itself: its training may continue.
        return copy.deepcopy(self)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _take_indices(depth: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """timm's `feature_take_indices`: the blocks to take, and the last of them; ValueError if there are none."""
    try:
        return feature_take_indices(depth, indices)
    except (AssertionError, ValueError, TypeError):
        raise ValueError(
            f"indices={indices!r}: give a list of blocks, 0 to {depth - 1} (negative ones count from the end), or the "
            f"number of last blocks, 1 to {depth}"
        ) from None
