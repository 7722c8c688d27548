"""Files of maps: one name per image, and no image is replaced."""

from pathlib import Path

import pytest

from linvit.explanation.naming import FileNames, check_maps
from linvit.settings.process import UsageError


def test_names_are_numbered_also_where_an_image_has_the_number_itself():
    names = FileNames()
    found = [names.name(Path(path)) for path in ("x/a.png", "x/a-2.png", "y/a.png", "z/a.jpg", "z/a-2.png", "a\n.png")]
    assert found == ["a", "a-2", "a-3", "a-4", "a-2-2", "a�"]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [(["a.png", "a.values.png"], ["a", "a.values-2"]), (["a.heads.png", "a.jpg", "a.png"], ["a.heads", "a-2", "a-3"])],
)
def test_no_file_of_an_image_is_one_of_another(paths, expected):
    names = FileNames()
    assert [names.name(Path(path)) for path in paths] == expected


def test_long_names_leave_room_for_extensions():
    name = FileNames().name(Path("ä" * 126 + ".png"))
    assert name == "ä" * 100


def test_only_files_that_would_be_replaced_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    extensions = (".png", ".values.png")
    check_maps("--output", tmp_path, [tmp_path / "a.jpg"], extensions=extensions)
    check_maps("--output", tmp_path / "maps", [tmp_path / "a.png"], extensions=extensions)
    for images in ([tmp_path / "link/a.png"], [tmp_path / "b/a.jpg", tmp_path / "a.values.png"]):
        with pytest.raises(UsageError, match="a map would replace the image"):
            check_maps("--output", tmp_path, images, extensions=extensions)
