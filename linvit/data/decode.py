"""Decoding and resizing of images: one set of rules for training, evaluation and prediction.

OpenCV decodes. The header of a JPEG is parsed here as well, because its size decides how small it may be decoded.
Resizing is antialiased and equals Pillow's (and so timm's) within two grey levels.
"""

import io
import math
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image

from linvit.data.tiff import SAMPLE_FORMAT, SIGNED, tiff_value, unsupported_bands, without_alpha_weights

EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)

# Factor by which a JPEG is shrunk while it is decoded.
Reduction = Literal[1, 2, 4, 8]
# The values of 16-bit images that are decoded as 0 and 255.
InputRange = tuple[int, int]
# OpenCV refuses larger images.
MAX_PIXELS = 2**30
_FULL_RANGE = (0, 2**16 - 1)
_SIGNED_RANGE = (-(2**15), 2**15 - 1)
_SIXTEEN_BITS = (np.uint16, np.int16)

# OpenCV says "grayscale" in the names of the flags for the size; together with COLOR_RGB they give colour.
_DECODE_FLAGS: dict[Reduction, int] = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_EXIF_ORIENTATION = 0x0112
# OpenCV takes no longer files.
MAX_FILE_BYTES = 2**31 - 1
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Encoders write at most a dozen scans. Every scan passes over all pixels, however few bytes it has.
_MANY_SCANS = 20
JPEG_SIGNATURE = b"\xff\xd8"
_START_OF_SCAN = b"\xff\xda"
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_MAX_SCANNED_PIXELS = 2**30
# More segments than any program writes before the first pixels.
_MAX_SEGMENTS = 10_000
_FILL_BYTES = re.compile(rb"\xff*")

# Pixels to either side that a filter needs, if it does not shrink the image, and its name in Pillow.
_FILTERS = {"bilinear": (1, Image.Resampling.BILINEAR), "bicubic": (2, Image.Resampling.BICUBIC)}

# A file that cannot be decoded raises an error with its name, which OpenCV's own log does not know.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class UnreadableImage(ValueError):
    """An image file cannot be read; the message names the file and the remedy."""


class CostlyImage(UnreadableImage):
    """Decoding an image takes too much time or memory."""


class UnsupportedImage(UnreadableImage):
    """An intact image file is of a kind that OpenCV does not decode."""


def read_image(path: str | os.PathLike[str], *, input_range: InputRange | None = None) -> np.ndarray:
    """Read an image file as RGB, (H, W, 3) uint8; see `decode_image`."""
    return decode_image(read_file(path), name=path, input_range=input_range)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of an image file.

    Raises:
        UnreadableImage: if the file cannot be read, is not a regular file (reading a pipe or a device may never end),
            or is too large.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "special")
            raise UnreadableImage(f"{path}: is {kind}, not an image file; remove it")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise UnreadableImage(
                    f"{path}: has {size:,} bytes, more than OpenCV decodes (2 GiB); cut it into pieces"
                )
            return file.read(size)
    except OSError as error:
        raise UnreadableImage(f"{path}: cannot be read ({error.strerror}); restore or remove the file") from error
    except MemoryError:
        raise UnreadableImage(f"{path}: has {size:,} bytes, which do not fit in memory; cut it into pieces") from None
    except UnreadableImage:
        raise
    except ValueError as error:
        # Such as a path with a null byte in a list.
        raise UnreadableImage(f"{path}: is not a valid path ({error}); correct or remove it") from error


