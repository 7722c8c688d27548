"""A learning rate sweep (Smith 2017, arXiv 1506.01186).

Each step multiplies the learning rate by the same factor. The loss falls at first, fastest at the steepest point, and
rises when the steps become too long. The trained weights are discarded.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from linvit.data.augment.build import resolve_input
from linvit.data.loader import Batch, Loader
from linvit.distributed import Ranks
from linvit.output.plots import BLUE, GREEN, LIGHT_GREY, RED
from linvit.training.batch_size import resolve_batch_size
from linvit.training.config import TrainConfig
from linvit.training.input_range import resolve_input_range
from linvit.training.setup import (
    build_step,
    build_train_loader,
    open_train_set,
    prepare_model,
    prepare_process,
    seed_step,
)
from linvit.training.step import TrainStep

# Decay of the exponential moving average that smooths the loss.
SMOOTHING = 0.9
# Steps before the average is meaningful.
SETTLING_STEPS = round(1 / (1 - SMOOTHING))
# The sweep ends when the smoothed loss exceeds its lowest value by this factor.
DIVERGED = 3.0


@dataclass(frozen=True)
class Sweep:
    """The learning rate of each step, its loss and the smoothed loss."""

    lr: list[float]
    loss: list[float]
    smoothed: list[float]

    @property
    def lowest(self) -> float:
        """The learning rate with the lowest smoothed loss."""
        return self.lr[int(np.argmin(self.smoothed))]

    @property
    def steepest(self) -> float:
        """The learning rate, not above `lowest`, where the smoothed loss falls fastest over log(learning rate).

        The fall is measured over a tenth of the sweep, without the first steps, on which the average is not meaningful.
        """
        reach = max(len(self.lr) // 20, 1)
        last = max(int(np.argmin(self.smoothed)), 1)
        first = min(SETTLING_STEPS, last // 2)
        falls = {
            middle: self.smoothed[min(middle + reach, last)] - self.smoothed[max(middle - reach, first)]
            for middle in range(first, last + 1)
        }
        return self.lr[min(falls, key=lambda middle: falls[middle])]

    @property
    def suggestion(self) -> float:
        """A tenth of `lowest`: the loss still falls there, with a margin before it rises."""
        return self.lowest / 10


def prepare_sweep(config: TrainConfig, ranks: Ranks) -> tuple[TrainStep, Loader]:
    """The training step and loader of a run with this configuration, without a schedule, an EMA and a cache."""
    config = config.model_copy(update={"model_ema": False, "cache": None})
    prepare_process(config)
    train_set = open_train_set(config)
    model, _ = prepare_model(config, class_names=train_set.class_names, ranks=ranks)
    config = resolve_input_range(config, train_set, ranks)
    spec = resolve_input(model, config)
    config = resolve_batch_size(config, model, train_set, spec=spec, ranks=ranks)
    loader = build_train_loader(config, train_set, spec=spec, ranks=ranks)
    # The sweep sets the learning rate of every step.
    return build_step(config, model, train_set, spec=spec, ranks=ranks, lr=1.0), loader


def run_sweep(
    step: TrainStep,
    loader: Loader,
    config: TrainConfig,
    ranks: Ranks,
    *,
    start_lr: float,
    end_lr: float,
    num_steps: int,
) -> Sweep:
    """Train with a rising learning rate until the last step, or until the loss diverges.

    Steps without any readable image are left out. Raises ValueError if an epoch has no others.
    """
    found = Sweep([], [], [])
    mean, group_size, num_empty = 0.0, config.grad_accum_steps, 0
    batches = _endless(loader)
    step.start_epoch(0)
    for number, lr in enumerate(np.geomspace(start_lr, end_lr, num_steps).tolist()):
        for group in step.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        for part in range(group_size):
            seed_step(config.seed, epoch=0, batch=number * group_size + part, rank=ranks.rank)
            batch = next(batches)
            step.backward(batch.images, batch.labels, group_size=group_size, closes_group=part == group_size - 1)
        update = step.update()
        num_empty = num_empty + 1 if update.outcome == "empty" else 0
        if num_empty * group_size >= len(loader):
            raise ValueError(f"{config.data_dir}: no image of an epoch can be read; restore the images")
        if num_empty:
            continue
        if not math.isfinite(update.loss):
            break
        mean = SMOOTHING * mean + (1 - SMOOTHING) * update.loss
        found.lr.append(lr)
        found.loss.append(update.loss)
        # The average starts at 0: correct its bias as Adam does.
        found.smoothed.append(mean / (1 - SMOOTHING ** (number + 1)))
        if found.smoothed[-1] > DIVERGED * min(found.smoothed):
            break
    return found


def _endless(loader: Loader) -> Iterator[Batch]:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def plot_sweep(found: Sweep, *, title: str) -> Figure:
    """Plot the loss over the learning rate, marking the steepest point and the suggestion."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(found.lr, found.loss, color=LIGHT_GREY, linewidth=1, label="loss")
    axes.plot(found.lr, found.smoothed, color=BLUE, linewidth=2, label="smoothed")
    for name, lr, color, marker in (
        ("steepest", found.steepest, RED, "v"),
        ("suggestion: lowest / 10", found.suggestion, GREEN, "o"),
    ):
        height = float(np.interp(lr, found.lr, found.smoothed))
        axes.plot([lr], [height], marker, color=color, markersize=9, label=f"{name}, {lr:.1e}")
    low, high = min(found.smoothed), found.smoothed[0]
    # Losses after the divergence would compress the rest of the curve.
    axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
