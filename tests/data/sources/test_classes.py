"""Labels of named classes, and class names for numeric labels."""

from pathlib import Path
from typing import Any

import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets

from linvit.data.sources.classes import (
    Classes,
    number_classes,
    number_labels,
    order_conflict,
    read_class_map,
    timm_order,
)


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
    with pytest.raises(ValueError, match="is not text"):
        read_class_map(file)
    file.write_bytes(b"caf\xe9\r\ncat\n")
    assert read_class_map(file) == ["caf\udce9", "cat"]
    with pytest.raises(ValueError, match=r"^--class-map .*none.txt: cannot be read"):
        read_class_map(tmp_path / "none.txt")


@pytest.mark.parametrize(
    "content",
    [
        '["dog", "cat"]',
        '{"cat": 1, "dog": 0}',
        '{"1": "cat", "0": "dog"}',
        '{"0": ["dog", "a description"], "1": ["cat", "another"]}',
    ],
)
def test_class_map_in_json(content: str, tmp_path: Path) -> None:
    file = tmp_path / "class_to_idx.json"
    file.write_text(content)
    assert read_class_map(file) == ["dog", "cat"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"cat": 1, "dog": 2}', "a label from 0 on"),
        ('{"cat": 0, "dog": 0}', "a label from 0 on"),
        ('{"cat": "feline"}', "a label from 0 on"),
        ("[1, 2]", "a label from 0 on"),
        ("{}", "a label from 0 on"),
        ("[]", "is empty"),
        ('{"cat"', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('["cat", "cat"]', "lists 'cat' more than once"),
    ],
)
def test_faults_of_a_class_map_in_json(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_class_map(file)


@pytest.mark.parametrize(
    "names",
    [
        [f"class{number}" for number in range(1, 13)],
        ["apple", "Zebra", "mango"],
        ["10", "9", "1"],
        ["a1b10", "a1b9", "A1b2"],
        ["n01440764", "n02012849", "n00000001"],
        ["cat", "dog"],
    ],
)
def test_order_of_timm_is_that_of_its_reader(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.png").touch()
    _, class_to_idx = find_images_and_targets(str(tmp_path))
    by_timm = sorted(class_to_idx, key=class_to_idx.__getitem__)
    assert timm_order(names) == by_timm
    assert (order_conflict(sorted(names)) is None) == (sorted(names) == by_timm)
