"""The speed of plain matrix products here, which nothing made of them can beat."""

from collections.abc import Callable

import torch

SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
REPEATS = 5


def gemm_flops_per_second(dtype: torch.dtype, device: torch.device, *, clock: Callable[[], float]) -> float:
    """Operations a second of the fastest of several square matrix products, with the threads in use."""
    best = 0.0
    for size in SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        a @ b
        for _ in range(REPEATS):
            started = clock()
            a @ b
            best = max(best, 2 * size**3 / (clock() - started))
    return best
