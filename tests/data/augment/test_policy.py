"""`--aa` strings are parsed as in timm, and sections that timm ignores are refused."""

import math

import pytest
from timm.data.auto_augment import RandAugment, rand_augment_transform

from linvit.data.augment.policy import AUTO_POLICIES, AugmentPolicy, parse_policy


@pytest.mark.parametrize(
    "text",
    [
        "rand",
        "rand-m9-mstd0.5-inc1",
        "rand-m7-n3",
        "rand-m15-mmax20-mstd1",
        "rand-m9-mstd101",
        "rand-p0.7-n1-inc0",
        "rand-tweights-m8",
        "rand-t3a-n1",
        "rand-t3aw-mstd0.5-p1",
    ],
)
def test_rand_augment_is_parsed_as_in_timm(text: str) -> None:
    ours = parse_policy(text)
    theirs = rand_augment_transform(text, {"translate_const": 100, "img_mean": (124, 116, 104)})
    assert isinstance(theirs, RandAugment)
    operation = theirs.ops[0]
    assert ours.num_ops == theirs.num_layers
    assert ours.prob == operation.prob
    assert ours.magnitude == operation.magnitude
    assert ours.magnitude_std == operation.magnitude_std
    assert ours.magnitude_max == (operation.magnitude_max or 10)
    assert ours.increasing == any("Increasing" in op.name for op in theirs.ops) or ours.table


def test_the_default_recipe() -> None:
    assert parse_policy("rand-m9-mstd0.5-inc1") == AugmentPolicy(
        kind="rand", magnitude=9.0, magnitude_std=0.5, increasing=True
    )
    assert math.isinf(parse_policy("rand-mstd200").magnitude_std)


@pytest.mark.parametrize("name", AUTO_POLICIES)
def test_auto_policies(name: str) -> None:
    assert parse_policy(f"{name}-mstd0.5") == AugmentPolicy(kind="auto", table=name, magnitude_std=0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rand-m9-mstd", "cannot read 'mstd'"),
        ("rand-q3", "cannot read 'q3'"),
        ("rand-m9.5", "cannot read 'm9.5'"),
        ("rand-w0", "cannot read 'w0'"),
        ("rand-tfoo", "choose one of 'tweights', 't3a', 't3aw'"),
        ("rand-n0", "n0 applies no operation"),
        ("rand-p2", "p is a probability"),
        ("rand--m9", "cannot read ''"),
        ("original-m9", "takes only mstd"),
        ("augmix-m5-w4-d2", "AugMix is not supported"),
        ("ta_wide-m9", "is unknown"),
        ("randaugment", "is unknown: choose one of 'rand-m9-mstd0.5-inc1'"),
    ],
)
def test_invalid_strings_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_policy(text)
    assert words in str(caught.value)
