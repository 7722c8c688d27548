"""Which images form which batch, and the random numbers of each sample.

Both depend on the seed, the epoch and the image alone: not on the number of workers, nor on where a run was resumed.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# timm's RepeatAugSampler, after DeiT's, shows a multiple of this many images in an epoch.
_REPEATED_ROUND = 256


class SampleKey(NamedTuple):
    """A sample of one epoch; it carries the epoch because a worker process outlives one."""

    epoch: int
    # In the data set.
    image: int
    # How often the image was shown in this epoch before: each time it is augmented anew.
    repeat: int = 0


def _philox(seed: int, epoch: int, stream: int, index: int, repeat: int = 0) -> np.random.Generator:
    """A generator of its own for each argument: key and upper counter words, at least 2^64 draws apart."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, repeat, index, stream]))


def sample_generators(seed: int, epoch: int, index: int, repeat: int = 0) -> tuple[np.random.Generator, random.Random]:
    """The two generators that albumentations draws from, for one showing of one image in one epoch."""
    generator = _philox(seed, epoch, 0, index, repeat)
    return generator, random.Random(int(generator.integers(2**63)))


class TrainSampler:
    """Batches of equal size in a new random order each epoch; samples short of a whole batch are left out.

    All ranks draw one order and cut it into batches of `world_size * batch_size`, of which each takes its part: the
    union over the ranks is the same for every `world_size` with the same total batch.

    Args:
        repeats: show each image of an epoch this often in a row, each time augmented anew, and so fewer images of the
            set (Hoffer et al. 2020); an epoch is as long as timm's RepeatAugSampler makes it. Need not be whole.
        labels: of all images; each class is then drawn equally often, images of small classes several times, of
            large ones some. None: every image once.

    Raises:
        ValueError: where there are fewer samples than one batch over all ranks needs.
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
        # One batch at least, where it is larger than the round number.
        return max(self.num_images // _REPEATED_ROUND * _REPEATED_ROUND // total, 1)

    @property
    def num_drawn(self) -> int:
        """Samples that this rank sees in an epoch."""
        return len(self) * self.batch_size

    def batches(self, epoch: int, first: int = 0) -> Iterator[list[SampleKey]]:
        indices, repeats = self._draw(epoch)
        for batch in range(first, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            part = slice(start, start + self.batch_size)
            yield [SampleKey(epoch, *drawn) for drawn in zip(indices[part].tolist(), repeats[part].tolist())]

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's samples in order, (num_images,) each: index in the data set, and how often it came before."""
        generator = _philox(self.seed, epoch, 1, 0)
        if self.labels is not None:
            return _draw_balanced(self.labels, generator)
        order = generator.permutation(self.num_images)
        place = np.arange(self.num_images)
        # As timm does it where repeats are not whole: some images are shown once more than others.
        turn = (place // self.repeats).astype(np.int64)
        return order[turn], place - np.searchsorted(turn, turn)


def _draw_balanced(labels: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As many samples as there are labels, the same number of every class give or take one, in random order.

    Within a class, images are drawn in turns: each appears as often as any other, give or take one.
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
            yield [SampleKey(epoch, index) for index in self.indices[start : start + self.batch_size]]
