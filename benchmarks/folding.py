"""Find where folding a layer's weights into its keys pays off: time of the associative order over the folded order.

    python benchmarks/folding.py --json benchmarks/results/folding_cpu.json

Times one attention layer with a separable projection and a class token, over width, k, patches, batch and mode. Folding
is faster above 1. `folds` is the choice of `choose_order`, `cost` the ratio of multiply-adds that it compares.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from linvit.measure.provenance import provenance, script_command
from linvit.model.attention import LinformerAttention
from linvit.model.kernels import choose_order
from linvit.model.projections import build_projection
from linvit.output.files import write_json

WIDTHS = {192: 3, 384: 6, 768: 12}
LENGTHS = [16, 36, 49, 64, 81, 100]
GRIDS = [14, 32, 64]
BATCHES = [1, 4]


def seconds(layer: LinformerAttention, x: torch.Tensor, mode: str) -> float:
    started = time.perf_counter()
    if mode == "forward":
        with torch.inference_mode():
            layer(x)
    else:
        layer(x).sum().backward()
        layer.zero_grad(set_to_none=True)
        x.grad = None
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(
    width: int, k: int, side: int, batch: int, mode: str, *, rounds: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    heads = WIDTHS[width]
    torch.manual_seed(0)
    E = build_projection("separable", k=k, grid_size=(side, side))
    layer = LinformerAttention(width, heads, qkv_bias=True, num_prefix_tokens=1, key_projection=E).to(device, dtype)
    x = torch.randn(batch, 1 + side * side, width, device=device, dtype=dtype, requires_grad=mode == "train")
    ratios = []
    for index in range(rounds + 1):
        times = {}
        for order in ("associative", "folded"):
            layer.order = order  # type: ignore[assignment]
            times[order] = seconds(layer, x, mode)
        if index:
            ratios.append(times["associative"] / times["folded"])
    keys = k + 1
    rule = dict(dim=width, num_heads=heads, num_keys=keys, num_patches=side * side, k=k, num_maps=1, foldable=True)
    return {
        "width": width,
        "heads": heads,
        "k": k,
        "patches": side * side,
        "batch": batch,
        "mode": mode,
        "times_faster": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "cost": round((width + keys) / (keys * heads + 2 * width * keys / side**2), 3),
        "folds": choose_order(**rule) == "folded",  # type: ignore[arg-type]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    origin = provenance(script_command(), seed=0, n=args.rounds)
    rows = []
    for case in itertools.product(WIDTHS, LENGTHS, GRIDS, BATCHES, ("forward", "train")):
        rows.append(measure(*case, rounds=args.rounds, device=args.device, dtype=getattr(torch, args.dtype)))
        print(rows[-1], flush=True)
    agreeing = sum((row["times_faster"] > 1) == row["folds"] for row in rows)
    lost = max(max(row["times_faster"], 1) if not row["folds"] else max(1 / row["times_faster"], 1) for row in rows)
    print(f"the rule agrees in {agreeing} of {len(rows)} cases; it loses at most {lost - 1:.0%}")
    if args.json:
        found = {**origin, "dtype": args.dtype, "agreeing": agreeing, "largest_loss": round(lost - 1, 3), "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, found, indent=1)


if __name__ == "__main__":
    main()
