"""Small image folders and one-second training runs, for the tests of training and evaluation."""

import csv
import os
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml

# train_imagenet.py is next to the package, not in it.
sys.path.insert(0, str(Path(__file__).parents[1]))

import train_imagenet
from linvit.runs.checkpoint import list_checkpoints, read_checkpoint

# For models this small one thread is faster than several, and its order of summation is fixed.
torch.set_num_threads(1)

SETTINGS: dict[str, Any] = {
    "model": "linvit_mini_patch4_64",
    "model_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "k": 4,
    "img_size": [32, 32],
    "batch_size": 8,
    "epochs": 2,
    "warmup_epochs": 0,
    "lr": 1e-3,
    "workers": 0,
    "device": "cpu",
    "report": False,
}
# Columns of summary.csv that depend on the clock.
TIMING = ("images_per_second", "data_wait", "seconds", "peak_memory")


def make_images(
    folder: Path, *, classes: tuple[str, ...] = ("blue", "green", "red"), train: int = 8, val: int = 3
) -> Path:
    """Write DATA/SPLIT/CLASS/*.png: noise with one brighter channel; `train` and `val` count the images per class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for channel, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = rng.integers(0, 100, (36, 40, 3), dtype=np.uint8)
                image[..., channel % 3] += 60
                assert cv2.imwrite(str(folder / split / name / f"{number}.png"), image)
    return folder


def make_broken_images(folder: Path) -> Path:
    """`make_images` with unreadable files: two thirds of the training images, and one validation image."""
    make_images(folder)
    for path in [*folder.glob("train/*/[0-4].png"), folder / "val/green/1.png"]:
        path.write_bytes(b"")
    return folder


def train(data: Path, output: Path, experiment: str = "run", **settings: Any) -> int:
    """Run train_imagenet.py with SETTINGS, overridden by these settings; returns its exit status."""
    output.mkdir(parents=True, exist_ok=True)
    config = output / f"{experiment}-{os.getpid()}.yaml"
    merged = {**SETTINGS, "output": str(output), "experiment": experiment, **settings}
    config.write_text(yaml.safe_dump(merged))
    return train_imagenet.main([str(data), "--config", str(config)])


def read_summary(run: Path) -> list[dict[str, str]]:
    """The rows of summary.csv, without the columns that depend on the clock."""
    with (run / "summary.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMING} for row in csv.DictReader(file)]


def read_state(run: Path, name: str) -> dict[str, Any]:
    """The training state in one of a run's checkpoints."""
    return read_checkpoint(run / "checkpoints" / name)


def assert_same_runs(a: Path, b: Path) -> None:
    """Fail unless two runs ended with identical state, summary and weights; settings and timing may differ."""
    assert read_summary(a) == read_summary(b)
    left, right = (read_checkpoint(list_checkpoints(run / "checkpoints")[-1]) for run in (a, b))
    for state in (left, right):
        del state["settings"]
        for row in state["progress"]["summary"]:
            for column in TIMING:
                del row[column]
    assert_same(left, right)
    for weights in ("best", "last"):
        one, other = (run / weights / "model.safetensors" for run in (a, b))
        assert one.read_bytes() == other.read_bytes(), weights


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Fail, naming the place, unless nested dicts and lists hold identical values."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for index, (left, right) in enumerate(zip(a, b)):
            assert_same(left, right, f"{path}/{index}")
    else:
        assert a == b, path
