"""Measure what the training loop adds to a model's bare step, with both in alternating steps.

    python benchmarks/loop_overhead.py --json benchmarks/results/loop_overhead.json

train_imagenet.py runs for an epoch on batches of bytes in memory. Between two requests for a batch, it normalises the
batch, seeds, trains, checks loss and gradients, reports, and checks whether to save or stop. After each of these steps
a second model of the same kind runs a bare step on the same batch, already normalised: forward, loss, backward,
optimizer. Reading images is in neither. The result is the median of the steps' ratios.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from linvit.data.loader import Loader, normalize
from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json
from linvit.training import setup
from linvit.training.config import TrainConfig, parse
from linvit.training.loss import create_loss
from linvit.training.model import build_model
from linvit.training.optim import create_optimizer
from linvit.training.setup import seed_run

# train_imagenet.py is next to the package, not in it.
sys.path.insert(0, str(Path(__file__).parents[1]))
import train_imagenet

CLASSES = ("a", "b")
MODELS = ("linvit_small_patch16_224:8", "linvit_mini_patch8_288:16")
CACHED_BATCHES = 4
WARMUP = 3


class Turns:
    """Replaces a loader: yields cached batches, and times the loop's step and then a bare step on each."""

    def __init__(self, loader: Loader, bare_step: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        batches = list(itertools.islice(iter(loader._loader), CACHED_BATCHES))
        self.batches = [(batch, normalize(batch.images, loader._spec)) for batch in batches]
        self.bare_step = bare_step
        self.num_batches = len(loader)
        self.loop: list[float] = []
        self.bare: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        for batch, images in itertools.islice(itertools.cycle(self.batches), self.num_batches):
            started = time.perf_counter()
            yield batch
            self.loop.append(time.perf_counter() - started)
            started = time.perf_counter()
            self.bare_step(images, batch.labels)
            self.bare.append(time.perf_counter() - started)


def make_bare_step(config: TrainConfig) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """The minimal training step of a model."""
    seed_run(config.seed)
    model, _ = build_model(config, class_names=CLASSES)
    model.train()
    optimizer = create_optimizer(model, config, lr=1e-3)
    loss_fn = create_loss(config)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        loss_fn(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", len(CLASSES))):
        for index in range(number):
            path = folder / split / CLASSES[index % len(CLASSES)] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))


def measure(model: str, batch_size: int, *, steps: int) -> dict[str, Any]:
    turns: list[Turns] = []
    build_train_loader = setup.build_train_loader
    with tempfile.TemporaryDirectory() as scratch:
        make_images(Path(scratch) / "data", batch_size * (steps + WARMUP))
        settings = f"--model {model} -b {batch_size} --epochs 1 --warmup-epochs 0 --lr 1e-3 -j 0 --device cpu"
        argv = [f"{scratch}/data", *settings.split(), "--output", scratch, "--experiment", "run"]

        def cached(*args: Any, **kwargs: Any) -> Loader:
            loader = build_train_loader(*args, **kwargs)
            turns.append(Turns(loader, make_bare_step(parse(argv))))
            loader._loader = turns[0]  # type: ignore[assignment]
            return loader

        setup.build_train_loader = cached
        try:
            status = train_imagenet.main(argv)
        finally:
            setup.build_train_loader = build_train_loader
        if status != 0:
            raise SystemExit(status)
    loop, bare = turns[0].loop[WARMUP:], turns[0].bare[WARMUP:]
    ratios = sorted(a / b for a, b in zip(loop, bare))
    quarter = len(ratios) // 4
    row = {
        "model": model,
        "batch": batch_size,
        "bare_seconds": round(statistics.median(bare), 4),
        "loop_seconds": round(statistics.median(loop), 4),
        "ratio": round(statistics.median(ratios), 4),
        "quartiles": [round(ratios[quarter], 4), round(ratios[-1 - quarter], 4)],
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="NAME:BATCH")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pairs = [spec.split(":") for spec in args.models]
    rows = [measure(model, int(batch), steps=args.steps) for model, batch in pairs]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, {**provenance(script_command(), seed=42, n=args.steps), "rows": rows})


if __name__ == "__main__":
    main()
