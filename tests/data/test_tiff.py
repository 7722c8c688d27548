"""TIFF files: colours are kept beside an alpha channel or a fourth band; other bands are refused instead of mixed."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from linvit.data.decode import UnsupportedImage, decode_image

RGB, GREY = 2, 1
COLOURS = (20, 40, 60, 80, 100)


def bands(count: int, dtype: type = np.uint8, factor: int = 1) -> np.ndarray:
    """An image (8, 8, count) whose bands have the values of COLOURS."""
    return np.broadcast_to(np.array(COLOURS[:count]) * factor, (8, 8, count)).astype(dtype)


def tiff(pixels: np.ndarray, photometric: int, *, extra: int | None = None, separate: bool = False) -> bytes:
    """An uncompressed TIFF file of pixels (H, W, bands)."""
    height, width, count = pixels.shape
    planes = [pixels[..., band].tobytes() for band in range(count)] if separate else [pixels.tobytes()]
    tags: list[tuple[int, list[int]]] = [
        (256, [width]),
        (257, [height]),
        (258, [8 * pixels.itemsize] * count),
        (259, [1]),
        (262, [photometric]),
        (273, [0] * len(planes)),
        (277, [count]),
        (278, [height]),
        (279, [len(plane) for plane in planes]),
        (284, [2 if separate else 1]),
        *([] if extra is None else [(338, [extra])]),
    ]
    body = 8 + 2 + 12 * len(tags) + 4
    size = sum(2 * len(values) for _, values in tags if len(values) > 2)
    offsets = np.cumsum([body + size, *map(len, planes)])[:-1].tolist()
    entries, stored = b"", b""
    for tag, values in tags:
        packed = struct.pack(f"<{len(values)}H", *(offsets if tag == 273 else values))
        at = struct.pack("<I", body + len(stored)) if len(packed) > 4 else packed.ljust(4, b"\0")
        stored += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, 3, len(values)) + at
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + stored + b"".join(planes)


def colour(data: bytes, **options: tuple[int, int]) -> list[int]:
    """The colour of a TIFF file of a single colour."""
    image = decode_image(data, name="a.tif", **options)  # type: ignore[arg-type]
    assert image.shape == (8, 8, 3)
    assert (image == image[0, 0]).all()
    return [int(value) for value in image[0, 0]]


@pytest.mark.parametrize("extra", [None, 0, 1, 2])
def test_a_fourth_band_does_not_change_the_colours(extra: int | None) -> None:
    assert colour(tiff(bands(4), RGB, extra=extra)) == [20, 40, 60]
    assert colour(tiff(bands(4, np.uint16, 256), RGB, extra=extra)) == [20, 40, 60]
    assert colour(tiff(bands(4, np.uint16, 256), RGB, extra=extra), input_range=(0, 255 * 128)) == [40, 80, 120]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_the_alpha_channel_of_pillow_is_dropped(mode: str) -> None:
    image = Image.fromarray(bands(4), "RGBA").convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF")
    assert colour(file.getvalue()) == list(image.convert("RGB").getpixel((0, 0)))


@pytest.mark.parametrize(("count", "photometric"), [(3, GREY), (4, GREY), (5, GREY), (5, RGB)])
@pytest.mark.parametrize("separate", [False, True])
def test_further_bands_are_refused(count: int, photometric: int, separate: bool) -> None:
    with pytest.raises(UnsupportedImage, match=f"^a.tif: is a TIFF image of {count} bands, which is not supported; "):
        colour(tiff(bands(count), photometric, extra=0, separate=separate))


def test_bands_of_16_bits_one_after_another_keep_8_bits_or_are_refused() -> None:
    whole, planes = (tiff(bands(3, np.uint16, 256), RGB, separate=separate) for separate in (False, True))
    assert colour(whole) == colour(planes) == [20, 40, 60]
    assert colour(whole, input_range=(0, 255 * 128)) == [40, 80, 120]
    with pytest.raises(UnsupportedImage, match=r"^a\.tif: is a TIFF image of 16 bits with its bands one after another"):
        colour(planes, input_range=(0, 255 * 128))


def test_a_second_band_of_16_bits_is_dropped_or_refused() -> None:
    data = tiff(bands(2, np.uint16, 256), GREY, extra=0)
    assert colour(data) == [20, 20, 20]
    with pytest.raises(UnsupportedImage, match="a TIFF image of 16 bits in grey with another band"):
        colour(data, input_range=(0, 255 * 128))
