"""Which layers get ordinary attention back after a fit: one or two often restore most of what was lost (JetViT, 2026).

n images, T tokens, D width.
"""

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from linvit.conversion.blocks import Vit, block_arguments, last_tokens
from linvit.conversion.calibration import Activations, last_tokens_error
from linvit.conversion.convert import restore_attention
from linvit.model.transformer import LinformerTransformer

# Images on which the layers are compared.
NUM_IMAGES = 16


@torch.no_grad()
def layer_to_restore(original: Vit, converted: LinformerTransformer, activations: Activations) -> int | None:
    """The layer whose original block, in place of the converted one, leaves the least error of the last tokens.

    Args:
        original, converted: in evaluation mode and single precision; the layers of `converted` are fitted.
        activations: the tokens that enter the first block; the held-out images decide.

    Returns None if no layer is projected.
    """
    tokens, own = (activations.held_out(each)[-NUM_IMAGES:] for each in (activations.original, activations.converted))
    target = activations.map(partial(last_tokens, original, 0), tokens)
    errors: dict[int, float] = {}
    for layer, (original_block, block, arguments) in enumerate(
        zip(original.blocks, converted.blocks, block_arguments(converted))
    ):
        if block.attn.projections() is not None:
            restored = activations.map(partial(_run, original_block, arguments), own)
            last = activations.map(partial(last_tokens, converted, layer + 1), restored)
            errors[layer] = last_tokens_error(last, target, activations.num_prefix_tokens)
        own = activations.map(partial(_run, block, arguments), own)
    return min(errors, key=lambda layer: errors[layer]) if errors else None


def with_ordinary_layers(original: Vit, converted: LinformerTransformer, layers: Sequence[int]) -> LinformerTransformer:
    """A copy of a converted model in which these layers have the original's attention."""
    model = copy.deepcopy(converted)
    restore_attention(original, model, layers)
    return model


def _run(block: nn.Module, arguments: dict[str, Tensor], tokens: Tensor) -> Tensor:
    out: Tensor = block(tokens, **arguments)
    return out
