"""Strings in one block come out as they went in."""

import pickle

from linvit.data.sources.base import PackedStrings


def test_strings_come_out_as_they_went_in() -> None:
    names = ["a/b.png", "", "Größe.jpg", "\udcff.jpg", "z"]
    packed = PackedStrings.pack(names)
    assert list(packed) == names
    assert len(packed) == 5
    assert packed[3] == names[3]
    assert list(pickle.loads(pickle.dumps(packed))) == names
    assert list(PackedStrings.pack([])) == []
