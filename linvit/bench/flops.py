"""Floating-point operations of a step, as torch counts them; two per multiply-add.

Counted on the meta device, where a step costs neither time nor memory and attention is plain matrix products: two in
the forward pass, four in the backward. So what a fused kernel computes a second time to save memory does not count.
(torch's counter does not know the fused CPU kernel at all.)
"""

from torch import Tensor, nn, no_grad
from torch.utils.flop_counter import FlopCounterMode

from linvit.bench.options import Mode


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
