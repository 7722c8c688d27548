"""Small generated images and ImageNet-style folders."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

Counts = dict[str, dict[str, int]]


def smooth_image(height: int, width: int, *, phase: float = 0.0) -> np.ndarray:
    """An image (height, width, 3) uint8 that looks much the same under any sound interpolation."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + phase), np.cos(y / 11 + phase), np.sin((x + 2 * y) / 23 - phase)]
    return np.stack([127 + scale * wave for scale, wave in zip((100, 90, 60), waves)], axis=-1).astype(np.uint8)


@pytest.fixture(name="smooth_image")
def _smooth_image() -> Callable[..., np.ndarray]:
    return smooth_image


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes `counts[split][class]` images, each different, and returns the folder of the splits."""

    def make(counts: Counts, *, height: int = 40, width: int = 52, suffix: str = ".png") -> Path:
        number = 0
        for split, classes in counts.items():
            for name, count in classes.items():
                folder = tmp_path / split / name
                folder.mkdir(parents=True)
                for index in range(count):
                    image = smooth_image(height, width, phase=0.37 * number)
                    assert cv2.imwrite(str(folder / f"{index:03d}{suffix}"), image[..., ::-1])
                    number += 1
        return tmp_path

    return make
