"""A trained run whose settings differ from every model's defaults, and the folder that it was trained on."""

from pathlib import Path

import pytest
from tiny_runs import make_images, train


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), val=5)


@pytest.fixture(scope="package")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "classes.txt").write_text("red\nblue\ngreen\n")
    preparation = {"crop_pct": 0.7, "mean": [0.1, 0.2, 0.3], "std": 0.3, "interpolation": "bilinear"}
    assert train(data, folder, lr=3e-3, class_map=str(folder / "classes.txt"), **preparation) == 0
    return folder / "run"
