"""Fit a converted model to its original, layer by layer, on unlabelled images.

Each layer receives the tokens that the fitted layers before it produce, and is fitted to produce the original's tokens.
So it also learns to correct the errors of the layers before it. In each layer

1. gradient descent fits E, F, Wq, Wk, Wv and Wo, if there are any steps;
2. ridge regression fits Wo with its bias, then the MLP's last layer with its bias. It uses a part of each image's
   patches, since neighbours are alike, and more images help more than more patches of each.

A layer with ordinary attention takes part in step 2 if a layer before it has changed. With share="layerwise", E stays
at its averages because every layer uses it, and the rest is fitted.

n images, T tokens, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from linvit.conversion.blocks import (
    Vit,
    after_attention,
    after_mlp,
    attended,
    attention_scale,
    block_arguments,
    local_added,
    mlp_scale,
    scale_attention,
    without_local,
)
from linvit.conversion.calibration import Activations, relative_error
from linvit.conversion.convert import projected_lengths, restore_attention
from linvit.conversion.local import LocalMoments, add_kernel_change, best_changes, neighbourhoods
from linvit.conversion.solvers import (
    DescentOptions,
    Moments,
    add_change,
    best_change,
    descend,
    replaced_by_identity,
)
from linvit.model.projected import ProjectedAttention
from linvit.model.sharing import Share
from linvit.model.transformer import LinformerTransformer

# Patches of each image that a regression uses.
PATCHES_FITTED = 256


@dataclass(frozen=True)
class FitOptions:
    """How layers are fitted.

    `max_error`: a layer whose error stays above this returns to ordinary attention. The error is the root mean square
    of the relative errors of the tokens after the layer's attention.
    """

    descent: DescentOptions = field(default_factory=DescentOptions)
    max_error: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class LayerFit:
    """One layer's errors on the held-out images: after its attention, before and after the fit, and after its block."""

    layer: int
    k: int | list[int] | None
    error_before: float
    error_after: float
    block_error: float
    # Mean cosine between the tokens after the block and the original's.
    cosine: float


def fit_layers(
    original: Vit,
    converted: LinformerTransformer,
    activations: Activations,
    options: FitOptions,
    *,
    done: Sequence[LayerFit] = (),
    report: Callable[[LayerFit], object] = lambda fit: None,
) -> list[LayerFit]:
    """Fit the layers of `converted` in place; `activations` advance to the tokens after the last block.

    Args:
        original, converted: in evaluation mode and single precision.
        activations: the tokens that enter the first block.
        options: how layers are fitted.
        done: layers that are fitted already. Their weights stay as they are; if all layers are done, this returns
            at once.
        report: called with each layer after its fit.

    Returns the fits of all layers, including those in `done`.
    """
    fits = list(done)
    if len(fits) == len(converted.blocks):
        return fits
    with torch.no_grad():
        # An earlier distillation may have changed the frequencies of learned rotary embedding.
        theirs, ours = block_arguments(original), block_arguments(converted)
    for layer, (original_block, block) in enumerate(zip(original.blocks, converted.blocks)):
        target = activations.map(partial(after_attention, original_block, theirs[layer]), activations.original)
        if layer < len(done):
            attended = _add_attention(block, activations, _heads(block, ours[layer], activations))
        else:
            attended, before, after = _fit_attention(
                original, converted, layer, ours[layer], activations, target, options
            )
        activations.original = activations.map(partial(after_mlp, original_block), target)
        if layer >= len(done) and not _is_unchanged(converted, layer):
            _refit_mlp(block, activations, attended, activations.original, _generator(options, layer))
        activations.converted = activations.map(partial(after_mlp, block), attended)
        if layer >= len(done):
            fits.append(_measure(converted, layer, activations, before, after))
            report(fits[-1])
    return fits


