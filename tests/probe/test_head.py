"""The classifier of a probe against scikit-learn's, and how its penalty is chosen."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from linvit.probe import head
from linvit.probe.head import PENALTIES, choose_penalty, fit_head, folds_of


def clouds(num_images: int, *, spread: float = 2.0, dim: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around three class means, not centred and on a scale of their own, with uneven classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (num_images,), generator=generator).clamp(max=2)
    means = torch.randn(3, dim, generator=torch.Generator().manual_seed(9))
    return 7 * (means[labels] + spread * torch.randn(num_images, dim, generator=generator)) + 100, labels


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_it_is_the_solution_of_scikit_learn(penalty: float) -> None:
    features, labels = clouds(150)
    found = fit_head(features, labels, num_classes=3, penalty=penalty)
    scaled = features.double() - features.double().mean(0)
    scaled = scaled / scaled.square().mean().sqrt()
    oracle = LogisticRegression(C=1 / (penalty * len(labels)), tol=1e-9, max_iter=10_000)
    oracle.fit(scaled.numpy(), labels.numpy())
    expected = torch.from_numpy(oracle.predict_proba(scaled.numpy()))
    probabilities = F.linear(features.double(), found.weight, found.bias).softmax(1)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)


def test_the_gradient_is_that_of_the_loss() -> None:
    features, labels = clouds(20, dim=3)
    fit = head._Fit(features, labels, 3)
    parameters = torch.randn(12, dtype=torch.float64, requires_grad=True)
    weight, bias = parameters.view(3, 4)[:, :-1], parameters.view(3, 4)[:, -1]
    expected = F.cross_entropy(F.linear(fit.rows, weight, bias), labels) + 0.15 * weight.square().sum()
    expected.backward()
    loss, gradient = fit._loss_and_gradient(parameters.detach().numpy(), 0.3)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.from_numpy(gradient), parameters.grad, rtol=0, atol=1e-12)


def test_the_penalty_generalises_best_and_the_search_stops_after_it() -> None:
    features, labels = clouds(60, spread=3.0)
    choice = choose_penalty([features], labels, num_classes=3, seed=0)
    tried = list(choice.losses)
    assert tried == list(PENALTIES[: len(tried)])
    assert choice.loss == min(choice.losses.values())
    assert tried.index(choice.penalty) == len(tried) - 1 - head.PATIENCE
    more, truth = clouds(5000, spread=3.0, seed=1)
    losses = {
        penalty: F.cross_entropy(fit_head(features, labels, num_classes=3, penalty=penalty).logits(more), truth).item()
        for penalty in (choice.penalty, PENALTIES[0], 1e-4)
    }
    assert min(losses, key=losses.__getitem__) == choice.penalty


def test_further_views_are_trained_on_but_never_held_out() -> None:
    features, labels = clouds(40)
    # A view that says the opposite: were it held out, its loss would count.
    choice = choose_penalty([features, -features], labels, num_classes=3, seed=0)
    folds = folds_of(labels, seed=0)
    expected = 0.0
    for fold in range(head.NUM_FOLDS):
        rows = torch.cat([features[folds != fold], -features[folds != fold]])
        fitted = fit_head(rows, labels[folds != fold].repeat(2), num_classes=3, penalty=PENALTIES[0])
        held = folds == fold
        expected += F.cross_entropy(fitted.logits(features[held]).double(), labels[held], reduction="sum").item()
    assert choice.losses[PENALTIES[0]] == pytest.approx(expected / len(labels), rel=1e-5)


def test_parts_have_an_equal_share_of_every_class() -> None:
    labels = torch.tensor([0] * 11 + [1] * 3 + [2] * 2 + [3])
    folds = folds_of(labels, seed=3)
    for label in range(4):
        counts = torch.bincount(folds[labels == label], minlength=head.NUM_FOLDS)
        assert counts.max() - counts.min() <= 1
    sizes = torch.bincount(folds, minlength=head.NUM_FOLDS)
    assert sizes.max() - sizes.min() <= 1
    assert not torch.equal(folds, folds_of(labels, seed=4))


def test_many_images_are_held_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "MOST_FOR_ALL_FOLDS", 30)
    features, labels = clouds(31)
    assert choose_penalty([features], labels, num_classes=3, seed=0).num_folds == 1


def test_constant_features_give_the_share_of_each_class() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    found = fit_head(torch.ones(4, 5), labels, num_classes=2, penalty=1e-3)
    probabilities = found.logits(torch.ones(1, 5)).softmax(1)
    torch.testing.assert_close(probabilities, torch.tensor([[0.75, 0.25]]), rtol=0, atol=1e-4)
    assert math.isfinite(float(found.weight.sum()))
