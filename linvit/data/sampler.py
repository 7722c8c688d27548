"""Which images form which batch, and the random numbers of each sample.

Both depend on the seed, the epoch and the image alone: not on the number of workers, nor on where a run was resumed.
"""

import random
from collections.abc import Iterator

import numpy as np

# Epoch and dataset index: a key carries the epoch because a worker process outlives one.
SampleKey = tuple[int, int]


def _philox(seed: int, epoch: int, stream: int, index: int) -> np.random.Generator:
    """A generator of its own for each argument: key and upper counter words, 2^128 draws apart."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, index, stream]))


def sample_generators(seed: int, epoch: int, index: int) -> tuple[np.random.Generator, random.Random]:
    """The two generators that albumentations draws from, for one image in one epoch."""
    generator = _philox(seed, epoch, 0, index)
    return generator, random.Random(int(generator.integers(2**63)))


class TrainSampler:
    """Batches of equal size in a new random order each epoch; images short of a whole batch are left out.

    All ranks draw one order and cut it into batches of `world_size * batch_size`, of which each takes its part: the
    union over the ranks is the same for every `world_size` with the same total batch.

    Raises:
        ValueError: where there are fewer images than one batch over all ranks needs.
    """

    def __init__(self, num_images: int, *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        assert 0 <= rank < world_size
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

    def __len__(self) -> int:
        return self.num_images // (self.batch_size * self.world_size)

    @property
    def num_drawn(self) -> int:
        """Images that this rank sees in an epoch."""
        return len(self) * self.batch_size

    def batches(self, epoch: int, first: int = 0) -> Iterator[list[SampleKey]]:
        order = _philox(self.seed, epoch, 1, 0).permutation(self.num_images)
        for batch in range(first, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(epoch, index) for index in order[start : start + self.batch_size].tolist()]


class EvalSampler:
    """Every image exactly once over all ranks, in order; the last batch may be smaller, and nothing is padded.

    Ranks may differ by one batch, so a loop over them must not communicate per batch.
    """

    def __init__(self, num_images: int, *, batch_size: int, rank: int, world_size: int) -> None:
        assert 0 <= rank < world_size
        self.batch_size = batch_size
        self.indices = range(rank, num_images, world_size)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    @property
    def num_drawn(self) -> int:
        """Images that this rank sees in an epoch."""
        return len(self.indices)

    def batches(self, epoch: int, first: int = 0) -> Iterator[list[SampleKey]]:
        for start in range(first * self.batch_size, len(self.indices), self.batch_size):
            yield [(epoch, index) for index in self.indices[start : start + self.batch_size]]
