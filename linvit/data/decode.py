"""Resizing with antialiasing, to Pillow's (and so timm's) result within one grey level.

What the header of a JPEG file says, found without decoding it.

Reading one image file, the same way for training, evaluation and prediction.
"""

import os
import struct
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
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


_EXIF_ORIENTATION = 0x0112


class JpegHeader(NamedTuple):
    """Size in pixels as stored, colour channels, and how EXIF has it turned (1 to 8; 1 is not at all)."""

    height: int
    width: int
    channels: int
    orientation: int


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG file; None for other files, and where it makes no sense."""
    if data[:2] != b"\xff\xd8":
        return None
    orientation = 1
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        # Start of frame, of any kind of JPEG; three other markers lie between.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, channels = struct.unpack_from(">HHB", data, position + 5)
            return JpegHeader(height, width, channels, orientation) if height and width else None
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    return None


def reducible_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG, as it is shown, that may be decoded at a reduced size; None for other files.

    A reduced image's last row and column may stand for fewer pixels than the others. Turned images in which they
    would come first are left out: those whose height or width is no multiple of 8.
    """
    header = read_jpeg_header(data)
    if header is None or (header.orientation != 1 and (header.height % 8 or header.width % 8)):
        return None
    # Orientations from 5 on exchange rows and columns.
    return (header.height, header.width) if header.orientation < 5 else (header.width, header.height)


def _orientation(tiff: bytes) -> int:
    """The orientation that EXIF's TIFF directory gives, 1 to 8; 1 where it gives none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == _EXIF_ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        # A damaged directory.
        pass
    return 1


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
