"""Class activation maps: what each patch adds to the logit of each class, without gradients.

The classifier is linear in the pooled tokens p, except for the scale σ(p) of the norm before it: logit_c = w_c·p / σ(p)
+ b_c. The pool is a sum over patches, p = Σ_j u_j. For an average, u_j is x_j / N; for a maximum, it has those channels
of x_j that are the largest of all patches; "avgmax" takes half of each. So w_c·u_j / σ(p) is what patch j adds to the
logit, and a map adds up to the logit, less a constant of the class and what pooled prefix tokens add. For an average
this is the class activation map of Zhou et al. 2016 (arXiv 1512.04150), equation 2, with the scale of the norm.

B batch, T tokens, N patches, D width, C classes.
"""

from typing import Any

import torch
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn

POOLS = ("avg", "max", "avgmax")


def check_class_maps(model: nn.Module) -> None:
    """Raise ValueError unless the logits of the model are sums over patches."""
    if not isinstance(model, VisionTransformer | Eva):
        raise ValueError(f"{type(model).__name__} is not a Vision Transformer, so it has no class activation maps")
    if model.global_pool not in POOLS or model.attn_pool is not None:
        raise ValueError(
            f"class activation maps need logits that are sums over patches, and pooling {model.global_pool!r} does not "
            f"give them; train with --gp {', '.join(POOLS[:-1])} or {POOLS[-1]}"
        )
    if not isinstance(model.head, nn.Linear) or not isinstance(model.fc_norm, nn.LayerNorm | nn.Identity):
        raise ValueError(
            f"class activation maps need a linear classifier, with a LayerNorm before it or none, not "
            f"{type(model.fc_norm).__name__} and {type(model.head).__name__}"
        )


def class_maps(model: Any, tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """What each patch adds to each logit, (B, C, h, w), in single precision at least.

    Args:
        model: one that `check_class_maps` accepts, in evaluation mode.
        tokens: what `model.forward_features` returns, (B, T, D).
        grid_size: (h, w) of the patches.
    """
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if not getattr(model, "pool_include_prefix", False):
        tokens = tokens[:, model.num_prefix_tokens :]
    shares = _shares(tokens, model.global_pool)  # (B, N or T, D)
    weights = model.head.weight.to(tokens.dtype)  # (C, D)
    norm = model.fc_norm
    if isinstance(norm, nn.LayerNorm):
        if norm.weight is not None:
            weights = weights * norm.weight.to(tokens.dtype)
        # The norm subtracts the mean over channels.
        weights = weights - weights.mean(dim=1, keepdim=True)
        variance = shares.sum(dim=1, keepdim=True).var(dim=2, unbiased=False, keepdim=True)
        shares = shares / (variance + norm.eps).sqrt()
    maps = shares @ weights.mT
    return maps[:, -grid_size[0] * grid_size[1] :].mT.unflatten(2, grid_size)


def forward_with_maps(model: Any, images: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The logits (B, C) of images (B, 3, height, width), and their `class_maps` (B, C, h, w)."""
    tokens = model.forward_features(images)
    return model.forward_head(tokens), class_maps(model, tokens, grid_size)


def patch_grid(model: Any, img_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in images of (height, width)."""
    rows, columns = model.patch_embed.dynamic_feat_size(img_size)
    return int(rows), int(columns)


def _shares(tokens: Tensor, pool: str) -> Tensor:
    """What each token adds to the pooled tokens: (B, T, D), whose sum over T is the pool."""
    average = tokens / tokens.shape[1]
    if pool == "avg":
        return average
    is_largest = (tokens == tokens.amax(dim=1, keepdim=True)).to(tokens.dtype)
    largest = tokens * is_largest / is_largest.sum(dim=1, keepdim=True)
    return largest if pool == "max" else (average + largest) / 2
