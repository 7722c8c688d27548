"""`linvit data elpv`: classes, split, copies, and a folder that is complete or absent."""

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from linvit import cli
from linvit.data import demo


def split_of(content):
    return "val" if int(hashlib.sha1(content).hexdigest()[:8], 16) % 5 == 0 else "train"


def make_source(folder, rows):
    """Write a package's data folder; `rows` are (name, content, probability, type)."""
    (folder / "images").mkdir(parents=True)
    for name, content, _, _ in rows:
        (folder / "images" / name).write_bytes(content)
    lines = [f"images/{name}  {probability}   {kind}" for name, _, probability, kind in rows]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


ROWS = [
    ("cell1.png", b"one", "0.0", "mono"),
    ("cell2.png", b"two", "0.3333333333333333", "mono"),
    ("cell3.png", b"three", "0.6666666666666666", "poly"),
    ("cell4.png", b"four", "1.0", "poly"),
    ("cell5.png", b"one", "0.3333333333333333", "mono"),
    ("cell6.png", b"six", "0.0", "mono"),
    ("cell7.png", b"six", "1.0", "mono"),
]


@pytest.fixture
def source(tmp_path, monkeypatch):
    folder = make_source(tmp_path / "package" / "data", ROWS)
    monkeypatch.setitem(demo.DEMO_SETS, "elpv", lambda: demo.read_elpv(folder))
    return folder


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_classes_split_and_copies(source):
    images = demo.read_elpv(source)
    assert {place: path.name for place, path in images.files.items()} == {
        f"{split_of(b'one')}/mono_functional/cell1.png": "cell1.png",
        f"{split_of(b'two')}/mono_functional/cell2.png": "cell2.png",
        f"{split_of(b'three')}/poly_defective/cell3.png": "cell3.png",
        f"{split_of(b'four')}/poly_defective/cell4.png": "cell4.png",
    }
    # cell5 is a copy of cell1; cell6 and cell7 contradict each other.
    assert (images.num_copies, images.num_contradictions) == (1, 2)


def test_the_split_depends_on_the_content_alone(tmp_path):
    contents = [f"image {number}".encode() for number in range(200)]
    rows = [(f"a{number}.png", content, "0.0", "mono") for number, content in enumerate(contents)]
    renamed = [(f"b{number}.png", content, "0.0", "mono") for number, content in enumerate(reversed(contents))]
    splits = []
    for name, each in (("first", rows), ("second", renamed)):
        images = demo.read_elpv(make_source(tmp_path / name, each))
        splits.append({path.read_bytes(): place.split("/")[0] for place, path in images.files.items()})
    assert splits[0] == splits[1] == {content: split_of(content) for content in contents}
    assert 20 < sum(split == "val" for split in splits[0].values()) < 60


def test_building_prints_counts_licence_and_citation(source, tmp_path, capsys):
    folder = tmp_path / "new" / "elpv"
    assert cli.main(["data", "elpv", str(folder), "--json", str(tmp_path / "counts.json")]) == 0
    text = capsys.readouterr().out
    for words in (
        "CC BY-NC-SA 4.0",
        "Deitsch",
        "Buerhop-Lutz",
        "1 byte-identical copies, 2 copies with contradictory labels",
    ):
        assert words in text
    assert {name.split("/")[1] for name in files_in(folder) if "/" in name} == {"mono_functional", "poly_defective"}
    assert "CC BY-NC-SA 4.0" in (folder / "README.txt").read_text()
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert sum(sum(splits.values()) for splits in counts["classes"].values()) == 4
    assert (counts["num_copies_dropped"], counts["num_contradictions_dropped"]) == (1, 2)


def test_building_again_changes_nothing(source, tmp_path, capsys):
    folder = tmp_path / "elpv"
    cli.main(["data", "elpv", str(folder)])
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert cli.main(["data", "elpv", str(folder)]) == 0
    assert "already built, not changed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


