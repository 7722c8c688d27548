"""A batch of images on the device, and their normalisation there."""

from dataclasses import dataclass
from functools import cache

import torch

from linvit.data.transforms import InputSpec


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, H, W) normalised and labels (B,) int64 on the device; dataset indices (B,) int64 on the CPU.

    B is less than the batch size, even 0, where images could not be read and are to be left out.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    # Indices of the images left out.
    unreadable: tuple[int, ...] = ()


def normalize(
    images: torch.Tensor, spec: InputSpec, *, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W): (x / 255 - mean) / std in float32, then `dtype`, on the images' device."""
    mean, std = _mean_and_std(spec.mean, spec.std, images.device)
    # Laid out before the arithmetic, which is several times as fast over planes as over pixels.
    layout = torch.channels_last if channels_last else torch.contiguous_format
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
    return planes.div_(255).sub_(mean).div_(std).to(dtype)


@cache
def _mean_and_std(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept on the device: a copy for every batch would wait for the work queued before it."""
    return torch.tensor(mean, device=device).view(3, 1, 1), torch.tensor(std, device=device).view(3, 1, 1)
