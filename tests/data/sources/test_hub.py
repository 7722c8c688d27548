"""Hugging Face data sets, if the package `datasets` is installed."""

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from linvit.data.decode import UnreadableImage
from linvit.data.sources.hub import open_hub


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r'hf:some/set: needs the package datasets; install it with: pip install "linvit\[hf\]"'
    ):
        open_hub("hf:some/set", split="train")


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return pytest.importorskip("datasets")


def png(grey: int) -> bytes:
    return cv2.imencode(".png", np.full((8, 9, 3), grey, np.uint8))[1].tobytes()


def rows(datasets: Any, labels: list, feature: Any, **names: str) -> Any:
    """A data set of grey images; the row number is the grey value."""
    image, label = names.get("image", "image"), names.get("label", "label")
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in range(len(labels))]
    features = datasets.Features({image: datasets.Image(), label: feature})
    return datasets.Dataset.from_dict({image: images, label: labels}, features=features)


def saved(datasets: Any, folder: Path, **splits: Any) -> str:
    datasets.DatasetDict(splits).save_to_disk(folder)
    return f"hf:{folder}"


def test_images_and_classes(datasets: Any, tmp_path: Path) -> None:
    labels = datasets.ClassLabel(names=["dog", "cat"])
    data = saved(datasets, tmp_path / "set", validation=rows(datasets, [1, 0, 1], labels, image="img", label="fine"))
    images = open_hub(data, split="val")
    assert images.class_names == ["dog", "cat"]
    assert images.labels == [1, 0, 1]
    assert images.read_bytes(2) == png(2)
    assert images.read(2).tolist() == np.full((8, 9, 3), 2).tolist()
    assert images.path(2) == Path(f"{data}/validation/2")
    assert open_hub(data, split="val", class_names=["cat", "dog"]).labels == [0, 1, 0]


def test_rows_keep_their_order(datasets: Any, tmp_path: Path) -> None:
    shuffled = rows(datasets, list("abcdef"), datasets.Value("string")).select([4, 1, 5])
    images = open_hub(saved(datasets, tmp_path / "set", train=shuffled), split="train")
    assert images.class_names == ["b", "e", "f"]
    assert images.labels == [1, 0, 2]
    assert images.read_bytes(0) == png(4)


def test_plain_numbers_are_labels_too(datasets: Any, tmp_path: Path) -> None:
    data = saved(datasets, tmp_path / "set", train=rows(datasets, [10, 2], datasets.Value("int64"), label="cls"))
    images = open_hub(data, split="train")
    assert images.class_names == ["2", "10"]
    assert "labels are numbers" in images.note


def test_parquet_files_and_folders_of_them(datasets: Any, tmp_path: Path) -> None:
    file = tmp_path / "set" / "train-00000-of-00001.parquet"
    file.parent.mkdir()
    rows(datasets, [0, 1], datasets.ClassLabel(names=["a", "b"])).to_parquet(file)
    for data in (f"hf:{file}", f"hf:{file.parent}"):
        images = open_hub(data, split="train")
        assert images.labels == [0, 1]
        assert images.read_bytes(1) == png(1)
        with pytest.raises(ValueError, match=r"no split 'val' \(looked for .*\); found 'train'"):
            open_hub(data, split="val")


def test_images_in_separate_files_and_missing_images(datasets: Any, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(7))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    images = [str(tmp_path / "1.png"), None]
    data = datasets.Dataset.from_dict({"image": images, "label": ["a", "b"]}, features=features)
    data.save_to_disk(tmp_path / "train")
    found = open_hub(f"hf:{tmp_path / 'train'}", split="train")
    assert found.read_bytes(0) == png(7)
    with pytest.raises(UnreadableImage, match=r"train/train/1: is empty"):
        found.read_bytes(1)


def test_faults_are_named(datasets: Any, tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["a", "b"])
    good = rows(datasets, [0, 1], names)
    for number, (faulty, words) in enumerate(
        [
            (rows(datasets, [0, -1], names), "row 1 has no label"),
            (rows(datasets, ["a", None], datasets.Value("string")), "row 1 has no label"),
            (rows(datasets, [0.5, 1.0], datasets.Value("float32")), "column 'label' holds 0.5, neither a name"),
            (good.remove_columns("image"), r"no column with the feature Image \(columns: 'label'\); cast one"),
            (
                good.remove_columns("label"),
                r"no column with the feature ClassLabel and none named 'label' or 'cls' \(columns: 'image'\)",
            ),
            (good.select([0]), "no images of 'b'"),
        ]
    ):
        with pytest.raises(ValueError, match=words):
            open_hub(saved(datasets, tmp_path / str(number), train=faulty), split="train")
    good.select([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet: cannot be loaded \(ValueError: .*no data"):
        open_hub(f"hf:{tmp_path / 'train.parquet'}", split="train")
    with pytest.raises(ValueError, match=r"hf:.*nowhere: cannot be loaded \(FileNotFoundError"):
        open_hub(f"hf:{tmp_path / 'nowhere'}", split="train")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "README.md",
            "---\nconfigs:\n- config_name: default\n  data_files: hf://datasets/some/set/*.parquet\n---\n# Set",
        ),
        (".huggingface.yaml", 'configs: [{"config_name": "a", "data_files": [{"split": "x", "path": "s3::b"}]}]'),
    ],
)
def test_a_folder_cannot_start_a_download(datasets: Any, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} names '(hf://.*|s3::b)', and a file cannot start a download"):
        open_hub(f"hf:{tmp_path / 'set'}", split="train")


def test_links_in_the_text_about_a_folder_are_no_downloads(datasets: Any, tmp_path: Path) -> None:
    rows(datasets, ["a", "b"], datasets.Value("string")).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "README.md").write_text("---\nlicense_link: https://example.org\n---\n# Set\nhttps://example.org")
    assert open_hub(f"hf:{tmp_path}", split="train").labels == [0, 1]
