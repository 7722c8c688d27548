"""What an image file's header says, without decoding the pixels."""

import io
import warnings
from typing import NamedTuple

from PIL import ExifTags, Image


class Header(NamedTuple):
    """Size in pixels as stored, and what about the image needs conversion, as codes of notes."""

    width: int
    height: int
    notes: tuple[str, ...]


def read_header(data: bytes, format_name: str) -> Header | None:
    """The header, or None where there is none that makes sense."""
    if format_name == "JPEG":
        header = _plain_jpeg(data)
        if header is not None:
            return header
    return _by_pillow(data, format_name)


def _plain_jpeg(data: bytes) -> Header | None:
    """The header of a JPEG without EXIF, in a tenth of Pillow's time; None for others."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        # Start of frame, of any kind of JPEG; three other markers lie between.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            return Header(width, height, ("cmyk",) if data[position + 9] == 4 else ())
        if marker == 0xE1 and data[position + 4 : position + 8] == b"Exif":
            return None
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


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
