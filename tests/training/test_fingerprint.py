"""A resumed run notices that images or labels changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tars import write_tar
from tiny_runs import make_images, read_state, train

from linvit.data.sources.base import ImageSet
from linvit.data.sources.csv import open_list
from linvit.data.sources.folder import open_folder
from linvit.data.sources.open import open_images
from linvit.training.fingerprint import changed_images, fingerprint


def swap(a: Path, b: Path) -> None:
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "an image gets another label": (
        lambda root: (root / "train/blue/3.png").rename(root / "train/red/new.png"),
        "training images: the images of 'blue', 'red' changed",
    ),
    "an image is renamed": (
        lambda root: (root / "train/blue/3.png").rename(root / "train/blue/33.png"),
        "training images: the images of 'blue' changed",
    ),
    "two classes swap their images": (
        lambda root: swap(root / "train/blue", root / "train/red"),
        "training images: the contents of",
    ),
    "an image is replaced": (
        lambda root: shutil.copy(root / "val/red/0.png", root / "val/blue/1.png"),
        "validation images: the contents of",
    ),
    "an image is removed": (
        lambda root: (root / "val/green/1.png").unlink(),
        "validation images: the images of 'green' changed",
    ),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    assert train(make_images(folder / "data"), folder, stop_epoch=1) == 0
    return folder


@pytest.mark.parametrize("case", CHANGES)
def test_changed_data_are_named_and_refused(
    case: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, sentence = CHANGES[case]
    shutil.copytree(stopped, tmp_path / "copy")
    output, data = tmp_path / "copy", tmp_path / "copy/data"
    change(data)
    capsys.readouterr()
    assert train(data, output, resume="auto") == 1
    assert sentence in capsys.readouterr().err


def test_changed_data_are_allowed_on_request_once(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path / "copy")
    output, data = tmp_path / "copy", tmp_path / "copy/data"
    (data / "val/green/1.png").unlink()
    assert train(data, output, resume="auto", allow_changed_data=True) == 0
    assert "changed data: validation images: the images of 'green' changed" in capsys.readouterr().out
    # The new state has the new fingerprint, and args.yaml not the permission.
    assert "allow_changed_data: false" in (output / "run/args.yaml").read_text()
    assert train(data, output, resume="auto", epochs=3) == 0


def test_a_state_without_a_fingerprint_resumes(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from linvit.training import recorder

    shutil.copytree(stopped, tmp_path / "copy")
    read = recorder.read_checkpoint
    monkeypatch.setattr(
        recorder,
        "read_checkpoint",
        lambda path: {name: value for name, value in read(path).items() if name != "data"},
    )
    (tmp_path / "copy/data/val/green/1.png").unlink()
    assert train(tmp_path / "copy/data", tmp_path / "copy", resume="auto") == 0
    assert read_state(tmp_path / "copy/run", "state-0002-000000")["data"] is not None


def compare(before: ImageSet, now: ImageSet) -> str | None:
    return changed_images(fingerprint(before), fingerprint(now), now)


def test_data_may_move(tmp_path: Path) -> None:
    make_images(tmp_path / "data", train=2, val=1)
    before = open_folder(tmp_path / "data", split="train")
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    assert compare(before, open_folder(tmp_path / "moved", split="train")) is None


def test_lines_of_a_list_in_another_order(tmp_path: Path) -> None:
    make_images(tmp_path, classes=("blue", "red"), train=2, val=1)
    lines = [f"train/{name}/{number}.png,{name}\n" for name in ("blue", "red") for number in (0, 1)]
    sets = []
    for chosen in (lines, [lines[2], *lines[:2], lines[3]], [lines[0].replace("blue\n", "red\n"), *lines[1:]]):
        (tmp_path / "list.csv").write_text("path,label\n" + "".join(chosen))
        sets.append(open_list(tmp_path / "list.csv", split="list.csv"))
    assert compare(sets[0], sets[1]) == "the order of the images changed"
    assert compare(sets[0], sets[2]) == "the images of 'blue', 'red' changed"


def test_images_in_tars(tmp_path: Path) -> None:
    small, large = b"image", b"a larger image"
    files = {"a/0.png": small, "b/0.png": small}
    sets = []
    for number, changed in enumerate((files, {**files, "b/0.png": large}, {"a/0.png": small, "b/1.png": small})):
        write_tar(tmp_path / str(number) / "train.tar", changed)
        sets.append(open_images(tmp_path / str(number), split="train"))
    assert "train.tar/b/0.png' changed" in str(compare(sets[0], sets[1]))
    assert compare(sets[0], sets[2]) == "the images of 'b' changed"
