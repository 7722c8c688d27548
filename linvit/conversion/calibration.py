"""The images that a conversion is fitted to, and the activations of both models on them.

The images are split three ways. Weights are fitted to most of them; the held-out images choose penalties and the best
weights of a layer; the unseen images only measure the result.

B images per batch, n images in the fit, P prefix tokens, T tokens, D width.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from linvit.data.augment.build import InputSpec
from linvit.data.sources.loose import load_batches, sample_paths

MIN_IMAGES = 8
# An eighth of the images is held out, and as many others stay unseen; at most this many each.
MAX_HELD_OUT = 64
# Weight of the prefix tokens in a layer's error. With equal weights, one token among a thousand would hardly count,
# but a classifier may read only that one.
PREFIX_SHARE = 0.1


@dataclass(frozen=True)
class CalibrationImages:
    """Images drawn from `folder` by `seed`, preprocessed for the model and moved to its device.

    Raises ValueError if the folder holds fewer than 8 images.
    """

    folder: Path
    spec: InputSpec
    device: torch.device
    num_images: int
    batch_size: int
    seed: int
    # Images of the fit, at most `num_images`; the last `num_held_out` are held out.
    fit_paths: list[str] = field(init=False)
    # Images that only measure the result, as many as are held out.
    unseen_paths: list[str] = field(init=False)
    # All images of the folder except the unseen ones; those of the fit come first.
    seen_paths: list[str] = field(init=False)

    def __post_init__(self) -> None:
        paths = sample_paths(self.folder, count=sys.maxsize, seed=self.seed)
        if len(paths) < MIN_IMAGES:
            raise ValueError(f"{self.folder} holds {len(paths)} images: a fit needs at least {MIN_IMAGES}")
        num_unseen = _num_held_out(min(self.num_images, len(paths)))
        object.__setattr__(self, "unseen_paths", paths[-num_unseen:])
        object.__setattr__(self, "seen_paths", paths[:-num_unseen])
        object.__setattr__(self, "fit_paths", self.seen_paths[: self.num_images])

    @property
    def num_held_out(self) -> int:
        """Number of images in the fit that choose penalties instead of being fitted to."""
        return _num_held_out(len(self.fit_paths))

    def fit_batches(self) -> Iterator[Tensor]:
        """The images of the fit once, the held-out ones last: (B, 3, H, W)."""
        return self._load(self.fit_paths, self.batch_size)

    def unseen_images(self) -> Tensor:
        """The images that only measure the result: (number of images, 3, H, W)."""
        return torch.cat(list(self._load(self.unseen_paths, self.batch_size)))

    def training_batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images except the unseen ones, reshuffled for every pass, without end: (B, 3, H, W)."""
        paths = list(self.seen_paths)
        order = random.Random(self.seed)
        while True:
            order.shuffle(paths)
            yield from self._load(paths, batch_size)

    def _load(self, paths: list[str], batch_size: int) -> Iterator[Tensor]:
        for images in load_batches(paths, self.spec, batch_size=batch_size):
            yield images.to(self.device)


def _num_held_out(count: int) -> int:
    return min(max(count // 8, 2), MAX_HELD_OUT)


@dataclass
class Activations:
    """The tokens that enter a block, in the original and in the converted model: each (n, T, D)."""

    original: Tensor
    converted: Tensor
    # The last images, which no weight is fitted to.
    num_held_out: int
    num_prefix_tokens: int
    batch_size: int
    # Whether blocks compute in bfloat16; the tokens between them stay in single precision.
    amp: bool = False

    @property
    def num_fitted(self) -> int:
        """Number of images that weights are fitted to."""
        return len(self.original) - self.num_held_out

    def held_out(self, tensor: Tensor) -> Tensor:
        """The part of a tensor (n, …) that belongs to the held-out images."""
        return tensor[self.num_fitted :]

    def map(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Apply `function` to tensors (n, …), one batch of images at a time and without gradients."""
        with torch.no_grad(), self.precision():
            batches = iter(self.batches(*tensors))
            first = function(*next(batches))
            # Concatenating a list of results would need twice the memory.
            out = first.new_empty(len(tensors[0]), *first.shape[1:])
            done = len(first)
            out[:done] = first
            for parts in batches:
                out[done : done + len(parts[0])] = function(*parts)
                done += len(parts[0])
        return out

    def precision(self) -> torch.autocast:
        """The context in which blocks compute."""
        return torch.autocast(self.original.device.type, torch.bfloat16, enabled=self.amp)

    def batches(self, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """Split tensors (n, …) into batches of the same images."""
        return zip(*(tensor.split(self.batch_size) for tensor in tensors))

    def weights(self, target: Tensor) -> Tensor:
        """`token_weights` of the tokens `target` (n, T, D)."""
        return token_weights(target, self.num_prefix_tokens)


def token_weights(target: Tensor, num_prefix_tokens: int) -> Tensor:
    """Weights (n, T) of the tokens' squared errors which make their mean relative to `target` (n, T, D).

    Every token is normalised before it is used, and some are many times longer than others.
    """
    # Unlike a sum of squares, a norm needs no temporary tensor of the tokens' size.
    weights = 1 / torch.linalg.vector_norm(target, dim=-1).square().clamp(min=1e-12)
    num_patches = target.shape[1] - num_prefix_tokens
    if num_prefix_tokens:
        weights[:, :num_prefix_tokens] *= PREFIX_SHARE * target.shape[1] / num_prefix_tokens
        weights[:, num_prefix_tokens:] *= (1 - PREFIX_SHARE) * target.shape[1] / num_patches
    return weights


def relative_error(tokens: Tensor, target: Tensor, weights: Tensor) -> float:
    """Root of the weighted mean squared error of tokens (n, T, D), with weights (n, T)."""
    squares = (tokens - target).square().sum(-1)
    return float((squares * weights).mean().sqrt())


def last_tokens_error(tokens: Tensor, target: Tensor, num_prefix_tokens: int) -> float:
    """Mean squared relative error of the prefix tokens plus that of the patches, because either may be used."""
    relative = (tokens - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)
    parts = (relative[:, :num_prefix_tokens], relative[:, num_prefix_tokens:])
    return sum(float(part.mean()) for part in parts if part.numel())
