"""What the header of a JPEG file says, found without decoding it."""

import struct

_EXIF_ORIENTATION = 0x0112


def reducible_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG, as it is shown, that may be decoded at a reduced size; None for other files.

    A reduced image's last row and column may stand for fewer pixels than the others. Turned images in which they
    would come first are left out: those whose height or width is no multiple of 8.
    """
    if data[:2] != b"\xff\xd8":
        return None
    orientation = 1
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        # Start of frame, of any kind of JPEG; three other markers lie between.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, position + 5)
            if not height or not width or (orientation != 1 and (height % 8 or width % 8)):
                return None
            # Orientations from 5 on exchange rows and columns.
            return (height, width) if orientation < 5 else (width, height)
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    return None


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
