"""Is a map true? Deletion and insertion curves (Petsiuk, Das and Saenko 2018, arXiv 1806.07421, section 3.2).

Deletion greys out patches, those with the largest values first: if the map is true, the probability of the class falls
early, and the area under the curve is small. Insertion reveals them in the same order on a blurred image: if the map is
true, the probability rises early, and the area is large. A random order of patches is the measure for both.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

# Standard deviation of the blur, as a fraction of the image's shorter side.
_BLUR = 1 / 16


@dataclass(frozen=True)
class Curves:
    """Probability of the class after each step, (S + 1), and the areas under the curves, from 0 to 1."""

    deletion: Tensor
    insertion: Tensor

    @property
    def deletion_area(self) -> float:
        return _area(self.deletion)

    @property
    def insertion_area(self) -> float:
        return _area(self.insertion)


def measure_curves(
    probabilities: Callable[[Tensor], Tensor],
    image: Tensor,
    patches: Tensor,
    *,
    target: int,
    steps: int = 16,
    batch_size: int = 8,
) -> Curves:
    """Deletion and insertion curves of one map.

    Args:
        probabilities: maps normalised images (B, 3, height, width) to probabilities (B, C).
        image: (1, 3, height, width), normalised, so that zero is the mean colour.
        patches: the map (h, w).
        target: the class whose probability is measured.
        steps: number of steps, in each of which an equal share of the patches changes.
        batch_size: images per forward pass.
    """
    order = patches.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    rank = rank.view(1, 1, *patches.shape).to(image.device)
    blurred = _blur(image)
    curves = []
    for shown, hidden in ((image, torch.zeros_like(image)), (blurred, image)):
        found = []
        for first in range(0, steps + 1, batch_size):
            batch = []
            for step in range(first, min(first + batch_size, steps + 1)):
                changed = (rank < round(step * len(order) / steps)).to(image.dtype)
                mask = F.interpolate(changed, size=image.shape[-2:], mode="nearest")
                batch.append(shown * (1 - mask) + hidden * mask)
            found.append(probabilities(torch.cat(batch))[:, target].cpu())
        curves.append(torch.cat(found))
    return Curves(*curves)


def random_map(grid_size: tuple[int, int], *, seed: int) -> Tensor:
    """A map (h, w) that orders the patches at random."""
    return torch.rand(grid_size, generator=torch.Generator().manual_seed(seed))


def _blur(image: Tensor) -> Tensor:
    sigma = min(image.shape[-2:]) * _BLUR
    # An odd kernel of three standard deviations to each side, which must fit into the image.
    size = min(2 * round(3 * sigma) + 1, 2 * (min(image.shape[-2:]) - 1) + 1)
    return gaussian_blur(image, [size, size], [sigma, sigma])


def _area(curve: Tensor) -> float:
    """Area under a curve with equal steps, by trapezoids, over an axis from 0 to 1."""
    return float((curve[:-1] + curve[1:]).mean() / 2)
