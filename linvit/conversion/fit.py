"""A converted model fitted to the original, layer by layer, on images without labels.

Each layer sees the tokens that the layers before it, fitted already, give it, and is fitted to what makes its own
tokens those of the original: so it also learns to undo what went wrong before it. In each layer

1. E, F, Wq, Wk, Wv, Wo by a short descent (`descent`),
2. Wo and its bias, then the MLP's last layer and its bias, in closed form (`closedform`), from a part of each image's
   patches: neighbours are alike, and more images are worth more than more of their patches.

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

from linvit.conversion.closed_form import Moments, best_change, change, without
from linvit.conversion.convert import projected_lengths, use_ordinary_attention
from linvit.conversion.descent import Descent, descend
from linvit.conversion.streams import Streams, attended, fed_forward, relative_error
from linvit.model.attention import LinformerAttention
from linvit.model.vit import LinformerViT, Share

# Of each image, as many as this go into the regressions.
PATCHES_FITTED = 256


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
        if layer < len(done):
            middle = _behind_attention(own, streams, _heads(own, streams))
        else:
            middle, before, after = _fit_attention(block, converted, layer, streams, wanted, options)
        streams.original = streams.map(partial(fed_forward, block), wanted)
        if layer >= len(done) and not _is_untouched(converted, layer):
            _refit_mlp(own, streams, middle, streams.original, _generator(options, layer))
        streams.converted = streams.map(partial(fed_forward, own), middle)
        if layer >= len(done):
            fits.append(_measure(converted, layer, streams, before, after))
            report(fits[-1])
    return fits


def _fit_attention(
    original: Block, converted: LinformerViT, layer: int, streams: Streams, wanted: Tensor, options: FitOptions
) -> tuple[Tensor, float, float]:
    """Fit the attention of one layer; returns the tokens behind it, and its error before and after."""
    block = converted.blocks[layer]
    before = _error(streams, streams.map(partial(attended, block), streams.held_out(streams.converted)), wanted)
    if block.attn.projections() is not None:
        if options.descent.steps:
            parameters = _own_parameters(block.attn, converted.share)
            descend(block, parameters, streams, wanted, options.descent, _generator(options, layer))
        middle = _refit_attention(block, streams, wanted, _generator(options, layer))
        after = _error(streams, streams.held_out(middle), wanted)
        if options.max_error is None or after <= options.max_error:
            return middle, before, after
        use_ordinary_attention(converted, [layer])
        block.attn.load_state_dict(original.attn.state_dict())
    if _is_untouched(converted, layer):
        middle = _behind_attention(block, streams, _heads(block, streams))
    else:
        middle = _refit_attention(block, streams, wanted, _generator(options, layer))
    return middle, before, _error(streams, streams.held_out(middle), wanted)


def _generator(options: FitOptions, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed(options.seed * 1000 + layer)


def _own_parameters(attention: LinformerAttention, share: Share) -> list[nn.Parameter]:
    """What a layer may change: not the one E of all layers."""
    everyones = attention.key_projection if share == "layerwise" else None
    kept = set() if everyones is None else set(everyones.parameters())
    return [parameter for parameter in attention.parameters() if parameter not in kept]


def _heads(block: Block, streams: Streams) -> Tensor:
    """What enters Wo of a layer."""
    with without(block.attn, "proj"):
        return streams.map(lambda x: block.attn(block.norm1(x)), streams.converted)


def _behind_attention(block: Block, streams: Streams, heads: Tensor) -> Tensor:
    """The tokens behind a layer's attention, from what enters its Wo."""
    return streams.map(lambda x, h: x + block.ls1(block.attn.proj(h)), streams.converted, heads)


def _refit_attention(block: Block, streams: Streams, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """Refit Wo of a layer so that the tokens behind its attention are `wanted`; returns what they are then."""
    heads = _heads(block, streams)
    _refit(block.attn.proj, block.ls1, lambda h: h, streams, (heads, streams.converted, wanted), generator)
    return _behind_attention(block, streams, heads)


def _refit_mlp(block: Block, streams: Streams, middle: Tensor, wanted: Tensor, generator: torch.Generator) -> None:
    """Refit the last linear layer of an MLP so that tokens `middle` become `wanted` behind it."""
    with without(block.mlp, "fc2") as layer:
        _refit(layer, block.ls2, lambda x: block.mlp(block.norm2(x)), streams, (middle, middle, wanted), generator)


@torch.no_grad()
def _refit(
    layer: nn.Linear,
    scale: nn.Module,
    enter: Callable[[Tensor], Tensor],
    streams: Streams,
    tensors: tuple[Tensor, Tensor, Tensor],
    generator: torch.Generator,
) -> None:
    """Refit a linear layer that adds γ (W h + b) to tokens.

    Args:
        layer, scale: W with b; γ.
        enter: h, from the first of the tensors, for some of the tokens.
        tensors: what h is made of, the tokens added to, and what they shall become, each (n, T, ·).
        generator: of the patches that are fitted to.
    """
    fitted, held_out = (Moments.empty(layer.in_features, layer.out_features, tensors[0].device) for _ in range(2))
    weights = streams.weights(tensors[2])
    for number, batch in enumerate(streams.batches(*tensors, weights)):
        tokens, counts = _draw(batch[0].shape[1], streams.num_prefix_tokens, generator)
        source, x, target, weight = (each[:, tokens] for each in batch)
        with streams.precision():
            h = enter(source)
            missing = target - x - scale(layer(h))
        weight = weight * counts.to(weight.device)
        num_fitted = min(max(streams.num_fitted - number * streams.batch_size, 0), len(x))
        fitted.add(h[:num_fitted], missing[:num_fitted], weight[:num_fitted])
        held_out.add(h[num_fitted:], missing[num_fitted:], weight[num_fitted:])
    change(layer, scale, best_change(fitted, held_out, has_bias=layer.bias is not None))


def _draw(num_tokens: int, num_prefix_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the prefix tokens and of some patches, and for how many tokens each of them stands."""
    num_patches = num_tokens - num_prefix_tokens
    patches = torch.randperm(num_patches, generator=generator)[:PATCHES_FITTED] + num_prefix_tokens
    tokens = torch.cat([torch.arange(num_prefix_tokens), patches])
    counts = torch.ones(len(tokens))
    counts[num_prefix_tokens:] = num_patches / len(patches)
    return tokens, counts


def _is_untouched(converted: LinformerViT, layer: int) -> bool:
    """Whether everything up to this layer is still the original's."""
    return all(k is None for k in projected_lengths(converted)[: layer + 1])


def _error(streams: Streams, found: Tensor, wanted: Tensor) -> float:
    """Of tokens `found` on the images held out."""
    held = streams.held_out(wanted)
    return relative_error(found, held, streams.weights(held))


def _measure(converted: LinformerViT, layer: int, streams: Streams, before: float, after: float) -> LayerFit:
    own, theirs = streams.held_out(streams.converted), streams.held_out(streams.original)
    return LayerFit(
        layer=layer,
        k=projected_lengths(converted)[layer],
        error_before=before,
        error_after=after,
        block_error=relative_error(own, theirs, streams.weights(theirs)),
        cosine=float(torch.cosine_similarity(own, theirs, dim=-1).mean()),
    )
