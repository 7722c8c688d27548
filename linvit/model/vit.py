"""LinformerViT: timm's VisionTransformer with Linformer attention.

B batch, T tokens, D width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from timm.layers import LayerNorm, PatchDropout, get_norm_layer
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from linvit.model.attention import LinformerAttention
from linvit.model.mlp import MlpLayer, mlp_class
from linvit.model.projected import ProjectedAttention
from linvit.model.projections import ProjectionInit
from linvit.model.sharing import ProjectedLength, Share

# Where timm keeps the filter of a model: in the module of its class.
from linvit.model.sharing import checkpoint_filter_fn as checkpoint_filter_fn
from linvit.model.stem import ConvPatchEmbed
from linvit.model.tokens import takes_layout, with_layout
from linvit.model.transformer import Embedded, LinformerTransformer
from linvit.settings.fields import unknown_choice

Stem = Literal["patch", "conv"]
_NORM_LAYERS = ("norm_layer", "embed_norm_layer")


class LinformerViT(LinformerTransformer, VisionTransformer):
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
        self._build_projections(k, kind=projection, share=share, init=projection_init, local=local)
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _attentions(self) -> list[ProjectedAttention]:
        attentions = super()._attentions()
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

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens after the last block and norm (B, T, D); `attn_mask` as in `LinformerAttention`."""
        if torch.jit.is_scripting():
            return self.norm(self.blocks(self.norm_pre(self._pos_embed(self.patch_embed(x)))))
        else:
            x, _ = self._run_blocks(self._embed(x, attn_mask), is_causal)
            return self.norm(x)

    def _embed(self, images: Tensor, attn_mask: Tensor | None) -> Embedded:
        x, kept = self._drop_patches(self._pos_embed(self.patch_embed(images)), self.patch_drop)
        return self._embedded(images, self.norm_pre(x), kept, attn_mask)

    def _block_arguments(self, embedded: Embedded, index: int) -> dict[str, Any]:
        return {} if embedded.layout is None else {"layout": embedded.layout}
