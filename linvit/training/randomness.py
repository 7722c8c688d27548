"""Seeds all randomness of a training step from (seed, epoch, batch, rank), so that a run can be resumed anywhere.

timm's Mixup uses numpy's global generator, dropout and stochastic depth use torch's. The loader seeds its own samples.
"""

import os
import random

import numpy as np
import torch


def seed_run(seed: int) -> None:
    """Seed everything before the first step: initial weights are equal in all processes."""
    _seed_generators(np.random.SeedSequence(seed))


def seed_step(seed: int, *, epoch: int, batch: int, rank: int) -> None:
    """Seed the training step on one batch, differently in each process."""
    _seed_generators(np.random.SeedSequence([seed, epoch, batch, rank]))


def _seed_generators(sequence: np.random.SeedSequence) -> None:
    for_torch, for_numpy, for_python = (int(word) for word in sequence.generate_state(3))
    # torch.manual_seed would also queue the seed for absent devices, which takes longer than everything else here.
    torch.default_generator.manual_seed(for_torch)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(for_torch)
    np.random.seed(for_numpy)
    random.seed(for_python)


def use_deterministic_algorithms() -> None:
    """Make torch raise an error for operations whose result varies from run to run on a GPU."""
    # cuBLAS needs this to be deterministic, and reads it when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
