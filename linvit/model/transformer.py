"""The part that LinformerViT and LinformerEva share: E and F, image sizes, parameter groups, features.

`linvit.model.sharing` describes who shares E and F. E and F are exempt from weight decay: their rows start as averages
over patches, and decay would shrink every key. So is the convolution beside attention, of nine weights per channel.
Under layer-wise learning-rate decay all of them train at the head's rate, because in a fine-tuned ViT they are the new
parameters.

B batch, T tokens, D width.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices, get_device_dtype
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models import checkpoint
from timm.models.vision_transformer import feature_take_indices
from torch import Tensor, nn

from linvit.model.local import LocalConv
from linvit.model.mlp import LeanMlp
from linvit.model.projected import ProjectedAttention
from linvit.model.projections import GridSize, Projection, ProjectionInit, build_projection, maps_can_differ
from linvit.model.sharing import ProjectedLength, Share, check_share_of_fixed, length_per_layer, store_shared_once
from linvit.model.tokens import TokenLayout, mask_of_kept
from linvit.settings.fields import unknown_choice

if TYPE_CHECKING:
    # timm has no types, so a class of it has every attribute.
    from timm.models import VisionTransformer as _Model
else:
    _Model = nn.Module

Checkpointing = Literal["mlp", "full"]
_NOT_NEW = r"(?!.*\.(?:key_projection|value_projection|local)\b)"


class Embedded(NamedTuple):
    """The tokens that enter the first block, with their mask, layout and rotary embedding."""

    tokens: Tensor
    mask: Tensor | None
    # None if the tokens fill the model's own grid.
    layout: TokenLayout | None
    # Rotary embedding of all layers or of each, see `linvit.model.rotary`; None without.
    rotary: Tensor | None = None


class LinformerTransformer(_Model):
    """Base of all Vision Transformers with Linformer attention, used together with a class of timm's.

    A class inherits from this and from a model of timm, replaces the attention layers by `ProjectedAttention`, calls
    `_build_projections`, and defines `_embed` and `_block_arguments`.
    """

    def _embed(self, images: Tensor, attn_mask: Tensor | None) -> Embedded:
        """The tokens before the first block."""
        raise NotImplementedError

    def _block_arguments(self, embedded: Embedded, index: int) -> dict[str, Any]:
        """Keywords of the block `index`, except `attn_mask` and `is_causal`."""
        raise NotImplementedError

    def _attentions(self) -> list[ProjectedAttention]:
        """The attention of each layer."""
        return [module for module in self.blocks.modules() if isinstance(module, ProjectedAttention)]

    def _build_projections(
        self, k: ProjectedLength, *, kind: str, share: Share, init: ProjectionInit, local: int | None
    ) -> None:
        """Give each attention layer its E and F, and a convolution beside it if `local` is its size."""
        self.share: Share = share
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
            if local is not None:
                attention.local = LocalConv(
                    self.embed_dim, size=local, grid_size=self.patch_embed.grid_size, **get_device_dtype(self)
                )
        if shared is not None:
            store_shared_once(self)

    def _convolutions(self) -> dict[str, LocalConv]:
        """The convolutions beside attention, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, LocalConv)}

    def _named_projections(self) -> dict[str, Projection]:
        """The projections by name, without those of single heads inside another projection."""
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

        Args:
            img_size: (height, width) in pixels; None keeps it.
            patch_size: (height, width) in pixels; None keeps it.

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
        activations of the MLPs, which saves half of a block's memory for an eighth of its arithmetic. False recomputes
        nothing (on a CPU, only the GELU).
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
        embedded = self._embed(x, attn_mask)
        if output_fmt == "NCHW" and embedded.layout is not None and embedded.layout.kept is not None:
            raise ValueError(
                "patch dropout leaves tokens that do not fill a grid, so there are no NCHW features: pass "
                "output_fmt='NLC', or call eval() on the model"
            )
        num_blocks = last + 1 if stop_early else len(self.blocks)
        x, features = self._run_blocks(embedded, is_causal, num_blocks=num_blocks, taken=taken)
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

    def _drop_patches(self, x: Tensor, drop: nn.Module | None) -> tuple[Tensor, Tensor | None]:
        """Apply timm's patch dropout; also returns the indices (B, n) of the kept patches, or None if all were kept."""
        if not isinstance(drop, PatchDropout | PatchDropoutWithIndices):
            return x, None
        return patch_dropout_forward(x, drop.prob, drop.num_prefix_tokens, drop.ordered, drop.training)

    def _embedded(
        self,
        images: Tensor,
        tokens: Tensor,
        kept: Tensor | None,
        attn_mask: Tensor | None,
        rotary: Tensor | None = None,
    ) -> Embedded:
        """The tokens of images, of which patch dropout kept `kept`."""
        # The grid of these images may differ from the model's.
        grid_size = self.patch_embed.dynamic_feat_size(images.shape[-2:]) if self.dynamic_img_size else None
        if kept is None:
            return Embedded(tokens, attn_mask, None if grid_size is None else TokenLayout(grid_size), rotary)
        layout = TokenLayout(grid_size or self.patch_embed.grid_size, kept)
        mask = None if attn_mask is None else mask_of_kept(attn_mask, layout, self.num_prefix_tokens)
        return Embedded(tokens, mask, layout, rotary)

    def _run_blocks(
        self, embedded: Embedded, is_causal: bool, *, num_blocks: int | None = None, taken: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens after the first `num_blocks` blocks (None for all), and after each block whose index is in `taken`."""
        x, features = embedded.tokens, []
        for index, block in enumerate(itertools.islice(self.blocks, num_blocks)):
            arguments = dict(attn_mask=embedded.mask, is_causal=is_causal, **self._block_arguments(embedded, index))
            x = checkpoint(block, x, **arguments) if self.grad_checkpointing else block(x, **arguments)
            if index in taken:
                features.append(x)
        return x, features

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
