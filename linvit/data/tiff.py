"""The bands of a TIFF file, of which OpenCV reads several kinds wrongly and without an error.

The numbers of the tags are those of TIFF 6.0 (Adobe 1992).
"""

import struct

# Of TIFF and BigTIFF: byte order, formats of offsets and of the number of tags, place of the first offset.
_SIGNATURES = {
    b"II*\0": ("<", "I", "H", 4),
    b"MM\0*": (">", "I", "H", 4),
    b"II+\0": ("<", "Q", "Q", 8),
    b"MM\0+": (">", "Q", "Q", 8),
}
# Type of the values, and its code for signed whole numbers.
SAMPLE_FORMAT, SIGNED = 339, 2
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA = 258, 262, 277, 284, 338
# Colours of an image by its photometric interpretation: RGB, CMYK, YCbCr and Lab; others are grey or have a palette.
_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}
_WHITE_IS_ZERO, _SEPARATE, _UNASSOCIATED_ALPHA, _UNSPECIFIED = 0, 2, 2, 0


def tiff_value(tiff: bytes, tag: int) -> int | None:
    """The first of a tag's 16-bit numbers in a TIFF directory; None if it is not there or the directory is damaged."""
    found = _place(tiff, tag)
    return None if found is None else int(struct.unpack_from(*found)[0])


def _place(tiff: bytes, tag: int) -> tuple[str, bytes, int] | None:
    """Format, bytes and offset of the first 16-bit number of a tag, as `struct.unpack_from` takes them."""
    if tiff[:4] not in _SIGNATURES:
        return None
    order, offset, number_of_tags, first = _SIGNATURES[tiff[:4]]
    width = struct.calcsize("=" + offset)
    try:
        (start,) = struct.unpack_from(order + offset, tiff, first)
        (count,) = struct.unpack_from(order + number_of_tags, tiff, start)
        start += struct.calcsize("=" + number_of_tags)
        for entry in range(start, start + (4 + 2 * width) * count, 4 + 2 * width):
            name, _, number = struct.unpack_from(order + "HH" + offset, tiff, entry)
            if name == tag:
                at = entry + 4 + width
                if 2 * number > width:  # stored elsewhere
                    (at,) = struct.unpack_from(order + offset, tiff, at)
                struct.unpack_from(order + "H", tiff, at)
                return order + "H", tiff, at
    except (struct.error, OverflowError):
        pass
    return None


def unsupported_bands(data: bytes, *, keeps_sixteen_bits: bool) -> str | None:
    """What a TIFF file is, as "a TIFF image of 5 bands", if OpenCV would misread it; None for other files.

    One extra band counts as an alpha channel, which is dropped.

    Args:
        keeps_sixteen_bits: whether images of 16 bits are decoded with all of them.
    """
    samples = tiff_value(data, _SAMPLES) or 1
    colours = _COLOURS.get(tiff_value(data, _PHOTOMETRIC) or 0, 1)
    if samples > colours + 1:
        return f"a TIFF image of {samples} bands"
    if not keeps_sixteen_bits or tiff_value(data, _BITS) != 16:
        return None
    if tiff_value(data, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        return "a TIFF image of 16 bits in which 0 is white"
    if samples == 1:
        return None
    if tiff_value(data, _PLANAR) == _SEPARATE:
        return "a TIFF image of 16 bits with its bands one after another"
    return "a TIFF image of 16 bits in grey with another band" if colours == 1 else None


def without_alpha_weights(data: bytes) -> bytes:
    """The same file, in which the alpha channel of a TIFF is declared an unknown band.

    OpenCV multiplies colours by an alpha channel that is declared unassociated, as in files that Pillow writes.
    """
    found = _place(data, _EXTRA)
    if found is None or struct.unpack_from(*found)[0] != _UNASSOCIATED_ALPHA:
        return data
    changed = bytearray(data)
    struct.pack_into(found[0], changed, found[2], _UNSPECIFIED)
    return bytes(changed)
