"""Synonyms of split names, and packed strings."""

import pickle

import pytest

from linvit.data.sources.base import PackedStrings, split_names


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ("train", "training")),
        ("val", ("val", "validation", "valid", "test")),
        ("validation", ("validation", "val", "valid", "test")),
        ("test", ("test",)),
        ("holdout", ("holdout",)),
    ],
)
def test_synonyms_of_a_split(split: str, names: tuple[str, ...]) -> None:
    assert split_names(split) == names


def test_packed_strings_are_unchanged() -> None:
    names = ["a/b.png", "", "Größe.jpg", "\udcff.jpg", "z"]
    packed = PackedStrings.pack(names)
    assert list(packed) == names
    assert len(packed) == 5
    assert packed[3] == names[3]
    assert list(pickle.loads(pickle.dumps(packed))) == names
    assert list(PackedStrings.pack([])) == []
