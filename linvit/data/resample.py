"""Resizing with antialiasing, to Pillow's (and so timm's) result within one grey level."""

import numpy as np
import torch
from torch.nn.functional import interpolate


def resize(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Resizes an image by "nearest", "bilinear" or "bicubic" interpolation.

    OpenCV's resize aliases when it shrinks, save for INTER_AREA, which is a box filter and blurs otherwise than the
    filters that pretrained models were trained with; torch's kernel filters as Pillow does, at the speed of OpenCV.

    Args:
        image: (H, W, 3) uint8, contiguous or not.

    Returns:
        (height, width, 3) uint8, contiguous; memory of its own.
    """
    if image.shape[:2] == (height, width):
        return image.copy()
    # torch warns of memory that may not be written to, such as a cache's; what is not so already is copied.
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    pixels = pixels[None].permute(0, 3, 1, 2)  # (1, 3, H, W), channels last
    if interpolation == "nearest":
        resized = interpolate(pixels, size=(height, width), mode="nearest-exact")
    else:
        resized = interpolate(pixels, size=(height, width), mode=interpolation, antialias=True, align_corners=False)
    # The result is channels last too, so that this copies nothing.
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1)[0].numpy())
