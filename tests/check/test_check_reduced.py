"""Images decoded at a reduced size: what is found, the size that is told, and what looks alike, stay the same."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from data.check.checks import checked
from jpegs import encode, photo

from linvit.check import statistics
from linvit.check.classes import drawn_for_colours
from linvit.check.inspect import THUMBNAIL, DecoderMessages, Inspection, inspect
from linvit.check.perceptual import FARTHEST, distance, hash_thumbnails

PIXELS = photo(270, 410)


def look(data: bytes, *, whole: bool, name: str = "a.jpg") -> Inspection:
    with DecoderMessages() as messages:
        return inspect(data, name, max_pixels=10**8, whole=whole, messages=messages)


def corrupted(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Bytes changed, cut off, left out and overwritten."""
    for place in rng.integers(2, len(data) - 50, 8):
        changed = bytearray(data)
        changed[place] ^= int(rng.integers(1, 256))
        yield bytes(changed)
        yield data[:place]
        yield data[:place] + data[place + int(rng.integers(1, 50)) :]
        yield data[:place] + rng.bytes(8) + data[place + 8 :]


@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "grey", "progressive"])
def test_damage_is_found_as_by_decoding_whole(kind: str) -> None:
    found = set()
    for broken in corrupted(encode(PIXELS, kind), np.random.default_rng(0)):
        whole, reduced = (look(broken, whole=each) for each in (True, False))
        assert reduced.findings == whole.findings
        assert (reduced.pixels is None) == (whole.pixels is None)
        found |= {code for code, _ in whole.findings}
    assert {"truncated", "damaged"} <= found


@pytest.mark.parametrize("orientation", [None, 3, 6])
@pytest.mark.parametrize(("height", "width"), [(270, 410), (272, 416), (2048, 1000), (63, 300)])
def test_size_is_the_one_shown(height: int, width: int, orientation: int | None) -> None:
    data = encode(photo(height, width), orientation=orientation)
    whole, reduced = (look(data, whole=each).pixels for each in (True, False))
    assert whole is not None
    assert reduced is not None
    assert (reduced.width, reduced.height) == (whole.width, whole.height)
    assert (whole.width, whole.height) == ((height, width) if orientation == 6 else (width, height))
    assert reduced.means == pytest.approx(whole.means, abs=2)


@pytest.mark.parametrize(("height", "width"), [(270, 410), (1024, 768), (1536, 2048)])
def test_copies_look_alike_however_they_are_decoded(height: int, width: int) -> None:
    pixels = photo(height, width)
    png = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
    forms = [look(encode(pixels), whole=True), look(encode(pixels), whole=False), look(png, whole=False, name="a.png")]
    thumbnails = np.stack([form.pixels.thumbnail for form in forms if form.pixels is not None])
    assert thumbnails.shape == (3, THUMBNAIL, THUMBNAIL)
    hashes = hash_thumbnails(thumbnails)
    assert distance(hashes, np.repeat(hashes[:1], 3)).max() <= FARTHEST // 2
    assert np.abs(thumbnails.astype(int) - thumbnails[0]).mean() < 2


def test_pixels_whose_averages_alone_are_equal_are_not_blank() -> None:
    chequers = np.indices((256, 256)).sum(axis=0) % 2 * 200
    data = encode(np.repeat(chequers[..., None], 3, axis=2).astype(np.uint8), "grey", quality=100)
    assert look(data, whole=False).findings == []
    flat = encode(np.full((256, 256, 3), 90, np.uint8))
    assert look(flat, whole=False).findings == [("blank", "")]


def test_complaints_about_a_blank_image_are_not_the_next_ones() -> None:
    flat = encode(np.full((256, 256, 3), 90, np.uint8))
    damaged = flat[:-2] + bytes(range(50)) + flat[-2:]
    with DecoderMessages() as messages:
        blank, clean = (
            inspect(data, "a.jpg", max_pixels=10**8, whole=False, messages=messages).findings
            for data in (damaged, encode(PIXELS))
        )
    assert [code for code, _ in blank] == ["blank", "damaged"]
    assert clean == []


def test_colours_are_of_some_images_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = np.arange(1000) % 4 != 0
    assert (drawn_for_colours(chosen) == chosen).all()
    assert not drawn_for_colours(np.zeros(5, bool)).any()
    monkeypatch.setattr(statistics, "_MOST_COLOURS", 50)
    drawn = drawn_for_colours(chosen)
    assert drawn.sum() == 50
    assert chosen[drawn].all()
    assert np.diff(np.flatnonzero(drawn)).max() <= 25


def test_copies_are_found_where_one_is_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 2), ("val", 1)):
        for index in range(count):
            path = tmp_path / f"data/{split}/a/{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(PIXELS))
    monkeypatch.setattr(statistics, "_MOST_COLOURS", 1)
    case = checked(tmp_path / "data", tmp_path)["findings"]["duplicate_across_splits"]["cases"][0]
    assert [case["path"], *case["others"]] == ["train/a/0.jpg", "train/a/1.jpg", "val/a/0.jpg"]


def test_colours_are_those_of_whole_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine noise, whose deviation any reduction would lose."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for index in range(count):
            path = tmp_path / f"data/{split}/a/{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.normal(120, 30, (256, 256, 1)).clip(0, 255).repeat(3, axis=2).astype(np.uint8)
            path.write_bytes(encode(noise, "4:4:4", quality=98))
    monkeypatch.setattr(statistics, "_MOST_COLOURS", 5)
    colours = checked(tmp_path / "data", tmp_path)["colours"]
    assert colours["num_images"] == 5
    assert colours["mean"] == pytest.approx([120 / 255] * 3, abs=0.01)
    assert colours["std"] == pytest.approx([30 / 255] * 3, abs=0.005)
