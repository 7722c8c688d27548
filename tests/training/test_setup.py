"""Every training step draws the same random numbers whenever it is run, and different ones from any other step."""

import random

import numpy as np
import torch

from linvit.training.setup import seed_run, seed_step


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random()


def draws_at(seed: int = 1, epoch: int = 2, batch: int = 3, rank: int = 4) -> tuple[float, float, float]:
    seed_step(seed, epoch=epoch, batch=batch, rank=rank)
    return draws()


def test_a_step_draws_the_same_numbers_again() -> None:
    first = draws_at()
    draws()
    assert draws_at() == first


def test_other_seeds_epochs_batches_and_ranks_draw_other_numbers() -> None:
    found = [draws_at(), draws_at(seed=0), draws_at(epoch=0), draws_at(batch=0), draws_at(rank=0), draws_at(2, 1)]
    for generator in zip(*found):
        assert len(set(generator)) == len(found)


def test_a_run_is_seeded() -> None:
    found = []
    for seed in (7, 8, 7):
        seed_run(seed)
        found.append(draws())
    assert found[0] == found[2]
    assert not set(found[0]) & set(found[1])
