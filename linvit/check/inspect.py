"""Which image format a file's first bytes say, and which its name.

What C libraries print to stderr while they decode: their only way to tell that an image came out damaged.

What an image file's header says, without decoding the pixels.

One pass over an image file: what is wrong with it, and the numbers that statistics and duplicates need.
"""

import io
import os
import re
import tempfile
import warnings
import zlib
from types import TracebackType
from typing import Literal, NamedTuple, Self

import cv2
import numpy as np
from PIL import ExifTags, Image

from linvit.check.cut import is_cut_off
from linvit.check.faults import LARGEST_ASPECT, SMALLEST_SIDE
from linvit.data.decode import UnreadableImage, decode_image, read_jpeg_header, reducible_size

HEAD_BYTES = 32

_BEGINNINGS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"BM": "BMP",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"v/1\x01": "OpenEXR",
    b"8BPS": "Photoshop",
}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC"}
_EXTENSIONS = {
    ".bmp": "BMP",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".pgm": "PNM",
    ".png": "PNG",
    ".ppm": "PNM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}


def format_of(head: bytes) -> str | None:
    """The format that the first `HEAD_BYTES` of a file are of, or None."""
    for beginning, name in _BEGINNINGS.items():
        if head.startswith(beginning):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PNM"
    return None


def format_named(path: str) -> str | None:
    """The format that a name's ending stands for, of those that training looks for, or None."""
    return _EXTENSIONS.get(os.path.splitext(path)[1].lower())


class DecoderMessages:
    """While it is entered, what the process prints to stderr, even from C, is caught instead."""

    def __enter__(self) -> Self:
        self._saved = os.dup(2)
        self._file = tempfile.TemporaryFile()
        os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)
        self._file.close()

    def take(self) -> str:
        """What was printed since it was last asked."""
        handle = self._file.fileno()
        length = os.lseek(handle, 0, os.SEEK_CUR)
        if length == 0:
            return ""
        os.lseek(handle, 0, os.SEEK_SET)
        text = os.read(handle, length)
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        return text.decode(errors="replace")


class Header(NamedTuple):
    """Size in pixels as stored, and what about the image needs conversion, as codes of notes."""

    width: int
    height: int
    notes: tuple[str, ...]


def read_header(data: bytes, format_name: str) -> Header | None:
    """The header, or None where there is none that makes sense."""
    jpeg = read_jpeg_header(data) if format_name == "JPEG" else None
    if jpeg is None:
        return _by_pillow(data, format_name)
    # In a tenth of Pillow's time.
    notes = [*["cmyk"] * (jpeg.channels == 4), *["exif_rotated"] * (jpeg.orientation != 1)]
    return Header(jpeg.width, jpeg.height, tuple(notes))


def _by_pillow(data: bytes, format_name: str) -> Header | None:
    limit = Image.MAX_IMAGE_PIXELS
    # Whether an image is too large is up to the caller, who reads its size here.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return Header(image.width, image.height, tuple(_notes(image, data, format_name)))
    # Pillow's plugins raise all sorts of errors on broken headers.
    except Exception:
        return None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _notes(image: Image.Image, data: bytes, format_name: str) -> list[str]:
    found = []
    if image.mode == "CMYK":
        found.append("cmyk")
    if image.mode in ("P", "PA"):
        found.append("palette")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        found.append("alpha")
    if _has_sixteen_bits(image, data, format_name):
        found.append("sixteen_bit")
    # A photo with a preview beside it is not meant here.
    if format_name != "JPEG" and getattr(image, "is_animated", False):
        found.append("animated")
    # Pillow decodes a whole PNG to see whether EXIF comes after the pixels.
    may_have_exif = b"eXIf" in data if format_name == "PNG" else "exif" in image.info or format_name == "TIFF"
    if may_have_exif and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        found.append("exif_rotated")
    return found


def _has_sixteen_bits(image: Image.Image, data: bytes, format_name: str) -> bool:
    if format_name == "PNG":
        # The bit depth in IHDR; Pillow's mode hides it for colours.
        return data[24] == 16
    if format_name == "TIFF":
        bits = image.tag_v2.get(258, (8,))  # type: ignore[attr-defined]
        return max(bits) == 16
    return image.mode.startswith("I")


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
