"""Decoding and resizing of images: one set of rules for training, evaluation and prediction.

OpenCV decodes. The header of a JPEG is parsed here as well, because its size decides how small it may be decoded.
Resizing is antialiased and equals Pillow's (and so timm's) within two grey levels.
"""

import os
import struct
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# Factor by which a JPEG is shrunk while it is decoded.
Reduction = Literal[1, 2, 4, 8]

# OpenCV says "grayscale" in the names of the flags for the size; together with COLOR_RGB they give colour.
_DECODE_FLAGS: dict[Reduction, int] = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_EXIF_ORIENTATION = 0x0112

# A file that cannot be decoded raises an error with its name, which OpenCV's own log does not know.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class UnreadableImage(ValueError):
    """An image file cannot be read; the message names the file and the remedy."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image file as RGB, (H, W, 3) uint8; see `decode_image`."""
    return decode_image(read_file(path), name=path)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of an image file.

    Raises:
        UnreadableImage: if the file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: cannot be read ({error.strerror}); restore or remove the file") from error
    except ValueError as error:
        raise UnreadableImage(f"{path}: is not a valid path ({error}); correct it") from error


def decode_image(data: bytes, *, name: str | os.PathLike[str], reduction: Reduction = 1) -> np.ndarray:
    """Decode the bytes of an image file as RGB.

    The EXIF orientation is applied (Pillow, and so timm, ignores it). Grey and palette images become RGB, 16-bit
    images keep their upper 8 bits, and CMYK is converted. An alpha channel is dropped and the colours under it are
    kept, as with Pillow's `convert("RGB")`. If a file has several frames, the first is decoded.

    Args:
        name: name of the image in error messages.
        reduction: 2, 4 or 8 decodes a JPEG to 1/2, 1/4 or 1/8 of its height and width, rounded up, from its lowest
            frequencies.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        UnreadableImage: if the data is empty, truncated or not an image.
    """
    if not data:
        raise UnreadableImage(f"{name}: is empty; restore or remove the file")
    try:
        # From memory OpenCV refuses truncated data; from a file it would return the part that it could decode.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _DECODE_FLAGS[reduction])
    except cv2.error as error:
        raise UnreadableImage(f"{name}: cannot be decoded ({error.err}); restore or remove the file") from error
    if image is None:
        raise UnreadableImage(f"{name}: is truncated, damaged or not an image; restore or remove the file")
    return image


class JpegHeader(NamedTuple):
    """Height and width in pixels as stored, number of colour channels, and EXIF orientation (1 to 8; 1 is upright)."""

    height: int
    width: int
    channels: int
    orientation: int


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Parse the header of a JPEG file without decoding it; None if it is invalid or the file is not a JPEG."""
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
        # The start of a frame, for any kind of JPEG; three markers in this range mean something else.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, channels = struct.unpack_from(">HHB", data, position + 5)
            return JpegHeader(height, width, channels, orientation) if height and width else None
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    return None


def reducible_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) as displayed, of a JPEG that may be decoded at a reduced size; None for other files.

    The last row and column of a reduced image may cover fewer pixels than the others. EXIF rotation can move them to
    the front, so rotated images whose height or width is not a multiple of 8 give None.
    """
    header = read_jpeg_header(data)
    if header is None or (header.orientation != 1 and (header.height % 8 or header.width % 8)):
        return None
    # Orientations from 5 on swap rows and columns.
    return (header.height, header.width) if header.orientation < 5 else (header.width, header.height)


def _exif_orientation(tiff: bytes) -> int:
    """The orientation in EXIF's TIFF directory, 1 to 8; 1 if there is none or the directory is damaged."""
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
        pass
    return 1


def resize(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Resize an image by "nearest", "bilinear" or "bicubic" interpolation.

    OpenCV's resize aliases when it shrinks. Its INTER_AREA does not, but it is a box filter, which blurs differently
    from the filters that pretrained models were trained with. torch's kernel filters as Pillow does and is as fast as
    OpenCV.

    Args:
        image: (H, W, 3) uint8, contiguous or not.

    Returns:
        (height, width, 3) uint8, contiguous; always a copy.
    """
    if image.shape[:2] == (height, width):
        return image.copy()
    # `linvit check` decodes without torch, which takes seconds to load.
    import torch
    from torch.nn.functional import interpolate

    # torch warns about read-only memory, such as that of a cache, so such memory is copied.
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    pixels = pixels[None].permute(0, 3, 1, 2)  # (1, 3, H, W), channels last
    if interpolation == "nearest":
        resized = interpolate(pixels, size=(height, width), mode="nearest-exact")
    else:
        resized = interpolate(pixels, size=(height, width), mode=interpolation, antialias=True, align_corners=False)
    # The result is channels last too, so this copies nothing.
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1)[0].numpy())
