"""Whether a broken image file ends too early, from the lengths and end marks that its format has."""

import re
import struct


def is_cut_off(data: bytes, format_name: str) -> bool:
    """Whether the end of the file is missing, judged only where decoding it failed."""
    check = _CHECKS.get(format_name)
    try:
        return check is not None and check(data)
    except struct.error:
        # Too short even for its header.
        return True


def _jpeg(data: bytes) -> bool:
    return not data.rstrip(b"\0").endswith(b"\xff\xd9")


def _png(data: bytes) -> bool:
    # Chunk by chunk: a damaged chunk may still be followed by a whole end.
    position = 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        if data[position + 4 : position + 8] == b"IEND":
            return position + 12 > len(data)
        position += 12 + length
    return True


def _webp(data: bytes) -> bool:
    return struct.unpack_from("<I", data, 4)[0] + 8 > len(data)


def _bmp(data: bytes) -> bool:
    return struct.unpack_from("<I", data, 2)[0] > len(data)


def _tiff(data: bytes) -> bool:
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    if start + 2 + 12 * count > len(data):
        return True
    entries = [struct.unpack_from(order + "HHII", data, start + 2 + 12 * number) for number in range(count)]
    values = {tag: _tiff_values(data, order, kind, number, value) for tag, kind, number, value in entries}
    # Strips' offsets and lengths.
    return any(offset + length > len(data) for offset, length in zip(values.get(273, ()), values.get(279, ())))


def _tiff_values(data: bytes, order: str, kind: int, number: int, value: int) -> tuple[int, ...]:
    if kind not in (3, 4):
        return ()
    code = "H" if kind == 3 else "I"
    if number == 1:
        return (value & 0xFFFF if kind == 3 and order == "<" else value >> 16 if kind == 3 else value,)
    return struct.unpack_from(f"{order}{number}{code}", data, value)


def _pnm(data: bytes) -> bool:
    # Width, height and largest value; a single space before the pixels, which may begin with more.
    header = re.match(rb"P([56])\s+(\d+)\s+(\d+)\s+(\d+)\s", data)
    if header is None:
        return len(data) < 16
    kind, width, height, largest = map(int, header.groups())
    channels = 3 if kind == 6 else 1
    return len(data) - header.end() < width * height * channels * (1 if largest < 256 else 2)


_CHECKS = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "BMP": _bmp, "TIFF": _tiff, "PNM": _pnm}
