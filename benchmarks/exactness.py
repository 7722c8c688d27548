"""Largest difference between LinformerAttention and the reference in float64, forward and over every gradient.

    python benchmarks/exactness.py --json benchmarks/results/exactness.json

Covers awkward grids, every kind with the sharings and orders of multiplication it supports, forms of k, and prefixes.
The tests require each difference to be below 1e-10.
"""

import argparse
import itertools
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

from linvit import reference
from linvit.measure.provenance import provenance, script_command
from linvit.model.attention import LinformerAttention
from linvit.model.projections import (
    PROJECTIONS,
    MatrixProjection,
    PerHeadProjection,
    Projection,
    build_projection,
    maps_can_differ,
)
from linvit.model.projections.conv import ConvProjection
from linvit.model.projections.grid import factor_pair
from linvit.output.files import write_json

GRIDS = [(7, 5), (13, 13), (6, 10)]
PREFIXES = {"none": 0, "class token": 1, "class and 4 registers": 5}
ORDERS = ["per_head", "associative", "folded"]
HEADS, WIDTH = 3, 12
# Maps of E and F, and whether F is E, by sharing.
SHARES = {"none": (HEADS, False), "headwise": (1, False), "kv": (1, True), "layerwise": (1, True)}


def reductions(projection: Projection, num_heads: int) -> list[reference.Reduction]:
    """E of each head, in the form that the reference takes."""
    if isinstance(projection, PerHeadProjection):
        return [found for head in projection.each_head() for found in reductions(head, 1)]
    if isinstance(projection, MatrixProjection):
        maps: list[reference.Reduction] = [*projection.matrix().double()]
    else:
        grid, cells = projection.grid_size, factor_pair(projection.k, projection.grid_size)
        if isinstance(projection, ConvProjection):
            weights = zip(projection.weight, projection.gamma, projection.beta)
            maps = [
                partial(reference.depthwise_conv, grid=grid, cells=cells, weight=w, gamma=g, beta=b)
                for w, g, b in weights
            ]
        else:
            maps = [partial(reference.max_pool, grid=grid, cells=cells)]
    return maps * (num_heads // len(maps))


def lengths(kind: str, share: str) -> list[int | list[int]]:
    """The forms of k that `kind` takes with `share`."""
    can_differ, per_head = maps_can_differ(kind), share == "none" and kind != "identity"
    one = [6] if can_differ or share in ("kv", "layerwise") else []
    return [*one, [6, 4, 9]] if per_head else [*one]


def orders(kind: str) -> list[str]:
    return ORDERS if issubclass(PROJECTIONS[kind], MatrixProjection) else ORDERS[1:]


def errors(kind: str, share: str, k: int | list[int], grid: tuple[int, int], prefix: int, order: str) -> list[float]:
    """The largest forward and the largest gradient difference."""
    torch.manual_seed(0)
    maps, same = SHARES[share]
    E, F = (
        build_projection(kind, k=k, grid_size=grid, num_maps=maps, dim=WIDTH, dtype=torch.float64) for _ in range(2)
    )
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
        E=reductions(E, HEADS),
        F=reductions(E if same else F, HEADS),
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
    for kind, share, grid, prefix in itertools.product(PROJECTIONS, SHARES, GRIDS, PREFIXES.values()):
        for k, order in itertools.product(lengths(kind, share), orders(kind)):
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
        write_json(args.json, {**provenance(script_command(), seed=0, n=1), "rows": rows})


if __name__ == "__main__":
    main()
