"""The same images as folders, lists, tars and a Hugging Face set give the same batches."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tars import write_tar
from tiny_runs import make_images

from linvit.data.augment.build import InputSpec
from linvit.data.decode import UnreadableImage
from linvit.data.loader import create_eval_loader, create_train_loader
from linvit.data.options import AugmentOptions
from linvit.data.sources.base import ImageSet
from linvit.data.sources.folder import open_folder
from linvit.data.sources.open import open_fraction, open_images

MakeFolder = Callable[..., Path]

SPEC = InputSpec(
    size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic", crop_pct=0.9, crop_mode="center"
)
COUNTS = {"train": {"ant": 5, "bee": 6}, "val": {"ant": 2, "bee": 1}}


def as_shards(folder: Path, target: Path) -> Path:
    """WebDataset shards of five images with numeric labels, and a file that names these."""
    for split in COUNTS:
        images = open_folder(folder, split=split)
        for first in range(0, len(images), 5):
            files = {}
            for index in range(first, min(first + 5, len(images))):
                files |= {f"{index:06d}.png": images.read_bytes(index), f"{index:06d}.cls": b"%d" % images.label(index)}
            write_tar(target / f"animals-{split}-{first // 5:04d}.tar", files)
    (target / "classes.txt").write_text("ant\nbee\n")
    return target


def as_tars_of_folders(folder: Path, target: Path) -> Path:
    target.mkdir()
    for split in COUNTS:
        with tarfile.open(target / f"{split}.tar", "w") as tar:
            for path in open_folder(folder, split=split).paths:
                tar.add(path, path.relative_to(folder))
    return target


def as_lists(folder: Path, target: Path) -> Path:
    target.mkdir()
    for split in COUNTS:
        lines = [
            f"{os.path.relpath(path, target)},{path.parent.name}" for path in open_folder(folder, split=split).paths
        ]
        (target / f"{split}.csv").write_text("\n".join(["path,label", *lines]))
    return target


def as_one_list(folder: Path, target: Path) -> Path:
    lines = [
        f"{split},{path},{path.parent.name}" for split in COUNTS for path in open_folder(folder, split=split).paths
    ]
    target.with_suffix(".csv").write_text("\n".join(["split,path,label", *lines]))
    return target.with_suffix(".csv")


def as_hub_set(folder: Path, target: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    splits = {}
    for split in COUNTS:
        images = open_folder(folder, split=split)
        rows = [{"bytes": images.read_bytes(index), "path": None} for index in range(len(images))]
        splits[split] = datasets.Dataset.from_dict({"image": rows, "label": images.labels}, features=features)
    datasets.DatasetDict(splits).save_to_disk(target)
    return f"hf:{target}"


FORMS: dict[str, Callable[[Path, Path], Any]] = {
    "shards": as_shards,
    "tars of folders": as_tars_of_folders,
    "lists": as_lists,
    "one list": as_one_list,
    "hub set": as_hub_set,
}


@pytest.fixture
def folder(make_folder: MakeFolder) -> Path:
    return make_folder(COUNTS)


@pytest.fixture(params=FORMS)
def other_form(request: pytest.FixtureRequest, folder: Path) -> Any:
    return FORMS[request.param](folder, folder / "other")


def batches(images: ImageSet, *, workers: int, first: int = 0) -> list[tuple[torch.Tensor, ...]]:
    loader = create_train_loader(
        images, AugmentOptions(aa="rand-m9"), SPEC, batch_size=3, seed=5, workers=workers, device="cpu"
    )
    loader.set_epoch(2)
    return [(batch.images, batch.labels, batch.indices) for batch in loader.iter_from(first)]


def same(some: list[tuple[torch.Tensor, ...]], others: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(*pair) for batch, other in zip(some, others) for pair in zip(batch, other)
    )


def test_batches_are_the_same_bit_for_bit(other_form: Any, folder: Path) -> None:
    expected = batches(open_images(folder, split="train"), workers=0)
    images = open_images(other_form, split="train")
    assert images.class_names == ["ant", "bee"]
    assert len(expected) == 3
    for workers in (0, 2):
        assert same(batches(images, workers=workers), expected)
    # As in a run that was resumed within the epoch.
    assert same(batches(images, workers=0, first=1), expected[1:])


def test_evaluation_sees_the_same_images(other_form: Any, folder: Path) -> None:
    names = ["bee", "cat", "ant"]
    settings: dict[str, Any] = {"split": "validation", "class_names": names, "missing_classes": "allow"}
    expected, images = open_images(folder, **settings), open_images(other_form, **settings)
    assert images.labels == expected.labels == [2, 2, 0]
    assert images.class_names == names
    loaders = [create_eval_loader(each, SPEC, batch_size=2, workers=0, device="cpu") for each in (expected, images)]
    assert all(torch.equal(one.images, other.images) for one, other in zip(*loaders))


def test_classes_and_splits_are_checked_the_same_way(other_form: Any) -> None:
    with pytest.raises(ValueError, match="'bee' is not among the 2 known classes"):
        open_images(other_form, split="val", class_names=["ant", "cat"])
    with pytest.raises(ValueError, match="no images of 'cat'; every split needs"):
        open_images(other_form, split="val", class_names=["ant", "bee", "cat"])
    with pytest.raises(ValueError, match=r"no split 'holdout' \(looked for holdout\); found '"):
        open_images(other_form, split="holdout")


def test_a_damaged_image_in_a_tar_is_skipped_and_named(folder: Path) -> None:
    shards = as_shards(folder, folder / "other")
    tar = shards / "animals-train-0000.tar"
    data = tar.read_bytes()
    start = data.index((folder / "train/ant/002.png").read_bytes())
    tar.write_bytes(data[:start] + b"\0" * 64 + data[start + 64 :])
    images = open_images(shards, split="train")
    with pytest.raises(UnreadableImage, match=r"animals-train-0000\.tar/000002\.png: is truncated"):
        images.read(2)
    loader = create_eval_loader(images, SPEC, batch_size=11, workers=0, device="cpu", on_bad_image="skip")
    (batch,) = loader
    assert batch.unreadable == (2,)
    assert batch.indices.tolist() == [index for index in range(11) if index != 2]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train.tar"], "train"),
        (["train-000.tar", "train-001.tar"], "train"),
        (["imagenet1k-train-0000.tar"], "train"),
        (["training_7.tar"], "train"),
        (["train-00000-of-00002.tar", "train-00001-of-00002.tar"], "train"),
        (["validation-0.tar"], "val"),
        (["train/000.tar", "train/001.tar"], "train"),
        (["valid/x.tar"], "val"),
        (["part-08.tar", "part-09.tar", "part-10.tar"], "part-{08..10}.tar"),
        (["part-08.tar", "part-09.tar"], "part-0*.tar"),
        (["part-08.tar", "part-09.tar"], "part-0[89].tar"),
        (["part-08.tar"], "part-08.tar"),
    ],
)
def test_the_tars_of_a_split_are_found(names: list[str], split: str, tmp_path: Path) -> None:
    for number, name in enumerate(names):
        write_tar(tmp_path / name, {f"a/{number}.jpg": b"x", f"b/{number}.jpg": b"y"})
    for other in ("x-trained-0.tar", "constrain-1.tar", "test/0.tar", ".train-5.tar", "other.tar"):
        write_tar(tmp_path / other, {"c/0.jpg": b"z"})
    images = open_images(tmp_path, split=split)
    assert images.class_names == ["a", "b"]
    assert [path.relative_to(tmp_path).as_posix() for path in images.paths] == [
        f"{name}/{label}/{number}.jpg" for number, name in enumerate(names) for label in "ab"
    ]


def test_folders_come_before_lists_and_lists_before_tars(folder: Path) -> None:
    for name in ("train.tar", "train/more.tar"):
        write_tar(folder / name, {"c/0.jpg": b"x"})
    (folder / "train.csv").write_text("path,label\ntrain/ant/000.png,cat\n")
    assert open_images(folder, split="train").class_names == ["ant", "bee"]
    (folder / "train").rename(folder / "images")
    (folder / "train.csv").write_text("path,label\nimages/ant/000.png,cat\n")
    assert open_images(folder, split="train").class_names == ["cat"]
    (folder / "train.csv").unlink()
    assert open_images(folder, split="train").class_names == ["c"]


def test_a_split_may_name_a_file(folder: Path) -> None:
    (folder / "some.csv").write_text("path,label\ntrain/ant/000.png,cat\n")
    assert open_images(folder, split="some.csv").class_names == ["cat"]


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("nowhere", "train", "nowhere: no such folder"),
        ("photo.jpg", "train", r"photo\.jpg: is not a list"),
        ("empty", "train", r"empty: no split 'train' .*; the folder is empty"),
        ("packed", "train", r"packed/train: compressed tars .*; decompress '0\.tar\.gz'"),
        ("packed", "part-{0..1}.tar", r"packed: no file 'part-0\.tar', 'part-1\.tar'"),
        ("packed", "part-*.tar", r"packed: no file 'part-\*\.tar'"),
        ("packed", "list.csv", r"packed: no file 'list\.csv'"),
        ("bare", "train", "train: holds no class folders"),
    ],
)
def test_faults_are_named(name: str, split: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "packed" / "train" / "0.tar.gz", {"a/0.jpg": b"x"})
    (tmp_path / "bare" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=words):
        open_images(tmp_path / name, split=split)


@pytest.mark.parametrize("form", ["folder", "list", "column", "tar"])
def test_the_test_split_is_reported_where_it_serves_as_validation(form: str, tmp_path: Path) -> None:
    data = tmp_path
    if form == "folder":
        make_images(tmp_path, train=1, val=1)
        (tmp_path / "val").rename(tmp_path / "test")
    elif form == "tar":
        write_tar(tmp_path / "test-000.tar", {"a/0.png": b"", "b/0.png": b""})
    else:
        (tmp_path / "0.png").touch()
        (tmp_path / "test.csv").write_text("path,label\n0.png,a\n")
        if form == "column":
            data = tmp_path / "list.csv"
            data.write_text("path,label,split\n0.png,a,test\n")
    assert open_images(data, split="validation").note.endswith(": no validation split; 'test' is used in its place")
    assert open_images(data, split="test").note == ""


def test_images_in_nested_folders_are_reported(tmp_path: Path) -> None:
    make_images(tmp_path, classes=("blue", "red"), train=2, val=1)
    (tmp_path / "train/red/dark").mkdir()
    (tmp_path / "train/red/1.png").rename(tmp_path / "train/red/dark/1.png")
    images = open_images(tmp_path, split="train")
    assert images.class_names == ["blue", "red"]
    assert images.note == (
        f"{tmp_path}/train: 1 images in folders inside class folders have the class of the outer one, such as "
        "red/dark: class 'red' (timm: 'dark')"
    )


def parts_of(data: Path, fraction: float = 0.25) -> dict[str, set[str]]:
    parts: dict[str, set[str]] = {}
    for part in ("train", "val"):
        images = open_fraction(data, split="train", fraction=fraction, part=part)
        assert images.class_names == ["blue", "red"]
        assert all(images.class_names[label] == path.parent.name for path, label in zip(images.paths, images.labels))
        parts[part] = {f"{path.parent.name}/{path.name}" for path in images.paths}
    return parts


def test_a_fraction_for_validation_is_stable(tmp_path: Path) -> None:
    for name in ("blue", "red"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(100):
            (tmp_path / "images" / name / f"{number}.png").touch()
    before = parts_of(tmp_path)
    assert len(before["train"] | before["val"]) == 200
    assert not before["train"] & before["val"]
    assert 30 <= len(before["val"]) <= 70
    # The same parts from the folder itself, as a training split, moved, and with other images added.
    assert parts_of(tmp_path / "images") == before
    (tmp_path / "images").rename(tmp_path / "train")
    assert parts_of(tmp_path) == before
    for number in range(100, 150):
        (tmp_path / "train/red" / f"{number}.png").touch()
    after = parts_of(tmp_path)
    assert all(before[part] < after[part] for part in before)
    # A larger fraction keeps what a smaller one has chosen.
    assert after["val"] < parts_of(tmp_path, 0.5)["val"]


def test_a_fraction_of_a_list_and_of_too_few_images(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    lines = ["path,label\n"]
    for number in range(20):
        (tmp_path / f"photos/{number}.png").touch()
        lines.append(f"photos/{number}.png,{number % 2}\n")
    (tmp_path / "labels.csv").write_text("".join(lines))
    parts = [
        open_fraction(tmp_path / "labels.csv", split="train", fraction=0.3, part=part) for part in ("train", "val")
    ]
    assert sum(map(len, parts)) == 20
    with pytest.raises(ValueError, match="val_fraction 1e-09 selects none of the 20 images; set it higher"):
        open_fraction(tmp_path / "labels.csv", split="train", fraction=1e-9, part="val")
    with pytest.raises(ValueError, match=r"val_fraction 0\.999999 leaves no training images of '0', '1'"):
        open_fraction(tmp_path / "labels.csv", split="train", fraction=0.999999, part="train")
