"""LinformerEva: timm's rotary Vision Transformers (DINOv3, EVA-02, Perception Encoder, …) with Linformer attention.

timm implements all of them as `Eva`. `linvit.model.rotary` describes the attention layers.

B batch, T tokens, D width.
"""

from functools import partial
from typing import Any, Literal

import torch
from timm.layers import LayerNorm, Mlp, apply_keep_indices_nlc, get_norm_layer
from timm.models.eva import Eva
from torch import Tensor, nn

from linvit.model.mlp import LeanMlp
from linvit.model.projections import ProjectionInit
from linvit.model.rotary import Rotary, make_projectable
from linvit.model.sharing import ProjectedLength, Share

# Where timm keeps the filter of a model: in the module of its class.
from linvit.model.sharing import checkpoint_filter_fn as checkpoint_filter_fn
from linvit.model.transformer import Embedded, LinformerTransformer
from linvit.settings.fields import unknown_choice


def rotary_of_layers(model: Any) -> list[Tensor | None]:
    """The rotary embedding of each layer of a Vision Transformer at its own image size, see `Rotary`; None without."""
    rope = model.rope if isinstance(model, Eva) else None
    if rope is None:
        return [None] * len(model.blocks)
    embed = rope.get_embed(shape=list(model.patch_embed.grid_size))
    return list(embed) if model.rope_mixed else [embed] * len(model.blocks)


class LinformerEva(LinformerTransformer, Eva):
    """A timm `Eva` whose attention layers are Linformer projections.

    Takes every keyword of timm's class, where `norm_layer` may be a name; k, projection, share, projection_init and
    local of `LinformerViT`; and these:

    Args:
        norm_eps: epsilon of every normalisation layer; None keeps that of `norm_layer`.
        weight_init: "skip" draws no weights, for a model on the meta device; "" draws timm's.

    Raises ValueError if k does not shorten the sequence (here and on every change of size) or does not match `share`.
    """

    def __init__(
        self,
        *args: Any,
        k: ProjectedLength = 64,
        projection: str = "separable",
        share: Share = "kv",
        projection_init: ProjectionInit = "pool",
        local: int | None = None,
        norm_layer: Any = LayerNorm,
        norm_eps: float | None = None,
        weight_init: Literal["skip", ""] = "",
        **eva_kwargs: Any,
    ) -> None:
        if weight_init not in ("skip", ""):
            raise ValueError(unknown_choice("weight_init", weight_init, ("skip", "")))
        # timm's constructor draws the weights.
        self._draws_weights = weight_init == ""
        norm_layer = get_norm_layer(norm_layer)
        if norm_eps is not None:
            norm_layer = partial(norm_layer, eps=norm_eps)
        super().__init__(*args, norm_layer=norm_layer, **eva_kwargs)
        # timm's model drops patches before their positions are recorded.
        self.drop_patches: nn.Module | None = self.patch_drop  # type: ignore[has-type]
        self.patch_drop = None
        for block in self.blocks:
            make_projectable(block.attn)
            if type(block.mlp) is Mlp:
                # The same layers, computed with less memory.
                block.mlp.__class__ = LeanMlp
        self._build_projections(k, kind=projection, share=share, init=projection_init, local=local)
        self._draws_weights = True

    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw fresh weights, as timm does."""
        if self._draws_weights:
            super().init_weights(needs_reset=needs_reset)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens after the last block and norm (B, T, D); `attn_mask` as in `LinformerAttention`."""
        if torch.jit.is_scripting():
            x, rope = self._pos_embed(self.patch_embed(x))
            x = self.norm_pre(x)
            for index, block in enumerate(self.blocks):
                if rope is None or not self.rope_mixed:
                    x = block(x, rope=rope)
                else:
                    x = block(x, rope=rope[index])
            return self.norm(x)
        else:
            x, _ = self._run_blocks(self._embed(x, attn_mask), is_causal)
            return self.norm(x)

    def _embed(self, images: Tensor, attn_mask: Tensor | None) -> Embedded:
        x, rotary = self._pos_embed(self.patch_embed(images))
        x, kept = self._drop_patches(x, self.drop_patches)
        if rotary is not None and kept is not None:
            rotary = apply_keep_indices_nlc(x, rotary, kept)
            # (B, depth, H, n, 2d) by layer, or (B, n, 2d) for every head.
            rotary = rotary.transpose(0, 1) if self.rope_mixed else rotary.unsqueeze(1)
        return self._embedded(images, self.norm_pre(x), kept, attn_mask, rotary)

    def _block_arguments(self, embedded: Embedded, index: int) -> dict[str, Any]:
        rotary = embedded.rotary
        if rotary is not None and self.rope_mixed:
            rotary = rotary[index]
        return {"rope": rotary if embedded.layout is None else Rotary(rotary, embedded.layout)}