def _fit_attention(
    original: Vit,
    converted: LinformerTransformer,
    layer: int,
    arguments: dict[str, Any],
    activations: Activations,
    target: Tensor,
    options: FitOptions,
) -> tuple[Tensor, float, float]:
    """Fit the attention of one layer; returns the tokens after it, and its error before and after the fit."""
    block = converted.blocks[layer]
    held_out = activations.held_out(activations.converted)
    before = _error(activations, activations.map(partial(after_attention, block, arguments), held_out), target)
    if block.attn.projections() is not None:
        if options.descent.steps:
            parameters = _layer_parameters(block.attn, converted.share)
            descend(block, arguments, parameters, activations, target, options.descent, _generator(options, layer))
        attended = _refit_attention(block, arguments, activations, target, _generator(options, layer))
        after = _error(activations, activations.held_out(attended), target)
        if options.max_error is None or after <= options.max_error:
            return attended, before, after
        restore_attention(original, converted, [layer])
    if _is_unchanged(converted, layer):
        attended = _add_attention(block, activations, _heads(block, arguments, activations))
    else:
        attended = _refit_attention(block, arguments, activations, target, _generator(options, layer))
    return attended, before, _error(activations, activations.held_out(attended), target)


def _generator(options: FitOptions, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed(options.seed * 1000 + layer)


def _layer_parameters(attention: ProjectedAttention, share: Share) -> list[nn.Parameter]:
    """The parameters that belong to this layer alone: all except an E shared by all layers."""
    shared = attention.key_projection if share == "layerwise" else None
    kept = set() if shared is None else set(shared.parameters())
    return [parameter for parameter in attention.parameters() if parameter not in kept]


def _heads(block: Block, arguments: dict[str, Any], activations: Activations) -> Tensor:
    """The heads' outputs, which are the input of Wo: (n, T, D)."""
    with replaced_by_identity(block.attn, "proj"), without_local(block.attn):
        return activations.map(lambda x: attended(block, x, arguments), activations.converted)


def _add_attention(block: Block, activations: Activations, heads: Tensor) -> Tensor:
    """The tokens after a layer's attention, from the heads' outputs."""
    return activations.map(
        lambda x, h: x + scale_attention(block, local_added(block, x, block.attn.proj(h))), activations.converted, heads
    )


def _refit_attention(
    block: Block,
    arguments: dict[str, Any],
    activations: Activations,
    target: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Refit Wo, and the convolution beside it, so that the tokens after the attention match `target`; returns these."""
    heads = _heads(block, arguments, activations)
    tensors = (heads, activations.converted, target)
    if getattr(block.attn, "local", None) is None:
        _refit(block.attn.proj, attention_scale(block), lambda h: h, activations, tensors, generator)
    else:
        _refit_with_local(block, activations, tensors, generator)
    return _add_attention(block, activations, heads)


def _refit_mlp(
    block: Block, activations: Activations, attended: Tensor, target: Tensor, generator: torch.Generator
) -> None:
    """Refit the MLP's last layer so that the tokens after the MLP match `target`; `attended` enter it."""
    with replaced_by_identity(block.mlp, "fc2") as layer:
        tensors = (attended, attended, target)
        _refit(layer, mlp_scale(block), lambda x: block.mlp(block.norm2(x)), activations, tensors, generator)


@torch.no_grad()
def _refit(
    layer: nn.Linear,
    scale: Tensor | None,
    layer_input: Callable[[Tensor], Tensor],
    activations: Activations,
    tensors: tuple[Tensor, Tensor, Tensor],
    generator: torch.Generator,
) -> None:
    """Refit a linear layer that adds γ (W h + b) to tokens.

    Args:
        layer, scale: W with b; γ.
        layer_input: computes h from some tokens of the first tensor.
        activations: gives the held-out images, batches and token weights.
        tensors: the source of h, the tokens before the addition and the target after it; each (n, T, ·).
        generator: samples the patches.
    """
    fitted, held_out = (Moments.empty(layer.in_features, layer.out_features, tensors[0].device) for _ in range(2))
    weights = activations.weights(tensors[2])
    for number, batch in enumerate(activations.batches(*tensors, weights)):
        tokens, counts = _sample_tokens(batch[0].shape[1], activations.num_prefix_tokens, generator)
        source, x, target, weight = (each[:, tokens] for each in batch)
        with activations.precision():
            h = layer_input(source)
            added = layer(h)
            residual = target - x - (added if scale is None else scale * added)
        weight = weight * counts.to(weight.device)
        num_fitted = min(max(activations.num_fitted - number * activations.batch_size, 0), len(x))
        fitted.add(h[:num_fitted], residual[:num_fitted], weight[:num_fitted])
        held_out.add(h[num_fitted:], residual[num_fitted:], weight[num_fitted:])
    add_change(layer, scale, best_change(fitted, held_out, has_bias=layer.bias is not None))


@torch.no_grad()
def _refit_with_local(
    block: Block, activations: Activations, tensors: tuple[Tensor, Tensor, Tensor], generator: torch.Generator
) -> None:
    """Refit Wo and the convolution beside it; `tensors` are the heads' outputs, the tokens before and the target."""
    layer, local, scale = block.attn.proj, block.attn.local, attention_scale(block)
    num_prefix = activations.num_prefix_tokens
    fitted, held_out = (LocalMoments.of(layer, local) for _ in range(2))
    weights = activations.weights(tensors[2])
    for number, batch in enumerate(activations.batches(*tensors, weights)):
        tokens, counts = _sample_tokens(batch[0].shape[1], num_prefix, generator)
        h, x, target, weight = (each[:, tokens] for each in batch)
        with activations.precision():
            normed = block.norm1(batch[1])
            n = neighbourhoods(normed, local, tokens, num_prefix)
            added = layer(h) + torch.einsum("ntsc,cs->ntc", n, local.weight.flatten(1))
            residual = target - x - (added if scale is None else scale * added)
        weight = weight * counts.to(weight.device)
        num_fitted = min(max(activations.num_fitted - number * activations.batch_size, 0), len(x))
        fitted.add_local(h[:num_fitted], n[:num_fitted], residual[:num_fitted], weight[:num_fitted])
        held_out.add_local(h[num_fitted:], n[num_fitted:], residual[num_fitted:], weight[num_fitted:])
    change, kernel = best_changes(fitted, held_out, has_bias=layer.bias is not None)
    add_change(layer, scale, change)
    add_kernel_change(local, scale, kernel)


def _sample_tokens(num_tokens: int, num_prefix_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of all prefix tokens and of a sample of patches, and how many tokens each index represents."""
    num_patches = num_tokens - num_prefix_tokens
    patches = torch.randperm(num_patches, generator=generator)[:PATCHES_FITTED] + num_prefix_tokens
    tokens = torch.cat([torch.arange(num_prefix_tokens), patches])
    counts = torch.ones(len(tokens))
    counts[num_prefix_tokens:] = num_patches / len(patches)
    return tokens, counts


def _is_unchanged(converted: LinformerTransformer, layer: int) -> bool:
    """Whether all layers up to this one have ordinary attention, so that they still equal the original's."""
    return all(k is None for k in projected_lengths(converted)[: layer + 1])


def _error(activations: Activations, held_out: Tensor, target: Tensor) -> float:
    """Relative error of the held-out images' tokens, for a target of all images."""
    expected = activations.held_out(target)
    return relative_error(held_out, expected, activations.weights(expected))


def _measure(
    converted: LinformerTransformer, layer: int, activations: Activations, before: float, after: float
) -> LayerFit:
    tokens, target = activations.held_out(activations.converted), activations.held_out(activations.original)
    return LayerFit(
        layer=layer,
        k=projected_lengths(converted)[layer],
        error_before=before,
        error_after=after,
        block_error=relative_error(tokens, target, activations.weights(target)),
        cosine=float(torch.cosine_similarity(tokens, target, dim=-1).mean()),
    )
