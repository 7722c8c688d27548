"""Which layers get ordinary attention back after a fit: one or two often restore most of what was lost (JetViT, 2026).

n images, T tokens, D width.
"""

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from linvit.conversion.blocks import Vit, last_tokens
from linvit.conversion.calibration import Activations, last_tokens_error
from linvit.conversion.convert import use_ordinary_attention
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
    tokens = activations.held_out(activations.original)[-NUM_IMAGES:]
    target = activations.map(partial(last_tokens, original, 0), tokens)
    errors: dict[int, float] = {}
    for layer, (original_block, block) in enumerate(zip(original.blocks, converted.blocks)):
        arguments = activations.arguments[layer]
        if block.attn.projections() is not None:
            restored = activations.map(partial(_run, original_block, arguments), tokens)
            last = activations.map(partial(last_tokens, converted, layer + 1), restored)
            errors[layer] = last_tokens_error(last, target, activations.num_prefix_tokens)
        tokens = activations.map(partial(_run, block, arguments), tokens)
    return min(errors, key=lambda layer: errors[layer]) if errors else None


def with_ordinary_layers(original: Vit, converted: LinformerTransformer, layers: Sequence[int]) -> LinformerTransformer:
    """A copy of a converted model in which these layers have the original's attention."""
    model = copy.deepcopy(converted)
    use_ordinary_attention(model, layers)
    for layer in layers:
        attention = model.blocks[layer].attn
        attention.load_state_dict({**attention.state_dict(), **original.blocks[layer].attn.state_dict()})
    return model


def _run(block: nn.Module, arguments: dict[str, Tensor], tokens: Tensor) -> Tensor:
    out: Tensor = block(tokens, **arguments)
    return out
