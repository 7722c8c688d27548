"""A sample of a folder's images, as a model takes them."""

import random
from pathlib import Path

import torch
from torch import Tensor

from linvit.data.loader import normalize
from linvit.data.read import read_image
from linvit.data.transforms import InputSpec, build_eval_pipeline
from linvit.prediction.inputs import expand


def sample_paths(folder: Path, *, count: int, seed: int) -> list[str]:
    """`count` image files below a folder at any depth, drawn by `seed`, or all where there are fewer.

    Raises ValueError where there is no such folder, or no image in it.
    """
    paths = list(expand(str(folder), missing="refuse"))
    return random.Random(seed).sample(paths, min(count, len(paths)))


def load_images(paths: list[str], spec: InputSpec) -> Tensor:
    """The images as evaluation prepares them: (B, 3, height, width), normalised.

    Raises UnreadableImage, naming the first that cannot be read.
    """
    pipeline = build_eval_pipeline(spec)
    images = [torch.from_numpy(pipeline(image=read_image(path))["image"]) for path in paths]
    return normalize(torch.stack(images), spec)
