"""Inspection of one image file: its problems, and the numbers that statistics and duplicates need."""

import os
import re
import tempfile
import zlib
from types import TracebackType
from typing import Literal, NamedTuple, Self

import cv2
import numpy as np

from linvit.check.faults import LARGEST_ASPECT, SMALLEST_SIDE
from linvit.check.header import HEAD_BYTES, Header, format_named, format_of, is_truncated, read_header
from linvit.data.decode import CostlyImage, InputRange, UnreadableImage, UnsupportedImage, decode_image, reducible_size
from linvit.data.value_range import value_range

# Side in pixels of the thumbnail that perceptual hashes are computed from.
THUMBNAIL = 32
# Side of the grid of pixels sampled from each image, for its colours and its thumbnail.
_SAMPLES = 64
_REDUCTIONS: tuple[Literal[8, 4, 2], ...] = (8, 4, 2)

_DAMAGE = re.compile(r"Corrupt JPEG data: ([^\n]*)|Premature end of JPEG file|CRC error")
_EXTRA_BYTES = re.compile(r"(\d+) extraneous bytes before marker 0xd9")


class Pixels(NamedTuple):
    """Numbers kept of a decoded image: its size, its channels' means and deviations (3, 1), and a grey thumbnail
    (32, 32) uint8. `value_range` is the lowest and highest value of an image of 16 bits, None for others.

    The deviations are those of the pixels only if the image was decoded at full size; otherwise slightly smaller.
    """

    width: int
    height: int
    means: np.ndarray
    deviations: np.ndarray
    thumbnail: np.ndarray
    value_range: InputRange | None = None


class Inspection(NamedTuple):
    """Findings as pairs of code and detail, a checksum of the bytes, and the pixels (None if not decoded)."""

    findings: list[tuple[str, str]]
    checksum: int
    num_bytes: int
    pixels: Pixels | None


class DecoderMessages:
    """A context that captures everything the process prints to stderr, including output of C libraries.

    libjpeg and libpng report damage in no other way.
    """

    def __enter__(self) -> Self:
        self._stderr = os.dup(2)
        self._file = tempfile.TemporaryFile()
        os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        self._file.close()

    def take(self) -> str:
        """The text printed since the last call."""
        handle = self._file.fileno()
        length = os.lseek(handle, 0, os.SEEK_CUR)
        if length == 0:
            return ""
        os.lseek(handle, 0, os.SEEK_SET)
        text = os.read(handle, length)
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        return text.decode(errors="replace")


def inspect(
    data: bytes,
    path: str,
    *,
    max_pixels: int,
    full_size: bool,
    messages: DecoderMessages,
    input_range: InputRange | None = None,
) -> Inspection:
    """Inspect the bytes of one image file.

    All data is decoded, as in training. Unless `full_size` is set, the pixels of a JPEG are computed at a reduced
    size: damage shows before that step. `input_range` is that of `decode_image`.
    """
    findings, pixels = _decode(data, path, max_pixels, full_size, messages, input_range)
    # Among a hundred thousand files, either checksum alone would give two of them the same number.
    checksum = zlib.crc32(data) << 32 | zlib.adler32(data)
    return Inspection(findings, checksum, len(data), pixels)


def _decode(
    data: bytes,
    path: str,
    max_pixels: int,
    full_size: bool,
    messages: DecoderMessages,
    input_range: InputRange | None,
) -> tuple[list[tuple[str, str]], Pixels | None]:
    if not data:
        return [("empty_file", "")], None
    format_name = format_of(data[:HEAD_BYTES]) or ""
    header = read_header(data, format_name)
    if header is not None and header.width * header.height > max_pixels:
        return [("decompression_bomb", f"{header.width}×{header.height}")], None
    size = None if full_size else reducible_size(data)
    try:
        reduction = 1 if size is None else _reduction(*size)
        image = decode_image(data, name=path, reduction=reduction, input_range=input_range)
    except UnreadableImage as error:
        return [_why_unreadable(data, format_name, header, messages, error, path)], None
    pixels = _measure(image, *(size or image.shape[:2]))
    if header is not None and "sixteen_bit" in header.codes:
        pixels = pixels._replace(value_range=value_range(data))
    findings = _header_findings(path, format_name, header) + _size_findings(pixels)
    if not pixels.deviations.any() and _is_blank(image if size is None else decode_image(data, name=path)):
        findings.append(("blank", ""))
    # Taken after the last decoding, so that no message is left for the next image.
    damage = _damage(data, messages.take())
    if damage:
        findings.append(("damaged", damage))
    return findings, pixels


