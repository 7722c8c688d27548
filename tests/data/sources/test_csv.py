"""Image lists in CSV files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from linvit.data.sources.csv import open_list

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
        ("file;label\nx;a\n", r"no column 'path', 'label' in the first line \(file;label\)"),
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
