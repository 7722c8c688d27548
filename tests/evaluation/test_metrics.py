import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from linvit.evaluation.metrics import ImageRecords, Metrics, best_of, is_better

CLASSES = [f"class {label}" for label in range(7)]


def random_results(num_images: int = 50) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(num_images, len(CLASSES)), torch.randint(0, len(CLASSES) - 1, (num_images,))


def record(logits: Tensor, labels: Tensor, batches: list[Tensor]) -> Metrics:
    records = ImageRecords(len(labels), torch.device("cpu"))
    for indices in batches:
        records.add(indices, logits[indices], labels[indices])
    return records.compute(CLASSES)


def test_metrics_equal_the_definitions() -> None:
    logits, labels = random_results()
    metrics = record(logits, labels, [torch.arange(50)])
    order = logits.argsort(dim=1, descending=True)
    hits = [order[i, :5].tolist().index(labels[i]) if labels[i] in order[i, :5] else None for i in range(50)]
    assert metrics.top1 == 100 * hits.count(0) / 50
    assert metrics.top5 == 100 * (50 - hits.count(None)) / 50
    assert metrics.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    # Beyond the precision of the logits, the mean is exact.
    losses = F.cross_entropy(logits, labels, reduction="none")
    assert metrics.loss == pytest.approx(losses.double().mean().item(), rel=1e-14)
    assert metrics.num_images == 50
    for label, name in enumerate(CLASSES[:-1]):
        own = [hit == 0 for hit, true in zip(hits, labels.tolist()) if true == label]
        assert metrics.per_class[name] == 100 * sum(own) / len(own)
        assert metrics.images_per_class[name] == len(own)
    assert metrics.per_class[CLASSES[-1]] is None


def test_batches_and_order_do_not_change_the_last_digit() -> None:
    logits, labels = random_results()
    whole = record(logits, labels, [torch.arange(50)])
    assert record(logits, labels, list(torch.randperm(50).split(7))) == whole


def test_two_classes_have_a_top5_of_all() -> None:
    logits, labels = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    records = ImageRecords(6, torch.device("cpu"))
    records.add(torch.arange(6), logits, labels)
    assert records.compute(["a", "b"]).top5 == 100


@pytest.mark.parametrize("indices", [torch.arange(49), torch.tensor([*range(50), 3])])
def test_an_image_that_is_missed_or_counted_twice_is_detected(indices: Tensor) -> None:
    logits, labels = random_results()
    with pytest.raises(AssertionError, match="not each of 50 images once"):
        record(logits, labels, [indices])


def metrics_of(top1: float, loss: float) -> Metrics:
    return Metrics(loss=loss, top1=top1, top5=100.0, num_images=1, per_class={}, images_per_class={})


def test_the_best_is_never_nan() -> None:
    assert not is_better(math.nan, None, "loss")
    raw, ema = metrics_of(90.0, math.nan), metrics_of(10.0, 2.0)
    assert best_of({"raw": raw, "ema": ema}, "top1") == "ema"
    assert best_of({"raw": raw}, "top1") is None


def test_the_best_by_each_metric() -> None:
    found = {"raw": metrics_of(80.0, 0.5), "ema": metrics_of(81.0, 0.6)}
    assert best_of(found, "top1") == "ema"
    assert best_of(found, "loss") == "raw"
    assert best_of(found, "top5") == "raw"
    assert is_better(0.4, 0.5, "loss")
    assert not is_better(0.5, 0.5, "loss")
    assert not is_better(80.0, 80.0, "top1")
