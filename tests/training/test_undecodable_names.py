"""Names that are not UTF-8, of classes, images and folders, survive a run and everything that reads it."""

import csv
import json
import os
from pathlib import Path

import pytest
from tiny_runs import make_images, read_state, read_summary, train

from linvit.cli import main

CAFE, DATA = (os.fsdecode(name) for name in (b"caf\xe9", b"d\xe4ta"))
PHOTO, BAD = (os.fsdecode(name) for name in (b"na\xefve.png", b"b\xe4d.png"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    data = make_images(folder / "data", classes=("blue", "red"), val=2)
    for split in ("train", "val"):
        (data / split / "blue").rename(data / split / CAFE)
        (data / split / "red/0.png").rename(data / split / "red" / PHOTO)
    (data / "train/red" / BAD).touch()
    data.rename(folder / DATA)
    settings = {"on_bad_image": "skip", "class_weights": "balanced"}
    assert train(folder / DATA, folder, stop_epoch=1, **settings) == 0
    assert train(folder / DATA, folder, resume="auto", **settings) == 0
    return folder


def test_every_state_is_saved_and_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "run"
    assert len(read_summary(run)) == 2
    for state in ("state-0000-000000", "state-0001-000000", "state-0002-000000"):
        assert read_state(run, state)["class_names"] == [CAFE, "red"]
    assert json.loads((run / "best/config.json").read_text())["label_names"] == [CAFE, "red"]
    bad = os.fsencode(folder / DATA / "train/red" / BAD)
    assert (run / "bad_images.txt").read_bytes() == bad + b"\n"
    # args.yaml alone repeats the run, in the same folders.
    arguments = ["train", "--config", str(run / "args.yaml"), "--epochs", "2", "--experiment", "again", "--dry-run"]
    assert main(arguments) == 0
    assert "nothing was trained" in capsys.readouterr().out


def test_evaluation_writes_its_files(folder: Path, tmp_path: Path) -> None:
    files = {flag: tmp_path / f"eval.{flag}" for flag in ("json", "csv", "markdown")}
    flags = [part for flag, path in files.items() for part in (f"--{flag}", str(path))]
    plots = ["--confusion", str(tmp_path / "c.png"), str(tmp_path / "c.csv")]
    run, data = str(folder / "run"), str(folder / DATA)
    assert main(["eval", run, data, "-j", "0", *flags, *plots]) == 0
    assert list(json.loads(files["json"].read_text())["per_class"]) == [CAFE, "red"]
    with files["csv"].open(newline="", encoding="utf-8", errors="surrogateescape") as text:
        rows = list(csv.DictReader(text))
    assert [row["path"] for row in rows if PHOTO in row["path"]] == [str(folder / DATA / "val/red" / PHOTO)]
    assert {row["label"] for row in rows} == {CAFE, "red"}
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_other_commands_take_them(folder: Path, tmp_path: Path) -> None:
    run, data = str(folder / "run"), folder / DATA
    assert main(["predict", run, str(data / "val"), "-j", "0", "-o", str(tmp_path / "p.csv")]) == 0
    assert main(["predict", run, str(data / "val"), "-j", "0"]) == 0
    assert main(["average", run, "--output", str(tmp_path / "average")]) == 0
    assert main(["eval", str(tmp_path / "average"), str(data), "-j", "0", "--bootstrap", "0"]) == 0
