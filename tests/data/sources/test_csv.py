"""Image lists in CSV files."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from linvit.data.sources.csv import open_list
from linvit.data.sources.open import open_images

MakeFolder = Callable[..., Path]


@pytest.fixture
def data(make_folder: MakeFolder) -> Path:
    return make_folder({"images": {"a": 2, "b": 2}})


def write(data: Path, text: str, name: str = "train.csv") -> Path:
    file = data / name
    file.write_text(text, encoding="utf-8")
    return file


def test_images_keep_the_order_of_the_list(data: Path) -> None:
    file = write(data, f"path,label\nimages/b/001.png,dog\n{data}/images/a/000.png,cat\nimages/b/000.png,dog\n")
    images = open_list(file, split="train")
    assert images.class_names == ["cat", "dog"]
    assert images.labels == [1, 0, 1]
    assert images.paths == [data / "images/b/001.png", data / "images/a/000.png", data / "images/b/000.png"]
    assert images[0][0].shape == (40, 52, 3)


def test_columns_may_be_quoted_and_in_any_order_among_others(data: Path) -> None:
    file = write(data, '\ufeffsize, Label , path\r\n3, "a, b",  images/a/000.png\r\n\r\n4,c,"images/a/001.png"\r\n')
    images = open_list(file, split="train")
    assert images.class_names == ["a, b", "c"]
    assert [path.name for path in images.paths] == ["000.png", "001.png"]


def test_a_column_names_the_splits(data: Path) -> None:
    text = "path,label,split\nimages/a/000.png,a,train\nimages/b/000.png,b,valid\nimages/b/001.png,b,train\n"
    file = write(data, text, "all.csv")
    train = open_list(file, split="train")
    assert [path.name for path in train.paths] == ["000.png", "001.png"]
    # "val" finds "valid"; labels follow the classes of the training images.
    val = open_list(file, split="val", class_names=train.class_names, missing_classes="allow")
    assert val.labels == [1]


@pytest.mark.parametrize(
    ("name", "split"), [("train.csv", "train"), ("valid.csv", "val"), ("x.csv", "x"), ("x.csv", "x.csv")]
)
def test_a_list_without_that_column_is_the_split_it_is_named_after(name: str, split: str, data: Path) -> None:
    assert len(open_list(write(data, "path,label\nimages/a/000.png,a\n", name), split=split)) == 1


def test_numbers_may_be_named_beside_the_list(data: Path) -> None:
    (data / "classes.txt").write_text("dog\ncat\n")
    images = open_list(write(data, "path,label\nimages/a/000.png,1\nimages/a/001.png,0\n"), split="train")
    assert images.class_names == ["dog", "cat"]
    assert images.labels == [1, 0]
    assert "classes.txt" in images.note


HEAD = "path,label\nimages/a/000.png,a\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + "images/a/none.png,a\n", r"line 3: .*images/a/none\.png does not exist; restore it"),
        (
            HEAD + "gone/x.png,a\ngone/y.png,a\n",
            r"line 3: .*x\.png does not exist \(2 of 3 images are missing\); restore",
        ),
        (HEAD + "images/a/000.png,b\n", r"line 3: repeats images/a/000\.png from line 2; remove one"),
        (HEAD + "images/a/001.png\n", r"line 3: has too few fields \(1\); write path,label"),
        (HEAD + "images/a/001.png,\n", "line 3: has no label; fill it in"),
        (HEAD + ",a\n", "line 3: has no path"),
        (HEAD + '\n"images/a/001.png",a\n"images/b/000.png"x,a\n', "line 5: is not valid CSV"),
        ("photos;label\nx;a\n", r"no column 'path', 'label' in the first line \(photos;label\)"),
        ("", r"no column 'path', 'label'"),
        ("path,label\n", "lists no images"),
        ("path,label,split\nimages/a/000.png,a,test2\n", r"no split 'train' \(looked for .*\); found 'test2'"),
    ],
)
def test_faults_are_named_with_their_line(text: str, words: str, data: Path) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        open_list(write(data, text), split="train")
    assert "train.csv" in str(caught.value)


def test_a_list_with_another_name_needs_the_column(data: Path) -> None:
    file = write(data, "path,label\nimages/a/000.png,a\n", "photos.csv")
    with pytest.raises(
        ValueError, match=r"photos\.csv: no split 'train' .*; give the folder of the list, or add a column 'split'"
    ):
        open_list(file, split="train")


def test_other_encodings_are_refused(data: Path) -> None:
    file = data / "train.csv"
    file.write_bytes("path,label\nimages/a/000.png,Größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.csv: is not UTF-8 text"):
        open_list(file, split="train")


def test_classes_are_checked(data: Path) -> None:
    file = write(data, HEAD)
    with pytest.raises(ValueError, match="'a' is not among the 1 known classes"):
        open_list(file, split="train", class_names=["x"])
    with pytest.raises(ValueError, match="no images of 'x'"):
        open_list(file, split="train", class_names=["a", "x"])


@pytest.mark.parametrize(
    "text",
    [
        "id,label\n000,cat\n001,dog\n",
        "filename,class\n000.png,cat\n001.png,dog\n",
        "image_path;label\nimages/a/000.png;cat\nimages/a/001.png;dog\n",
        "image\tage\ttarget\n000\t3\tcat\n001\t4\tdog\n",
        "id,breed\n000,cat\n001,dog\n",
        "image,cat,dog\n000,1.0,0.0\n001,0.0,1.0\n",
        "id,cat,dog,split\n000,1,0,train\n001,0,1,train\n",
        ",ImageId,PredictionString\n0,000,cat 85 1 499 272 dog 1 2 3 4\n1,001,dog 1 1 2 2\n",
    ],
)
def test_other_columns_delimiters_and_names_without_extension(text: str, data: Path) -> None:
    # As in Kaggle's sets, the images are in a folder named after the split, without class folders.
    (data / "images/a").rename(data / "train")
    write(data, text.replace("images/a/", ""))
    images = open_images(data, split="train")
    assert images.class_names == ["cat", "dog"]
    assert images.labels == [0, 1]
    assert images.paths == [data / "train/000.png", data / "train/001.png"]
    assert ("labels are taken from" in images.note) == any(name in text for name in ("breed", "cat,dog"))


def test_listed_files_are_not_checked_one_by_one(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check takes a millisecond on a network file system."""
    (data / "images/a").rename(data / "train")
    file = write(data, "path,label\n000.png,cat\n001,dog\n")
    monkeypatch.setattr(os.path, "isfile", lambda path: pytest.fail(f"checked {path}"))
    assert open_list(file, split="train").paths == [data / "train/000.png", data / "train/001.png"]


