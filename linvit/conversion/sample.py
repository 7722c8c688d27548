"""The images of a conversion: a sample of a folder, a part of which no weight is fitted to."""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from linvit.data.transforms import InputSpec
from linvit.spectrum.images import load_batches, sample_paths

FEWEST = 8
# They choose and measure, and teach nothing: an eighth, and at most so many.
MOST_HELD_OUT = 64


@dataclass(frozen=True)
class Sample:
    """Images below `folder`, drawn by `seed`, as a model takes them, on its device.

    Raises ValueError where there are fewer than 8.
    """

    folder: Path
    spec: InputSpec
    device: torch.device
    num_images: int
    batch_size: int
    seed: int
    paths: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", sample_paths(self.folder, count=self.num_images, seed=self.seed))
        if len(self.paths) < FEWEST:
            raise ValueError(f"{self.folder} holds {len(self.paths)} images: a fit needs at least {FEWEST}")

    @property
    def num_held_out(self) -> int:
        return min(max(len(self.paths) // 8, 2), MOST_HELD_OUT)

    def batches(self) -> Iterator[Tensor]:
        """All images of the sample once, those held out last: (B, 3, H, W)."""
        return self._load(self.paths, self.batch_size)

    def held_out(self) -> Tensor:
        """The images that no weight is fitted to."""
        return torch.cat(list(self._load(self.paths[-self.num_held_out :], self.batch_size)))

    def endless(self, batch_size: int) -> Iterator[Tensor]:
        """All images of the folder but those held out, again and again, each time in another order."""
        held_out = set(self.paths[-self.num_held_out :])
        everything = sample_paths(self.folder, count=sys.maxsize, seed=self.seed)
        paths = [path for path in everything if path not in held_out]
        order = random.Random(self.seed)
        while True:
            order.shuffle(paths)
            yield from self._load(paths, batch_size)

    def _load(self, paths: list[str], batch_size: int) -> Iterator[Tensor]:
        for images in load_batches(paths, self.spec, batch_size=batch_size):
            yield images.to(self.device)
