"""Splits are found under the names that are usual for them."""

import pytest

from linvit.data.sources.base import split_names


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
def test_names(split: str, names: tuple[str, ...]) -> None:
    assert split_names(split) == names
