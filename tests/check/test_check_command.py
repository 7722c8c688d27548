"""`linvit check` as it is typed: exit statuses, files, layouts, processes, and nothing of DATA touched."""

import hashlib
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from checks import checked, places
from corpus import build_clean, build_corpus, build_fault, encoded, picture, write
from PIL import Image

from linvit.check.run import FolderSource, Pool, Reader
from linvit.cli import main
from linvit.data.decode import read_image


def state_of(folder: Path) -> list[tuple[object, ...]]:
    """Every name, size, time and content below a folder."""
    found: list[tuple[object, ...]] = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        plain = path.is_file() and not path.is_symlink()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if plain else ""
        found.append((str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode, digest))
    return found


def test_exit_statuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = build_clean(tmp_path / "data")
    assert main(["check", str(data), "-j", "0"]) == 0
    assert "kinds found: no faults, no notes" in capsys.readouterr().out
    build_fault(data, "alpha")
    assert main(["check", str(data), "-j", "0"]) == 0
    build_fault(data, "tiny")
    assert main(["check", str(data), "-j", "0"]) == 1
    shown = capsys.readouterr().out
    assert "kinds found: 1 fault, 1 note" in shown
    assert "train/ant/tiny.png (40×5)" in shown
    assert main(["check", str(data), "-j", "0", "--allow", "tiny"]) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["nowhere"], 1, "nowhere: no such folder"),
        (["empty"], 1, "empty: holds no images (looked for .bmp"),
        (["data", "--allow", "tiney"], 2, "unknown fault 'tiney'; did you mean 'tiny'?"),
        (["data", "--json", "none/check.json"], 2, "--json none/check.json: there is no folder none; make it first"),
        (["data", "--workers", "-1"], 2, "--workers takes a whole number of at least 0"),
        ([], 2, "required: DATA"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: list[str],
    status: int,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    build_clean(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    assert main(["check", *arguments]) == status
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_nothing_is_modified_and_processes_find_the_same(tmp_path: Path) -> None:
    build_corpus(tmp_path / "data")
    before = state_of(tmp_path)
    (tmp_path / "out").mkdir()
    settings = {"html_file": tmp_path / "out/check.html"}
    reports = [checked(tmp_path / "data", tmp_path / "out", workers=workers, **settings) for workers in (0, 2)]
    for report in reports:
        for name in ("seconds", "images_per_second", "workers"):
            del report[name]
    assert reports[0] == reports[1]
    for file in ("check.json", "check.html"):
        (tmp_path / "out" / file).unlink()
    (tmp_path / "out").rmdir()
    assert [row for row in state_of(tmp_path) if row[0] != str(tmp_path)] == before


def test_the_page_holds_its_pictures(tmp_path: Path) -> None:
    build_corpus(tmp_path / "data")
    report = checked(tmp_path / "data", tmp_path, html_file=tmp_path / "check.html")
    page = (tmp_path / "check.html").read_text()
    assert all(f'id="{code}"' in page for code in report["findings"])
    assert page.count("data:image/jpeg;base64,") > 20
    assert "http" not in page.replace("http-equiv", "")
    assert "<figcaption>train/ant/empty.jpg</figcaption>" in page
    # Not decoded for its picture either.
    assert "<img" not in page.split('<section id="decompression_bomb">')[1].split("</section>")[0]


def test_names_that_are_no_text_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = build_clean(tmp_path / "data")
    (Path(os.fsdecode(os.fsencode(data) + b"/train/ant/caf\xe9 [bold]<b>\n.jpg"))).write_bytes(b"")
    report = checked(data, tmp_path, html_file=tmp_path / "check.html")
    assert os.fsencode(places(report)["empty_file"][0]).endswith(b"caf\xe9 [bold]<b>\n.jpg")
    assert "caf� [bold]<b>�.jpg" in capsys.readouterr().out.replace("\n", "")
    assert "caf� [bold]&lt;b&gt;�.jpg" in (tmp_path / "check.html").read_text()


def test_class_folders_alone_and_images_alone(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    report = checked(data / "train", tmp_path)
    assert (report["layout"], report["findings"], report["status"]) == ("classes", {}, 0)
    assert report["splits"][""]["classes"] == {"ant": 4, "bee": 4}
    report = checked(data / "train/ant", tmp_path)
    assert (report["layout"], report["findings"], report["num_images"]) == ("images", {}, 4)


def test_splits_have_any_name_and_may_lack_labels(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    for old, new in (("train", "fold0"), ("val", "fold1")):
        (data / old).rename(data / new)
    assert list(checked(data, tmp_path)["splits"]) == ["fold0", "fold1"]
    write(data / "unlabelled/0.jpg", encoded(picture(50)))
    (data / "fold0").rename(data / "train")
    report = checked(data, tmp_path)
    assert report["findings"] == {}
    assert report["splits"]["unlabelled"]["classes"] == {}


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    for number, name in enumerate(("valid", "broken")):
        write(tmp_path / f"data/{name}/0.jpg", encoded(picture(number)))
    report = checked(tmp_path / "data", tmp_path)
    assert (report["layout"], report["splits"][""]["classes"]) == ("classes", {"broken": 1, "valid": 1})


def test_what_cannot_be_opened_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests may run as root, from whom no permission can be taken.
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


def test_sizes_and_colours_are_those_of_the_pixels(tmp_path: Path) -> None:
    shapes = [(100, 200), (80, 60), (300, 150), (90, 90)]
    for number, (height, width) in enumerate(shapes):
        write(tmp_path / f"data/train/a/{number}.png", encoded(picture(number, height=height, width=width), "PNG"))
    write(tmp_path / "data/val/a/0.png", encoded(Image.new("RGB", (64, 64), (255, 0, 0)), "PNG"))
    report = checked(tmp_path / "data", tmp_path)
    sizes = report["splits"]["train"]["sizes"]
    assert sizes["width"] == {"min": 60, "median": 120, "max": 200}
    assert sizes["aspect"] == {"min": 0.5, "median": 0.875, "max": 2.0}
    assert sizes["shorter_side_histogram"] == [[32, 1], [64, 2], [128, 1]]
    images = [read_image(tmp_path / f"data/train/a/{number}.png") for number in range(4)]
    alike = [cv2.resize(image, (64, 64), interpolation=cv2.INTER_NEAREST).reshape(-1, 3) / 255 for image in images]
    assert report["colours"]["split"] == "train"
    assert report["colours"]["mean"] == pytest.approx(np.concatenate(alike).mean(axis=0), abs=1e-4)
    assert report["colours"]["std"] == pytest.approx(np.concatenate(alike).std(axis=0), abs=1e-4)
    whole = np.mean([image.reshape(-1, 3).mean(axis=0) for image in images], axis=0) / 255
    assert report["colours"]["mean"] == pytest.approx(whole, abs=0.01)


def test_padding_is_no_damage(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    image = encoded(picture(90))
    write(data / "train/ant/padded.jpg", image[:-2] + bytes(20) + image[-2:])
    write(data / "train/bee/behind.jpg", encoded(picture(91)) + bytes(500))
    assert checked(data, tmp_path)["findings"] == {}


def test_lists_and_tars_are_checked_too(tmp_path: Path) -> None:
    images = build_clean(tmp_path / "images")
    write(images / "train/ant/cut.jpg", encoded(picture(92))[:-300])
    lists = tmp_path / "lists"
    lists.mkdir()
    for split in ("train", "val"):
        files = sorted((images / split).rglob("*.jpg"))
        rows = "".join(f"{path},{path.parent.name}\n" for path in files)
        (lists / f"{split}.csv").write_text(f"path,label\n{rows}")
    report = checked(lists, tmp_path)
    assert (report["layout"], report["training"]) == ("lists", "would start")
    assert places(report) == {"truncated": [str(images / "train/ant/cut.jpg")]}
    shards = tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "val"):
        with tarfile.open(shards / f"{split}.tar", "w") as tar:
            for name in ("ant", "bee"):
                tar.add(images / split / name, name)
    assert places(checked(shards, tmp_path)) == {"truncated": ["train.tar/ant/cut.jpg"]}


def test_a_broken_list_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.csv").write_text("file,class\na,b\n")
    assert main(["check", str(tmp_path)]) == 1
    assert "no column 'path', 'label'" in capsys.readouterr().err


def end_process(reader: Reader, task: int) -> None:
    os._exit(task)


def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    reader = Reader(FolderSource(tmp_path), max_pixels=1)
    with Pool(1, reader) as pool, pytest.raises(OSError, match="give fewer --workers"):
        list(pool.map(end_process, [1]))


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_all_processes(tmp_path: Path) -> None:
    image = encoded(picture(0, height=600, width=800), "PNG")
    for number in range(2000):
        write(tmp_path / f"data/a/{number}.png", image)
    arguments = ["check", str(tmp_path / "data"), "-j", "2", "--json", str(tmp_path / "check.json")]
    program = f"import sys; sys.argv[0] = 'linvit'; from linvit.cli import main; sys.exit(main({arguments}))"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, start_new_session=True) as process:
        children: list[str] = []
        while len(children) < 2 and process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        # Forking itself cannot be interrupted.
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=60)[1].decode().splitlines()[-1] == "interrupted"
    assert process.returncode == 130
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not (tmp_path / "check.json").exists()
