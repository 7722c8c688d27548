"""Time one layer's attention by its projected length, on the device at hand: what a plan spends.

Operations mislead where a device spends its time elsewhere: on a GPU, a layer of a quarter of the operations may take
longer than fused attention.

D width, T tokens.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linvit.conversion.blocks import Vit, block_arguments
from linvit.conversion.comparison import resized_copy, synchronised_clock
from linvit.conversion.convert import convert_unchecked
from linvit.measure.timing import Runner, Step, interleave, make_step
from linvit.model.sharing import Share

ROUNDS = 7
WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class LayerTimes:
    """Median seconds of one image's forward pass.

    Attributes:
        attention: of one layer's attention by projected length; None is ordinary attention.
        rest: of everything else in the model.
    """

    attention: dict[int | None, float]
    rest: float

    def per_layer(self, k: int | None, *, depth: int) -> float:
        """Seconds of a layer with this length, with an equal part of the rest."""
        return self.attention[k] + self.rest / depth


def measure_layer_times(
    model: Vit,
    lengths: Sequence[int],
    *,
    projection: str,
    share: Share,
    local: int | None = None,
    img_size: tuple[int, int] | None = None,
    amp: bool = False,
    batch_size: int = 1,
) -> LayerTimes:
    """Time the attention of a model's first layer with each of these lengths and without projections, in turn.

    Args:
        model: in evaluation mode, on the device to measure.
        lengths: projected lengths.
        projection, share, local: as in `convert_vit`.
        img_size: (height, width) of the images; None for the model's own.
        amp: compute in bfloat16.
        batch_size: images per pass.

    Raises ValueError if a layer fails or does not fit in memory.
    """
    whole = resized_copy(model, img_size or model.patch_embed.img_size)
    weight = whole.patch_embed.proj.weight
    generator = torch.Generator().manual_seed(0)
    num_tokens = whole.patch_embed.num_patches + whole.num_prefix_tokens
    x = torch.randn(batch_size, num_tokens, whole.embed_dim, generator=generator).to(weight)
    images = torch.randn(batch_size, whole.in_chans, *whole.patch_embed.img_size, generator=generator).to(weight)
    arguments = block_arguments(whole)[0]
    dtype = torch.bfloat16 if amp else torch.float32
    layers: dict[int | None, nn.Module] = {None: whole.blocks[0].attn}
    for k in lengths:
        converted = convert_unchecked(whole, k=k, projection=projection, share=share, local=local)
        layers[k] = converted.blocks[0].attn
    runners = {k: Runner(f"attention with k={k}", _step(layer, x, arguments, dtype)) for k, layer in layers.items()}
    model_runner = Runner("the model", make_step(whole, images, mode="forward", dtype=dtype))
    interleave(
        [*runners.values(), model_runner],
        rounds=ROUNDS,
        warmup=WARMUP_ROUNDS,
        clock=lambda: synchronised_clock(x),
        report=lambda index: None,
    )
    if any(not runner.seconds for runner in (*runners.values(), model_runner)):
        raise ValueError("--k plan: a forward pass does not fit in memory: give a smaller --target-size")
    attention = {k: statistics.median(runner.seconds) / batch_size for k, runner in runners.items()}
    total = statistics.median(model_runner.seconds) / batch_size
    return LayerTimes(attention, max(total - len(whole.blocks) * attention[None], 0.0))


def _step(layer: nn.Module, x: Tensor, arguments: dict[str, Any], dtype: torch.dtype) -> Step:
    return make_step(_WithArguments(layer, arguments), x, mode="forward", dtype=dtype)


class _WithArguments(nn.Module):
    """A layer with further keywords, as a module of the tokens alone."""

    def __init__(self, layer: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.arguments = layer, arguments

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, **self.arguments)
        return out
