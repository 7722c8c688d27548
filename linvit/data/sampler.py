"""The order of images in an epoch, their batches, and the random generators of each sample.

All of it is a function of the seed, the epoch and the image. Neither the number of workers nor the batch at which a run
is resumed changes it.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# With repeats, an epoch of timm's RepeatAugSampler (from DeiT) has a multiple of this many samples.
_REPEATED_ROUND = 256


class SampleKey(NamedTuple):
    """A sample of one epoch; the epoch is part of the key because worker processes outlive epochs."""

    epoch: int
    # Index in the data set.
    image: int
    # How many times the image was drawn in this epoch before; each repeat is augmented differently.
    repeat: int = 0


def _philox(seed: int, epoch: int, stream: int, index: int, repeat: int = 0) -> np.random.Generator:
    """A separate generator for each combination of arguments, at least 2^64 draws from any other."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, repeat, index, stream]))


def sample_generators(seed: int, epoch: int, index: int, repeat: int = 0) -> tuple[np.random.Generator, random.Random]:
    """The two generators that albumentations draws from, for one repeat of one image in one epoch."""
    generator = _philox(seed, epoch, 0, index, repeat)
    return generator, random.Random(int(generator.integers(2**63)))


class TrainSampler:
    """Batches of equal size in a new random order each epoch; the incomplete last batch is dropped.

    All ranks draw the same order, split it into batches of `world_size * batch_size`, and take their share of each.
    Together they therefore see the same batches for every `world_size` with the same total batch size.

    Args:
        repeats: draw each image this many times in a row, augmented differently each time, and fewer distinct images
            per epoch (Hoffer et al. 2020). The length of an epoch is that of timm's RepeatAugSampler. May be
            fractional.
        labels: labels of all images. Every class is then drawn equally often: images of small classes are repeated,
            and large classes are subsampled. None draws every image once.

    Raises:
        ValueError: if one batch over all ranks needs more images than there are.
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        repeats: float = 1.0,
        labels: Sequence[int] | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        assert repeats >= 1
        assert repeats == 1 or labels is None
        total = batch_size * world_size
        if num_images < total:
            processes = f" in each of {world_size} processes" if world_size > 1 else ""
            raise ValueError(
                f"batch_size {batch_size}{processes} needs {total} training images, but there are {num_images}; "
                f"set batch_size to at most {max(num_images // world_size, 1)}"
            )
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.labels = None if labels is None else np.asarray(labels)

    def __len__(self) -> int:
        total = self.batch_size * self.world_size
        if self.repeats == 1 or self.num_images < _REPEATED_ROUND:
            return self.num_images // total
        # At least one batch, even if a batch is larger than the rounded number of samples.
        return max(self.num_images // _REPEATED_ROUND * _REPEATED_ROUND // total, 1)

    @property
    def num_samples(self) -> int:
        """Samples of this rank in an epoch."""
        return len(self) * self.batch_size

    def batches(self, epoch: int, first: int = 0) -> Iterator[list[SampleKey]]:
        """The batches of an epoch from number `first` on."""
        indices, repeats = self._draw(epoch)
        for batch in range(first, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            part = slice(start, start + self.batch_size)
            yield [SampleKey(epoch, *drawn) for drawn in zip(indices[part].tolist(), repeats[part].tolist())]

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's samples in order: index in the data set and number of earlier draws, (num_images,) each."""
        generator = _philox(self.seed, epoch, 1, 0)
        if self.labels is not None:
            return _draw_balanced(self.labels, generator)
        order = generator.permutation(self.num_images)
        position = np.arange(self.num_images)
        # As in timm, fractional repeats draw some images once more than others.
        turn = (position // self.repeats).astype(np.int64)
        return order[turn], position - np.searchsorted(turn, turn)


def _draw_balanced(labels: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One sample per label in random order; the numbers of samples of any two classes differ by at most one.

    Within a class, the numbers of draws of any two images differ by at most one.
    """
    by_class = np.argsort(labels, kind="stable")
    members_of = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
    each, left = divmod(len(labels), len(members_of))
    counts = np.full(len(members_of), each)
    counts[generator.permutation(len(members_of))[:left]] += 1
    indices, repeats = [], []
    for members, count in zip(members_of, counts.tolist()):
        turns = -(-count // len(members))
        drawn = [generator.permutation(members) for _ in range(turns)]
        indices.append(np.concatenate(drawn)[:count] if drawn else members[:0])
        repeats.append(np.arange(count) // len(members))
    order = generator.permutation(len(labels))
    return np.concatenate(indices)[order], np.concatenate(repeats)[order]


class EvalSampler:
    """Every image exactly once over all ranks, in order and without padding; the last batch may be smaller.

    The numbers of batches of two ranks may differ by one, so a loop over batches must not communicate in each of them.
    """

    def __init__(self, num_images: int, *, batch_size: int, rank: int, world_size: int) -> None:
        assert 0 <= rank < world_size
        self.batch_size = batch_size
        self.indices = range(rank, num_images, world_size)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    @property
    def num_samples(self) -> int:
        """Images of this rank in an epoch."""
        return len(self.indices)

    def batches(self, epoch: int, first: int = 0) -> Iterator[list[SampleKey]]:
        """The batches of an epoch from number `first` on."""
        for start in range(first * self.batch_size, len(self.indices), self.batch_size):
            yield [SampleKey(epoch, index) for index in self.indices[start : start + self.batch_size]]
