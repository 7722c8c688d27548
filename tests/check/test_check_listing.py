"""Folders, lists and tar files are listed as training sees them."""

import os
import tarfile
from pathlib import Path

import pytest
from checks import checked, paths_by_code
from corpus import build_clean, encoded, random_image, write
from folders import link_levels

from linvit.check.listing import scan
from linvit.cli import main


def test_data_may_be_class_folders_or_images(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    report = checked(data / "train", tmp_path)
    assert (report["layout"], report["findings"], report["status"]) == ("classes", {}, 0)
    assert report["splits"][""]["classes"] == {"ant": 4, "bee": 4}
    report = checked(data / "train/ant", tmp_path)
    assert (report["layout"], report["findings"], report["num_images"]) == ("images", {}, 4)


def test_splits_may_have_any_name_and_no_labels(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    for old, new in (("train", "fold0"), ("val", "fold1")):
        (data / old).rename(data / new)
    assert list(checked(data, tmp_path)["splits"]) == ["fold0", "fold1"]
    write(data / "unlabelled/0.jpg", encoded(random_image(50)))
    (data / "fold0").rename(data / "train")
    report = checked(data, tmp_path)
    assert report["findings"] == {}
    assert report["splits"]["unlabelled"]["classes"] == {}


def test_classes_may_have_names_of_splits(tmp_path: Path) -> None:
    for number, name in enumerate(("valid", "broken")):
        write(tmp_path / f"data/{name}/0.jpg", encoded(random_image(number)))
    report = checked(tmp_path / "data", tmp_path)
    assert (report["layout"], report["splits"][""]["classes"]) == ("classes", {"broken": 1, "valid": 1})


def test_folders_and_files_that_cannot_be_opened_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Patched, because permissions do not apply to root, who may run the tests.
    data = build_clean(tmp_path / "data")
    scandir, unpatched = os.scandir, open

    def refuse(path: str | Path) -> None:
        if str(path).endswith(("train/bee", "val/ant/0.jpg")):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: [refuse(path), scandir(path)][1])
    monkeypatch.setattr(
        "builtins.open", lambda path, *args, **kwargs: [refuse(path), unpatched(path, *args, **kwargs)][1]
    )
    report = checked(data, tmp_path)
    assert report["findings"]["unreadable_folder"]["cases"] == [
        {"path": "train/bee", "detail": "permission denied", "others": []}
    ]
    assert report["findings"]["unreadable_file"]["cases"][0]["path"] == "val/ant/0.jpg"
    assert report["findings"]["unreadable_file"]["cases"][0]["detail"] == "permission denied"
    assert "Permission denied" in report["training"]


def test_lists_and_tar_files_are_checked(tmp_path: Path) -> None:
    images = build_clean(tmp_path / "images")
    write(images / "train/ant/cut.jpg", encoded(random_image(92))[:-300])
    lists = tmp_path / "lists"
    lists.mkdir()
    for split in ("train", "val"):
        files = sorted((images / split).rglob("*.jpg"))
        rows = "".join(f"{path},{path.parent.name}\n" for path in files)
        (lists / f"{split}.csv").write_text(f"path,label\n{rows}")
    report = checked(lists, tmp_path)
    assert (report["layout"], report["training"]) == ("lists", "would start")
    assert paths_by_code(report) == {"truncated": [str(images / "train/ant/cut.jpg")]}
    shards = tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "val"):
        with tarfile.open(shards / f"{split}.tar", "w") as tar:
            for name in ("ant", "bee"):
                tar.add(images / split / name, name)
    assert paths_by_code(checked(shards, tmp_path)) == {"truncated": ["train.tar/ant/cut.jpg"]}


def test_an_invalid_list_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.csv").write_text("photos,kinds\na,b\n")
    assert main(["check", str(tmp_path)]) == 3
    assert "no column 'path', 'label'" in capsys.readouterr().err


def test_a_folder_is_listed_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    link_levels(tmp_path / "data/train/cat", levels=25)
    listing = scan(tmp_path / "data")
    assert [image.path for image in listing.images] == ["train/cat/" + "a/" * 25 + "x.jpg"]
    repeated = [finding for finding in listing.findings if finding.code == "repeated_folder"]
    assert len(repeated) == 25
    assert (repeated[-1].path, repeated[-1].others) == ("train/cat/b", ("train/cat/a",))


def test_pipes_and_devices_named_like_images_are_findings(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    os.mkfifo(data / "train/ant/pipe.jpg")
    (data / "val/ant/zero.png").symlink_to("/dev/zero")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/train.csv").write_text(
        "path,label\n../data/train/ant/pipe.jpg,a\n../data/val/ant/zero.png,a\n../data/train/bee/0.jpg,b\n"
    )
    cases = checked(data, tmp_path)["findings"]["unreadable_file"]["cases"]
    assert [case["path"] for case in cases] == ["train/ant/pipe.jpg", "val/ant/zero.png"]
    assert cases[0]["detail"] == "not a regular file"
    report = checked(tmp_path / "lists", tmp_path)
    assert [case["detail"] for case in report["findings"]["unreadable_file"]["cases"]] == ["is a pipe", "is a device"]