def decode_image(
    data: bytes, *, name: str | os.PathLike[str], reduction: Reduction = 1, input_range: InputRange | None = None
) -> np.ndarray:
    """Decode the bytes of an image file as RGB.

    The EXIF orientation is applied (Pillow, and so timm, ignores it). Grey and palette images become RGB, 16-bit
    images keep their upper 8 bits unless `input_range` is given, and CMYK is converted. An alpha channel is dropped and
    the colours under it are kept, as with Pillow's `convert("RGB")`. If a file has several frames, the first is
    decoded.

    Args:
        name: name of the image in error messages.
        reduction: 2, 4 or 8 decodes a JPEG to 1/2, 1/4 or 1/8 of its height and width, rounded up, from its lowest
            frequencies.
        input_range: values of 16-bit images that become black (0) and white (255), linearly and clipped; images of 8
            bits are not changed.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        UnreadableImage: if the data is empty, truncated or not an image.
        CostlyImage: if decoding takes too much time or memory.
        UnsupportedImage: if it is an image of a kind that OpenCV does not decode, such as one of floats.
    """
    if not data:
        raise UnreadableImage(f"{name}: is empty; restore or remove the file")
    _refuse_many_scans(data, name)
    flags = _DECODE_FLAGS[reduction]
    if input_range is None and tiff_value(data, SAMPLE_FORMAT) == SIGNED:
        # OpenCV would make -1 white and 0 black.
        input_range = _SIGNED_RANGE
    in_range = input_range not in (None, _FULL_RANGE)
    if (kind := unsupported_bands(data, keeps_sixteen_bits=in_range)) is not None:
        raise UnsupportedImage(f"{name}: is {kind}, which is not supported; convert it to a grey or RGB PNG")
    try:
        # From memory OpenCV refuses truncated data; from a file it would return the part that it could decode.
        buffer = np.frombuffer(without_alpha_weights(data), np.uint8)
        image = None if input_range is None or not in_range else _decode_sixteen_bits(buffer, *input_range)
        if image is None:
            image = cv2.imdecode(buffer, flags)
    except (cv2.error, MemoryError) as error:
        if isinstance(error, MemoryError) or error.code == cv2.Error.StsNoMem:
            raise CostlyImage(f"{name}: needs more memory than there is; scale it down") from error
        raise UnreadableImage(f"{name}: cannot be decoded ({error.err}); restore or remove the file") from error
    if image is None or image.dtype != np.uint8 or image.ndim != 3:
        kind = _intact_kind(data)
        if kind is not None:
            raise UnsupportedImage(f"{name}: is {kind}, which is not supported; convert it to PNG of 8 or 16 bits")
        raise UnreadableImage(f"{name}: is truncated, damaged or not an image; restore or remove the file")
    return image


def _decode_sixteen_bits(data: np.ndarray, low: int, high: int) -> np.ndarray | None:
    """An image of 16 bits with `low` as black and `high` as white; None for other images."""
    # As BGR: as RGB, OpenCV 5.0 decodes TIFF files of 16-bit colours as black.
    image = None if data[:2].tobytes() == JPEG_SIGNATURE else cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image is None or image.dtype not in _SIXTEEN_BITS:
        return None
    levels = _levels(image.dtype.kind, low, high)
    return cv2.cvtColor(levels[image.view(np.uint16)], cv2.COLOR_BGR2RGB)


