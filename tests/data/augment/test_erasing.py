"""Random erasing equals timm's, which works on normalised tensors."""

import random

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing as TimmRandomErasing

from linvit.data.augment.erasing import RandomErasing
from linvit.data.sampler import sample_generators

# So narrow that no value is clipped.
MEAN, STD = (0.5, 0.4, 0.6), (0.1, 0.08, 0.06)


def erased(transform: RandomErasing, image: np.ndarray, count: int) -> list[np.ndarray]:
    images = []
    for index in range(count):
        transform.set_random_state(*sample_generators(0, 0, index))
        images.append(transform(image=image)["image"])
    return images


@pytest.mark.parametrize("max_count", [1, 3])
def test_the_erased_area_is_distributed_as_in_timm(max_count: int) -> None:
    white = np.full((48, 64, 3), 255, np.uint8)
    ours = RandomErasing(mode="const", max_count=max_count, mean=(0.0, 0.0, 0.0), std=STD, p=0.5)
    areas = np.array([(image == 0).mean() for image in erased(ours, white, 2000)])
    random.seed(0)
    theirs = TimmRandomErasing(probability=0.5, mode="const", max_count=max_count, device="cpu")
    timm_areas = np.array([(theirs(torch.ones(3, 48, 64)) == 0).float().mean().item() for _ in range(2000)])
    assert (areas > 0).mean() == pytest.approx((timm_areas > 0).mean(), abs=0.03)
    assert areas.mean() == pytest.approx(timm_areas.mean(), rel=0.06)
    assert areas.std() == pytest.approx(timm_areas.std(), rel=0.06)


def test_fills_are_those_of_the_normalised_image() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    constant = erased(RandomErasing(mode="const", mean=MEAN, std=STD, p=1.0), image, 30)
    assert {tuple(pixel) for erased_image in constant for pixel in erased_image[erased_image.any(axis=-1)]} == {
        (128, 102, 153)
    }
    noise = erased(RandomErasing(mode="pixel", mean=MEAN, std=STD, p=1.0), image, 100)
    pixels = np.concatenate([erased_image[erased_image.all(axis=-1)] for erased_image in noise]) / 255
    assert len(np.unique(pixels, axis=0)) > 0.9 * len(pixels)
    assert pixels.mean(axis=0) == pytest.approx(MEAN, abs=0.01)
    assert pixels.std(axis=0) == pytest.approx(STD, abs=0.01)
    colours = [
        {tuple(pixel) for pixel in erased_image[erased_image.any(axis=-1)]}
        for erased_image in erased(RandomErasing(mode="rand", mean=MEAN, std=STD, p=1.0), image, 100)
    ]
    assert all(len(colour) <= 1 for colour in colours)
    assert len(set().union(*colours)) > 90


def test_the_input_image_is_not_modified_by_erasing() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    results = erased(RandomErasing(mode="pixel", p=1.0), image, 5)
    assert not image.any()
    assert all(result.any() for result in results)
