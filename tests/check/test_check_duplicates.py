"""Copies are found however they were changed; similar images are not reported as copies."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checks import checked, paths_by_code
from corpus import build_clean, encoded, random_image, write
from jpegs import encode, photo
from PIL import Image, ImageEnhance

from linvit.check import splits
from linvit.check.duplicates import similarity


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
        write(data / f"a/{number}.bmp", encoded(random_image(number, height=180, width=240), "BMP"))
    return data


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(change: str, many: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to(many)
    for number in range(20):
        image = CHANGES[change](Image.open(many / f"a/{number}.bmp"))
        write(tmp_path / f"data/val/a/{number}.bmp", encoded(image, "BMP"))
    found = paths_by_code(checked(tmp_path / "data", tmp_path))
    assert found.pop("link_outside") == ["train"]
    assert list(found) == ["near_duplicate_across_splits"]
    assert len(found["near_duplicate_across_splits"]) == 20


def test_different_images_are_not_copies(many: Path, tmp_path: Path) -> None:
    assert checked(many, tmp_path)["findings"] == {}


def test_look_alikes_raise_the_threshold(tmp_path: Path) -> None:
    # A shared pattern with small differences, like parts photographed by a fixed camera.
    data = tmp_path / "data"
    base = np.asarray(random_image(0, height=120, width=120)).astype(np.float32)
    for number in range(40):
        own = np.asarray(random_image(100 + number, height=120, width=120)).astype(np.float32) - 128
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


def test_a_group_is_reported_once_with_all_its_members(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    for name in ("train/ant/copy.jpg", "train/bee/copy.jpg", "val/bee/copy.jpg"):
        write(data / name, (data / "train/ant/0.jpg").read_bytes())
    findings = checked(data, tmp_path)["findings"]
    members = ["train/ant/copy.jpg", "train/bee/copy.jpg", "val/bee/copy.jpg"]
    for code in ("duplicate_two_labels", "duplicate_across_splits"):
        assert findings.pop(code)["cases"] == [{"path": "train/ant/0.jpg", "detail": "", "others": members}]
    assert findings == {}


def test_copies_are_found_if_only_one_is_decoded_at_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 2), ("val", 1)):
        for index in range(count):
            path = tmp_path / f"data/{split}/a/{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(photo(270, 410)))
    monkeypatch.setattr(splits, "_MAX_COLOUR_IMAGES", 1)
    case = checked(tmp_path / "data", tmp_path)["findings"]["duplicate_across_splits"]["cases"][0]
    assert [case["path"], *case["others"]] == ["train/a/0.jpg", "train/a/1.jpg", "val/a/0.jpg"]


def test_the_search_for_near_duplicates_can_be_disabled(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    write(data / "val/ant/again.png", encoded(Image.open(data / "train/ant/0.jpg"), "PNG"))
    report = checked(data, tmp_path, near_duplicates=False)
    assert (report["findings"], report["near_duplicates"]) == ({}, None)


def test_similarity_is_that_of_details() -> None:
    image = np.asarray(random_image(0, height=120, width=160))
    assert similarity(image, image) == pytest.approx(1, abs=1e-4)
    assert similarity(image, np.clip(image.astype(int) + 40, 0, 255).astype(np.uint8)) > 0.9
    assert abs(similarity(image, np.asarray(random_image(1, height=120, width=160)))) < 0.2
    assert similarity(image, np.zeros_like(image)) == 0
