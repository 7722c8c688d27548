"""Deletion and insertion curves of a model whose probability is known."""

import pytest
import torch

from linvit.explanation.deletion import measure_curves, random_map


def mean_of_left_half(images):
    """Probability of class 1: the mean of the left half of images whose pixels are 0 or 1."""
    p = images[:, 0, :, : images.shape[3] // 2].mean(dim=(1, 2))
    return torch.stack([1 - p, p], dim=1)


@pytest.fixture
def image():
    image = torch.zeros(1, 3, 32, 32)
    image[..., :16] = 1
    return image


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_true_map_deletes_early_and_a_false_one_late(image, batch_size):
    left_first = torch.zeros(4, 4)
    left_first[:, :2] = 1
    true = measure_curves(mean_of_left_half, image, left_first, target=1, steps=16, batch_size=batch_size)
    false = measure_curves(mean_of_left_half, image, -left_first, target=1, steps=16, batch_size=batch_size)
    expected = torch.cat([torch.linspace(1, 0, 9), torch.zeros(8)])
    torch.testing.assert_close(true.deletion, expected)
    torch.testing.assert_close(false.deletion, expected.flip(0).mul(-1).add(1))
    assert true.deletion_area == pytest.approx(0.25)
    assert false.deletion_area == pytest.approx(0.75)
    # Insertion starts at the blurred image and ends at the image.
    assert 0.5 < true.insertion[0] < 1
    assert true.insertion[-1] == pytest.approx(1)
    assert true.insertion_area > false.insertion_area


def test_a_random_order_lies_between(image):
    areas = [
        measure_curves(mean_of_left_half, image, random_map((4, 4), seed=seed), target=1).deletion_area
        for seed in range(20)
    ]
    assert sum(areas) / len(areas) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(random_map((4, 4), seed=1), random_map((4, 4), seed=1))
