import random

import numpy as np
import torch

from linvit.training.randomness import seed_run, seed_step


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random()


def draws_at(seed: int = 1, epoch: int = 2, batch: int = 3, rank: int = 4) -> tuple[float, float, float]:
    seed_step(seed, epoch=epoch, batch=batch, rank=rank)
    return draws()


def test_the_same_step_draws_the_same() -> None:
    first = draws_at()
    draws()
    assert draws_at() == first


def test_every_seed_epoch_batch_and_rank_draws_its_own() -> None:
    found = [draws_at(), draws_at(seed=0), draws_at(epoch=0), draws_at(batch=0), draws_at(rank=0), draws_at(2, 1)]
    for generator in zip(*found):
        assert len(set(generator)) == len(found)


def test_runs_begin_by_their_seed() -> None:
    found = []
    for seed in (7, 8, 7):
        seed_run(seed)
        found.append(draws())
    assert found[0] == found[2]
    assert not set(found[0]) & set(found[1])
