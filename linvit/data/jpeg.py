"""What the header of a JPEG file says, found without decoding it."""

import struct
from typing import NamedTuple

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
