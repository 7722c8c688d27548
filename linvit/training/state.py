"""The state of a training run: everything that is needed to resume it, as a dict of plain values and tensors.

`linvit.runs.checkpoint` stores it on disk. The weights have the keys of timm's checkpoints, `state_dict` and
`state_dict_ema`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from timm.models import get_model_input_config

from linvit.evaluation.metrics import Metrics, best_of, is_better
from linvit.model.description import model_arguments
from linvit.output.files import reason
from linvit.settings.fields import listed
from linvit.training.fsdp import gather, load_full
from linvit.training.optim import load_optimizer, trained_names
from linvit.training.resume import check_batches, check_settings
from linvit.training.step import TrainStep


@dataclass
class Progress:
    """Progress of a run."""

    # The next batch to train on.
    epoch: int = 0
    batch: int = 0
    # Sum and number of the losses of this epoch's updates.
    loss_sum: float = 0.0
    num_losses: int = 0
    # Updates refused because loss or gradients were not finite: in the whole run, and in a row just now.
    num_bad: int = 0
    bad_in_row: int = 0
    # The best value of eval_metric, and the number of evaluations since.
    best: float | None = None
    evaluations_since_best: int = 0
    # The rows of summary.csv.
    summary: list[dict[str, Any]] = field(default_factory=list)

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations found no better value; None disables it."""
        return patience is not None and self.evaluations_since_best >= patience

    def judge(self, metrics: Mapping[str, Metrics], metric: str) -> str | None:
        """Record an evaluation; returns the name of the weights that are the best so far, None if they are not new."""
        self.evaluations_since_best += 1
        name = best_of(metrics, metric)
        if name is None or not is_better(metrics[name].value(metric), self.best, metric):
            return None
        self.best, self.evaluations_since_best = metrics[name].value(metric), 0
        return name

    def add_loss(self, loss: float) -> None:
        self.loss_sum += loss
        self.num_losses += 1

    def end_epoch(self) -> float:
        """Move to the start of the next epoch; returns the mean loss of the finished one."""
        mean = self.loss_sum / self.num_losses if self.num_losses else math.nan
        self.epoch, self.batch, self.loss_sum, self.num_losses = self.epoch + 1, 0, 0.0, 0
        return mean


def collect_state(
    step: TrainStep,
    progress: Progress,
    *,
    settings: dict[str, Any],
    class_names: Sequence[str],
    num_images: int,
    num_batches: int,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The state of a run between two updates; its tensors are those in use, not copies.

    If weights are sharded, all processes must call it. The first gets the full tensors, the others empty ones.

    Args:
        settings: the run's configuration as plain values.
        class_names: the name of each label.
        num_images: number of training images.
        num_batches: number of batches per epoch in each process.
        data: fingerprints of the training and validation images, by split name.
    """
    model = step.plain_model
    state = {
        "arch": model.pretrained_cfg["architecture"],
        "model_args": model_arguments(model),
        "settings": settings,
        "class_names": list(class_names),
        "img_size": tuple(get_model_input_config(model)["input_size"][1:]),
        "world_size": step.ranks.world_size,
        "num_images": num_images,
        "num_batches": num_batches,
        "data": data,
        "progress": asdict(progress),
        "num_updates": step.num_updates,
        "num_skipped": step.num_skipped,
        "images_at_once": step.micro_batches.size,
        "state_dict": model.state_dict(),
        "state_dict_ema": step.ema.module.state_dict() if step.ema is not None else None,
        "optimizer": step.optimizer.state_dict(),
        "optimizer_names": trained_names(step.optimizer, model),
        "scaler": step.scaler.state_dict(),
        "distillation": {} if step.distillation is None else step.distillation.state_dict(),
    }
    return gather(state, keep=step.ranks.is_primary) if step.is_sharded else state


def restore_state(
    state: dict[str, Any],
    step: TrainStep,
    *,
    settings: dict[str, Any],
    class_names: Sequence[str],
    num_images: int,
    num_batches: int,
    with_optimizer: bool = True,
) -> Progress:
    """Load a state into model, moving average, optimizer and loss scaler; returns the run's progress.

    Learning rate, weight decay and other options of the optimizer come from the current settings. Raises ValueError if
    the state belongs to other classes, another model or another optimizer, or was saved within an epoch whose batches
    changed. The number of processes may change if the total batch stays the same.
    """
    model = step.plain_model
    if list(class_names) != state["class_names"]:
        raise ValueError(
            f"--resume: the checkpoint's classes ({listed(state['class_names'])}) are not the data's "
            f"({listed(class_names)}); to start over from its weights use --pretrained-path"
        )
    progress = Progress(**state["progress"])
    check_settings(state["settings"], settings, within_epoch=progress.batch > 0, with_optimizer=with_optimizer)
    now = {"settings": settings, "world_size": step.ranks.world_size, "num_images": num_images}
    check_batches(state, now | {"num_batches": num_batches}, batch=progress.batch)
    try:
        load_full(model, state["state_dict"])
        if step.ema is not None:
            averaged = state["state_dict_ema"]
            load_full(step.ema.module, averaged if averaged is not None else state["state_dict"])
        if step.distillation is not None:
            step.distillation.load_state_dict(state["distillation"])
        if with_optimizer:
            names = trained_names(step.optimizer, model)
            load_optimizer(step.optimizer, state["optimizer"], names=names, names_before=state["optimizer_names"])
            if step.scaler.is_enabled() and state["scaler"]:
                step.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"--resume: the checkpoint does not fit the requested model or optimizer ({reason(error)}); resume with "
            "the run's own args.yaml, or with --no-resume-opt if only the optimizer changed"
        ) from error
    step.num_updates, step.num_skipped = state["num_updates"], state["num_skipped"]
    if step.micro_batches.can_split:
        step.micro_batches.size = state["images_at_once"]
    if step.scheduler is not None:
        step.scheduler.step(progress.epoch)
        step.scheduler.step_update(step.num_updates)
    return progress
