import pytest
import torch
from random_results import random_logits, recorded
from torch.nn import functional as F

from linvit.evaluation.scores import HIGHEST, LOWEST, calibration, fit_temperature, halves


def test_the_temperature_has_the_highest_likelihood() -> None:
    logits, labels = random_logits(500)
    temperature = fit_temperature(logits, labels)
    losses = [F.cross_entropy(logits.double() / (temperature * factor), labels).item() for factor in (0.99, 1, 1.01)]
    assert min(losses) == losses[1]
    # The logits of a model twice as sure need twice the temperature.
    assert fit_temperature(2 * logits, labels) == pytest.approx(2 * temperature, rel=1e-9)


def test_a_calibrated_model_needs_none() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    found = calibration(recorded(4 * logits, labels), 4 * logits, fit_temperature(4 * logits, labels))
    assert found["temperature"] == pytest.approx(4, abs=0.1)
    assert found["ece_before"] > 15
    assert found["ece"] < 1.5
    assert found["loss"] < found["loss_before"]


@pytest.mark.parametrize(("sign", "limit"), [(1, LOWEST), (-1, HIGHEST)])
def test_where_all_is_right_or_wrong_the_temperature_has_a_limit(sign: int, limit: float) -> None:
    logits, labels = sign * torch.eye(4), torch.arange(4)
    assert fit_temperature(logits, labels) == pytest.approx(limit, rel=1e-6)


def test_temperature_one_changes_nothing() -> None:
    logits, labels = random_logits()
    found = calibration(recorded(logits, labels), logits, 1.0)
    assert (found["loss"], found["ece"]) == pytest.approx((found["loss_before"], found["ece_before"]), rel=1e-6)


def test_halves_share_no_image() -> None:
    one, other = halves(11, seed=0)
    assert (len(one), len(other)) == (5, 6)
    assert sorted([*one.tolist(), *other.tolist()]) == list(range(11))
    assert torch.equal(halves(11, seed=0)[0], one)
    assert not torch.equal(halves(11, seed=1)[0], one)
