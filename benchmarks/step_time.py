"""Seconds of a forward pass and of a training step, ours against timm's ViT with fused attention, side by side.

    python benchmarks/step_time.py --json benchmarks/results/step_time_cpu.json

Each round times every model once, in turn, so that whatever else the machine does falls on all alike; what counts is
the median over rounds of the ratio to timm's ViT in the same round.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
from provenance import provenance
from torch import nn

import linvit.models  # noqa: F401  registers the names

BASELINE = "vit_small_patch16_224"
OURS = "linvit_small_patch16_224"


def build(name: str, size: int, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size, num_classes=1000, **kwargs)


def forward(model: nn.Module, images: torch.Tensor) -> None:
    with torch.inference_mode():
        model.eval()(images)


def train(model: nn.Module, images: torch.Tensor) -> None:
    model.train()(images).sum().backward()
    model.zero_grad(set_to_none=True)


def seconds(mode: str, model: nn.Module, images: torch.Tensor) -> float:
    started = time.perf_counter()
    {"forward": forward, "train": train}[mode](model, images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(size: int, mode: str, *, rounds: int, lengths: list[int], device: str) -> list[dict[str, Any]]:
    models = {f"k={k}": build(OURS, size, k=k, projection="separable", share="kv") for k in lengths}
    models = {"timm ViT": build(BASELINE, size), **models}
    images = torch.randn(1, 3, size, size, device=device)
    for model in models.values():
        seconds(mode, model.to(device), images)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(seconds(mode, model, images))
    rows = []
    for name, taken in times.items():
        ratios = [base / own for base, own in zip(times["timm ViT"], taken)]
        rows.append(
            {
                "model": name,
                "image_size": size,
                "patches": (size // 16) ** 2,
                "mode": mode,
                "seconds": round(statistics.median(taken), 4),
                "times_faster": round(statistics.median(ratios), 2),
                "spread": [round(min(ratios), 2), round(max(ratios), 2)],
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 64, 32], help="projected lengths k")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [
        row
        for size in args.sizes
        for mode in ("forward", "train")
        for row in measure(size, mode, rounds=args.rounds, lengths=args.lengths, device=args.device)
    ]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({**provenance(seed=0, n=args.rounds), "dtype": "float32", "batch": 1, "rows": rows}, indent=2)
            + "\n"
        )


if __name__ == "__main__":
    main()
