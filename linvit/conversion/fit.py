"""A converted model fitted to the original, layer by layer, on images without labels.

Each layer sees the tokens that the layers before it, fitted already, give it, and is fitted to what makes its own
tokens those of the original: so it also learns to undo what went wrong before it. In each layer

1. E, F, Wq, Wk, Wv, Wo by a short descent (`descent`),
2. Wo and its bias, then the MLP's last layer and its bias, in closed form (`closedform`).

Layers with ordinary attention take part in 2: they have nothing to lose, and something to undo. With
share="layerwise" E stays at its averages, since every layer uses it, and the rest is fitted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from linvit.attention import LinformerAttention
from linvit.conversion.closedform import Moments, best_change, change, without
from linvit.conversion.convert import projected_lengths, use_ordinary_attention
from linvit.conversion.descent import Descent, descend
from linvit.conversion.streams import Streams, attended, fed_forward, relative_error
from linvit.vit import LinformerViT, Share


@dataclass(frozen=True)
class FitOptions:
    """How layers are fitted.

    `max_error`: a layer whose error is above this after fitting goes back to ordinary attention. Errors are of the
    tokens behind a layer's attention, root mean square of the relative error of each.
    """

    descent: Descent = field(default_factory=Descent)
    max_error: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class LayerFit:
    """One layer, on the images held out: errors of the tokens behind its attention, and behind its block."""

    layer: int
    k: int | list[int] | None
    error_before: float
    error_after: float
    block_error: float
    # Mean over tokens of the cosine to the original's, behind the block.
    cosine: float


def fit_layers(
    original: VisionTransformer,
    converted: LinformerViT,
    streams: Streams,
    options: FitOptions,
    *,
    done: Sequence[LayerFit] = (),
    report: Callable[[LayerFit], object] = lambda fit: None,
) -> list[LayerFit]:
    """Fit the layers of `converted` in place, and take `streams` along, to the tokens behind the last block.

    Layers that are `done` already are only gone through; where all are, nothing happens. Both models are in evaluation
    mode and single precision; `report` is told each layer when it is fitted.
    """
    fits = list(done)
    if len(fits) == len(converted.blocks):
        return fits
    for layer, (block, own) in enumerate(zip(original.blocks, converted.blocks)):
        wanted = streams.map(partial(attended, block), streams.original)
        if layer >= len(done):
            before, after = _fit_attention(converted, layer, streams, wanted, options)
        middle = streams.map(partial(attended, own), streams.converted)
        streams.original = streams.map(partial(fed_forward, block), wanted)
        if layer >= len(done) and not _is_untouched(converted, layer):
            _refit(own.mlp, "fc2", own.norm2, own.ls2, streams, middle, streams.original)
        streams.converted = streams.map(partial(fed_forward, own), middle)
        if layer >= len(done):
            fits.append(_measure(converted, layer, streams, before, after))
            report(fits[-1])
    return fits


def _fit_attention(
    converted: LinformerViT, layer: int, streams: Streams, wanted: Tensor, options: FitOptions
) -> tuple[float, float]:
    """Fit the attention of one layer; returns its error before and after."""
    block, weights = converted.blocks[layer], streams.weights(wanted)
    original_weights = {name: value.clone() for name, value in block.attn.state_dict().items()}
    before = _error(block, streams, wanted, weights)
    if block.attn.projections() is not None:
        generator = torch.Generator().manual_seed(options.seed * 1000 + layer)
        block.attn.order = "associative"
        parameters = _own_parameters(block.attn, converted.share)
        descend(block, parameters, streams, wanted, weights, options.descent, generator)
        _refit(block.attn, "proj", block.norm1, block.ls1, streams, streams.converted, wanted)
        block.attn.order = None
        after = _error(block, streams, wanted, weights)
        if options.max_error is None or after <= options.max_error:
            return before, after
        use_ordinary_attention(converted, [layer])
        block.attn.load_state_dict({name: original_weights[name] for name in block.attn.state_dict()})
    if not _is_untouched(converted, layer):
        _refit(block.attn, "proj", block.norm1, block.ls1, streams, streams.converted, wanted)
    return before, _error(block, streams, wanted, weights)


def _own_parameters(attention: LinformerAttention, share: Share) -> list[nn.Parameter]:
    """What a layer may change: not the one E of all layers."""
    everyones = attention.key_projection if share == "layerwise" else None
    kept = set() if everyones is None else set(everyones.parameters())
    return [parameter for parameter in attention.parameters() if parameter not in kept]


@torch.no_grad()
def _refit(
    module: nn.Module, name: str, norm: nn.Module, scale: nn.Module, streams: Streams, inputs: Tensor, wanted: Tensor
) -> None:
    """Refit the last linear layer `name` of an attention or MLP so that `inputs` and what it adds are `wanted`."""
    weights = streams.weights(wanted)
    with without(module, name) as layer:
        fitted, held_out = (Moments.empty(layer.in_features, layer.out_features, inputs.device) for _ in range(2))
        for number, (x, target, weight) in enumerate(streams.batches(inputs, wanted, weights)):
            h = module(norm(x))
            missing = target - x - scale(layer(h))
            num_fitted = min(max(streams.num_fitted - number * streams.batch_size, 0), len(x))
            fitted.add(h[:num_fitted], missing[:num_fitted], weight[:num_fitted])
            held_out.add(h[num_fitted:], missing[num_fitted:], weight[num_fitted:])
    change(layer, scale, best_change(fitted, held_out, has_bias=layer.bias is not None))


def _is_untouched(converted: LinformerViT, layer: int) -> bool:
    """Whether everything up to this layer is still the original's."""
    return all(k is None for k in projected_lengths(converted)[: layer + 1])


def _error(block: Block, streams: Streams, wanted: Tensor, weights: Tensor) -> float:
    held = slice(streams.num_fitted, None)
    found = streams.map(partial(attended, block), streams.converted[held])
    return relative_error(found, wanted[held], weights[held])


def _measure(converted: LinformerViT, layer: int, streams: Streams, before: float, after: float) -> LayerFit:
    held = slice(streams.num_fitted, None)
    own, theirs = streams.converted[held], streams.original[held]
    return LayerFit(
        layer=layer,
        k=projected_lengths(converted)[layer],
        error_before=before,
        error_after=after,
        block_error=relative_error(own, theirs, streams.weights(theirs)),
        cosine=float(torch.cosine_similarity(own, theirs, dim=-1).mean()),
    )
