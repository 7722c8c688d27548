"""Count a model's floating-point operations (two per multiply-add), and measure how many this machine can do."""

from collections.abc import Callable

import torch
from torch import Tensor, nn, no_grad
from torch.utils.flop_counter import FlopCounterMode

from linvit.settings.fields import Mode

# Sides of the square matrices that are multiplied to find the fastest speed.
GEMM_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
GEMM_REPEATS = 5


def count_flops(model: nn.Module, images: Tensor, *, mode: Mode) -> int:
    """Operations of one forward pass or training step; `model` and `images` are on the meta device.

    On the meta device a step costs neither time nor memory, and attention is two matrix products in the forward pass
    and four in the backward pass. What a fused kernel recomputes to save memory is therefore not counted. (torch's
    counter does not know the fused CPU kernel at all.)
    """
    assert images.is_meta
    model.train(mode == "train")
    counter = FlopCounterMode(display=False)
    if mode == "forward":
        with counter, no_grad():
            model(images)
    else:
        with counter:
            model(images).sum().backward()
        model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def gemm_flops_per_second(dtype: torch.dtype, device: torch.device, *, clock: Callable[[], float]) -> float:
    """Operations per second of the fastest of several square matrix products, with the current number of threads.

    This is an upper bound on the speed of a model, which consists of matrix products. `clock` returns seconds and
    waits for the device.
    """
    best = 0.0
    for size in GEMM_SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        a @ b
        for _ in range(GEMM_REPEATS):
            started = clock()
            a @ b
            best = max(best, 2 * size**3 / (clock() - started))
    return best
