"""Metadata of image files: format, size and encoding, and whether the end is missing."""

import io
import os
import warnings
from typing import NamedTuple

from PIL import ExifTags, Image

from linvit.data.decode import no_pixel_limit, read_jpeg_header

# Bytes from the start of a file that `format_of` needs.
HEAD_BYTES = 32

_SIGNATURES = {
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
# Brands of ISO media files, which start with the length of their first box.
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC"}
_EXTENSIONS = {
    ".avif": "AVIF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jfif": "JPEG",
    ".jp2": "JPEG 2000",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".pgm": "PNM",
    ".png": "PNG",
    ".ppm": "PNM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}

_JPEG_END = b"\xff\xd9"
_PNG_END = b"IEND\xaeB`\x82"
_TIFF_BITS_PER_SAMPLE = 258
# Parts of Pillow's errors and warnings about files that end too early.
_TRUNCATION_MESSAGES = ("truncated", "expecting to read", "not enough image data")


class Header(NamedTuple):
    """Width and height in pixels as stored, and finding codes for what decoding converts."""

    width: int
    height: int
    codes: tuple[str, ...]


def format_of(head: bytes) -> str | None:
    """The format of a file, from its first `HEAD_BYTES` bytes; None if it is unknown."""
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PNM"
    return None


def format_named(path: str) -> str | None:
    """The format that a file's extension stands for; None if training does not read such files."""
    return _EXTENSIONS.get(os.path.splitext(path)[1].lower())


def read_header(data: bytes, format_name: str) -> Header | None:
    """The header of an image file; None if it is missing or invalid."""
    if format_name == "JPEG":
        # Ten times as fast as Pillow.
        jpeg = read_jpeg_header(data)
        if jpeg is None:
            return None
        codes = [*["cmyk"] * (jpeg.channels == 4), *["exif_rotated"] * (jpeg.orientation != 1)]
        return Header(jpeg.width, jpeg.height, tuple(codes))
    try:
        with warnings.catch_warnings(), no_pixel_limit():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return Header(image.width, image.height, tuple(_conversions(image, data, format_name)))
    # Pillow's plugins raise all sorts of errors on broken headers.
    except Exception:
        return None


def is_truncated(data: bytes, format_name: str) -> bool:
    """Whether the end of a file that cannot be decoded is missing, rather than some of its data damaged."""
    # Pillow calls some damaged JPEGs truncated too, misses cuts close to the end of a PNG, and reports every broken
    # WebP in the same words. These formats have an end marker or state the length of the file.
    if format_name == "JPEG":
        return not data.rstrip(b"\0").endswith(_JPEG_END)
    if format_name == "PNG":
        return _PNG_END not in data
    if format_name == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if format_name == "BMP":
        return len(data) < int.from_bytes(data[2:6], "little")
    messages = _pillow_messages(data).lower()
    return any(part in messages for part in _TRUNCATION_MESSAGES)


def _pillow_messages(data: bytes) -> str:
    """Pillow's error from decoding a file and its warnings before; empty if it decodes the file."""
    with warnings.catch_warnings(record=True) as caught, no_pixel_limit():
        warnings.simplefilter("always")
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        except Exception as error:
            return "\n".join([*(str(warning.message) for warning in caught), str(error)])
    return ""


def _conversions(image: Image.Image, data: bytes, format_name: str) -> list[str]:
    codes = []
    if image.mode == "CMYK":
        codes.append("cmyk")
    if image.mode in ("P", "PA"):
        codes.append("palette")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        codes.append("alpha")
    if _has_sixteen_bits(image, data, format_name):
        codes.append("sixteen_bit")
    # In a JPEG, the second frame is only a preview.
    if format_name != "JPEG" and getattr(image, "is_animated", False):
        codes.append("animated")
    # Pillow decodes a full PNG to look for EXIF after the pixels.
    may_have_exif = b"eXIf" in data if format_name == "PNG" else "exif" in image.info or format_name == "TIFF"
    if may_have_exif and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        codes.append("exif_rotated")
    return codes


def _has_sixteen_bits(image: Image.Image, data: bytes, format_name: str) -> bool:
    if format_name == "PNG":
        # The bit depth in IHDR; Pillow's mode does not show it for colour images.
        return data[24] == 16
    if format_name == "TIFF":
        bits = image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (8,))  # type: ignore[attr-defined]
        return max(bits) == 16
    return image.mode.startswith("I")
