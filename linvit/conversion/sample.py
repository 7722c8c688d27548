"""The images of a conversion: those that weights are fitted to, those that choose, and those that only measure."""

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
# Images that choose penalties, and again as many that measure what came out: an eighth, and at most so many.
MOST_HELD_OUT = 64


@dataclass(frozen=True)
class Sample:
    """Images below `folder`, drawn by `seed`, as a model takes them, on its device.

    Of the `num_images` at most, `paths`, the last `num_held_out` choose, and teach nothing. Those `unseen` do neither:
    other images of the folder, or some of the sample where it has no others.

    Raises ValueError where there are fewer than 8.
    """

    folder: Path
    spec: InputSpec
    device: torch.device
    num_images: int
    batch_size: int
    seed: int
    paths: list[str] = field(init=False)
    unseen_paths: list[str] = field(init=False)
    other_paths: list[str] = field(init=False)

    def __post_init__(self) -> None:
        drawn = sample_paths(self.folder, count=self.num_images, seed=self.seed)
        if len(drawn) < FEWEST:
            raise ValueError(f"{self.folder} holds {len(drawn)} images: a fit needs at least {FEWEST}")
        known = set(drawn)
        others = [path for path in sample_paths(self.folder, count=sys.maxsize, seed=self.seed) if path not in known]
        wanted = _num_held_out(drawn)
        missing = max(0, wanted - len(others))
        object.__setattr__(self, "paths", drawn[missing:])
        object.__setattr__(self, "unseen_paths", others[:wanted] + drawn[:missing])
        object.__setattr__(self, "other_paths", others[wanted:])

    @property
    def num_held_out(self) -> int:
        return _num_held_out(self.paths)

    def batches(self) -> Iterator[Tensor]:
        """All images of the sample once, those held out last: (B, 3, H, W)."""
        return self._load(self.paths, self.batch_size)

    def unseen(self) -> Tensor:
        """The images that nothing is fitted to or chosen by."""
        return torch.cat(list(self._load(self.unseen_paths, self.batch_size)))

    def endless(self, batch_size: int) -> Iterator[Tensor]:
        """All images of the folder but those unseen, again and again, each time in another order."""
        paths = sorted(self.paths + self.other_paths)
        order = random.Random(self.seed)
        while True:
            order.shuffle(paths)
            yield from self._load(paths, batch_size)

    def _load(self, paths: list[str], batch_size: int) -> Iterator[Tensor]:
        for images in load_batches(paths, self.spec, batch_size=batch_size):
            yield images.to(self.device)


def _num_held_out(paths: list[str]) -> int:
    return min(max(len(paths) // 8, 2), MOST_HELD_OUT)
