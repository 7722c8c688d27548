"""The index of the images in tars, its cached copy, and the faults a tar may have."""

import gzip
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tars import write_tar

from linvit.data.decode import UnreadableImage
from linvit.data.sources import tarindex
from linvit.data.sources.tar import open_shards
from linvit.data.sources.tarindex import Member, ShardIndex, index_shards, scan_tar

IMAGE = b"the bytes of an image" * 40


def labels_in(path: Path) -> dict[str, str | None]:
    return {member.name: member.label for member in scan_tar(path)}


def test_a_user_without_a_home_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.setattr(tarindex, "_MIN_CACHED", 0)
    assert len(index_shards([write_tar(tmp_path / "x.tar", {"n01/7.jpg": IMAGE})]).names) == 1


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_and_sizes_match_the_tar(kind: int, tmp_path: Path) -> None:
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
        # Several labels: the first kind wins.
        ({"n01/7.jpg": IMAGE, "n01/7.cls": b"3", "n01/7.json": b'{"label": 4}'}, "3"),
        ({"n01/7.jpg": IMAGE, "n01/7.json": b'{"label": 4}'}, "4"),
        ({"n01/7.jpg": IMAGE, "n01/7.txt": b"a caption"}, "n01"),
        # Files that are not labels.
        ({"n01/7.jpg": IMAGE, "n01/7.json": b'{"width": 4}'}, "n01"),
        ({"7.jpg": IMAGE, "7.txt": b"a caption\nof two lines"}, None),
        ({"7.jpg": IMAGE, "7.txt": b"a long caption" * 40}, None),
        ({"n01/7.jpg": IMAGE, "n02/7.cls": b"", "info.json": b'{"label": 1}'}, "n01"),
    ],
)
def test_labels(files: dict[str, bytes], label: str | None, tmp_path: Path) -> None:
    (member,) = scan_tar(write_tar(tmp_path / "x.tar", files))
    assert member.label == label


def test_masks_hidden_and_other_files_are_ignored(tmp_path: Path) -> None:
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
        ({"n/7.jpg": IMAGE, "n/7.jpg#2": IMAGE}, r"x\.tar/n/7\.jpg: occurs twice"),
        ({"7.jpg": IMAGE, "7.png": IMAGE, "7.cls": b"1"}, r"x\.tar/7\.png: shares a label file with 7\.jpg"),
        ({"7.heic": IMAGE, "7.cls": b"1"}, r"x\.tar/7\.cls: has no image beside it"),
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


def test_a_tar_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"n/{number}.jpg": IMAGE for number in range(3)})
    data = path.read_bytes()
    # Three images, each a header and two blocks of data, then zeros.
    end = 3 * (512 + 1024)
    for size in (0, 100, 512, 700, 512 + 1024, 512 + 1024 + 300, end - 100, end, end + 511):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"x\.tar: is truncated, damaged or not a tar"):
            scan_tar(path)
    path.write_bytes(data[: end + 512])
    assert len(scan_tar(path)) == 3


@pytest.mark.parametrize("place", [0, 30, 130, 150])
def test_a_damaged_header_is_refused(place: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"n/{number}.jpg": IMAGE for number in range(3)})
    data = bytearray(path.read_bytes())
    # In the second header, which tarfile would take for the end.
    data[512 + 1024 + place] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.tar: is truncated, damaged or not a tar \(neither a header nor the end"):
        scan_tar(path)


def test_concatenated_tars_are_refused(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "x.tar", {"n/1.jpg": IMAGE})
    second = write_tar(tmp_path / "y.tar", {"n/2.jpg": IMAGE})
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(ValueError, match=r"x\.tar: is truncated, damaged or not a tar"):
        scan_tar(first)


def test_other_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(IMAGE * 20)
    with pytest.raises(ValueError, match=r"x\.tar: is truncated, damaged or not a tar"):
        scan_tar(tmp_path / "x.tar")
    with pytest.raises(ValueError, match=r"y\.tar: cannot be read \(No such file"):
        scan_tar(tmp_path / "y.tar")


def test_members_are_tuples_of_plain_values(tmp_path: Path) -> None:
    assert scan_tar(write_tar(tmp_path / "x.tar", {"n/7.jpg": IMAGE})) == [Member("n/7.jpg", 512, len(IMAGE), "n")]


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tarindex, "_MIN_CACHED", 3)
    return [
        write_tar(tmp_path / "a.tar", {"x/1.jpg": b"one", "y/2.jpg": b"three"}),
        write_tar(tmp_path / "b.tar", {"y/1.jpg": b"two", "3.jpg": b"four"}),
    ]


def as_lists(index: ShardIndex) -> list:
    return [list(index.names), *(getattr(index, name).tolist() for name in ("shards", "offsets", "sizes", "codes"))]


def cached_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "linvit" / "shards").glob("*"))


def test_images_of_all_shards(shards: list[Path]) -> None:
    index = index_shards(shards)
    names = ["x/1.jpg", "y/2.jpg", "y/1.jpg", "3.jpg"]
    assert as_lists(index) == [names, [0, 0, 1, 1], [512, 1536, 512, 1536], [3, 5, 3, 4], [0, 1, 1, -1]]
    assert index.labels == ["x", "y"]


