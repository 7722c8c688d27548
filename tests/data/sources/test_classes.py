"""Labels of named classes, and class names for numeric labels."""

from pathlib import Path
from typing import Any

import pytest

from linvit.data.sources.classes import Classes, number_classes, number_labels, read_class_map


def numbered(found: set[str], folder: Path, *, class_names: list[str] | None = None, **settings: Any) -> Classes:
    settings = {"source": "DATA", "missing_classes": "refuse", "class_file": folder / "classes.txt"} | settings
    return number_labels(found, class_names=class_names, **settings)


def test_names_are_sorted_as_text_or_as_listed() -> None:
    settings: dict[str, Any] = {"source": "DATA", "missing_classes": "refuse"}
    assert number_classes({"b", "a", "C"}, class_names=None, **settings).names == ["C", "a", "b"]
    classes = number_classes({"b", "a"}, class_names=["b", "a"], **settings)
    assert classes.label_of == {"b": 0, "a": 1}


def test_names_are_kept_if_only_some_look_like_numbers(tmp_path: Path) -> None:
    classes = numbered({"10", "9", "x"}, tmp_path)
    assert classes.names == ["10", "9", "x"]
    assert not classes.note


def test_numbers_alone_become_names_in_numeric_order(tmp_path: Path) -> None:
    classes = numbered({"10", "9", "0"}, tmp_path)
    assert classes.names == ["0", "9", "10"]
    assert classes.label_of == {"0": 0, "9": 1, "10": 2}
    assert "labels are numbers and serve as class names" in classes.note
    # The other split then uses them as names.
    other = numbered({"10", "9"}, tmp_path, class_names=classes.names, missing_classes="allow")
    assert other.label_of == {"9": 1, "10": 2}


def test_a_file_names_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\ncat\nbird\n")
    classes = numbered({"0", "1", "2"}, tmp_path)
    assert classes.names == ["dog", "cat", "bird"]
    assert classes.label_of == {"0": 0, "1": 1, "2": 2}
    assert str(tmp_path / "classes.txt") in classes.note
    # A model that orders the classes differently gets its own labels.
    other = numbered({"0", "2"}, tmp_path, class_names=["ant", "bird", "dog"], missing_classes="allow")
    assert other.label_of == {"0": 2, "2": 1}
    with pytest.raises(ValueError, match="no images of 'bird'"):
        numbered({"0", "1"}, tmp_path)


def test_a_list_of_classes_gives_numbers_their_names(tmp_path: Path) -> None:
    classes = numbered({"0", "1"}, tmp_path, class_names=["dog", "cat"])
    assert classes.label_of == {"0": 0, "1": 1}
    assert "read as indices" in classes.note


@pytest.mark.parametrize(
    ("found", "names", "words"),
    [
        ({"0", "2"}, ["dog", "cat"], r"DATA: label 2 has no name, because .* has only 2 \(labels 0 to 1\);"),
        ({"-1", "0"}, None, "DATA: label -1 is not a class"),
        ({"0", "3"}, ["0", "1"], "'3' is not among the 2 known classes"),
        ({"0"}, ["0", "1"], "no images of '1'; every split needs"),
        ({"a", "d"}, ["a"], "'d' is not among the 1 known classes; rename or remove it, or train"),
        ({"a", "d", "e"}, ["a"], "'d', 'e' are not among the 1 known classes; rename or remove them"),
        ({"a"}, ["a", "b"], "no images of 'b'"),
    ],
)
def test_faults_are_named(found: set[str], names: list[str] | None, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        numbered(found, tmp_path, class_names=names)


def test_class_map(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("dog\n\ncat \nbird\n")
    assert read_class_map(file) == ["dog", "cat", "bird"]
    file.write_text("dog\ncat\ndog\n")
    with pytest.raises(ValueError, match="lists 'dog' more than once"):
        read_class_map(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_class_map(file)
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="UTF-8"):
        read_class_map(file)
    with pytest.raises(ValueError, match=r"^--class-map .*none.txt: cannot be read"):
        read_class_map(tmp_path / "none.txt")
