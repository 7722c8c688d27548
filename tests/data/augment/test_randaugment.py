"""Automatic augmentation draws operations, arguments, probabilities and noise as timm does."""

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from timm.data.auto_augment import LEVEL_TO_ARG, auto_augment_policy, rand_augment_choices
from torchvision.transforms import TrivialAugmentWide

from linvit.data.augment.operations import OPERATIONS
from linvit.data.augment.policy import AUTO_POLICIES, TIMM_ARGUMENTS, TRIVIAL_ARGUMENTS, TRIVIAL_STEPS
from linvit.data.augment.randaugment import PolicyAugment, Step
from linvit.data.sampler import sample_generators


def drawn_steps(policy: str, count: int) -> list[list[Step]]:
    transform = PolicyAugment(policy=policy)
    steps = []
    for index in range(count):
        transform.set_random_state(*sample_generators(0, 0, index))
        steps.append(transform.get_params()["steps"])
    return steps


@pytest.mark.parametrize("name", sorted(TIMM_ARGUMENTS))
def test_magnitudes_become_timms_arguments(name: str) -> None:
    draw = random.Random(0)
    random.seed(0)
    for magnitude in (0.0, 0.4, 1.0, 3.3, 5.0, 8.9, 9.0, 9.7, 10.0, 12.5):
        ours = {TIMM_ARGUMENTS[name](magnitude / 10, draw) for _ in range(40)}
        if name == "GaussianBlurRand":
            # timm draws the radius inside the operation, from 0.1 to twice the argument.
            (largest,) = LEVEL_TO_ARG[name](magnitude, {})
            assert min(0.1, 2 * largest) <= min(ours)
            assert max(ours) <= max(0.1, 2 * largest)
            continue
        theirs = {LEVEL_TO_ARG[name](magnitude, {})[0] for _ in range(40)}
        assert sorted(ours) == pytest.approx(sorted(theirs), abs=1e-12), magnitude


def test_operations_without_an_argument_are_timms() -> None:
    without = {name for name, argument in LEVEL_TO_ARG.items() if argument is None}
    # Only TrivialAugment draws the absolute translations.
    assert without == set(OPERATIONS) - set(TIMM_ARGUMENTS) - {"TranslateX", "TranslateY"}


@pytest.mark.parametrize(
    ("policy", "increasing"), [("rand-m9-inc1", True), ("rand-m9", False), ("rand-m5-n3-p0.8", False)]
)
def test_operations_are_drawn_uniformly(policy: str, increasing: bool) -> None:
    count = 2000
    steps = drawn_steps(policy, count)
    layers, prob = (3, 0.8) if "n3" in policy else (2, 0.5)
    names = Counter(name for sample in steps for name, _ in sample)
    choices = rand_augment_choices("", increasing=increasing)
    assert set(names) == set(choices)
    expected = count * layers * prob / len(choices)
    assert all(0.6 * expected < number < 1.4 * expected for number in names.values())
    assert np.mean([len(sample) for sample in steps]) == pytest.approx(layers * prob, rel=0.05)


def test_weighted_operations_follow_the_weights() -> None:
    steps = drawn_steps("rand-t3aw-n1-p1", 1500)
    names = Counter(name for sample in steps for name, _ in sample)
    weights = rand_augment_choices("3aw")
    assert set(names) == set(weights)
    for name in ("Desaturate", "Rotate", "ShearX"):
        expected = 1500 * weights[name] / sum(weights.values())
        assert names[name] == pytest.approx(expected, rel=0.25)
    # Weighted operations are drawn without replacement.
    assert all(len({name for name, _ in sample}) == 3 for sample in drawn_steps("rand-t3aw-n3-p1", 100))
    with pytest.raises(ValueError, match="n must be at most 14"):
        PolicyAugment(policy="rand-t3aw-n15")


def rotations(policy: str) -> np.ndarray:
    return np.array(
        [arguments[0] for sample in drawn_steps(policy, 2000) for name, arguments in sample if name == "Rotate"]
    )


def test_magnitudes_have_the_requested_noise() -> None:
    assert set(np.abs(rotations("rand-m9"))) == {27.0}
    noisy = rotations("rand-m5-mstd1")
    assert np.abs(noisy).mean() == pytest.approx(15.0, abs=1.0)
    assert np.abs(noisy).std() == pytest.approx(3.0, abs=0.7)
    assert (noisy > 0).mean() == pytest.approx(0.5, abs=0.12)
    uniform = np.abs(rotations("rand-m8-mstd101"))
    assert uniform.min() < 2
    assert uniform.max() == pytest.approx(24.0, abs=2.0)
    assert uniform.mean() == pytest.approx(12.0, abs=2.0)
    # The maximum is 10 unless mmax raises it.
    assert set(np.abs(rotations("rand-m15"))) == {30.0}
    assert set(np.abs(rotations("rand-m15-mmax20"))) == {45.0}


