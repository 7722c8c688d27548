"""Reading one image file, the same way for training, evaluation and prediction."""

import os
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# By how much a JPEG shrinks while it is decoded, and the flags for it. OpenCV calls the flag of the size alone grey.
_DECODERS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

# A file that cannot be decoded raises an error with its name; OpenCV's own log does not know the name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class UnreadableImage(ValueError):
    """An image file that cannot be read; its message names the file and the mend."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file as RGB, (H, W, 3) uint8; see `decode_image`."""
    return decode_image(read_file(path), name=path)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file; UnreadableImage, naming it, where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: cannot be read ({error.strerror}); restore or remove the file") from error


def decode_image(data: bytes, *, name: str | os.PathLike[str], reduction: Literal[1, 2, 4, 8] = 1) -> np.ndarray:
    """Decodes an image file's bytes as RGB.

    The orientation that a camera wrote into EXIF is applied (Pillow, and so timm, ignores it). Grey and palette
    images become RGB, 16-bit ones keep their upper 8 bits, CMYK is converted, an alpha channel is dropped (the
    colours under it stay, as with Pillow's `convert("RGB")`), and of several frames the first is taken.

    Args:
        name: what to call the image in messages.
        reduction: decode a JPEG to 1/2, 1/4 or 1/8 of its height and width, rounded up, from its lowest frequencies.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        UnreadableImage: naming the image, where it is empty, truncated or no image.
    """
    if not data:
        raise UnreadableImage(f"{name}: is empty; restore or remove the file")
    try:
        # From memory OpenCV refuses truncated data; from a file it would return the part it could decode.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _DECODERS[reduction])
    except cv2.error as error:
        raise UnreadableImage(f"{name}: cannot be decoded ({error.err}); restore or remove the file") from error
    if image is None:
        raise UnreadableImage(f"{name}: is truncated, damaged or no image; restore or remove the file")
    return image
