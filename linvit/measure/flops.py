"""Floating-point operations of a step, as torch counts them; two per multiply-add.

Counted on the meta device, where a step costs neither time nor memory and attention is plain matrix products: two in
the forward pass, four in the backward. So what a fused kernel computes a second time to save memory does not count.
(torch's counter does not know the fused CPU kernel at all.)

The speed of plain matrix products here, which nothing made of them can beat.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn, no_grad
from torch.utils.flop_counter import FlopCounterMode

from linvit.settings.fields import Mode


def count_flops(model: nn.Module, images: Tensor, *, mode: Mode) -> int:
    """Operations of one forward pass or training step; `model` and `images` lie on the meta device."""
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
