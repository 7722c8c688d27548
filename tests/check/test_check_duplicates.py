"""Copies are found whatever was done to them; pictures of the same kind of thing are none."""

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from checks import checked, places
from corpus import build_clean, encoded, picture, write
from PIL import Image, ImageEnhance

from linvit.check.duplicates import likeness
from linvit.check.perceptual import FARTHEST, close_pairs, distance, hash_thumbnails


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, quality=quality)))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg": lambda image: through_jpeg(image, 50),
    "half": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "double": lambda image: image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC),
    "resized and jpeg": lambda image: through_jpeg(image.resize((170, 130), Image.Resampling.LANCZOS), 75),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "grey": lambda image: image.convert("L"),
}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("many")
    for number in range(40):
        write(data / f"a/{number}.bmp", encoded(picture(number, height=180, width=240), "BMP"))
    return data


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(change: str, many: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to(many)
    for number in range(20):
        image = CHANGES[change](Image.open(many / f"a/{number}.bmp"))
        write(tmp_path / f"data/val/a/{number}.bmp", encoded(image, "BMP"))
    found = places(checked(tmp_path / "data", tmp_path))
    assert found.pop("link_outside") == ["train"]
    assert list(found) == ["near_duplicate_across_splits"]
    assert len(found["near_duplicate_across_splits"]) == 20


def test_different_pictures_are_no_copies(many: Path, tmp_path: Path) -> None:
    assert checked(many, tmp_path)["findings"] == {}


def test_look_alikes_raise_the_bar(tmp_path: Path) -> None:
    # One pattern with a little of their own, as parts before one camera have.
    data = tmp_path / "data"
    base = np.asarray(picture(0, height=120, width=120)).astype(np.float32)
    for number in range(40):
        own = np.asarray(picture(100 + number, height=120, width=120)).astype(np.float32) - 128
        image = Image.fromarray(np.clip(base + 0.3 * own, 0, 255).astype(np.uint8))
        write(data / f"a/{number}.png", encoded(image, "PNG"))
        if number == 7:
            write(data / "a/again.jpg", encoded(image, quality=98))
    report = checked(data, tmp_path)
    assert report["near_duplicates"]["candidate_pairs"] > 40
    assert report["near_duplicates"]["threshold"] > 0.6
    assert [[case["path"], *case["others"]] for case in report["findings"]["near_duplicate"]["cases"]] == [
        ["a/7.png", "a/again.jpg"]
    ]


def test_flat_images_are_not_alike(tmp_path: Path) -> None:
    for number in range(8):
        image = Image.new("RGB", (64, 64), (20 * number, 90, 120))
        image.putpixel((number, 5), (255, 255, 255))
        write(tmp_path / f"data/a/{number}.png", encoded(image, "PNG"))
    assert checked(tmp_path / "data", tmp_path)["findings"] == {}


def test_groups_are_told_once_with_all_their_members(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    for name in ("train/ant/copy.jpg", "train/bee/copy.jpg", "val/bee/copy.jpg"):
        write(data / name, (data / "train/ant/0.jpg").read_bytes())
    findings = checked(data, tmp_path)["findings"]
    members = ["train/ant/copy.jpg", "train/bee/copy.jpg", "val/bee/copy.jpg"]
    for code in ("duplicate_two_labels", "duplicate_across_splits"):
        assert findings.pop(code)["cases"] == [{"path": "train/ant/0.jpg", "detail": "", "others": members}]
    assert findings == {}


def test_near_duplicates_can_be_left_out(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    write(data / "val/ant/again.png", encoded(Image.open(data / "train/ant/0.jpg"), "PNG"))
    report = checked(data, tmp_path, near_duplicates=False)
    assert (report["findings"], report["near_duplicates"]) == ({}, None)


def test_close_pairs_are_all_pairs_within_six_bits() -> None:
    rng = np.random.default_rng(0)
    count = 1600
    hashes = rng.integers(0, 1 << 63, count, dtype=np.uint64)
    # Every second one is the one before it with up to six of its bits changed.
    for place in range(1, count, 2):
        changed = sum(1 << int(bit) for bit in rng.choice(63, place % 7, replace=False))
        hashes[place] = hashes[place - 1] ^ np.uint64(changed)
    # As numbers with the first bit first, of which the last one is always 0.
    hashes = (hashes << np.uint64(1)).byteswap()
    distances = np.stack([distance(hashes, np.full(count, value)) for value in hashes])
    a, b = np.nonzero(np.triu(distances <= FARTHEST, 1))
    found = close_pairs(hashes)
    assert set(map(tuple, found.tolist())) == set(zip(a.tolist(), b.tolist()))
    assert len(found) >= count // 2
    assert (np.diff(distances[found[:, 0], found[:, 1]].astype(int)) >= 0).all()


def test_distance_counts_bits() -> None:
    a, b = np.array([0, 7], np.uint64), np.array([(1 << 63) + 1, 7], np.uint64)
    assert distance(a, b).tolist() == [2, 0]


def test_hashes_do_not_depend_on_brightness_and_contrast() -> None:
    thumbnails = np.stack([cv2.resize(np.asarray(picture(n).convert("L")), (32, 32)) for n in range(20)])
    other = (thumbnails * 0.5 + 60).astype(np.uint8)
    assert distance(hash_thumbnails(thumbnails), hash_thumbnails(other)).max() <= 4
    assert len(set(hash_thumbnails(thumbnails).tolist())) == 20


def test_likeness_is_of_details() -> None:
    image = np.asarray(picture(0, height=120, width=160))
    assert likeness(image, image) == pytest.approx(1, abs=1e-4)
    assert likeness(image, np.clip(image.astype(int) + 40, 0, 255).astype(np.uint8)) > 0.9
    assert abs(likeness(image, np.asarray(picture(1, height=120, width=160)))) < 0.2
    assert likeness(image, np.zeros_like(image)) == 0
