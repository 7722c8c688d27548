"""The classifier of a probe: multinomial logistic regression with an L2 penalty, solved to convergence.

The loss is the mean cross-entropy plus λ/2 ‖W‖². The features are centred and divided by one number, their root mean
variance, so that λ means the same for every model; the bias has no penalty. scikit-learn's `LogisticRegression` with
C = 1 / (λ n) on the scaled features has the same solution.

n training rows, D features, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# From strong to weak. Each solution is the starting point of the next.
PENALTIES = tuple(float(f"{10 ** (exponent / 2):.3g}") for exponent in range(2, -13, -1))
NUM_FOLDS = 5
# With more images, one part alone chooses the penalty.
MOST_FOR_ALL_FOLDS = 20_000
# The search stops after this many penalties in a row without a lower loss.
PATIENCE = 3
_MOST_ITERATIONS = 1000


@dataclass(frozen=True)
class Head:
    """A linear classifier of features: weight (C, D) and bias (C,) in float64, and the penalty it was trained with."""

    weight: Tensor
    bias: Tensor
    penalty: float

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, C) of features (N, D) in float32, as the model computes them."""
        return F.linear(features.float(), self.weight.float(), self.bias.float())


@dataclass(frozen=True)
class Choice:
    """The penalty chosen by cross-validation, and the mean held-out loss in nats of every penalty that was tried."""

    penalty: float
    losses: dict[float, float]
    num_folds: int

    @property
    def loss(self) -> float:
        return self.losses[self.penalty]


def folds_of(labels: Tensor, *, seed: int) -> Tensor:
    """Deal labels (N,) into NUM_FOLDS parts, 0 to NUM_FOLDS - 1, each with an equal share of every class; (N,)."""
    labels = labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    folds = torch.empty_like(labels)
    dealt = 0
    for label in labels.unique(sorted=True):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        # Continue where the last class stopped, so that small classes do not all fall into the first part.
        folds[members] = (torch.arange(len(members)) + dealt) % NUM_FOLDS
        dealt += len(members)
    return folds


def choose_penalty(
    views: Sequence[Tensor],
    labels: Tensor,
    *,
    num_classes: int,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> Choice:
    """Choose the penalty with the lowest cross-entropy on held-out parts of the training images.

    Args:
        views: features of the images as they are, (N, D), then of further views of them, which are trained on only.
        labels: (N,).
        advance: called after each fit.
    """
    folds = folds_of(labels, seed=seed).to(labels.device)
    num_folds = NUM_FOLDS if len(labels) <= MOST_FOR_ALL_FOLDS else 1
    fits = []
    for fold in range(num_folds):
        kept, held = folds != fold, folds == fold
        if kept.any() and held.any():
            rows = torch.cat([view[kept] for view in views])
            fits.append((_Fit(rows, labels[kept].repeat(len(views)), num_classes), views[0][held], labels[held]))
    losses: dict[float, float] = {}
    best = PENALTIES[0]
    for number, penalty in enumerate(PENALTIES):
        total, count = 0.0, 0
        for fit, features, truth in fits:
            log_probabilities = fit.solve(penalty).logits(features).double().log_softmax(1)
            total += float(F.nll_loss(log_probabilities, truth, reduction="sum"))
            count += len(truth)
            advance()
        losses[penalty] = total / count
        if losses[penalty] < losses[best]:
            best = penalty
        if number - PENALTIES.index(best) >= PATIENCE:
            break
    return Choice(best, losses, len(fits))


def fit_head(features: Tensor, labels: Tensor, *, num_classes: int, penalty: float) -> Head:
    """The classifier with the least penalised loss on features (n, D) and labels (n,)."""
    return _Fit(features, labels, num_classes).solve(penalty)


class _Fit:
    """Training rows, and the last solution, which the next one starts from."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        rows = features.double()
        self.mean = rows.mean(0)
        rows = rows - self.mean
        # Constant features leave nothing to scale.
        self.scale = float(rows.square().mean().sqrt()) or 1.0
        self.rows, self.labels, self.num_classes = rows / self.scale, labels.to(rows.device), num_classes
        self.parameters = np.zeros(num_classes * (rows.shape[1] + 1))

    def solve(self, penalty: float) -> Head:
        # SciPy takes a while to import.
        from scipy.optimize import minimize

        solution = minimize(
            self._loss_and_gradient,
            self.parameters,
            args=(penalty,),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": _MOST_ITERATIONS, "maxfun": 2 * _MOST_ITERATIONS, "gtol": 1e-6, "ftol": 1e-13},
        )
        self.parameters = solution.x
        weight, bias = self._split(self.parameters)
        weight = weight / self.scale
        return Head(weight, bias - weight @ self.mean, penalty)

    def _split(self, parameters: np.ndarray) -> tuple[Tensor, Tensor]:
        matrix = torch.from_numpy(np.array(parameters)).to(self.rows.device).view(self.num_classes, -1)
        return matrix[:, :-1], matrix[:, -1]

    def _loss_and_gradient(self, parameters: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        weight, bias = self._split(parameters)
        log_probabilities = torch.addmm(bias, self.rows, weight.mT).log_softmax(1)  # (n, C)
        loss = F.nll_loss(log_probabilities, self.labels) + penalty / 2 * weight.square().sum()
        residuals = log_probabilities.exp_()
        residuals[torch.arange(len(residuals), device=residuals.device), self.labels] -= 1
        residuals /= len(residuals)
        gradient = torch.cat([residuals.mT @ self.rows + penalty * weight, residuals.sum(0)[:, None]], dim=1)
        return float(loss), gradient.flatten().cpu().numpy()
