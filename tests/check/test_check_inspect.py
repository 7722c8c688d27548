"""Decoding at a reduced size changes neither the findings nor the reported size nor the duplicates found."""

import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from checks import checked
from corpus import build_clean, encoded, random_image, write
from jpegs import encode, photo

from linvit.check.inspect import THUMBNAIL, DecoderMessages, Inspection, inspect
from linvit.check.perceptual import MAX_DISTANCE, distance, hash_thumbnails

PIXELS = photo(270, 410)


def inspected(data: bytes, *, full_size: bool, name: str = "a.jpg") -> Inspection:
    with DecoderMessages() as messages:
        return inspect(data, name, max_pixels=10**8, full_size=full_size, messages=messages)


def corrupted(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """The data with bytes changed, truncated, removed and overwritten."""
    for index in rng.integers(2, len(data) - 50, 8):
        changed = bytearray(data)
        changed[index] ^= int(rng.integers(1, 256))
        yield bytes(changed)
        yield data[:index]
        yield data[:index] + data[index + int(rng.integers(1, 50)) :]
        yield data[:index] + rng.bytes(8) + data[index + 8 :]


@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "grey", "progressive"])
def test_damage_is_found_as_at_full_size(kind: str) -> None:
    found = set()
    for broken in corrupted(encode(PIXELS, kind), np.random.default_rng(0)):
        full, reduced = (inspected(broken, full_size=each) for each in (True, False))
        assert reduced.findings == full.findings
        assert (reduced.pixels is None) == (full.pixels is None)
        found |= {code for code, _ in full.findings}
    assert {"truncated", "damaged"} <= found


@pytest.mark.parametrize("orientation", [None, 3, 6])
@pytest.mark.parametrize(("height", "width"), [(270, 410), (272, 416), (2048, 1000), (63, 300)])
def test_size_is_that_of_the_upright_image(height: int, width: int, orientation: int | None) -> None:
    data = encode(photo(height, width), orientation=orientation)
    full, reduced = (inspected(data, full_size=each).pixels for each in (True, False))
    assert full is not None
    assert reduced is not None
    assert (reduced.width, reduced.height) == (full.width, full.height)
    assert (full.width, full.height) == ((height, width) if orientation == 6 else (width, height))
    assert reduced.means == pytest.approx(full.means, abs=2)


@pytest.mark.parametrize(("height", "width"), [(270, 410), (1024, 768), (1536, 2048)])
def test_copies_look_alike_however_they_are_decoded(height: int, width: int) -> None:
    pixels = photo(height, width)
    png = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
    forms = [
        inspected(encode(pixels), full_size=True),
        inspected(encode(pixels), full_size=False),
        inspected(png, full_size=False, name="a.png"),
    ]
    thumbnails = np.stack([form.pixels.thumbnail for form in forms if form.pixels is not None])
    assert thumbnails.shape == (3, THUMBNAIL, THUMBNAIL)
    hashes = hash_thumbnails(thumbnails)
    assert distance(hashes, np.repeat(hashes[:1], 3)).max() <= MAX_DISTANCE // 2
    assert np.abs(thumbnails.astype(int) - thumbnails[0]).mean() < 2


def test_an_image_with_uniform_averages_is_not_blank() -> None:
    chequers = np.indices((256, 256)).sum(axis=0) % 2 * 200
    data = encode(np.repeat(chequers[..., None], 3, axis=2).astype(np.uint8), "grey", quality=100)
    assert inspected(data, full_size=False).findings == []
    flat = encode(np.full((256, 256, 3), 90, np.uint8))
    assert inspected(flat, full_size=False).findings == [("blank", "")]


def test_messages_about_a_blank_image_are_not_attributed_to_the_next() -> None:
    flat = encode(np.full((256, 256, 3), 90, np.uint8))
    damaged = flat[:-2] + bytes(range(50)) + flat[-2:]
    with DecoderMessages() as messages:
        blank, clean = (
            inspect(data, "a.jpg", max_pixels=10**8, full_size=False, messages=messages).findings
            for data in (damaged, encode(PIXELS))
        )
    assert [code for code, _ in blank] == ["blank", "damaged"]
    assert clean == []


def test_padding_is_not_damage(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    image = encoded(random_image(90))
    write(data / "train/ant/padded.jpg", image[:-2] + bytes(20) + image[-2:])
    write(data / "train/bee/behind.jpg", encoded(random_image(91)) + bytes(500))
    assert checked(data, tmp_path)["findings"] == {}


def test_a_long_jpeg_without_a_header_is_given_up_at_once() -> None:
    started = time.perf_counter()
    found = inspected(b"\xff\xd8" + b"\xff" * 2_000_000 + b"\xff\xd9", full_size=True)
    assert found.findings == [("undecodable", "invalid header")]
    # A search byte by byte takes seconds.
    assert time.perf_counter() - started < 0.5
