"""What an image file's header says, without decoding the pixels."""

import io
import warnings
from typing import NamedTuple

from PIL import ExifTags, Image

from linvit.data.jpeg import read_jpeg_header


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
