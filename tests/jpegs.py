"""JPEG files of every kind that cameras and programs write."""

import io
from typing import Any

import cv2
import numpy as np
from PIL import Image

KINDS: dict[str, dict[str, Any]] = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "thumbnail": {"comment": b"\xff\xd8\xff\xc0\0\x11\x08\0\x01\0\x01" * 3},
}


def encode(pixels: np.ndarray, kind: str = "4:2:0", *, orientation: int | None = None, quality: int = 92) -> bytes:
    """A JPEG file of an image (H, W, 3) uint8, with EXIF if it has an orientation."""
    settings = dict(KINDS[kind])
    image = Image.fromarray(pixels).convert(settings.pop("mode", "RGB"))
    if orientation is not None:
        exif = Image.Exif()
        exif[0x010F] = "a camera"
        exif[0x0112] = orientation
        settings["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **settings)
    return buffer.getvalue()


def photo(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """An image (height, width, 3) uint8 that has as much contrast at each scale as photographs have, and noise."""
    rng = np.random.default_rng(seed)
    image = rng.normal(127, 3, (height, width, 3)).astype(np.float32)
    for step in (4, 8, 16, 32, 64, 128):
        coarse = rng.normal(0, 14, (height // step + 2, width // step + 2, 3)).astype(np.float32)
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image, 0, 255).astype(np.uint8)
