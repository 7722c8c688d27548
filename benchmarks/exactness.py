"""Largest difference between LinformerAttention and the reference in float64, forward and over every gradient.

    python benchmarks/exactness.py --json benchmarks/results/exactness.json

On awkward grids, for every kind, sharing, form of k, prefix and order of multiplication; the tests hold each to 1e-10.
"""

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path

import torch
from provenance import provenance
from torch import Tensor, nn

from linvit import reference
from linvit.attention import LinformerAttention
from linvit.projections import PROJECTIONS, Projection, build_projection

GRIDS = [(7, 5), (13, 13)]
PREFIXES = {"none": 0, "class token": 1, "class and 4 registers": 5}
ORDERS = ["per_head", "associative", "folded"]
HEADS, WIDTH = 3, 12
# Maps of E and F, and whether F is E, by sharing.
SHARES = {"none": (HEADS, False), "headwise": (1, False), "kv": (1, True), "layerwise": (1, True)}


def head_matrices(projection: Projection) -> list[Tensor]:
    matrices = projection.matrix().double().expand(HEADS, -1, -1)
    lengths = projection.lengths * (HEADS // len(projection.lengths))
    return [matrix[:length] for matrix, length in zip(matrices, lengths)]


def errors(kind: str, share: str, k: int | list[int], grid: tuple[int, int], prefix: int, order: str) -> list[float]:
    """The largest forward and the largest gradient difference."""
    torch.manual_seed(0)
    maps, same = SHARES[share]
    E = build_projection(kind, k=k, grid_size=grid, num_maps=maps, dtype=torch.float64)
    F = E if same else build_projection(kind, k=k, grid_size=grid, num_maps=maps, dtype=torch.float64)
    layer = LinformerAttention(WIDTH, HEADS, qkv_bias=True, num_prefix_tokens=prefix, dtype=torch.float64)
    layer.set_projections(E, None if same else F)
    layer.order = order  # type: ignore[assignment]
    nn.init.normal_(layer.qkv.bias)
    x = torch.randn(2, prefix + grid[0] * grid[1], WIDTH, dtype=torch.float64, requires_grad=True)
    fast = layer(x)
    slow = reference.linformer_attention(
        x,
        qkv_weight=layer.qkv.weight,
        qkv_bias=layer.qkv.bias,
        out_weight=layer.proj.weight,
        out_bias=layer.proj.bias,
        E=head_matrices(E),
        F=head_matrices(F),
        num_prefix_tokens=prefix,
    )
    inputs = [x, *layer.parameters()]
    cotangent = torch.randn_like(slow)
    gradients = [torch.autograd.grad(y, inputs, cotangent, retain_graph=True) for y in (fast, slow)]
    return [
        (fast - slow).abs().max().item(),
        max((a - b).abs().max().item() for a, b in zip(*gradients)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for kind, share, grid, prefix, order in itertools.product(PROJECTIONS, SHARES, GRIDS, PREFIXES.values(), ORDERS):
        lengths: list[int | list[int]] = [6, [6, 4, 9]] if share == "none" and kind != "identity" else [6]
        for k in lengths:
            found[kind, share].append(errors(kind, share, k, grid, prefix, order))
    rows = [
        {
            "projection": kind,
            "share": share,
            "cases": len(cases),
            "forward": max(forward for forward, _ in cases),
            "gradients": max(gradient for _, gradient in cases),
        }
        for (kind, share), cases in found.items()
    ]
    for row in rows:
        print("{projection:<10} {share:<10} {cases:>3} cases   {forward:.1e}   {gradients:.1e}".format(**row))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**provenance(seed=0, n=1), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