def test_a_cached_index_is_used_instead_of_the_tars(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_shards(shards)
    assert len(cached_files(tmp_path)) == 1
    monkeypatch.setattr(tarindex, "scan_tar", lambda path: pytest.fail(f"{path} is read again"))
    again = index_shards(shards)
    assert as_lists(again) == as_lists(index)
    assert again.labels == index.labels
    assert [getattr(again, name).dtype for name in ("shards", "codes")] == [np.int32, np.int32]


@pytest.mark.parametrize("change", ["size", "time", "damage", "version", "order"])
def test_a_cached_index_of_other_tars_is_not_used(
    change: str, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_shards(shards)
    (cached,) = cached_files(tmp_path)
    # The same size with other labels.
    state = shards[0].stat()
    write_tar(shards[0], {"z/1.jpg": b"one", "y/2.jpg": b"three"})
    os.utime(shards[0], ns=(state.st_atime_ns, state.st_mtime_ns + (change == "time")))
    if change == "size":
        write_tar(shards[0], {f"z/{number}.jpg": b"one" for number in range(40)})
        os.utime(shards[0], ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "damage":
        cached.write_bytes(cached.read_bytes()[:-200])
    elif change == "version":
        monkeypatch.setattr(tarindex, "_VERSION", -1)
    elif change == "order":
        shards.reverse()
    assert "z" in index_shards(shards).labels


def test_the_index_of_a_small_set_is_not_cached(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarindex, "_MIN_CACHED", 5)
    index_shards(shards)
    assert not cached_files(tmp_path)


def test_an_index_that_cannot_be_cached_is_still_used(shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(index_shards(shards).names) == 4


def test_a_missing_shard_is_named(shards: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"c\.tar: cannot be read"):
        index_shards([*shards, shards[0].with_name("c.tar")])


def header(kind: bytes, size: int, name: str = "x.jpg") -> bytearray:
    """A header that claims a file of this size, in the base-256 form for sizes that octal digits do not hold."""
    info = tarfile.TarInfo(name)
    info.type = kind
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    data[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    return data


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        (header(tarfile.GNUTYPE_LONGNAME, 50 * 2**30), "a header of 53,687,091,200 bytes"),
        (header(tarfile.GNUTYPE_LONGNAME, -512), "a header of -512 bytes"),
        (header(tarfile.XHDTYPE, 2**70), "a header of"),
        (header(tarfile.REGTYPE, -1024), "'x.jpg' has -1,024 bytes"),
        (header(tarfile.REGTYPE, -1024, "notes.md"), "'notes.md' has -1,024 bytes"),
        (header(tarfile.REGTYPE, 2**70), "cannot be parsed"),
        (header(tarfile.GNUTYPE_LONGNAME, 0) * 2000, "cannot be parsed"),
    ],
)
def test_headers_that_would_not_end_are_damage(headers: bytearray, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(write_tar(path, {"a.jpg": IMAGE}).read_bytes()[:1536] + headers + bytes(1024))
    with pytest.raises(ValueError, match=rf"x\.tar: is truncated, damaged or not a tar \(.*{reason}"):
        scan_tar(path)


def test_a_sparse_tar_of_50_gb_is_indexed_without_reading_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": IMAGE, "a.cls": b"1"})
    with path.open("r+b") as file:
        file.truncate(50 * 10**9)
    assert labels_in(path) == {"a.jpg": "1"}


def test_an_image_of_50_gb_in_a_sparse_tar_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    size = 50 * 2**30
    with path.open("wb") as file:
        file.write(header(tarfile.REGTYPE, size, "a/0.jpg"))
        file.seek(512 + size)
        file.write(write_tar(tmp_path / "y.tar", {"a/1.jpg": IMAGE}).read_bytes())
    images = open_shards([path], split="train", class_file=tmp_path / "classes.txt")
    with pytest.raises(UnreadableImage, match=r"train\.tar/a/0\.jpg: has 53,687,091,200 bytes"):
        images.read_bytes(0)
    assert images.read_bytes(1) == IMAGE


def test_labels_that_are_nested_or_huge_are_named(tmp_path: Path) -> None:
    nested = write_tar(tmp_path / "x.tar", {"a.jpg": IMAGE, "a.json": b"[" * 10**5})
    with pytest.raises(ValueError, match=r"a\.json: is not a JSON object"):
        scan_tar(nested)
    huge = write_tar(tmp_path / "y.tar", {"a.jpg": IMAGE, "a.json": bytes(2**24 + 1)})
    with pytest.raises(ValueError, match=r"a\.json: has 16,777,217 bytes, too many for a label"):
        scan_tar(huge)


def test_a_user_without_a_home_folder_has_no_cached_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tarindex, "_MIN_CACHED", 1)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert len(index_shards([write_tar(tmp_path / "x.tar", {"n/a.jpg": IMAGE})]).names) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["a.1.jpg", "a.2.jpg", "a.cls"],
            r"a\.2\.jpg: shares a label file with a\.1\.jpg, because WebDataset cuts names",
        ),
        (
            ["n/a.1.jpg", "n/a.1.cls"],
            r"n/a\.1\.jpg: its \.cls file does not count, because WebDataset cuts names at th",
        ),
        (
            ["a.1.jpg", "a.1.json"],
            r"a\.1\.jpg: has no label; add a file of the same name \(WebDataset .* here after 'a'\)",
        ),
        (["a.jpg"], r"a\.jpg: has no label; add a file of the same name with"),
    ],
)
def test_the_rule_of_the_first_dot_is_told(files: list[str], message: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x-000.tar", dict.fromkeys(files, b"1"))
    with pytest.raises(ValueError, match=message):
        open_shards([path], split="train", class_file=tmp_path / "classes.txt")
