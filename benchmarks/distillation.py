"""What distillation adds to a fitted conversion, by learning rate, batch size and number of images seen.

    python benchmarks/distillation.py DATA NAME=WEIGHTS FOLDER --img-size 518 --rates 1e-5 3e-6 --images-seen 1000 8000

Each trial starts from the conversion in FOLDER and learns from images of DATA/train, which are read once and stay on
the device. Features of DATA/val are probed as in probe.py; a few other images of DATA/val choose the best weights of a
trial. The first rows are the original and the conversion itself.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from probe import Probes, create, draw, features_of
from timm.models import VisionTransformer
from torch import Tensor

from linvit.conversion.comparison import Comparison
from linvit.conversion.distil import DistilOptions, distil
from linvit.data.augment.build import InputSpec, resolve_input
from linvit.data.options import InputOptions
from linvit.data.sources.loose import load_batches, sample_paths
from linvit.data.sources.open import open_images
from linvit.device import choose_device
from linvit.measure.provenance import provenance, script_command
from linvit.model.vit import LinformerViT
from linvit.output.files import write_json

HELD_OUT = 64
BATCH_SIZE = 8


def read(paths: list[str], spec: InputSpec, device: torch.device) -> Tensor:
    """All images, (N, 3, H, W), in bfloat16."""
    return torch.cat([images.bfloat16().to(device) for images in load_batches(paths, spec, batch_size=BATCH_SIZE)])


def shuffled(images: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """An endless sequence of batches, reshuffled after every pass."""
    numbers, order = list(range(len(images))), random.Random(seed)
    while True:
        order.shuffle(numbers)
        for first in range(0, len(numbers), batch_size):
            yield images[numbers[first : first + batch_size]].float()


def in_batches(images: Tensor) -> Iterator[Tensor]:
    return (batch.float() for batch in images.split(BATCH_SIZE))


def probed(features: Tensor, labels: Tensor, seed: int) -> Probes:
    torch.set_num_threads(1)
    return Probes(features, labels, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("original")
    parser.add_argument("converted", type=Path)
    parser.add_argument("--img-size", type=int, required=True)
    parser.add_argument("--num-images", type=int, default=10**9, help="number of images to learn from")
    parser.add_argument("--probe-images", type=int, default=1000)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--images-seen", type=int, nargs="+", default=[1000])
    parser.add_argument("--workers", type=int, default=1, help="processes that fit probes while trials run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    device = torch.device(choose_device(args.device))
    original = create(args.original, args.img_size).to(device)
    start = create(f"local-dir:{args.converted}", args.img_size).to(device)
    assert isinstance(start, LinformerViT)
    spec = resolve_input(original, InputOptions(img_size=(args.img_size,) * 2))
    train = read(sample_paths(args.data / "train", count=args.num_images, seed=args.seed), spec, device)
    val = open_images(args.data, split="val")
    indices = draw(val, args.probe_images, args.seed)
    labels = torch.tensor([val.label(index) for index in indices])
    probe_images = read([str(val.path(index)) for index in indices], spec, device)
    others = sorted(set(range(len(val))) - set(indices))[:: max(1, (len(val) - len(indices)) // HELD_OUT)][:HELD_OUT]
    held_out = Comparison(
        original, read([str(val.path(index)) for index in others], spec, device).float(), batch_size=BATCH_SIZE
    )

    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        futures: list[Future[Probes]] = []

        def add(model: VisionTransformer, row: dict[str, Any]) -> None:
            futures.append(
                pool.submit(probed, features_of(model, in_batches(probe_images), amp=True), labels, args.seed)
            )
            rows.append(row)
            print(json.dumps(row), flush=True)

        add(original, {"model": "original"})
        add(start, {"model": "converted", "held_out": held_out.fidelity(start).mean_cosine})
        for images_seen, batch_size, rate in product(args.images_seen, args.batch_sizes, args.rates):
            torch.manual_seed(args.seed)
            model = copy.deepcopy(start)
            started = time.perf_counter()
            options = DistilOptions(steps=images_seen // batch_size, rate=rate, amp=True)
            batches = shuffled(train, batch_size, args.seed)
            fidelity = distil(original, model, batches, held_out, options)
            row = {"images_seen": images_seen, "batch_size": batch_size, "rate": rate}
            add(model, row | {"held_out": fidelity.mean_cosine, "seconds": time.perf_counter() - started})
        reference = futures[0].result()
        for row, future in zip(rows, futures):
            row |= future.result().against(reference)
            print(json.dumps({name: round(x, 6) if isinstance(x, float) else x for name, x in row.items()}), flush=True)
    if args.json is not None:
        about = provenance(script_command(), seed=args.seed, n=1) | {
            "img_size": args.img_size,
            "num_images": len(train),
            "probe_images": len(indices),
        }
        write_json(args.json, about | {"rows": rows})


if __name__ == "__main__":
    main()