def _reduction(height: int, width: int) -> Literal[1, 2, 4, 8]:
    """The largest reduction that leaves enough pixels to sample from."""
    return next((each for each in _REDUCTIONS if min(height, width) >= each * _SAMPLES), 1)


def _why_unreadable(
    data: bytes, format_name: str, header: Header | None, messages: DecoderMessages, error: UnreadableImage, path: str
) -> tuple[str, str]:
    printed = messages.take()
    detail = str(error).removeprefix(f"{path}: ").partition(";")[0]
    if isinstance(error, CostlyImage):
        return "undecodable", detail
    # A JPEG without its end is truncated, although Pillow may decode it.
    truncated = is_truncated(data, format_name) if format_name else False
    # Pillow's decoders print messages too, which must not count for the next image.
    messages.take()
    if truncated:
        return "truncated", f"ends after {len(data):,} bytes"
    if isinstance(error, UnsupportedImage):
        return "unsupported", detail
    if not format_name:
        return "not_an_image", ""
    reason = printed.strip().splitlines()[-1:] or (["invalid header"] if header is None else [])
    return "undecodable", "".join(reason)


def _damage(data: bytes, printed: str) -> str:
    """The decoder's message about damaged pixels; "" if there is none."""
    found = _DAMAGE.search(printed)
    if found is None:
        return ""
    extra = _EXTRA_BYTES.search(printed)
    if extra:
        # Cameras pad files with equal bytes, which is harmless. Other extra bytes mean that earlier data was misread.
        padding = data[: data.rfind(b"\xff\xd9")][-int(extra[1]) :]
        if len(set(padding)) <= 1:
            return ""
    return found[0]


def _header_findings(path: str, format_name: str, header: Header | None) -> list[tuple[str, str]]:
    findings = [(code, "") for code in header.codes] if header is not None else []
    named = format_named(path)
    if named is not None and format_name and named != format_name:
        findings.append(("wrong_extension", f"its content is {format_name}"))
    return findings


def _size_findings(pixels: Pixels) -> list[tuple[str, str]]:
    size = f"{pixels.width}×{pixels.height}"
    shorter, longer = sorted((pixels.width, pixels.height))
    if shorter < SMALLEST_SIDE:
        return [("tiny", size)]
    if longer > LARGEST_ASPECT * shorter:
        return [("extreme_aspect", size)]
    return []


def _is_blank(image: np.ndarray) -> bool:
    return bool((image == image[0, 0]).all())


def _measure(image: np.ndarray, height: int, width: int) -> Pixels:
    """Measure the pixels of an image of this size, decoded at full or reduced size."""
    # Sampling is much faster than averaging, and leaves mean and deviation unbiased.
    samples = _sample(image)
    means, deviations = cv2.meanStdDev(samples)
    reduction = _reduction(height, width)
    if reduction > 1 and image.shape[:2] == (height, width):
        # Reduced like a JPEG, so that copies look alike whatever their format and decoded size.
        small = -(-width // reduction), -(-height // reduction)
        samples = _sample(cv2.resize(image, small, interpolation=cv2.INTER_AREA))
    grey = cv2.cvtColor(samples, cv2.COLOR_RGB2GRAY)
    thumbnail = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    return Pixels(width, height, means, deviations, thumbnail)


def _sample(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (_SAMPLES, _SAMPLES), interpolation=cv2.INTER_NEAREST)
