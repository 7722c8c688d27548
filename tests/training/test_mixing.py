import numpy as np
import pytest
import torch
from timm.data import Mixup

from linvit.training.loss import mix


def mixing() -> Mixup:
    return Mixup(mixup_alpha=1.0, num_classes=3, label_smoothing=0.1)


def mixed(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    np.random.seed(0)
    return mix(mixing(), images.clone(), labels)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_pairs_are_mixed_as_timm_mixes_them_and_an_odd_one_stays(size: int) -> None:
    images, labels = torch.randn(size, 3, 4, 4), torch.arange(size) % 3
    found, targets = mixed(images, labels)
    assert targets.shape == (size, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(size))
    pairs = size - size % 2
    if pairs:
        np.random.seed(0)
        expected = mixing()(images[:pairs].clone(), labels[:pairs])
        assert torch.equal(found[:pairs], expected[0])
        assert torch.equal(targets[:pairs], expected[1])
        assert not torch.equal(found[:pairs], images[:pairs])
    if size % 2:
        assert torch.equal(found[-1], images[-1])
        assert targets[-1, labels[-1]].item() == pytest.approx(0.9 + 0.1 / 3)
