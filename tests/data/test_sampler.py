"""Batches cover an epoch over any number of ranks; every sample has its own random generators."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from timm.data.distributed_sampler import RepeatAugSampler

from linvit.data.sampler import EvalSampler, TrainSampler, sample_generators


def train_batches(
    num_images: int, *, batch_size: int, world_size: int, epoch: int = 0, seed: int = 7
) -> list[list[list[int]]]:
    """Indices by rank and batch."""
    samplers = [
        TrainSampler(num_images, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    return [[[key.image for key in batch] for batch in sampler.batches(epoch)] for sampler in samplers]


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
    assert {key.epoch for batch in sampler.batches(5) for key in batch} == {5}


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size 8 needs 8 training images, but there are 5; .* at most 5"):
        TrainSampler(5, batch_size=8, seed=0, rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"batch_size 4 in each of 2 processes needs 8 .* at most 2"):
        TrainSampler(5, batch_size=4, seed=0, rank=0, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_images", [1, 5, 12])
def test_evaluation_sees_every_image_once(num_images: int, world_size: int) -> None:
    samplers = [EvalSampler(num_images, batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks = [[[key.image for key in batch] for batch in sampler.batches(0)] for sampler in samplers]
    assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(num_images))
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in ranks]
    assert sum(sampler.num_samples for sampler in samplers) == num_images


def test_every_sample_has_its_own_random_numbers() -> None:
    def first_numbers(*key: int) -> tuple[float, float]:
        generator, python = sample_generators(*key)
        return generator.random(), python.random()

    keys = list(itertools.product((0, 1, 2**40), (0, 1, 2), range(20), (0, 1, 2)))
    drawn = [number for key in keys for number in first_numbers(*key)]
    assert len(set(drawn)) == 2 * len(keys)
    assert first_numbers(3, 4, 5, 1) == first_numbers(3, 4, 5, 1)
    # The default is the first draw of an image.
    assert first_numbers(3, 4, 5) == first_numbers(3, 4, 5, 0)
    assert 0.4 < sum(drawn) / len(drawn) < 0.6


def drawn_keys(num_images: int, *, batch_size: int = 8, world_size: int = 1, epoch: int = 0, **how: Any) -> list:
    """The keys of an epoch by total batch, which joins the batches of all ranks in order."""
    samplers = [
        TrainSampler(num_images, batch_size=batch_size, seed=7, rank=rank, world_size=world_size, **how)
        for rank in range(world_size)
    ]
    return [[key for part in parts for key in part] for parts in zip(*(each.batches(epoch) for each in samplers))]


@pytest.mark.parametrize("num_images", [40, 300, 1024])
@pytest.mark.parametrize("repeats", [2.0, 2.5, 3.0])
def test_repeated_images_are_as_many_as_in_timm(num_images: int, repeats: float) -> None:
    timms = RepeatAugSampler(range(num_images), num_replicas=1, rank=0, num_repeats=repeats)
    ours = [key for batch in drawn_keys(num_images, repeats=repeats) for key in batch]
    # Both drop the incomplete last batch.
    assert len(ours) == len(timms) // 8 * 8
    times = sorted(Counter(key.image for key in ours).values())
    expected = sorted(Counter(list(timms)[: len(ours)]).values())
    assert times == expected
    assert len({(key.image, key.repeat) for key in ours}) == len(ours)
    assert {key.repeat for key in ours} == set(range(int(np.ceil(repeats))))


def test_repeats_of_an_image_are_consecutive_and_epochs_differ() -> None:
    keys = [key for batch in drawn_keys(24, repeats=3.0) for key in batch]
    for first in range(0, 24, 3):
        assert len({key.image for key in keys[first : first + 3]}) == 1
        assert [key.repeat for key in keys[first : first + 3]] == [0, 1, 2]
    assert keys != [key for batch in drawn_keys(24, repeats=3.0, epoch=1) for key in batch]


def test_an_epoch_has_at_least_one_batch() -> None:
    assert len(drawn_keys(400, batch_size=300, repeats=3.0)) == 1


LABELS = [0] * 50 + [1] * 7 + [2] * 3


def test_balanced_classes_are_drawn_equally() -> None:
    keys = [key for batch in drawn_keys(60, batch_size=60, labels=LABELS) for key in batch]
    assert Counter(LABELS[key.image] for key in keys) == {0: 20, 1: 20, 2: 20}
    for label, members in ((0, 50), (1, 7), (2, 3)):
        times = Counter(key.image for key in keys if LABELS[key.image] == label)
        assert max(times.values()) == -(-20 // members)
        assert max(times.values()) - min(times.values()) <= 1
    # Every repeat of an image is a different sample.
    assert len(set(keys)) == 60
    assert [LABELS[key.image] for key in keys] != sorted(LABELS[key.image] for key in keys)


def test_over_epochs_a_large_class_is_fully_drawn_and_extra_draws_rotate() -> None:
    labels = LABELS[:59]
    epochs = [drawn_keys(59, batch_size=59, epoch=epoch, labels=labels)[0] for epoch in range(20)]
    assert {key.image for keys in epochs for key in keys} == set(range(59))
    counts = [Counter(LABELS[key.image] for key in keys) for keys in epochs]
    assert {count[label] for count in counts for label in range(3)} == {19, 20}
    assert len({label for count in counts for label in range(3) if count[label] == 19}) == 3


@pytest.mark.parametrize("how", [{"labels": LABELS}, {"repeats": 3.0}])
def test_repeats_and_balance_are_the_same_for_any_number_of_ranks(how: dict) -> None:
    alone = drawn_keys(60, batch_size=12, **how)
    assert alone == drawn_keys(60, batch_size=12, **how)
    assert alone == drawn_keys(60, batch_size=6, world_size=2, **how)
    assert alone == drawn_keys(60, batch_size=4, world_size=3, **how)
    sampler = TrainSampler(60, batch_size=12, seed=7, rank=0, world_size=1, **how)
    assert list(sampler.batches(0, 2)) == alone[2:]
