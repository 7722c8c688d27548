"""All randomness of a training step as a function of (seed, epoch, batch, rank), so that a run can go on anywhere.

timm's Mixup draws from numpy's generator, dropout and stochastic depth from torch's; the loader seeds samples itself.
"""

import os
import random

import numpy as np
import torch


def seed_run(seed: int) -> None:
    """Seed what is drawn before the first step: the same weights in every process."""
    _seed_generators(np.random.SeedSequence(seed))


def seed_step(seed: int, *, epoch: int, batch: int, rank: int) -> None:
    """Seed what one batch draws; each process draws its own."""
    _seed_generators(np.random.SeedSequence([seed, epoch, batch, rank]))


def _seed_generators(sequence: np.random.SeedSequence) -> None:
    for_torch, for_numpy, for_python = (int(word) for word in sequence.generate_state(3))
    # torch.manual_seed would also note the seed for devices that are not there, which takes longer than all the rest.
    torch.default_generator.manual_seed(for_torch)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(for_torch)
    np.random.seed(for_numpy)
    random.seed(for_python)


def use_deterministic_algorithms() -> None:
    """Have torch refuse algorithms whose result varies from run to run on a GPU."""
    # cuBLAS asks for it, and reads it when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
