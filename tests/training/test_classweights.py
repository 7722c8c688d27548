"""Class weights: read from where they are asked for, and what they do to the loss."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from linvit.training.loss import create_loss, create_mixup, read_class_weights
from linvit.training.options import LossOptions

NAMES = ["1", "no", "cat"]
LABELS = [0] * 6 + [1] * 3 + [2]


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
    # In these proportions, with a mean of 1 over the images.
    torch.testing.assert_close(weights, torch.tensor([1.0, 3.0, 2.0]) / 1.7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat: 1\n1: 1\n", "gives no weight to 'no'"),
        ("cat: 1\n1: 1\nno: 1\ncta: 2\n", "unknown class 'cta'; did you mean 'cat'?"),
        ("cat: 1\ncat: 1\n1: 1\nno: 1\n", "'cat' is there twice"),
        ("cat: -1\n1: 1\nno: 1\n", "'cat' needs a number of at least 0, not '-1'"),
        ("cat: x\n1: 1\nno: 1\n", "'cat' needs a number of at least 0, not 'x'"),
        ("cat: .inf\n1: 1\nno: 1\n", "'cat' needs a number of at least 0"),
        ("cat: 0\n1: 0\nno: 0\n", "no class with images has a weight above 0"),
        ("- cat\n", "holds something else than lines of `class name: weight`"),
        ("cat: [", "is not valid YAML or JSON"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_class_weights(str(path), class_names=NAMES, labels=LABELS)
    assert str(path) in str(error.value)
    assert words in str(error.value)


def test_the_loss_weighs_hard_and_mixed_labels_alike() -> None:
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


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
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
