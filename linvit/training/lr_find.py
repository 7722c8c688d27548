"""Options of `linvit lr-find`: those of training and a few of its own; imports nothing heavy.

A learning rate from a sweep: `linvit lr-find` (Smith 2017, arXiv 1506.01186).

The learning rate rises by one factor from step to step; the loss falls at first, fastest at the steepest point, and
rises again where steps are too long. Nothing is kept of the weights.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field

from linvit.data.augment.build import resolve_input
from linvit.data.loader import Batch, Loader, create_train_loader
from linvit.data.sources.classes import read_class_map
from linvit.data.sources.open import open_images
from linvit.distributed import Ranks, StopRequest, joined_ranks, recorded, usable_workers
from linvit.model.build import check_model_name
from linvit.output.files import write_file, write_text
from linvit.settings.flags import UsageError
from linvit.training.batch_size import settle_batch_size
from linvit.training.config import TrainConfig, parse_with, training_parser
from linvit.training.distill import create_distillation
from linvit.training.log import say
from linvit.training.loss import create_loss, create_mixup, read_class_weights
from linvit.training.model import build_model, freeze, place_model, wrap_model
from linvit.training.optim import create_optimizer
from linvit.training.randomness import seed_run, seed_step
from linvit.training.step import TrainStep


class SweepOptions(BaseModel):
    """From where to where the learning rate is raised, and where the result goes."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    start_lr: float = Field(1e-7, gt=0.0, description="learning rate of the first step")
    end_lr: float = Field(1.0, gt=0.0, description="learning rate of the last step")
    num_steps: int = Field(100, ge=10, description="steps in between, each a factor above the one before")
    plot_file: Path = Field(Path("lr-find.png"), description="picture of the loss over the learning rate")
    json_file: Path | None = Field(None, description="file that the result is written to")


class LrFindConfig(TrainConfig, SweepOptions):
    """A training run's configuration, and the sweep."""


def parse_lr_find(argv: Sequence[str]) -> LrFindConfig:
    """What a command line of `linvit lr-find` asks for; raises UsageError."""
    parser = training_parser(
        "linvit lr-find",
        LrFindConfig,
        "Raise the learning rate step by step on throw-away weights, and show where the loss falls and where it rises.",
        spellings={"json_file": ["--json"], "plot_file": ["--plot"]},
    )
    config = parse_with(parser, argv, LrFindConfig)
    if config.start_lr >= config.end_lr:
        raise UsageError(f"--start-lr {config.start_lr:g} must be below --end-lr {config.end_lr:g}")
    return config


# Weight of the past in the smoothed loss.
SMOOTHING = 0.9
SETTLING_STEPS = round(1 / (1 - SMOOTHING))
# A smoothed loss of so many times the lowest ends the sweep.
DIVERGED = 3.0


