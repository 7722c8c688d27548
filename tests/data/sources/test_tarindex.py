"""What lies where in a tar, and every way in which a tar can be wrong."""

import gzip
import os
import tarfile
from pathlib import Path

import pytest
from tars import write_tar

from linvit.data.sources.tarindex import Member, scan_tar

IMAGE = b"the bytes of an image" * 40


def labels_in(path: Path) -> dict[str, str | None]:
    return {member.name: member.label for member in scan_tar(path)}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_lie_where_the_index_says(kind: int, tmp_path: Path) -> None:
    long = f"{'folder/' * 20}n01/{'0' * 60}.JPEG" if kind == tarfile.USTAR_FORMAT else f"n01/{'ü' * 200}.JPEG"
    files = {"b/1.png": b"one", long: IMAGE, "b/0.jpg": b"", "b/2.webp": IMAGE[:700]}
    path = write_tar(tmp_path / "x.tar", files, format=kind)
    data = path.read_bytes()
    members = scan_tar(path)
    assert [member.name for member in members] == list(files)
    assert [data[member.offset : member.offset + member.size] for member in members] == list(files.values())
    assert [member.label for member in members] == ["b", "n01", "b", "b"]


@pytest.mark.parametrize(
    ("files", "label"),
    [
        ({"7.jpg": IMAGE, "7.cls": b"12\n"}, "12"),
        ({"7.cls": b" tabby cat ", "7.jpg": IMAGE}, "tabby cat"),
        ({"7.jpg": IMAGE, "7.json": b'{"label": 0, "width": 3}'}, "0"),
        ({"7.jpg": IMAGE, "7.json": b'{"label": "cat"}'}, "cat"),
        ({"7.jpg": IMAGE, "7.txt": b"cat"}, "cat"),
        ({"n01/7.jpg": IMAGE}, "n01"),
        ({"./train/n01/7.jpg": IMAGE}, "n01"),
        ({"7.jpg": IMAGE}, None),
        # The first that counts.
        ({"n01/7.jpg": IMAGE, "n01/7.cls": b"3", "n01/7.json": b'{"label": 4}'}, "3"),
        ({"n01/7.jpg": IMAGE, "n01/7.json": b'{"label": 4}'}, "4"),
        ({"n01/7.jpg": IMAGE, "n01/7.txt": b"a caption"}, "n01"),
        # What is about something else.
        ({"n01/7.jpg": IMAGE, "n01/7.json": b'{"width": 4}'}, "n01"),
        ({"7.jpg": IMAGE, "7.txt": b"a caption\nof two lines"}, None),
        ({"7.jpg": IMAGE, "7.txt": b"a long caption" * 40}, None),
        ({"n01/7.jpg": IMAGE, "n02/7.cls": b"", "info.json": b'{"label": 1}'}, "n01"),
    ],
)
def test_labels(files: dict[str, bytes], label: str | None, tmp_path: Path) -> None:
    (member,) = scan_tar(write_tar(tmp_path / "x.tar", files))
    assert member.label == label


def test_what_is_no_image_of_its_own_is_passed_over(tmp_path: Path) -> None:
    files = {
        "7.mask.png": b"mask",
        "7.jpg": IMAGE,
        "7.cls": b"1",
        "._7.jpg": b"resource fork",
        ".thumbs/8.jpg": IMAGE,
        "README.md": b"read me",
        "n01/photo 1.5m.jpg": IMAGE,
        "n01/photo 1.7m.jpg": IMAGE,
    }
    path = write_tar(tmp_path / "x.tar", files)
    assert labels_in(path) == {"7.jpg": "1", "n01/photo 1.5m.jpg": "n01", "n01/photo 1.7m.jpg": "n01"}


def test_images_keep_the_order_of_the_tar(tmp_path: Path) -> None:
    names = ["n/1.png", "n/2.png", "n/1.jpg", "n/0.png"]
    assert list(labels_in(write_tar(tmp_path / "x.tar", dict.fromkeys(names, IMAGE)))) == names


def test_an_empty_tar_has_no_images(tmp_path: Path) -> None:
    assert scan_tar(write_tar(tmp_path / "x.tar", {})) == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"n/7.jpg": IMAGE, "n/7.jpg#2": IMAGE}, r"x\.tar/n/7\.jpg: is there twice"),
        ({"7.jpg": IMAGE, "7.png": IMAGE, "7.cls": b"1"}, r"x\.tar/7\.png: has the label file of 7\.jpg, too"),
        ({"7.heic": IMAGE, "7.cls": b"1"}, r"x\.tar/7\.cls: is the label of no image"),
        ({"7.jpg": IMAGE, "7.json": b"{"}, r"x\.tar/7\.json: is not a JSON object"),
        ({"7.jpg": IMAGE, "7.json": b"[1]"}, r"x\.tar/7\.json: is not a JSON object"),
        ({"7.jpg": IMAGE, "7.cls": b"\xff\xfe"}, r"x\.tar/7\.cls: is not text; write the label"),
    ],
)
def test_faults_name_the_file_in_the_tar(files: dict[str, bytes], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        scan_tar(write_tar(tmp_path / "x.tar", files))


def test_links_are_refused(tmp_path: Path) -> None:
    for name in ("one.jpg", "two.jpg"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "one.jpg").write_bytes(IMAGE)
    os.link(tmp_path / "one.jpg", tmp_path / "two.jpg")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "one.jpg", "one.jpg")
        tar.add(tmp_path / "two.jpg", "two.jpg")
    with pytest.raises(ValueError, match=r"x\.tar/two\.jpg: is a link"):
        scan_tar(tmp_path / "x.tar")


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"n/7.jpg": IMAGE})
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"x\.tar: is compressed \(gzip\).*decompress it"):
        scan_tar(path)


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"n/{number}.jpg": IMAGE for number in range(3)})
    data = path.read_bytes()
    # Three headers with two blocks each, then zeros.
    end = 3 * (512 + 1024)
    for size in (0, 100, 512, 700, 512 + 1024, 512 + 1024 + 300, end - 100, end, end + 511):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"x\.tar: is truncated, damaged or no tar"):
            scan_tar(path)
    path.write_bytes(data[: end + 512])
    assert len(scan_tar(path)) == 3


@pytest.mark.parametrize("place", [0, 30, 130, 150])
def test_a_damaged_header_is_refused(place: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"n/{number}.jpg": IMAGE for number in range(3)})
    data = bytearray(path.read_bytes())
    # In the second of three, which tarfile itself takes for the end.
    data[512 + 1024 + place] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.tar: is truncated, damaged or no tar \(neither a header nor the end"):
        scan_tar(path)


def test_tars_joined_with_cat_are_refused(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "x.tar", {"n/1.jpg": IMAGE})
    second = write_tar(tmp_path / "y.tar", {"n/2.jpg": IMAGE})
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(ValueError, match=r"x\.tar: is truncated, damaged or no tar"):
        scan_tar(first)


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(IMAGE * 20)
    with pytest.raises(ValueError, match=r"x\.tar: is truncated, damaged or no tar"):
        scan_tar(tmp_path / "x.tar")
    with pytest.raises(ValueError, match=r"y\.tar: cannot be read \(No such file"):
        scan_tar(tmp_path / "y.tar")


def test_members_are_tuples_of_plain_values(tmp_path: Path) -> None:
    assert scan_tar(write_tar(tmp_path / "x.tar", {"n/7.jpg": IMAGE})) == [Member("n/7.jpg", 512, len(IMAGE), "n")]
