import pytest
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from linvit.training.loss import create_loss, create_mixup
from linvit.training.options import LossOptions


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"smoothing": 0.0}, nn.CrossEntropyLoss),
        ({"smoothing": 0.1}, LabelSmoothingCrossEntropy),
        ({"mixup": 0.8}, SoftTargetCrossEntropy),
        ({"cutmix_minmax": (0.2, 0.8)}, SoftTargetCrossEntropy),
        ({"bce_loss": True}, BinaryCrossEntropy),
        ({"bce_loss": True, "cutmix": 1.0}, BinaryCrossEntropy),
    ],
)
def test_the_loss_is_the_one_that_timm_chooses(options: dict, kind: type) -> None:
    assert type(create_loss(LossOptions(**options))) is kind


def test_binary_cross_entropy_keeps_its_options() -> None:
    loss = create_loss(
        LossOptions(bce_loss=True, smoothing=0.2, bce_sum=True, bce_target_thresh=0.3, bce_pos_weight=2.0)
    )
    assert (loss.smoothing, loss.sum_classes, loss.target_threshold) == (0.2, True, 0.3)
    assert loss.pos_weight == 2.0
    # Mixing smooths the labels itself.
    assert create_loss(LossOptions(bce_loss=True, smoothing=0.2, mixup=0.5)).smoothing == 0.0


def test_mixed_labels_are_smoothed_distributions() -> None:
    mixup = create_mixup(LossOptions(mixup=1.0, smoothing=0.1), num_classes=5)
    _, labels = mixup(torch.randn(6, 3, 8, 8), torch.arange(6) % 5)
    assert labels.shape == (6, 5)
    torch.testing.assert_close(labels.sum(1), torch.ones(6))
    assert labels.min() >= 0.1 / 5 - 1e-6


def test_nothing_is_mixed_unless_asked() -> None:
    assert create_mixup(LossOptions(), num_classes=5) is None