@pytest.mark.parametrize("change", ["foreign file", "missing file", "changed file", "a file instead of a folder"])
def test_a_folder_with_anything_else_is_refused_and_left_untouched(source, tmp_path, change, capsys):
    folder = tmp_path / "elpv"
    demo.write_demo_set(demo.read_elpv(source), folder)
    image = next(folder.rglob("cell1.png"))
    if change == "foreign file":
        (folder / "notes.txt").write_text("mine")
    elif change == "missing file":
        image.unlink()
    elif change == "changed file":
        image.write_bytes(b"other")
    else:
        folder = image
    before = files_in(tmp_path)
    capsys.readouterr()
    assert cli.main(["data", "elpv", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder} ")
    assert "give a new or empty folder" in error
    assert files_in(tmp_path) == before


def test_an_empty_folder_is_filled(source, tmp_path):
    (tmp_path / "elpv").mkdir()
    assert demo.write_demo_set(demo.read_elpv(source), tmp_path / "elpv")
    assert len(files_in(tmp_path / "elpv")) == 5


def test_an_interrupted_build_leaves_nothing_and_the_next_build_repairs_a_killed_one(source, tmp_path, monkeypatch):
    folder = tmp_path / "elpv"
    images = demo.read_elpv(source)
    copied = []

    def interrupted_copy(source, target):
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(target)

    with monkeypatch.context() as patch:
        patch.setattr(demo.shutil, "copyfile", interrupted_copy)
        with pytest.raises(KeyboardInterrupt):
            demo.write_demo_set(images, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]

    # A killed build cannot clean up.
    (tmp_path / ".elpv.part" / "train").mkdir(parents=True)
    (tmp_path / ".elpv.part" / "train" / "half").write_bytes(b"")
    assert demo.write_demo_set(images, folder)
    assert set(files_in(folder)) == {*images.files, "README.txt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elpv", "package"]


def test_a_missing_package_is_an_error_that_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["data", "elpv", str(tmp_path / "elpv")]) == 1
    assert 'pip install "linvit[demo]"' in capsys.readouterr().err
    assert not (tmp_path / "elpv").exists()


@pytest.mark.parametrize("line", ["images/cell1.png 0.0", "images/cell1.png high mono", "a b c d"])
def test_errors_in_labels_name_the_line(source, line):
    with (source / "labels.csv").open("a") as labels:
        labels.write(line + "\n")
    with pytest.raises(ValueError, match=r"labels\.csv: line 8 is not `file probability type`"):
        demo.read_elpv(source)


def test_an_unknown_type_names_the_line(source):
    with (source / "labels.csv").open("a") as labels:
        labels.write("images/cell1.png 0.0 thin\n")
    with pytest.raises(ValueError, match=r"labels\.csv: line 8 has the type 'thin'"):
        demo.read_elpv(source)


def test_a_folder_that_cannot_be_written_is_named_and_nothing_is_left(source, tmp_path, monkeypatch, capsys):
    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo.shutil, "copyfile", full_disk)
    folder = tmp_path / "elpv"
    assert cli.main(["data", "elpv", str(folder)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {folder} cannot be built: No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_a_missing_image_is_named(source):
    (source / "images" / "cell3.png").unlink()
    with pytest.raises(ValueError, match=r"cell3\.png is missing"):
        demo.read_elpv(source)


def test_the_real_data_set_has_the_published_counts():
    pytest.importorskip("elpv_dataset", reason="the [demo] extra is not installed")
    images = demo.find_elpv()
    assert (images.num_copies, images.num_contradictions) == (0, 0)
    assert images.counts() == {
        "mono_defective": {"train": 300, "val": 69},
        "mono_functional": {"train": 563, "val": 142},
        "poly_defective": {"train": 366, "val": 86},
        "poly_functional": {"train": 862, "val": 236},
    }


def test_two_builds_at_once_both_succeed(source, tmp_path, monkeypatch):
    images, copy = demo.read_elpv(source), demo.shutil.copyfile

    def slow_copy(source, target):
        time.sleep(0.01)
        copy(source, target)

    monkeypatch.setattr(demo.shutil, "copyfile", slow_copy)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: demo.write_demo_set(images, tmp_path / "sub/elpv"), range(3)))
    assert sorted(found) == [False, False, True]
    assert set(files_in(tmp_path / "sub/elpv")) == {*images.files, "README.txt"}
