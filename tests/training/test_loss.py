"""The training loss, mixing with an odd number of images, and class weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional as F

from linvit.training.loss import create_loss, create_mixup, mix, read_class_weights
from linvit.training.options import LossOptions

NAMES = ["1", "no", "cat"]
LABELS = [0] * 6 + [1] * 3 + [2]


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
    # timm's Mixup smooths the labels itself.
    assert create_loss(LossOptions(bce_loss=True, smoothing=0.2, mixup=0.5)).smoothing == 0.0


def test_mixed_labels_are_smoothed_distributions() -> None:
    mixup = create_mixup(LossOptions(mixup=1.0, smoothing=0.1), num_classes=5)
    _, labels = mixup(torch.randn(6, 3, 8, 8), torch.arange(6) % 5)
    assert labels.shape == (6, 5)
    torch.testing.assert_close(labels.sum(1), torch.ones(6))
    assert labels.min() >= 0.1 / 5 - 1e-6


def test_nothing_is_mixed_by_default() -> None:
    assert create_mixup(LossOptions(), num_classes=5) is None


def mixing() -> Mixup:
    return Mixup(mixup_alpha=1.0, num_classes=3, label_smoothing=0.1)


def mixed(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    np.random.seed(0)
    return mix(mixing(), images.clone(), labels)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_pairs_are_mixed_as_in_timm_and_the_last_of_an_odd_number_stays_unmixed(size: int) -> None:
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


def test_balanced_weights_give_each_class_the_same_share() -> None:
    weights = read_class_weights("balanced", class_names=NAMES, labels=LABELS)
    shares = weights * torch.bincount(torch.tensor(LABELS))
    torch.testing.assert_close(shares, torch.full((3,), 10 / 3))
    assert read_class_weights(None, class_names=NAMES, labels=LABELS) is None


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_gives_each_class_its_weight(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_text("cat: 2\n1: 1.0\nno: 3e0\n" if suffix == "yaml" else json.dumps({"cat": 2, "1": 1.0, "no": 3}))
    weights = read_class_weights(str(path), class_names=NAMES, labels=LABELS)
    # In the proportions of the file, with a mean of 1 over the images.
    torch.testing.assert_close(weights, torch.tensor([1.0, 3.0, 2.0]) / 1.7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat: 1\n1: 1\n", "no weight for 'no'"),
        ("cat: 1\n1: 1\nno: 1\ncta: 2\n", "unknown class 'cta'; did you mean 'cat'?"),
        ("cat: 1\ncat: 1\n1: 1\nno: 1\n", "'cat' appears twice"),
        ("cat: -1\n1: 1\nno: 1\n", "the weight of 'cat' must be a number of at least 0, not '-1'"),
        ("cat: x\n1: 1\nno: 1\n", "the weight of 'cat' must be a number of at least 0, not 'x'"),
        ("cat: .inf\n1: 1\nno: 1\n", "the weight of 'cat' must be a number of at least 0"),
        ("cat: 0\n1: 0\nno: 0\n", "no class with images has a weight above 0"),
        ("- cat\n", "the file must consist of `class name: weight` lines"),
        ("cat: [", "is not valid YAML or JSON"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_by_name(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_class_weights(str(path), class_names=NAMES, labels=LABELS)
    assert str(path) in str(error.value)
    assert words in str(error.value)


def test_hard_and_mixed_labels_are_weighted_alike() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    smooth = F.one_hot(labels, 3) * 0.8 + 0.2 / 3
    expected = -(weight * smooth * logits.log_softmax(1)).sum(1).mean()
    hard = create_loss(LossOptions(smoothing=0.2), class_weights=weight)
    mixed = create_loss(LossOptions(smoothing=0.2, mixup=0.5), class_weights=weight)
    torch.testing.assert_close(hard(logits, labels), expected)
    torch.testing.assert_close(mixed(logits, smooth), expected)
    mixup = create_mixup(LossOptions(smoothing=0.2, mixup=0.5), num_classes=3)
    mixup.mixup_enabled = False
    _, soft = mixup(torch.zeros(8, 3, 4, 4), labels)
    torch.testing.assert_close(mixed(logits, soft), expected, rtol=1e-6, atol=0)


def test_the_losses_of_parts_average_to_the_loss_of_the_batch() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 2, 1])
    loss = create_loss(LossOptions(smoothing=0.1), class_weights=torch.tensor([1.0, 3.0, 0.5]))
    parts = [loss(logits[part], labels[part]) for part in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(sum(parts) / 2, loss(logits, labels))


def test_weights_of_one_change_nothing() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.arange(6) % 3
    plain, weighted = (create_loss(LossOptions(), class_weights=weights) for weights in (None, torch.ones(3)))
    torch.testing.assert_close(weighted(logits, labels), plain(logits, labels))