@pytest.mark.parametrize("name", AUTO_POLICIES)
def test_auto_policies_draw_timms_sub_policies(name: str) -> None:
    sub_policies = auto_augment_policy(name)
    allowed = {tuple(operation.name for operation in sub_policy if operation.prob > 0) for sub_policy in sub_policies}
    steps = drawn_steps(name, 1500)
    drawn = {tuple(name for name, _ in sample) for sample in steps}
    assert {names for names in allowed if len(names) == 1} <= drawn
    assert {operation for names in drawn for operation in names} == {
        operation for names in allowed for operation in names
    }
    mean = np.mean([sum(operation.prob for operation in sub_policy) for sub_policy in sub_policies])
    assert np.mean([len(sample) for sample in steps]) == pytest.approx(mean, rel=0.06)


def test_three_augment_is_one_of_three() -> None:
    steps = drawn_steps("3a", 1500)
    assert all(len(sample) == 1 for sample in steps)
    names = Counter(sample[0][0] for sample in steps)
    assert set(names) == {"Solarize", "Desaturate", "GaussianBlurRand"}
    assert min(names.values()) > 430
    by_name = {name: {sample[0][1][0] for sample in steps if sample[0][0] == name} for name in names}
    assert by_name["Solarize"] == {128}
    assert by_name["Desaturate"] == {1.0}
    assert min(by_name["GaussianBlurRand"]) < 0.2
    assert max(by_name["GaussianBlurRand"]) > 1.9


def test_trivial_augment_has_torchvisions_space() -> None:
    space = TrivialAugmentWide()._augmentation_space(TRIVIAL_STEPS)
    assert set(space) == set(TRIVIAL_ARGUMENTS)
    draw = random.Random(0)
    for name, (magnitudes, signed) in space.items():
        argument = TRIVIAL_ARGUMENTS[name]
        if argument is None:
            assert magnitudes.ndim == 0
            continue
        for step in (0, 7, TRIVIAL_STEPS - 1):
            value = float(magnitudes[step])
            expected = {value, -value} if signed else {value}
            if name in ("Brightness", "Color", "Contrast", "Sharpness"):
                expected = {1 + value for value in expected}
            ours = {argument(step / (TRIVIAL_STEPS - 1), draw) for _ in range(30)}
            assert sorted(ours) == pytest.approx(sorted(expected), abs=1e-4)


def test_trivial_augment_draws_every_operation() -> None:
    steps = drawn_steps("ta_wide", 2000)
    names = Counter(sample[0][0] if sample else "Identity" for sample in steps)
    assert set(names) == set(TRIVIAL_ARGUMENTS)
    assert min(names.values()) > 0.6 * 2000 / len(TRIVIAL_ARGUMENTS)
    assert drawn_steps("trivialaugment", 20) == steps[:20]


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n4-p1", "original", "v0r", "3a", "ta_wide"])
def test_images_stay_images(policy: str, smooth_image: Callable[..., np.ndarray]) -> None:
    image = smooth_image(33, 47)
    before = image.copy()
    transform = PolicyAugment(policy=policy, fill=(1, 2, 3))
    changed = 0
    for index in range(60):
        transform.set_random_state(*sample_generators(0, 0, index))
        result = transform(image=image)["image"]
        assert result.shape == image.shape
        assert result.dtype == np.uint8
        changed += not np.array_equal(result, image)
    assert changed > 20
    assert np.array_equal(image, before)


def test_interpolation_is_drawn_per_operation_or_fixed() -> None:
    def methods(interpolation: str) -> set[str]:
        transform = PolicyAugment(policy="rand-m9-p1", interpolation=interpolation, fill=(1, 2, 3))
        seen = set()
        for index in range(100):
            transform.set_random_state(*sample_generators(0, 0, index))
            for name, arguments in transform.get_params()["steps"]:
                if name == "Rotate":
                    assert arguments[2] == (1, 2, 3)
                    seen.add(arguments[1])
        return seen

    assert methods("random") == {"bilinear", "bicubic"}
    assert methods("bilinear") == {"bilinear"}