@lru_cache(maxsize=4)
def _levels(kind: str, low: int, high: int) -> np.ndarray:
    """The grey level (65536,) uint8 of each 16-bit pattern: `low` becomes 0 and `high` 255, of signed values too."""
    values = np.arange(2**16, dtype=np.uint16).view(np.int16 if kind == "i" else np.uint16)
    return np.rint((values.astype(np.float64) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)


def _intact_kind(data: bytes) -> str | None:
    """What an image is, as "an image of float32 values", that OpenCV or Pillow decodes in its own type; else None."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is not None:
        return f"an image of {image.dtype} values"
    # Pillow takes minutes to search a long JPEG for a header that is not there.
    if data.startswith(JPEG_SIGNATURE) and read_jpeg_header(data) is None:
        return None
    try:
        with warnings.catch_warnings(), no_pixel_limit():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                # OpenCV decodes every PNG, unless it is damaged after the last pixel, which Pillow does not notice.
                if image.width * image.height > MAX_PIXELS or image.format == "PNG":
                    return None
                image.load()
                return f"a {image.format} image of mode {image.mode}"
    # Pillow's plugins raise all sorts of errors on damaged files.
    except Exception:
        return None


@contextmanager
def no_pixel_limit() -> Iterator[None]:
    """Pillow opens images of any size: the caller has its own limit."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


class JpegHeader(NamedTuple):
    """Height and width in pixels as stored, number of colour channels, and EXIF orientation (1 to 8; 1 is upright).

    `is_progressive` says whether the frame is, and `end` is the offset of the data after it.
    """

    height: int
    width: int
    channels: int
    orientation: int
    is_progressive: bool
    end: int


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Parse the header of a JPEG file without decoding it; None if it is invalid or the file is not a JPEG."""
    if not data.startswith(JPEG_SIGNATURE):
        return None
    orientation = 1
    position = 2
    for _ in range(_MAX_SEGMENTS):
        if position + 10 > len(data) or data[position] != 0xFF:
            return None
        if data[position + 1] == 0xFF:
            # Any number of fill bytes may precede a marker.
            position = _FILL_BYTES.match(data, position).end() - 1  # type: ignore[union-attr]
            if position + 10 > len(data):
                return None
        marker = data[position + 1]
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        # The start of a frame, for any kind of JPEG; three markers in this range mean something else.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, channels = struct.unpack_from(">HHB", data, position + 5)
            if not height or not width:
                return None
            is_progressive = marker in _PROGRESSIVE
            return JpegHeader(height, width, channels, orientation, is_progressive, position + 2 + length)
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    return None


def _refuse_many_scans(data: bytes, name: str | os.PathLike[str]) -> None:
    """Raise UnreadableImage for a JPEG whose scans take far longer to decode than its pixels."""
    header = read_jpeg_header(data)
    if header is None:
        return
    if not header.is_progressive:
        # A first scan with all channels is the only one, so most files need no search.
        first = data.find(_START_OF_SCAN, header.end)
        if data[first + 4 : first + 5] == bytes([header.channels]):
            return
    num_scans = data.count(_START_OF_SCAN, header.end)
    if num_scans > _MANY_SCANS and num_scans * header.height * header.width > _MAX_SCANNED_PIXELS:
        raise CostlyImage(f"{name}: is a JPEG of {num_scans:,} scans, which takes too long to decode; remove it")


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
    value = tiff_value(tiff, _EXIF_ORIENTATION)
    return value if value is not None and 1 <= value <= 8 else 1


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


def resize_part(
    image: np.ndarray, height: int, width: int, interpolation: str, part: tuple[int, int, int, int]
) -> np.ndarray:
    """A part of an image that is resized, without the memory and time of the rest.

    Args:
        image: (H, W, 3) uint8.
        height, width: size of the full image after the resize.
        part: top, left, height and width of the part, in pixels of the resized image.

    Returns:
        The part (height, width, 3) uint8, equal to that of `resize` within two grey levels.
    """
    axes = list(zip(image.shape, (height, width), part[:2], part[2:]))
    if interpolation == "nearest":
        rows, columns = (_nearest(old, new, at, count) for old, new, at, count in axes)
        return image[rows[:, None], columns]
    filter_width, resample = _FILTERS[interpolation]
    windows, box = [], []
    for old, new, at, count in axes:
        scale = old / new
        reach = math.ceil(filter_width * max(scale, 1.0)) + 1
        first, last = math.floor(at * scale), math.ceil((at + count) * scale)
        start = max(first - reach, 0)
        windows.append(slice(start, min(last + reach, old)))
        box.append((at * scale - start, min((at + count) * scale, old) - start))
    (top, bottom), (left, right) = box
    window = Image.fromarray(np.ascontiguousarray(image[windows[0], windows[1]]))
    # torch cannot start between two pixels, as Pillow can.
    return np.array(window.resize(part[:1:-1], resample, box=(left, top, right, bottom)))


def _nearest(old: int, new: int, first: int, count: int) -> np.ndarray:
    """Indices (count,) of the pixels that contain the centres of the resized ones, in torch's float32 arithmetic."""
    centres = np.arange(first, first + count).astype(np.float32) + np.float32(0.5)
    return np.minimum((centres * (np.float32(old) / np.float32(new))).astype(np.int64), old - 1)
