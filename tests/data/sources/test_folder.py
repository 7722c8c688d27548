"""Splits, classes and labels of ImageNet-style folders."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import link_levels

from linvit.check.listing import scan
from linvit.data.sources.folder import ImageFolder, open_folder
from linvit.data.sources.loose import expand

MakeFolder = Callable[..., Path]


def test_images_labels_and_names(make_folder: MakeFolder) -> None:
    folder = open_folder(make_folder({"train": {"b": 2, "a": 1, "C": 1}}), split="train")
    # As in torchvision, capitals come first.
    assert folder.class_names == ["C", "a", "b"]
    assert folder.labels == [0, 1, 2, 2]
    assert [str(path.relative_to(folder.root)) for path in folder.paths] == [
        "C/000.png",
        "a/000.png",
        "b/000.png",
        "b/001.png",
    ]
    assert len(folder) == 4
    image, label = folder[3]
    assert image.shape == (40, 52, 3)
    assert label == 2


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        ("train", "train"),
        ("training", "train"),
        ("val", "val"),
        ("val", "validation"),
        ("validation", "val"),
        ("validation", "validation"),
        ("valid", "val"),
        ("test", "val"),
        ("holdout", "holdout"),
    ],
)
def test_splits_are_found(there: str, asked: str, make_folder: MakeFolder) -> None:
    assert open_folder(make_folder({there: {"a": 1}}), split=asked).root.name == there


def test_the_requested_name_comes_before_its_synonyms(make_folder: MakeFolder) -> None:
    data = make_folder({name: {"a": 1} for name in ("test", "validation", "val")})
    assert open_folder(data, split="validation").root.name == "validation"
    assert open_folder(data, split="val").root.name == "val"
    assert open_folder(data, split="test").root.name == "test"


def test_nested_images_are_found_and_hidden_or_other_files_are_not(make_folder: MakeFolder) -> None:
    data = make_folder({"train": {"a": 1, "a/deep/er": 2, ".ipynb_checkpoints": 1, "a/.thumbs": 1}})
    (data / "train" / "a" / "notes.txt").write_text("not an image")
    (data / "train" / "a" / "._000.png").write_bytes(b"a resource fork")
    (data / "train" / "stray.png").write_bytes(b"of no class")
    folder = open_folder(data, split="train")
    assert folder.class_names == ["a"]
    assert [path.name for path in folder.paths] == ["000.png", "000.png", "001.png"]


def test_upper_case_extensions_are_found(make_folder: MakeFolder) -> None:
    data = make_folder({"train": {"a": 1}}, suffix=".JPG")
    assert len(open_folder(data, split="train")) == 1


def test_labels_follow_given_class_names(make_folder: MakeFolder) -> None:
    data = make_folder({"train": {"a": 1, "b": 1, "c": 1}, "val": {"c": 1, "b": 2}})
    names = open_folder(data, split="train").class_names
    folder = open_folder(data, split="val", class_names=names, missing_classes="allow")
    # timm's reader would give b label 0 and c label 1.
    assert folder.labels == [1, 1, 2]
    assert folder.class_names == names


def test_class_names_may_be_in_any_order(make_folder: MakeFolder) -> None:
    folder = open_folder(make_folder({"val": {"a": 1, "b": 1}}), split="val", class_names=["b", "a"])
    assert folder.labels == [1, 0]


@pytest.mark.parametrize(
    ("counts", "split", "names", "words"),
    [
        (
            {"train": {"a": 1}},
            "val",
            None,
            r"no split 'val' \(looked for val, validation, valid, test\); found 'train'",
        ),
        ({"a": {"x": 1}}, "train", None, "no split 'train'"),
        ({"train": {"a": 0}}, "train", None, "holds no images in its class folders"),
        ({"train": {"a": 1, "b": 0}}, "train", None, "no images of 'b'; add images or remove the folder"),
        ({"val": {"a": 1, "d": 1}}, "val", ["a", "b"], "'d' is not among the 2 known classes"),
        ({"val": {"a": 1}}, "val", ["a", "b"], "no images of 'b'; every split needs"),
        ({"train": {".hidden": 1}}, "train", None, "holds no class folders"),
    ],
)
def test_faults_are_named(
    counts: dict[str, dict[str, int]], split: str, names: list[str] | None, words: str, make_folder: MakeFolder
) -> None:
    data = make_folder(counts)
    with pytest.raises(ValueError, match=words) as caught:
        open_folder(data, split=split, class_names=names)
    assert str(data) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        open_folder(tmp_path / "nowhere", split="train")


def test_long_lists_are_cut_short(make_folder: MakeFolder) -> None:
    data = make_folder({"val": {"a": 1}})
    with pytest.raises(ValueError, match="'b00', 'b01', 'b02', 'b03', 'b04' and 15 more"):
        open_folder(data, split="val", class_names=["a", *(f"b{index:02d}" for index in range(20))])


def test_pickles_are_small() -> None:
    count = 20_000
    folder = ImageFolder(
        Path("/data/train"),
        split="train",
        class_names=["n01440764"],
        relative_paths=[f"n01440764/n01440764_{index:05d}.JPEG" for index in range(count)],
        labels=[0] * count,
    )
    data = pickle.dumps(folder)
    assert len(data) < 60 * count
    assert pickle.loads(data).path(123) == Path("/data/train/n01440764/n01440764_00123.JPEG")
    assert folder.path(0).name == "n01440764_00000.JPEG"


def test_a_folder_in_a_class_is_read_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    link_levels(tmp_path / "train/cat", levels=25)
    (tmp_path / "train/dog").symlink_to("cat")
    images = open_folder(tmp_path, split="train")
    deep = "a/" * 25 + "x.jpg"
    assert images.paths == [tmp_path / "train/cat" / deep, tmp_path / "train/dog" / deep]


def test_folders_nested_too_deeply_are_named(tmp_path: Path) -> None:
    (tmp_path / "train/cat" / ("a/" * 300)).mkdir(parents=True)
    for search in (lambda: open_folder(tmp_path, split="train"), lambda: list(expand(str(tmp_path), missing="keep"))):
        with pytest.raises(ValueError, match="a/a: is nested more than 250 folders deep; move it up or remove it"):
            search()
    (tmp_path / "train/cat/0.jpg").touch()
    (finding,) = [each for each in scan(tmp_path).findings if each.code == "unreadable_folder"]
    assert finding.detail == "nested more than 250 folders deep"


def test_a_link_to_a_parent_or_to_itself_is_refused(make_folder: MakeFolder) -> None:
    data = make_folder({"train": {"a": 1, "b": 1}})
    (data / "train/b/loop").symlink_to(data / "train", target_is_directory=True)
    with pytest.raises(ValueError, match="train/b/loop: links to a folder that contains it; remove the link"):
        open_folder(data, split="train")
    (data / "train/b/loop").unlink()
    (data / "train/b/itself").symlink_to("itself")
    with pytest.raises(ValueError, match=r"train/b/itself: cannot be followed \(Too many levels of symbolic links\)"):
        open_folder(data, split="train")
