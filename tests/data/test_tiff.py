"""TIFF files: colours are kept beside an alpha channel or a fourth band; other bands are refused instead of mixed."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from linvit.data.decode import UnsupportedImage, decode_image
from linvit.data.tiff import tiff_value

RGB, GREY, WHITE_IS_ZERO = 2, 1, 0
COLOURS = (20, 40, 60, 80, 100)


def bands(count: int, dtype: type = np.uint8, factor: int = 1) -> np.ndarray:
    """An image (8, 8, count) whose bands have the values of COLOURS."""
    return np.broadcast_to(np.array(COLOURS[:count]) * factor, (8, 8, count)).astype(dtype)


def tiff(
    pixels: np.ndarray,
    photometric: int,
    *,
    extra: int | None = None,
    separate: bool = False,
    signed: bool = False,
    big: bool = False,
) -> bytes:
    """An uncompressed TIFF file, or BigTIFF, of pixels (H, W, bands)."""
    height, columns, count = pixels.shape
    planes = [pixels[..., band].tobytes() for band in range(count)] if separate else [pixels.tobytes()]
    tags: list[tuple[int, list[int]]] = [
        (256, [columns]),
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
        *([(339, [2] * count)] if signed else []),
    ]
    width, offset = (8, "Q") if big else (4, "I")
    body = (16 + 8 if big else 8 + 2) + (4 + 2 * width) * len(tags) + width
    size = sum(2 * len(values) for _, values in tags if 2 * len(values) > width)
    offsets = np.cumsum([body + size, *map(len, planes)])[:-1].tolist()
    entries, stored = b"", b""
    for tag, values in tags:
        packed = struct.pack(f"<{len(values)}H", *(offsets if tag == 273 else values))
        is_long = len(packed) > width
        at = struct.pack("<" + offset, body + len(stored)) if is_long else packed.ljust(width, b"\0")
        stored += packed if is_long else b""
        entries += struct.pack("<HH" + offset, tag, 3, len(values)) + at
    head = struct.pack("<HHQQ", 8, 0, 16, len(tags)) if big else struct.pack("<IH", 8, len(tags))
    return (b"II+\0" if big else b"II*\0") + head + entries + bytes(width) + stored + b"".join(planes)


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


def test_big_tiff_files_are_read_alike() -> None:
    assert colour(tiff(bands(4), RGB, extra=2, big=True)) == [20, 40, 60]
    signed = bands(1, np.int16, 256)
    assert colour(tiff(signed, GREY, signed=True, big=True)) == colour(tiff(signed, GREY, signed=True)) == [147] * 3
    with pytest.raises(UnsupportedImage, match="a TIFF image of 5 bands"):
        colour(tiff(bands(5), GREY, extra=0, big=True))
    with pytest.raises(UnsupportedImage, match="with its bands one after another"):
        colour(tiff(bands(3, np.uint16, 256), RGB, separate=True, big=True), input_range=(0, 255 * 128))


@pytest.mark.parametrize("start", [2**63 - 1, 2**64 - 1])
def test_a_big_tiff_file_that_points_out_of_itself_is_not_a_fault_of_the_reader(start: int) -> None:
    assert tiff_value(b"II+\0" + struct.pack("<HHQ", 8, 0, start), 277) is None


def test_grey_images_of_16_bits_in_which_0_is_white() -> None:
    data = tiff(bands(1, np.uint16, 256), WHITE_IS_ZERO)
    assert colour(data) == [235, 235, 235]
    with pytest.raises(UnsupportedImage, match="a TIFF image of 16 bits in which 0 is white"):
        colour(data, input_range=(0, 255 * 128))