def test_class_folders_come_before_a_list(data: Path) -> None:
    write(data, "path,label\nimages/a/000.png,x\n")
    (data / "images").rename(data / "train")
    assert open_images(data, split="train").class_names == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,cat,dog\n000,1,1\n", "line 2: has 2 classes; an image has one class"),
        ("id,cat,dog\n000,0,0\n", "line 2: has 0 classes"),
        ("id,cat,age\n000,1,7\n", "line 2: column 'age' is '7', not 0 or 1, and the list has no column 'label'"),
        ("id,label\nimages/a/000.png,a\nimages/a/000,a\n", r"line 3: repeats images/a/000\.png from line 2"),
        ("id,label\nimages/a/999,a\n", "line 2: .*images/a/999 does not exist"),
    ],
)
def test_faults_of_other_columns_are_named(text: str, words: str, data: Path) -> None:
    with pytest.raises(ValueError, match=words):
        open_list(write(data, text), split="train")


def test_a_name_without_extension_must_be_unique(data: Path) -> None:
    (data / "images/a/000.jpg").touch()
    with pytest.raises(ValueError, match=r"images/a/000: is one of '000\.jpg', '000\.png'; add the extension"):
        open_list(write(data, "id,label\nimages/a/000,a\n"), split="train")


def test_names_that_are_not_utf8_are_found_by_their_bytes(data: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (data / "images/a").rename(data / "images" / name)
    (data / "train.csv").write_bytes(b"path,label\nimages/caf\xe9/000.png,caf\xe9\n")
    images = open_list(data / "train.csv", split="train")
    assert (images.class_names, images.paths) == ([name], [data / "images" / name / "000.png"])


SYNSETS = ["n01440764", "n01443537", "n01484850"]
PHOTOS = [f"ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3)]


def boxes(names: Iterable[str]) -> str:
    return "".join(f"{photo[:-5]},{name} 1 2 3 4\n" for photo, name in zip(PHOTOS, names))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LOC_val_solution.csv", "ImageId,PredictionString\n" + boxes(["n01484850", "n01440764", "n01443537"])),
        ("val.txt", "".join(f"{photo} {label}\n" for photo, label in zip(PHOTOS, (2, 0, 1)))),
        ("imagenet_2012_validation_synset_labels.txt", "n01484850\nn01440764\nn01443537\n"),
        ("ILSVRC2012_validation_ground_truth.txt", "490\n449\n450\n"),
    ],
)
def test_imagenets_validation_images_lie_in_one_folder(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    for photo in PHOTOS:
        (tmp_path / "val" / photo).touch()
    with pytest.raises(ValueError, match=r"val: holds no class folders; .* or write a list val\.csv beside it"):
        open_images(tmp_path, split="val")
    (tmp_path / name).write_text(text)
    if "ground_truth" in name:
        with pytest.raises(ValueError, match="its numbers are IDs of ImageNet's development kit, not labels; copy"):
            open_images(tmp_path, split="val", class_names=SYNSETS)
        kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O")]
        table = np.array([(449.0, SYNSETS[0]), (450.0, SYNSETS[1]), (490.0, SYNSETS[2])], dtype=kinds)
        savemat(tmp_path / "meta.mat", {"synsets": table})
    for split in ("val", "validation"):
        images = open_images(tmp_path, split=split, class_names=SYNSETS)
        assert images.labels == [2, 0, 1]
        assert [path.name for path in images.paths] == PHOTOS


def test_labels_without_paths_must_be_as_many_as_images(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / PHOTOS[0]).touch()
    (tmp_path / "val.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"val\.txt: has 2 labels without paths, but there are 1 images"):
        open_images(tmp_path, split="val")


def test_a_path_that_cannot_exist_is_named(data: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.csv: line 2: .* does not exist"):
        open_list(write(data, f"path,label\n{'a' * 5000},a\n"), split="train")
