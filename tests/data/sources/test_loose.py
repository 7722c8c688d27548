"""Images found by folder, pattern and list, and their order; images given as arrays."""

import glob
import os
from pathlib import Path

import numpy as np
import pytest
from folders import link_levels
from PIL import Image

from linvit.data.decode import decode_image, read_image
from linvit.data.sources.loose import expand, find_images, natural_key, read_list


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "10.png",
        "9.png",
        "a/img12.JPG",
        "a/img2.jpg",
        "a/deep/er/x.webp",
        ".cache/1.png",
        "a/.x.png",
        "t.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def found(folder: Path, path: str = "", **options: str) -> list[str]:
    return [os.path.relpath(image, folder) for image in expand(os.path.join(folder, path), missing="refuse")]


def test_a_folder_is_searched_at_any_depth_in_natural_order(folder: Path) -> None:
    assert found(folder) == ["9.png", "10.png", "a/deep/er/x.webp", "a/img2.jpg", "a/img12.JPG"]


def test_a_folder_is_read_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    link_levels(tmp_path / "top", levels=25)
    deep = "a/" * 25 + "x.jpg"
    assert found(tmp_path / "top") == [deep]
    assert found(tmp_path / "top", "**/*.jpg") == found(tmp_path / "top", "**") == [deep]
    assert found(tmp_path / "top", "a/**/x.*") == found(tmp_path / "top", "**/a/**/*.jpg") == [deep]


def test_a_pattern_matches_as_in_glob(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for pattern in ("**/*.png", "a/**/*.[jw]*", "./**/x.webp", "**/deep/**/*", f"{folder}/**/*2.*", "*/**/img*.jpg"):
        expected = {path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
        matches = {path for path in expand(pattern, missing="refuse") if os.path.isfile(path)}
        assert matches == expected, pattern
    # A loop of links ends.
    (folder / "a/up").symlink_to(folder)
    (folder / "a/too").symlink_to(folder)
    assert list(expand("**/9.png", missing="refuse")) == ["9.png"]


def test_a_link_to_itself_is_one_image_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("a.png")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "b.png").write_bytes(b"b")
    assert list(expand(str(tmp_path), missing="refuse")) == [str(tmp_path / name) for name in ("a.png", "b.png")]


def test_a_link_to_a_parent_folder_is_not_followed(folder: Path) -> None:
    (folder / "a/deep/up").symlink_to(folder)
    assert len(found(folder)) == 5


def test_a_pattern_keeps_the_order_of_the_folder(folder: Path) -> None:
    assert found(folder, "**/*.[jpw]*") == ["9.png", "10.png", "a/deep/er/x.webp", "a/img2.jpg"]
    assert found(folder, "*") == ["9.png", "10.png", "a/deep/er/x.webp", "a/img2.jpg", "a/img12.JPG", "t.txt"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(folder: Path) -> None:
    (folder / "[19].png").touch()
    assert found(folder, "[19].png") == ["[19].png"]


def test_a_missing_path_is_refused_or_kept(folder: Path) -> None:
    for name in ("tpyo.png", "*.gif"):
        with pytest.raises(ValueError, match="there is no such file or folder, and nothing matches it"):
            found(folder, name)
        assert list(expand(str(folder / name), missing="keep")) == [str(folder / name)]


def test_a_folder_without_images_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: holds no images \(looked for .avif .bmp"):
        found(folder, "empty")


def test_numbers_sort_by_value() -> None:
    names = ["b", "a10", "a9b", "a9", "a", "9", "10", "a-1/x", "a.jpg", "a2.jpg", "a/2", "a/10"]
    assert sorted(names, key=natural_key) == [
        *("9", "10", "a", "a/2", "a/10", "a.jpg", "a2.jpg", "a9", "a9b", "a10", "a-1/x", "b")
    ]


def test_a_list_has_one_path_per_line(tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbffirst one.png\r\n", b"\n", b" second.png \n", b"\xff.png"]
    assert list(read_list(lines)) == ["first one.png", " second.png ", os.fsdecode(b"\xff.png")]


def test_arrays_and_pillow_images_are_the_pixels_of_their_files(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    upside_down = Image.fromarray(pixels)
    upside_down.getexif()[0x0112] = 3
    upside_down.save(tmp_path / "a.png", exif=upside_down.getexif())
    images = find_images([pixels, tmp_path / "a.png", Image.open(tmp_path / "a.png")])
    assert [images.name(index) for index in range(3)] == [None, str(tmp_path / "a.png"), None]
    assert np.array_equal(images.read(0), pixels)
    assert np.array_equal(images.read(1), pixels[::-1, ::-1])
    assert np.array_equal(images.read(2), read_image(tmp_path / "a.png"))
    # The loader decodes bytes itself.
    assert np.array_equal(decode_image(images.read_bytes(0), name="array"), pixels)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 \(4, 4, 3\) is not an image"),
        (np.zeros((3, 4, 4), np.uint8), r"uint8 \(3, 4, 4\) is not an image"),
        (7, "int is not an image: give a path, a PIL image or an array"),
    ],
)
def test_other_inputs_are_refused(image: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_images([image])  # type: ignore[list-item]
