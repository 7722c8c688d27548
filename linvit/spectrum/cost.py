"""What a layer costs at each projected length, and which lengths are worth trying."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from linvit.bench.flops import count_flops
from linvit.projections import GridSize
from linvit.projections.grid import factor_pair
from linvit.spectrum.result import Spectrum
from linvit.vit import LinformerViT, Share

# Cells that k divides the grid into are at most so many times longer than wide, or wider than long.
LONGEST_CELL = 1.5
# Each length tried is at least this many times the one before it.
STEP = 1.15


class Choice(NamedTuple):
    """A projected length for one layer (None: ordinary attention): operations on one image, share of energy kept."""

    k: int | None
    flops: int
    energy: float
    # What ordinary attention takes.
    ordinary_flops: int


def layer_choices(spectrum: Spectrum, *, projection: str, share: Share, min_k: int) -> list[list[Choice]]:
    """For each layer what it can do, from the least operations to the most: projected lengths, then ordinary attention.

    `energy` is the mean over heads of the share that the k largest singular values have: no k projected keys can keep
    more. Lengths that cost as much as ordinary attention are left out.
    """
    ordinary = attention_flops(spectrum, None, projection=projection, share=share)
    cheaper: dict[int, int] = {}
    for k in lengths_to_try(spectrum.grid_size, min_k=min_k):
        flops = attention_flops(spectrum, k, projection=projection, share=share)
        if flops >= ordinary:
            break
        cheaper[k] = flops
    return [
        [
            *(Choice(k, flops, _energy_kept(spectrum, layer, k), ordinary) for k, flops in cheaper.items()),
            Choice(None, ordinary, 1.0, ordinary),
        ]
        for layer in range(spectrum.num_layers)
    ]


def lengths_to_try(grid_size: GridSize, *, min_k: int) -> list[int]:
    """Projected lengths k_h · k_w, ascending, whose cells on the grid are near square."""
    height, width = grid_size
    products = {
        k_h * k_w for k_h in range(1, height + 1) for k_w in range(1, width + 1) if min_k <= k_h * k_w < height * width
    }
    lengths: list[int] = []
    for k in sorted(products):
        k_h, k_w = factor_pair(k, grid_size)
        shape = (height / k_h) / (width / k_w)
        if max(shape, 1 / shape) <= LONGEST_CELL and (not lengths or k >= STEP * lengths[-1]):
            lengths.append(k)
    return lengths


def attention_flops(spectrum: Spectrum, k: int | None, *, projection: str, share: Share) -> int:
    """Operations of one attention layer on one image; two per multiply-add, as `linvit bench` counts them.

    Raises ValueError for a projection and a share that do not go together.
    """
    return _count(
        spectrum.grid_size, spectrum.num_prefix_tokens, spectrum.embed_dim, spectrum.num_heads, k, projection, share
    )


@cache
def _count(
    grid_size: GridSize, num_prefix: int, embed_dim: int, num_heads: int, k: int | None, projection: str, share: Share
) -> int:
    with torch.device("meta"):
        # One layer on a picture of a pixel a patch.
        model = LinformerViT(
            img_size=grid_size,
            patch_size=1,
            embed_dim=embed_dim,
            depth=1,
            num_heads=num_heads,
            class_token=num_prefix > 0,
            reg_tokens=max(num_prefix - 1, 0),
            global_pool="avg",
            num_classes=0,
            k=[k],
            projection=projection,
            share=share,
            weight_init="skip",
        )
        tokens = torch.empty(1, num_prefix + grid_size[0] * grid_size[1], embed_dim)
    return count_flops(model.blocks[0].attn, tokens, mode="forward")


def _energy_kept(spectrum: Spectrum, layer: int, k: int) -> float:
    cumulative = spectrum.cumulative_energy[layer]
    return float(np.mean(cumulative[:, min(k, cumulative.shape[1]) - 1]))
