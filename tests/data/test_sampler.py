"""Batches cover an epoch over any number of ranks; every sample has a random state of its own."""

import pytest

from linvit.data.sampler import EvalSampler, TrainSampler, sample_generators


def train_batches(
    num_images: int, *, batch_size: int, world_size: int, epoch: int = 0, seed: int = 7
) -> list[list[list[int]]]:
    """Indices by rank and batch."""
    samplers = [
        TrainSampler(num_images, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    return [[[index for _, index in batch] for batch in sampler.batches(epoch)] for sampler in samplers]


def test_ranks_share_an_epoch_without_overlap() -> None:
    ranks = train_batches(24, batch_size=4, world_size=2)
    seen = [index for batches in ranks for batch in batches for index in batch]
    assert sorted(seen) == list(range(24))
    assert [len(batches) for batches in ranks] == [3, 3]


def test_the_incomplete_last_batch_is_dropped() -> None:
    ranks = train_batches(27, batch_size=4, world_size=2)
    seen = [index for batches in ranks for batch in batches for index in batch]
    assert len(seen) == len(set(seen)) == 24
    assert {len(batch) for batches in ranks for batch in batches} == {4}


def test_the_total_batch_is_the_same_for_any_number_of_ranks() -> None:
    (alone,) = train_batches(24, batch_size=8, world_size=1)
    first, second = train_batches(24, batch_size=4, world_size=2)
    assert alone == [a + b for a, b in zip(first, second)]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = train_batches(64, batch_size=8, world_size=1)
    assert first == train_batches(64, batch_size=8, world_size=1)
    assert first != train_batches(64, batch_size=8, world_size=1, epoch=1)
    assert first != train_batches(64, batch_size=8, world_size=1, seed=8)
    assert first[0][0] != list(range(8))


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_starting_in_the_middle(first: int) -> None:
    sampler = TrainSampler(34, batch_size=8, seed=0, rank=0, world_size=1)
    assert list(sampler.batches(2, first)) == list(sampler.batches(2))[first:]
    evaluation = EvalSampler(26, batch_size=8, rank=0, world_size=1)
    assert list(evaluation.batches(0, first)) == list(evaluation.batches(0))[first:]


def test_keys_carry_the_epoch() -> None:
    sampler = TrainSampler(8, batch_size=8, seed=0, rank=0, world_size=1)
    assert {epoch for batch in sampler.batches(5) for epoch, _ in batch} == {5}


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size 8 needs 8 training images, but there are 5; .* at most 5"):
        TrainSampler(5, batch_size=8, seed=0, rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"batch_size 4 in each of 2 processes needs 8 .* at most 2"):
        TrainSampler(5, batch_size=4, seed=0, rank=0, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_images", [1, 5, 12])
def test_evaluation_sees_every_image_once(num_images: int, world_size: int) -> None:
    samplers = [EvalSampler(num_images, batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks = [[[index for _, index in batch] for batch in sampler.batches(0)] for sampler in samplers]
    assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(num_images))
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in ranks]
    assert sum(sampler.num_drawn for sampler in samplers) == num_images


def test_every_sample_has_numbers_of_its_own() -> None:
    def first_numbers(seed: int, epoch: int, index: int) -> tuple[float, float]:
        generator, python = sample_generators(seed, epoch, index)
        return generator.random(), python.random()

    keys = [(seed, epoch, index) for seed in (0, 1, 2**40) for epoch in (0, 1, 2) for index in range(50)]
    drawn = [number for key in keys for number in first_numbers(*key)]
    assert len(set(drawn)) == 2 * len(keys)
    assert first_numbers(3, 4, 5) == first_numbers(3, 4, 5)
    assert 0.4 < sum(drawn) / len(drawn) < 0.6
