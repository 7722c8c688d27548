"""Images per second on one core: this loader and timm's, in alternating epochs.

    python benchmarks/loader.py --json benchmarks/results/loader.json

Both use one worker process, which reads JPEG files, crops, flips and collates bytes (timm: PIL and its prefetcher's
collate). Both normalise on the device, which is not measured. An epoch is timed from its first request to its last
batch. The result is the median of the epochs' ratios.

The images are generated, with contrast at every scale, as in photographs, and noise; quality 90, 4:2:0.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Set before libraries that start threads are loaded, so that each worker has one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch
from timm.data import create_dataset, create_loader

from linvit.data.augment.build import InputSpec
from linvit.data.loader import create_eval_loader, create_train_loader
from linvit.data.options import AugmentOptions, CacheOptions
from linvit.data.sources.folder import open_folder
from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Case(NamedTuple):
    """Images of (height, width), resized to a square of `size` pixels."""

    height: int
    width: int
    size: int
    images: int
    batch: int


CASES = {
    "2048x1536-1024": Case(1536, 2048, 1024, 32, 4),
    "500x375-224": Case(375, 500, 224, 512, 32),
    "4096x3072-224": Case(3072, 4096, 224, 16, 4),
}


def make_images(folder: Path, case: Case) -> float:
    """Write the JPEG files of both splits and return their mean size in KB."""
    rng = np.random.default_rng(0)
    sizes = []
    for index in range(case.images):
        image = rng.normal(127, 4, (case.height, case.width, 3)).astype(np.float32)
        step = 4
        while step < case.height:
            coarse = rng.normal(0, 14, (case.height // step + 2, case.width // step + 2, 3)).astype(np.float32)
            image += cv2.resize(coarse, (case.width, case.height), interpolation=cv2.INTER_CUBIC)
            step *= 2
        _, data = cv2.imencode(".jpg", np.clip(image, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
        sizes.append(len(data) / 1000)
        for split in ("train", "val"):
            path = folder / split / "ab"[index % 2] / f"{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.tobytes())
    return statistics.mean(sizes)


def our_batches(folder: Path, case: Case, mode: str, caching: CacheOptions | None = None) -> Iterable[Any]:
    """Epochs of batches as a worker sends them: uint8 images and their labels."""
    spec = InputSpec((case.size, case.size), MEAN, STD, "bicubic", 0.9, "center")
    dataset = open_folder(folder, split=mode)
    settings: dict[str, Any] = {"batch_size": case.batch, "workers": 1, "device": "cpu", "caching": caching}
    if mode == "train":
        loader = create_train_loader(dataset, AugmentOptions(color_jitter=None), spec, seed=0, **settings)
    else:
        loader = create_eval_loader(dataset, spec, **settings)
    return Epochs(loader._loader, loader.set_epoch)


def timm_batches(folder: Path, case: Case, mode: str) -> Iterable[Any]:
    is_training = mode == "train"
    loader = create_loader(
        create_dataset("", root=str(folder), split=mode, is_training=is_training),
        (3, case.size, case.size),
        case.batch,
        is_training=is_training,
        num_workers=1,
        use_prefetcher=True,
        persistent_workers=True,
        pin_memory=False,
        device=torch.device("cpu"),
        color_jitter=None,
        interpolation="random" if is_training else "bicubic",
        crop_pct=0.9,
    )
    return Epochs(loader.loader, lambda epoch: None)


class Epochs:
    """A DataLoader that starts the next epoch each time it is iterated."""

    def __init__(self, loader: Iterable[Any], set_epoch: Callable[[int], None]) -> None:
        self.loader = loader
        self.set_epoch = set_epoch
        self.epoch = 0

    def __iter__(self) -> Any:
        self.set_epoch(self.epoch)
        self.epoch += 1
        for batch in self.loader:
            yield batch
            # linvit's loader does this once a batch is on the device.
            if hasattr(batch, "release"):
                batch.release()


def images_per_second(batches: Iterable[Any], count: int) -> float:
    started = time.perf_counter()
    for _ in batches:
        pass
    return count / (time.perf_counter() - started)


def measure(case: Case, mode: str, folder: Path, *, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache_dir:
        makers = {
            "ours": partial(our_batches, folder, case, mode),
            "ours, cached": partial(
                our_batches, folder, case, mode, CacheOptions(cache="disk", cache_dir=Path(cache_dir))
            ),
            "timm": partial(timm_batches, folder, case, mode),
        }
        loaders = {name: make() for name, make in makers.items()}
        # The first epoch starts the workers and fills the cache.
        for loader in loaders.values():
            images_per_second(loader, case.images)
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(rounds):
            for name, loader in loaders.items():
                speeds[name].append(images_per_second(loader, case.images))
    row: dict[str, Any] = {"mode": mode}
    for name, values in speeds.items():
        row[f"{name} images/s"] = round(statistics.median(values), 1)
        if name != "timm":
            ratios = sorted(a / b for a, b in zip(values, speeds["timm"]))
            row[f"{name}, times timm"] = round(statistics.median(ratios), 2)
            row[f"{name}, range"] = [round(ratios[0], 2), round(ratios[-1], 2)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.cases:
        with tempfile.TemporaryDirectory() as scratch:
            kilobytes = round(make_images(Path(scratch), CASES[name]))
            for mode in ("train", "val"):
                row = measure(CASES[name], mode, Path(scratch), rounds=args.rounds)
                rows.append({"case": name, "file KB": kilobytes, **row})
                print(rows[-1], flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, {**provenance(script_command(), seed=0, n=args.rounds), "rows": rows})


if __name__ == "__main__":
    main()