@dataclass(frozen=True)
class Sweep:
    """Learning rates and, at each, the loss and its smoothed value."""

    lr: list[float]
    loss: list[float]
    smoothed: list[float]

    @property
    def lowest(self) -> float:
        """The learning rate where the smoothed loss is lowest."""
        return self.lr[int(np.argmin(self.smoothed))]

    @property
    def steepest(self) -> float:
        """The learning rate below that where the smoothed loss falls fastest over the logarithm of the rate.

        Falls are taken over a tenth of the sweep, and not before the average has got over its first losses.
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
        """A tenth of the rate where the loss is lowest: there it still falls, and training has room to vary."""
        return self.lowest / 10


@recorded
def lr_find_command(config: LrFindConfig) -> int:
    """`linvit lr-find`: sweep, draw and suggest; returns the exit status.

    Raises ValueError where options, data and weights do not fit together, or the loss falls nowhere.
    """
    with joined_ranks(config.device) as ranks:
        check_model_name(config.model)
        seed_run(config.seed)
        step, loader = _prepare(config, ranks)
        found = sweep(step, loader, config, ranks)
        if not ranks.is_primary:
            return 0
        if len(found.lr) < 3 or found.lowest == found.lr[0]:
            raise ValueError(f"the loss does not fall above --start-lr {config.start_lr:g}: set it lower")
        figure = draw(found, title=f"{config.model}, batches of {loader.batch_size * ranks.world_size}")
        write_file(config.plot_file, lambda file: figure.savefig(file, format="png", dpi=120))
        if config.json_file is not None:
            result = {"suggestion": found.suggestion, "steepest": found.steepest, "lowest": found.lowest}
            settings = {"model": config.model, "batch": loader.batch_size * ranks.world_size, "seed": config.seed}
            write_text(config.json_file, json.dumps({**result, **settings, **asdict(found)}, indent=2) + "\n")
        say(f"the loss falls fastest at {found.steepest:.2e} and is lowest at {found.lowest:.2e}: {config.plot_file}")
        say(f"suggestion: --lr {found.suggestion:.1e}")
    return 0


def _prepare(config: TrainConfig, ranks: Ranks) -> tuple[TrainStep, Loader]:
    """What a training run of this configuration begins with, without a schedule."""
    assert config.data_dir is not None
    listed = read_class_map(config.class_map) if config.class_map is not None else None
    images = open_images(config.data_dir, split=config.train_split, class_names=listed)
    model, _ = build_model(config, class_names=images.class_names)
    for note in freeze(model, config.freeze):
        if ranks.is_primary:
            say(note)
    place_model(model, config, ranks)
    spec = resolve_input(model, config)
    config = settle_batch_size(config, model, spec=spec, num_images=len(images), ranks=ranks)
    loader = create_train_loader(
        images,
        config,
        spec,
        batch_size=config.images_per_batch,
        seed=config.seed,
        sampling=config.sampler,
        repeats=max(config.aug_repeats, 1.0),
        workers=usable_workers(config.workers),
        device=ranks.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
        pin_memory=config.pin_mem,
        channels_last=config.channels_last,
        on_bad_image=config.on_bad_image,
    )
    weights = read_class_weights(config.class_weights, class_names=images.class_names, labels=images.labels)
    distillation = create_distillation(model, config, spec=spec, class_names=images.class_names, device=ranks.device)
    besides = distillation.parameters() if distillation is not None else ()
    step = TrainStep(
        wrap_model(model if distillation is None else distillation.trained, config, ranks),
        model,
        # The sweep sets the rate of every step.
        optimizer=create_optimizer(model, config, lr=1.0, besides=besides),
        scheduler=None,
        ema=None,
        mixup=create_mixup(config, num_classes=len(images.class_names)),
        loss_fn=create_loss(config, class_weights=weights),
        config=config,
        ranks=ranks,
        stop=StopRequest(),
        distillation=distillation,
    )
    return step, loader


def sweep(step: TrainStep, loader: Loader, config: LrFindConfig, ranks: Ranks) -> Sweep:
    """Train with a rising learning rate, until the last step or until the loss explodes."""
    found = Sweep([], [], [])
    mean, group_size = 0.0, config.grad_accum_steps
    batches = _endless(loader)
    step.start_epoch(0)
    for number, lr in enumerate(np.geomspace(config.start_lr, config.end_lr, config.num_steps).tolist()):
        for group in step.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        for part in range(group_size):
            seed_step(config.seed, epoch=0, batch=number * group_size + part, rank=ranks.rank)
            batch = next(batches)
            step.backward(batch.images, batch.labels, group_size=group_size, closes_group=part == group_size - 1)
        update = step.update()
        if not math.isfinite(update.loss):
            break
        mean = SMOOTHING * mean + (1 - SMOOTHING) * update.loss
        found.lr.append(lr)
        found.loss.append(update.loss)
        # As in Adam: the average begins at nothing.
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


def draw(found: Sweep, *, title: str) -> Figure:
    """The loss over the learning rate, with the steepest point and the suggestion."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(found.lr, found.loss, color="#bbbbbb", linewidth=1, label="loss")
    axes.plot(found.lr, found.smoothed, color="#0072b2", linewidth=2, label="smoothed")
    for name, lr, colour, marker in (
        ("steepest", found.steepest, "#d55e00", "v"),
        ("suggestion: lowest / 10", found.suggestion, "#009e73", "o"),
    ):
        height = float(np.interp(lr, found.lr, found.smoothed))
        axes.plot([lr], [height], marker, color=colour, markersize=9, label=f"{name}, {lr:.1e}")
    low, high = min(found.smoothed), found.smoothed[0]
    # What comes after the explosion would squash the rest.
    axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
