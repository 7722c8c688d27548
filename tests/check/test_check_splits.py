"""Statistics of sizes and colours match the pixels."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from checks import checked
from corpus import encoded, random_image, write
from jpegs import encode
from PIL import Image

from linvit.check import splits
from linvit.check.splits import sample_for_colours
from linvit.data.decode import read_image


def test_sizes_and_colours_are_those_of_the_pixels(tmp_path: Path) -> None:
    shapes = [(100, 200), (80, 60), (300, 150), (90, 90)]
    for number, (height, width) in enumerate(shapes):
        write(tmp_path / f"data/train/a/{number}.png", encoded(random_image(number, height=height, width=width), "PNG"))
    write(tmp_path / "data/val/a/0.png", encoded(Image.new("RGB", (64, 64), (255, 0, 0)), "PNG"))
    report = checked(tmp_path / "data", tmp_path)
    sizes = report["splits"]["train"]["sizes"]
    assert sizes["width"] == {"min": 60, "median": 120, "max": 200}
    assert sizes["aspect"] == {"min": 0.5, "median": 0.875, "max": 2.0}
    assert sizes["shorter_side_histogram"] == [[32, 1], [64, 2], [128, 1]]
    images = [read_image(tmp_path / f"data/train/a/{number}.png") for number in range(4)]
    samples = [cv2.resize(image, (64, 64), interpolation=cv2.INTER_NEAREST).reshape(-1, 3) / 255 for image in images]
    assert report["colours"]["split"] == "train"
    assert report["colours"]["mean"] == pytest.approx(np.concatenate(samples).mean(axis=0), abs=1e-4)
    assert report["colours"]["std"] == pytest.approx(np.concatenate(samples).std(axis=0), abs=1e-4)
    exact = np.mean([image.reshape(-1, 3).mean(axis=0) for image in images], axis=0) / 255
    assert report["colours"]["mean"] == pytest.approx(exact, abs=0.01)


def test_colours_are_sampled_evenly_from_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    selected = np.arange(1000) % 4 != 0
    assert (sample_for_colours(selected) == selected).all()
    assert not sample_for_colours(np.zeros(5, bool)).any()
    monkeypatch.setattr(splits, "_MAX_COLOUR_IMAGES", 50)
    sample = sample_for_colours(selected)
    assert sample.sum() == 50
    assert selected[sample].all()
    assert np.diff(np.flatnonzero(sample)).max() <= 25


def test_colours_are_those_of_images_at_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Any reduction would lower the deviation of fine noise.
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for index in range(count):
            path = tmp_path / f"data/{split}/a/{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.normal(120, 30, (256, 256, 1)).clip(0, 255).repeat(3, axis=2).astype(np.uint8)
            path.write_bytes(encode(noise, "4:4:4", quality=98))
    monkeypatch.setattr(splits, "_MAX_COLOUR_IMAGES", 5)
    colours = checked(tmp_path / "data", tmp_path)["colours"]
    assert colours["num_images"] == 5
    assert colours["mean"] == pytest.approx([120 / 255] * 3, abs=0.01)
    assert colours["std"] == pytest.approx([30 / 255] * 3, abs=0.005)
