"""`linvit train`: runs the training loop of train_imagenet.py."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

SUMMARY = "train a model on folders of images (same as python train_imagenet.py)"


def main(argv: Sequence[str]) -> int:
    """Train, and return the exit status."""
    from linvit.training.config import parse

    config = parse(argv, prog="linvit train")
    from linvit.distributed import record_errors

    return record_errors(load_loop().train)(config)


def load_loop() -> ModuleType:
    """Import train_imagenet.py from next to this package, never a file of that name in the current folder."""
    spec = importlib.util.spec_from_file_location("train_imagenet", Path(__file__).parents[2] / "train_imagenet.py")
    assert spec is not None
    assert spec.loader is not None
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    return loop
