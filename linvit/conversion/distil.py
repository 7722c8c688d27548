"""How near a converted model is to the original, on images that no weight was fitted to.

Distillation of a converted model from its original, end to end, on images without labels.

Both see the same images. Learnt are the tokens behind a few blocks and behind the last norm, by the relative square
error of each, and the logits, where there are any, by their divergence. What is nearest on images that it does not
learn from is kept, also where that is the beginning.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from linvit.conversion.streams import embed, token_weights
from linvit.model.vit import LinformerViT


@dataclass(frozen=True)
class Fidelity:
    """Means over images: cosines of the class token and the patch tokens behind the last norm, and of what the
    classifier reads; share of images with the same first class. None where a model has no such thing."""

    num_images: int
    class_cosine: float | None
    patch_cosine: float
    feature_cosine: float | None
    top1_agreement: float | None

    @property
    def cosines(self) -> list[float]:
        """Those of the cosines that there are."""
        return [each for each in (self.class_cosine, self.patch_cosine, self.feature_cosine) if each is not None]

    @property
    def mean_cosine(self) -> float:
        return sum(self.cosines) / len(self.cosines)


class Comparison:
    """Images, and what the original makes of them, in single precision.

    Args:
        original: in evaluation mode.
        images: (n, 3, H, W).
        batch_size: of them at once.
    """

    def __init__(self, original: VisionTransformer, images: Tensor, *, batch_size: int) -> None:
        self.original, self.batches = original, images.split(batch_size)
        with torch.no_grad():
            self.theirs = [_features(original, batch) for batch in self.batches]

    @torch.no_grad()
    def of(self, converted: VisionTransformer, *, amp: bool = False) -> Fidelity:
        """How near a model is, in evaluation mode; with `amp` it computes in bfloat16, in which it is a bit farther."""
        original, rows = self.original, []
        for batch, (tokens, pooled, logits) in zip(self.batches, self.theirs):
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=amp):
                own = [each.float() for each in _features(converted, batch)]
            cosines = torch.cosine_similarity(tokens, own[0], dim=-1)
            row = [cosines[:, 0], cosines[:, original.num_prefix_tokens :].mean(1)]
            row.append(torch.cosine_similarity(pooled, own[1]))
            row.append((logits.argmax(1) == own[2].argmax(1)).float())
            rows.append(torch.stack(row))
        class_cosine, patch_cosine, feature_cosine, agreement = torch.cat(rows, dim=1).mean(1).tolist()
        return Fidelity(
            num_images=sum(map(len, self.batches)),
            class_cosine=class_cosine if original.has_class_token else None,
            patch_cosine=patch_cosine,
            feature_cosine=feature_cosine if original.global_pool else None,
            top1_agreement=agreement if original.num_classes > 0 else None,
        )


def _features(model: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens behind the last norm (B, T, D), what the classifier reads and what it says, both (B, ·)."""
    tokens = model.forward_features(images)
    pooled = model.forward_head(tokens, pre_logits=True)
    return tokens, pooled.flatten(1), model.head(pooled).flatten(1)


# Blocks whose tokens are learnt: so many, evenly spaced, the last among them.
NUM_TAPS = 4
WARMUP = 0.05
LARGEST_GRADIENT = 1.0
# Of what it is like, evenly spaced; as the rate falls, the last ones are mostly the best.
NUM_CHECKS = 5


@dataclass(frozen=True)
class DistilOptions:
    """How long: optimizer steps, or minutes by the clock, whichever is given; the rate of AdamW; whether in bfloat16.

    Weights, losses and the comparison in the end are in single precision all the same.
    """

    steps: int | None = None
    minutes: float | None = None
    rate: float = 1e-5
    amp: bool = False

    def __post_init__(self) -> None:
        assert (self.steps is None) != (self.minutes is None)


def distil(
    original: VisionTransformer,
    converted: LinformerViT,
    batches: Iterator[Tensor],
    unseen: Comparison,
    options: DistilOptions,
    *,
    report: Callable[[float], object] = lambda share: None,
) -> Fidelity:
    """Train `converted` in place; returns what it is like in the end.

    Args:
        original, converted: in evaluation mode, in which they stay.
        batches: images (B, 3, H, W), without end.
        unseen: images to choose the best weights by, with what the original makes of them. Not those that chose the
            penalties of a fit: on them it would look better than it is.
        options: how long.
        report: told the share of the way gone, after each step.
    """
    optimizer = torch.optim.AdamW(converted.parameters(), lr=options.rate, weight_decay=0.0)
    best = unseen.of(converted, amp=options.amp)
    state = {name: value.clone() for name, value in converted.state_dict().items()}
    clock = _Clock(options)
    checks = 0
    while (share := clock.share) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1.0, share / WARMUP + 0.01) * 0.5 * (1 + math.cos(math.pi * share))
        images = next(batches)
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=options.amp):
            given = loss(original, converted, images)
        given.backward()
        torch.nn.utils.clip_grad_norm_(converted.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        clock.tick()
        if clock.share * NUM_CHECKS >= checks + 1:
            checks = int(clock.share * NUM_CHECKS)
            fidelity = unseen.of(converted, amp=options.amp)
            if fidelity.mean_cosine > best.mean_cosine:
                best, state = fidelity, {name: value.clone() for name, value in converted.state_dict().items()}
        report(min(clock.share, 1.0))
    converted.load_state_dict(state)
    return unseen.of(converted)


def loss(original: VisionTransformer, converted: LinformerViT, images: Tensor) -> Tensor:
    """How far apart the two are on images (B, 3, H, W); gradients go to `converted` alone."""
    with torch.no_grad():
        wanted = _tapped(original, images)
        wanted_logits = original.forward_head(wanted[-1])
    found = _tapped(converted, images)
    parts = [
        ((own - theirs).square().sum(-1) * token_weights(theirs, original.num_prefix_tokens)).mean()
        for own, theirs in zip(map(Tensor.float, found), map(Tensor.float, wanted))
    ]
    total = torch.stack(parts).mean()
    if original.num_classes > 0:
        given = F.log_softmax(converted.forward_head(found[-1]).float(), dim=-1)
        asked = F.log_softmax(wanted_logits.float(), dim=-1)
        total = total + F.kl_div(given, asked, log_target=True, reduction="batchmean")
    return total


def _tapped(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Tokens behind a few blocks, and behind the last norm: each (B, T, D)."""
    depth = len(model.blocks)
    taps = {math.ceil(depth * (number + 1) / NUM_TAPS) - 1 for number in range(NUM_TAPS)}
    tokens, found = embed(model, images), []
    for index, block in enumerate(model.blocks):
        tokens = block(tokens)
        if index in taps:
            found.append(tokens)
    return [*found, model.norm(tokens)]


class _Clock:
    """How much of the way is gone, by steps or by time."""

    def __init__(self, options: DistilOptions) -> None:
        self.options, self.steps, self.started = options, 0, time.monotonic()

    def tick(self) -> None:
        self.steps += 1

    @property
    def share(self) -> float:
        if self.options.steps is not None:
            return self.steps / self.options.steps
        assert self.options.minutes is not None
        return (time.monotonic() - self.started) / (60 * self.options.minutes)
