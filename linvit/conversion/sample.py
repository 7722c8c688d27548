"""The images of a conversion: those that weights are fitted to, those that choose, and those that only measure."""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from linvit.data.augment.build import InputSpec
from linvit.data.sources.loose import load_batches, sample_paths

FEWEST = 8
# Images that choose penalties, and again as many that measure what came out: an eighth, and at most so many.
MOST_HELD_OUT = 64


@dataclass(frozen=True)
class Sample:
    """Images below `folder`, drawn by `seed`, as a model takes them, on its device.

    `paths` are those of the fit, at most `num_images`, the last `num_held_out` of which choose, and teach nothing. As
    many others of the folder, `unseen_paths`, do neither.

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
    # All of the folder but those unseen, those of the fit first.
    seen_paths: list[str] = field(init=False)

    def __post_init__(self) -> None:
        everything = sample_paths(self.folder, count=sys.maxsize, seed=self.seed)
        if len(everything) < FEWEST:
            raise ValueError(f"{self.folder} holds {len(everything)} images: a fit needs at least {FEWEST}")
        unseen = _num_held_out(min(self.num_images, len(everything)))
        object.__setattr__(self, "unseen_paths", everything[-unseen:])
        object.__setattr__(self, "seen_paths", everything[:-unseen])
        object.__setattr__(self, "paths", self.seen_paths[: self.num_images])

    @property
    def num_held_out(self) -> int:
        return _num_held_out(len(self.paths))

    def batches(self) -> Iterator[Tensor]:
        """All images of the sample once, those held out last: (B, 3, H, W)."""
        return self._load(self.paths, self.batch_size)

    def unseen(self) -> Tensor:
        """The images that nothing is fitted to or chosen by."""
        return torch.cat(list(self._load(self.unseen_paths, self.batch_size)))

    def endless(self, batch_size: int) -> Iterator[Tensor]:
        """All images of the folder but those unseen, again and again, each time in another order."""
        paths = list(self.seen_paths)
        order = random.Random(self.seed)
        while True:
            order.shuffle(paths)
            yield from self._load(paths, batch_size)

    def _load(self, paths: list[str], batch_size: int) -> Iterator[Tensor]:
        for images in load_batches(paths, self.spec, batch_size=batch_size):
            yield images.to(self.device)


def _num_held_out(count: int) -> int:
    return min(max(count // 8, 2), MOST_HELD_OUT)
