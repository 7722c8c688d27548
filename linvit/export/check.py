"""Compare an exported model, opened again by its own runtime, with the model that it was exported from.

B batch, C classes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from linvit.data.augment.build import InputSpec
from linvit.data.loader import normalize

# Largest difference of a probability that passes: rounding in float32, and in half precision.
TOLERANCE = {"float32": 1e-4, "fp16": 2e-2, "bf16": 2e-2}
# Batches of random images: each size is a case of its own for a graph with a dynamic batch.
RANDOM_BATCHES = (1, 2, 5)

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """How far the probabilities of two models differ on the same images.

    Attributes:
        images: which images, "random" or where they come from.
        difference: largest absolute difference of a probability; NaN if the exported model gives NaN.
        top1: share of images whose most probable class is the same.
    """

    images: str
    num_images: int
    difference: float
    top1: float


@torch.no_grad()
def compare(model: Forward, exported: Forward, batches: Iterable[Tensor], *, images: str) -> Agreement:
    """Compare the probabilities of two functions from normalised images (B, 3, H, W) to logits (B, C)."""
    count, same, largest = 0, 0, torch.zeros(())
    for batch in batches:
        ours, theirs = model(batch).float(), exported(batch).float()
        count += len(batch)
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        # Unlike Python's `max`, this keeps NaN.
        largest = torch.maximum(largest, (ours.softmax(1) - theirs.softmax(1)).abs().max())
    return Agreement(images, count, float(largest), same / count)


def random_images(spec: InputSpec, *, seed: int) -> Iterator[Tensor]:
    """Batches of noise around random colours, normalised: (B, 3, H, W) for each B of RANDOM_BATCHES."""
    generator = torch.Generator().manual_seed(seed)
    for count in RANDOM_BATCHES:
        colours = torch.rand(count, 1, 1, 3, generator=generator)
        noise = torch.rand(count, *spec.size, 3, generator=generator)
        yield normalize(((colours + noise) * 127.5).to(torch.uint8), spec)


def require(agreement: Agreement, tolerance: float) -> None:
    """Raise ValueError if the models differ by more than `tolerance`, or by NaN."""
    if not agreement.difference <= tolerance:
        raise ValueError(
            f"the exported model differs from the original by {agreement.difference:.2g} on {agreement.images} images, "
            f"more than --tolerance {tolerance:g}; nothing was written; choose another --format, or omit --half"
        )
