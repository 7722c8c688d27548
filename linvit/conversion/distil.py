"""Distil a converted model from its original, end to end, on unlabelled images.

Both models see the same images. There are two losses. If there is a classifier, both add the KL divergence of the
logits.

- "tokens": the relative squared error of the tokens after a few blocks and after the last norm.
- "features": of the tokens after the last norm alone, 1 - cosine of the class token, 0.9 (1 - mean cosine of the
  patches), and 0.1 times their smooth L1 distance, as in IronViT.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from linvit.conversion.blocks import Vit, block_arguments, embed
from linvit.conversion.calibration import token_weights
from linvit.conversion.comparison import Comparison, Fidelity
from linvit.model.transformer import LinformerTransformer

# Number of blocks whose tokens enter the loss, evenly spaced; the last block is one of them.
NUM_TAPPED_BLOCKS = 4
DistilLoss = Literal["tokens", "features"]
PATCH_COSINE_WEIGHT = 0.9
PATCH_DISTANCE_WEIGHT = 0.1
# Fraction of the training in which the rate rises.
WARMUP = 0.05
MAX_GRADIENT_NORM = 1.0
# How often fidelity is measured, at even intervals; as the rate falls, the last weights are usually the best.
NUM_CHECKS = 5


@dataclass(frozen=True)
class DistilOptions:
    """Length of the training in optimizer steps or in minutes (give one), AdamW's rate, and whether to use bfloat16.

    With `amp`, weights, losses and the final comparison still stay in single precision. A step sums the gradients of
    `accumulate` batches.
    """

    steps: int | None = None
    minutes: float | None = None
    rate: float = 1e-5
    amp: bool = False
    loss: DistilLoss = "tokens"
    accumulate: int = 1

    def __post_init__(self) -> None:
        assert (self.steps is None) != (self.minutes is None)


def distil(
    original: Vit,
    converted: LinformerTransformer,
    batches: Iterator[Tensor],
    unseen: Comparison,
    options: DistilOptions,
    *,
    report: Callable[[float], object] = lambda progress: None,
) -> Fidelity:
    """Train `converted` in place and keep its best weights, which may be the initial ones; returns their fidelity.

    Args:
        original, converted: in evaluation mode, in which they stay.
        batches: images (B, 3, H, W), without end.
        unseen: the images that choose the best weights. Images that chose the penalties of a fit would give
            optimistic figures.
        options: length, rate and precision.
        report: called after each step with the progress, from 0 to 1.
    """
    optimizer = torch.optim.AdamW(converted.parameters(), lr=options.rate, weight_decay=0.0)
    best = unseen.fidelity(converted, amp=options.amp)
    best_state = _copy_state(converted)
    clock = _Clock(options)
    num_checks = 0
    while (progress := clock.progress) < 1:
        rate = options.rate * min(1.0, progress / WARMUP + 0.01) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        for _ in range(options.accumulate):
            images = next(batches)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=options.amp):
                loss = distillation_loss(original, converted, images, options.loss)
            (loss / options.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(converted.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        clock.steps += 1
        if clock.progress * NUM_CHECKS >= num_checks + 1:
            num_checks = int(clock.progress * NUM_CHECKS)
            fidelity = unseen.fidelity(converted, amp=options.amp)
            if fidelity.mean_cosine > best.mean_cosine:
                best, best_state = fidelity, _copy_state(converted)
        report(min(clock.progress, 1.0))
    converted.load_state_dict(best_state)
    return unseen.fidelity(converted)


def distillation_loss(
    original: Vit, converted: LinformerTransformer, images: Tensor, loss: DistilLoss = "tokens"
) -> Tensor:
    """The loss on images (B, 3, H, W), with gradients for `converted` only."""
    with torch.no_grad():
        target_tokens = _tapped_tokens(original, images)
        target_logits = original.forward_head(target_tokens[-1])
    tokens = _tapped_tokens(converted, images)
    if loss == "features":
        ends = tokens[-1].float(), target_tokens[-1].float()
        total = _feature_loss(*ends, original.num_prefix_tokens, has_class_token=original.cls_token is not None)
    else:
        losses = [
            ((own - target).square().sum(-1) * token_weights(target, original.num_prefix_tokens)).mean()
            for own, target in zip(map(Tensor.float, tokens), map(Tensor.float, target_tokens))
        ]
        total = torch.stack(losses).mean()
    if original.num_classes > 0:
        own_log_probs = F.log_softmax(converted.forward_head(tokens[-1]).float(), dim=-1)
        target_log_probs = F.log_softmax(target_logits.float(), dim=-1)
        total = total + F.kl_div(own_log_probs, target_log_probs, log_target=True, reduction="batchmean")
    return total


def _feature_loss(tokens: Tensor, target: Tensor, num_prefix_tokens: int, *, has_class_token: bool) -> Tensor:
    """The loss "features" of tokens (B, T, D)."""
    distances = 1 - F.cosine_similarity(tokens, target, dim=-1)  # (B, T)
    distance = F.smooth_l1_loss(tokens[:, num_prefix_tokens:], target[:, num_prefix_tokens:])
    total = PATCH_COSINE_WEIGHT * distances[:, num_prefix_tokens:].mean() + PATCH_DISTANCE_WEIGHT * distance
    return total + distances[:, 0].mean() if has_class_token else total


def _tapped_tokens(model: Vit, images: Tensor) -> list[Tensor]:
    """Tokens after the tapped blocks and after the last norm: each (B, T, D)."""
    depth = len(model.blocks)
    tapped = {math.ceil(depth * (number + 1) / NUM_TAPPED_BLOCKS) - 1 for number in range(NUM_TAPPED_BLOCKS)}
    tokens, outputs = embed(model, images), []
    for index, (block, arguments) in enumerate(zip(model.blocks, block_arguments(model))):
        tokens = block(tokens, **arguments)
        if index in tapped:
            outputs.append(tokens)
    return [*outputs, model.norm(tokens)]


def _copy_state(model: LinformerTransformer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class _Clock:
    """The fraction of the training that is done, by steps or by time."""

    def __init__(self, options: DistilOptions) -> None:
        self.options, self.steps, self.started = options, 0, time.monotonic()

    @property
    def progress(self) -> float:
        if self.options.steps is not None:
            return self.steps / self.options.steps
        assert self.options.minutes is not None
        return (time.monotonic() - self.started) / (60 * self.options.minutes)
