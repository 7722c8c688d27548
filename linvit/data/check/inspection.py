"""One pass over an image file: what is wrong with it, and the numbers that statistics and duplicates need."""

import re
import zlib
from typing import Literal, NamedTuple

import cv2
import numpy as np

from linvit.data.check.cut import is_cut_off
from linvit.data.check.faults import LARGEST_ASPECT, SMALLEST_SIDE
from linvit.data.check.formats import HEAD_BYTES, format_named, format_of
from linvit.data.check.header import Header, read_header
from linvit.data.check.messages import DecoderMessages
from linvit.data.jpeg import reducible_size
from linvit.data.read import UnreadableImage, decode_image

# Pixels picked out of an image, a side, for its statistics and its thumbnail.
_SAMPLES = 64
_REDUCTIONS: tuple[Literal[8, 4, 2], ...] = (8, 4, 2)
THUMBNAIL = 32

_DAMAGE = re.compile(r"Corrupt JPEG data: ([^\n]*)|Premature end of JPEG file|CRC error")
_LEFT_OVER = re.compile(r"(\d+) extraneous bytes before marker 0xd9")


class Pixels(NamedTuple):
    """What is kept of a decoded image: its size, its channels' means and deviations (3, 1), a grey (32, 32) uint8.

    The deviations are those of the pixels only where the image was decoded whole; else they are a little smaller.
    """

    width: int
    height: int
    means: np.ndarray
    deviations: np.ndarray
    thumbnail: np.ndarray


class Inspection(NamedTuple):
    """Findings as code and detail; a checksum of the bytes; None for pixels that were not or cannot be decoded."""

    findings: list[tuple[str, str]]
    checksum: int
    num_bytes: int
    pixels: Pixels | None


def inspect(data: bytes, path: str, *, max_pixels: int, whole: bool, messages: DecoderMessages) -> Inspection:
    """Look at the bytes of one image file.

    All of its data is decoded, as in training. Unless it has to be decoded `whole`, a JPEG's pixels are computed at a
    reduced size: what is wrong with a file shows before that.
    """
    findings, pixels = _look(data, path, max_pixels, whole, messages)
    # Each alone would give the same number for two files among a hundred thousand.
    checksum = zlib.crc32(data) << 32 | zlib.adler32(data)
    return Inspection(findings, checksum, len(data), pixels)


def _look(
    data: bytes, path: str, max_pixels: int, whole: bool, messages: DecoderMessages
) -> tuple[list[tuple[str, str]], Pixels | None]:
    if not data:
        return [("empty_file", "")], None
    format_name = format_of(data[:HEAD_BYTES]) or ""
    header = read_header(data, format_name)
    if header is not None and header.width * header.height > max_pixels:
        return [("decompression_bomb", f"{header.width}×{header.height}")], None
    size = None if whole else reducible_size(data)
    try:
        image = decode_image(data, name=path, reduction=1 if size is None else _reduction(*size))
    except UnreadableImage:
        return [_why_unreadable(data, format_name, header, messages.take())], None
    pixels = _measure(image, *(size or image.shape[:2]))
    findings = _from_name_and_header(path, format_name, header) + _from_size(pixels)
    if not pixels.deviations.any() and _is_blank(image if size is None else decode_image(data, name=path)):
        findings.append(("blank", ""))
    # After the last decoding: what it says would be taken for the next image's.
    damage = _damage(data, messages.take())
    if damage:
        findings.append(("damaged", damage))
    return findings, pixels


def _reduction(height: int, width: int) -> Literal[1, 2, 4, 8]:
    """By how much an image may shrink that enough pixels to pick from are left."""
    return next((each for each in _REDUCTIONS if min(height, width) >= each * _SAMPLES), 1)


def _why_unreadable(data: bytes, format_name: str, header: Header | None, said: str) -> tuple[str, str]:
    if not format_name:
        return "not_an_image", ""
    if is_cut_off(data, format_name):
        return "truncated", f"after {len(data):,} bytes"
    reason = said.strip().splitlines()[-1:] or (["its header makes no sense"] if header is None else [])
    return "undecodable", "".join(reason)


def _damage(data: bytes, said: str) -> str:
    """What the decoder complained about, but for what costs no pixel."""
    found = _DAMAGE.search(said)
    if found is None:
        return ""
    left_over = _LEFT_OVER.search(said)
    if left_over:
        # Cameras pad, which is no damage; other bytes left over mean that some before them were misread.
        padding = data[: data.rfind(b"\xff\xd9")][-int(left_over[1]) :]
        if len(set(padding)) <= 1:
            return ""
    return found[0]


def _from_name_and_header(path: str, format_name: str, header: Header | None) -> list[tuple[str, str]]:
    findings = [(code, "") for code in header.notes] if header is not None else []
    named = format_named(path)
    if named is not None and format_name and named != format_name:
        findings.append(("wrong_extension", f"{format_name}, by its content"))
    return findings


def _from_size(pixels: Pixels) -> list[tuple[str, str]]:
    findings = []
    size = f"{pixels.width}×{pixels.height}"
    shorter, longer = sorted((pixels.width, pixels.height))
    if shorter < SMALLEST_SIDE:
        findings.append(("tiny", size))
    elif longer > LARGEST_ASPECT * shorter:
        findings.append(("extreme_aspect", size))
    return findings


def _is_blank(image: np.ndarray) -> bool:
    return bool((image == image[0, 0]).all())


def _measure(image: np.ndarray, height: int, width: int) -> Pixels:
    """The pixels of an image of this size, decoded whole or reduced."""
    # Every so many pixels one: far quicker than averaging, and without bias for mean and deviation.
    means, deviations = cv2.meanStdDev(samples := _pick(image))
    reduction = _reduction(height, width)
    if reduction > 1 and image.shape[:2] == (height, width):
        # Copies look alike whether one is a JPEG and the other not, or one was decoded whole.
        small = -(-width // reduction), -(-height // reduction)
        samples = _pick(cv2.resize(image, small, interpolation=cv2.INTER_AREA))
    grey = cv2.cvtColor(samples, cv2.COLOR_RGB2GRAY)
    thumbnail = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    return Pixels(width, height, means, deviations, thumbnail)


def _pick(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (_SAMPLES, _SAMPLES), interpolation=cv2.INTER_NEAREST)
