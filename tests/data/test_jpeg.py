"""The size in a header is the size of the decoded image, and nothing that is no header does harm."""

import struct

import numpy as np
import pytest
from jpegs import KINDS, encode, photo

from linvit.data.decode import decode_image, reducible_size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 64), (1, 1), (17, 33)])
def test_the_size_is_that_of_the_decoded_image(kind: str, shape: tuple[int, int]) -> None:
    for orientation in (None, 1, 3, 5, 6, 8):
        data = encode(photo(*shape), kind, orientation=orientation)
        if (orientation or 1) != 1 and shape != (40, 64):
            # The decoder would turn a last column of fewer pixels to the front.
            assert reducible_size(data) is None
            continue
        assert reducible_size(data) == (shape if (orientation or 1) < 5 else shape[::-1])
        assert reducible_size(data) == decode_image(data, name="image").shape[:2]


def exif(order: str, *, tag: int = 0x0112, value: int = 6) -> bytes:
    """An EXIF segment with one entry."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    tiff = mark + struct.pack(f"{order}IHHHIHHI", 8, 1, tag, 3, 1, value, 0, 0)
    payload = b"Exif\0\0" + tiff
    return b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("value", "turned"), [(0, False), (4, False), (5, True), (8, True), (9, False), (500, False)])
def test_both_byte_orders_are_read(order: str, value: int, turned: bool) -> None:
    plain = encode(photo(40, 64))
    data = plain[:2] + exif(order, value=value) + plain[2:]
    assert reducible_size(data) == ((64, 40) if turned else (40, 64)) == decode_image(data, name="image").shape[:2]


@pytest.mark.parametrize("cut", range(14, 36, 3))
def test_a_damaged_directory_turns_nothing(cut: int) -> None:
    plain = encode(photo(40, 64))
    segment = exif("<")
    short = segment[:2] + struct.pack(">H", cut - 2) + segment[4:cut]
    assert reducible_size(plain[:2] + short + plain[2:]) in ((40, 64), (64, 40))


def test_what_is_no_jpeg_has_no_size() -> None:
    data = encode(photo(40, 64))
    assert reducible_size(b"") is None
    assert reducible_size(b"\x89PNG\r\n\x1a\n" + data) is None
    assert reducible_size(data[:2]) is None
    # Fill bytes before a marker are allowed.
    assert reducible_size(data[:2] + b"\xff\xff" + data[2:]) == (40, 64)
    # A height of 0 stands for one that only the end of the data tells.
    start = data.index(b"\xff\xc0")
    assert reducible_size(data[: start + 5] + b"\0\0" + data[start + 7 :]) is None


def test_no_damage_raises() -> None:
    rng = np.random.default_rng(0)
    data = encode(photo(40, 64), orientation=6)
    for _ in range(2000):
        damaged = bytearray(data[: rng.integers(len(data))])
        for place in rng.integers(0, max(len(damaged), 1), 3) if damaged else ():
            damaged[place] = rng.integers(256)
        size = reducible_size(bytes(damaged))
        assert size is None or min(size) > 0
