"""The costs in docs/how_it_works.md are those that PyTorch counts, in the order that the page names."""

import re
from pathlib import Path

import pytest
import torch
from timm.layers import Attention, Mlp
from torch.utils.flop_counter import FlopCounterMode

from linvit import LinformerAttention, build_projection
from linvit.model.kernels import choose_order

PAGE = (Path(__file__).parents[2] / "docs/how_it_works.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.partition("<!-- costs -->")[2].partition("\n\n")[0].splitlines()[3:]
]
DIM, HEADS = 384, 6
assert len(ROWS) == 6


def layer_of(text: str, order: str, grid: int) -> torch.nn.Module:
    if "ordinary" in text:
        return Attention(DIM, HEADS, qkv_bias=True)
    if "MLP" in text:
        return Mlp(DIM, 4 * DIM)
    kind, k = re.fullmatch(r"`(\w+)`, k = (\d+)", text).groups()
    E = build_projection(kind, k=int(k), grid_size=(grid, grid))
    layer = LinformerAttention(DIM, HEADS, key_projection=E)
    if order == "per head":
        layer.order = "per_head"
    else:
        assert layer._choose_order(E, E, torch.empty(1, grid * grid, DIM)) == order
    return layer


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_gflops_are_counted(row):
    text, order, *costs = row
    for grid, cost in zip((32, 64, 128), costs, strict=True):
        with torch.device("meta"):
            layer, x = layer_of(text, order, grid), torch.empty(1, grid * grid, DIM)
        layer.fused_attn = False
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(x)
        assert f"{counter.get_total_flops() / 1e9:.2f}" == cost


def test_longest_folded_lengths():
    found = re.search(r"For ViT-S that is k up to (\d+) at 512 px and (\d+) at 1024 px", PAGE)
    for patches, longest in zip((1024, 4096), map(int, found.groups())):
        for k, order in ((longest, "folded"), (longest + 1, "associative")):
            keys = dict(num_keys=1 + k, k=k, num_patches=patches)
            assert choose_order(dim=DIM, num_heads=HEADS, num_maps=1, foldable=True, **keys) == order
