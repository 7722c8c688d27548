"""The tokens between two layers, of the original model and of the converted one, on the images of the fit.

n images, the last `num_held_out` of which no weight is fitted to; P prefix tokens, T tokens, D width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor

# Of a layer's error, the share of prefix tokens: one among a thousand would count for nothing, and a classifier may
# read nothing else.
PREFIX_SHARE = 0.1


@dataclass
class Streams:
    """What enters a block: (n, T, D) in each of the two models."""

    original: Tensor
    converted: Tensor
    num_held_out: int
    num_prefix_tokens: int
    batch_size: int
    # Whether blocks compute in bfloat16; what is between them is in single precision all the same.
    amp: bool = False

    @property
    def num_fitted(self) -> int:
        """Images that weights are fitted to."""
        return len(self.original) - self.num_held_out

    def held_out(self, tensor: Tensor) -> Tensor:
        """Of a tensor (n, …) the images that no weight is fitted to."""
        return tensor[self.num_fitted :]

    def map(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`function` of tensors (n, …), a batch of images at a time."""
        with torch.no_grad(), self.precision():
            batches = iter(self.batches(*tensors))
            first = function(*next(batches))
            # Not a list that is put together in the end: that would take the memory twice.
            out = first.new_empty(len(tensors[0]), *first.shape[1:])
            done = len(first)
            out[:done] = first
            for parts in batches:
                out[done : done + len(parts[0])] = function(*parts)
                done += len(parts[0])
        return out

    def precision(self) -> torch.autocast:
        """In which blocks compute."""
        return torch.autocast(self.original.device.type, torch.bfloat16, enabled=self.amp)

    def batches(self, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """The tensors' batches of images, side by side."""
        return zip(*(tensor.split(self.batch_size) for tensor in tensors))

    def weights(self, wanted: Tensor) -> Tensor:
        """`token_weights` of tokens `wanted` (n, T, D)."""
        return token_weights(wanted, self.num_prefix_tokens)


def token_weights(wanted: Tensor, num_prefix_tokens: int) -> Tensor:
    """What the squared error of each token counts, so that the mean is relative: (n, T) for tokens `wanted` (n, T, D).

    Every token is normalised before it is used, and some are many times longer than others.
    """
    # Unlike a sum of squares, a norm takes no memory of the tokens' size.
    weights = 1 / torch.linalg.vector_norm(wanted, dim=-1).square().clamp(min=1e-12)
    patches = wanted.shape[1] - num_prefix_tokens
    if num_prefix_tokens:
        weights[:, :num_prefix_tokens] *= PREFIX_SHARE * wanted.shape[1] / num_prefix_tokens
        weights[:, num_prefix_tokens:] *= (1 - PREFIX_SHARE) * wanted.shape[1] / patches
    return weights


def embed(model: VisionTransformer, images: Tensor) -> Tensor:
    """What enters the first block (B, T, D) for images (B, 3, H, W)."""
    tokens: Tensor = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    return tokens


def attended(block: Block, tokens: Tensor) -> Tensor:
    """The tokens behind a block's attention, in evaluation mode."""
    out: Tensor = tokens + block.ls1(block.attn(block.norm1(tokens)))
    return out


def fed_forward(block: Block, tokens: Tensor) -> Tensor:
    """What a block's MLP makes of the tokens behind its attention, in evaluation mode."""
    out: Tensor = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return out


def relative_error(found: Tensor, wanted: Tensor, weights: Tensor) -> float:
    """Root of the weighted mean of squares: tokens (n, T, D), weights (n, T)."""
    squares = (found - wanted).square().sum(-1)
    return float((squares * weights).mean().sqrt())
