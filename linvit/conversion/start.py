"""Where E and F start when the other weights are trained already: at plain averages over the cells of the grid.

A projection that is trained from scratch starts with a little noise, which tells its rows apart. Each row has it on all
patches: measured on a real DINOv2 ViT-S/14 at 266 px with k = 64, that alone takes the tokens behind the first
attention layer from 0.15 to 1.16 of relative error.
"""

import torch

from linvit.projections import PerHeadProjection, Projection
from linvit.projections.conv import ConvProjection
from linvit.projections.grid import averaging_matrix, tile_rows
from linvit.projections.linear import LinearProjection
from linvit.projections.separable import SeparableProjection


@torch.no_grad()
def start_from_averages(projection: Projection) -> None:
    """Take the noise out of a fresh projection; kinds that have none, or nothing but noise, stay as they are."""
    if isinstance(projection, PerHeadProjection):
        for head in projection.each_head():
            start_from_averages(head)
    elif isinstance(projection, SeparableProjection):
        for weight in (projection.weight_h, projection.weight_w):
            _, cells, size = weight.shape
            weight.copy_(averaging_matrix(cells, size, device=weight.device, dtype=weight.dtype))
    elif isinstance(projection, LinearProjection):
        weight = projection.weight
        weight.copy_(tile_rows(projection.k, projection.grid_size, device=weight.device, dtype=weight.dtype))
    elif isinstance(projection, ConvProjection):
        projection.weight.fill_(1 / projection.weight[0, 0].numel())
