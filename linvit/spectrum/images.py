"""A sample of a folder's images, as a model takes them."""

import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from linvit.data.loader import normalize
from linvit.data.read import read_image
from linvit.data.transforms import InputSpec, build_eval_pipeline
from linvit.prediction.inputs import expand

# Batches being read at once; each takes memory until its turn comes.
_MOST_THREADS = 8


def sample_paths(folder: Path, *, count: int, seed: int) -> list[str]:
    """`count` image files below a folder at any depth, drawn by `seed`, or all where there are fewer.

    Raises ValueError where there is no such folder, or no image in it.
    """
    paths = list(expand(str(folder), missing="refuse"))
    return random.Random(seed).sample(paths, min(count, len(paths)))


def load_images(paths: Sequence[str], spec: InputSpec) -> Tensor:
    """The images as evaluation prepares them: (B, 3, height, width), normalised.

    Raises UnreadableImage, naming the first that cannot be read.
    """
    pipeline = build_eval_pipeline(spec)
    images = [torch.from_numpy(pipeline(image=read_image(path))["image"]) for path in paths]
    return normalize(torch.stack(images), spec)


def load_batches(paths: Sequence[str], spec: InputSpec, *, batch_size: int) -> Iterator[Tensor]:
    """`load_images` of so many at once, in order, read ahead by a few threads."""
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Tensor]] = deque()
        for first in range(0, len(paths), batch_size):
            ahead.append(pool.submit(load_images, paths[first : first + batch_size], spec))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
