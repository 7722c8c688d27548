"""The state of a training run: all that going on from it needs, and the files it is kept in.

A file is a dict of plain values and tensors that `torch.load(path, weights_only=True)` reads; `state_dict` and
`state_dict_ema` are where timm looks for weights.
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models import get_model_args, get_model_input_config

from linvit.files import reason, write_file
from linvit.training.engine import TrainStep
from linvit.training.metrics import Metrics, best_of, is_better

FORMAT = 1
_FILE_NAME = re.compile(r"state-(\d+)-(\d+)\.pth")


@dataclass
class Progress:
    """How far a run has come."""

    # The next batch to train on.
    epoch: int = 0
    batch: int = 0
    # Of the losses of this epoch's updates so far.
    loss_sum: float = 0.0
    num_losses: int = 0
    # The best value of eval_metric yet, and how many evaluations ago it was found.
    best: float | None = None
    evaluations_since_best: int = 0
    # The rows of summary.csv.
    summary: list[dict[str, Any]] = field(default_factory=list)

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether that many evaluations have passed without a better one; never where `patience` is None."""
        return patience is not None and self.evaluations_since_best >= patience

    def judge(self, metrics: Mapping[str, Metrics], metric: str) -> str | None:
        """Take note of an evaluation; returns which of its weights are the best yet, None if older ones are."""
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
        """Move to the start of the next epoch; returns the mean loss of the one that is over."""
        mean = self.loss_sum / max(self.num_losses, 1)
        self.epoch, self.batch, self.loss_sum, self.num_losses = self.epoch + 1, 0, 0.0, 0
        return mean


def collect_state(
    step: TrainStep, progress: Progress, *, settings: dict[str, Any], class_names: Sequence[str], num_batches: int
) -> dict[str, Any]:
    """The state of a run between two updates.

    Args:
        settings: the run's configuration as plain values.
        class_names: name of every label.
        num_batches: batches that a process sees in an epoch.
    """
    model = step.plain_model
    return {
        "format": FORMAT,
        "arch": model.pretrained_cfg["architecture"],
        "model_args": get_model_args(model),
        "settings": settings,
        "class_names": list(class_names),
        "img_size": tuple(get_model_input_config(model)["input_size"][1:]),
        "world_size": step.ranks.world_size,
        "num_batches": num_batches,
        "progress": asdict(progress),
        "num_updates": step.num_updates,
        "num_skipped": step.num_skipped,
        "state_dict": model.state_dict(),
        "state_dict_ema": step.ema.module.state_dict() if step.ema is not None else None,
        "optimizer": step.optimizer.state_dict(),
        "scaler": step.scaler.state_dict(),
    }


def restore_state(
    state: dict[str, Any], step: TrainStep, *, class_names: Sequence[str], num_batches: int, with_optimizer: bool = True
) -> Progress:
    """Put a run's model, average, optimizer and loss scaler back to `state`; returns how far it had come.

    Raises ValueError where the state is of other classes or another model, or stands inside an epoch that is cut into
    other batches now.
    """
    model = step.plain_model
    if list(class_names) != state["class_names"]:
        raise ValueError(
            f"--resume: the state's classes ({_listed(state['class_names'])}) are not the data's "
            f"({_listed(class_names)}); to begin anew from its weights use --pretrained-path"
        )
    progress = Progress(**state["progress"])
    if progress.batch and (state["world_size"], state["num_batches"]) != (step.ranks.world_size, num_batches):
        raise ValueError(
            f"--resume: the state stands at batch {progress.batch} of {state['num_batches']} in each of "
            f"{state['world_size']} processes, not of {num_batches} in each of {step.ranks.world_size}; keep the "
            "number of processes and --batch-size, or resume from the end of an epoch (state-*-000000.pth)"
        )
    try:
        model.load_state_dict(state["state_dict"])
        if step.ema is not None:
            averaged = state["state_dict_ema"]
            step.ema.module.load_state_dict(averaged if averaged is not None else state["state_dict"])
        if with_optimizer:
            step.optimizer.load_state_dict(state["optimizer"])
            if step.scaler.is_enabled() and state["scaler"]:
                step.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"--resume: the state is of another model or optimizer than asked for ({reason(error)}); "
            "resume with the run's own options, its args.yaml"
        ) from error
    step.num_updates, step.num_skipped = state["num_updates"], state["num_skipped"]
    if step.scheduler is not None:
        step.scheduler.step(progress.epoch)
        step.scheduler.step_update(step.num_updates)
    return progress


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed run does otherwise, as "name: before → now"."""
    ignored = {"resume", "output", "experiment", "stop_epoch"}
    return [
        f"{name}: {before.get(name)} → {value}"
        for name, value in now.items()
        if name not in ignored and before.get(name) != value
    ]


def save_state(folder: Path, state: dict[str, Any], *, keep: int, milestones: Sequence[int]) -> Path:
    """Write a state's file, then delete all but the newest `keep`; the states that end epochs in `milestones` stay."""
    progress = state["progress"]
    path = folder / f"state-{progress['epoch']:04d}-{progress['batch']:06d}.pth"
    write_file(path, lambda file: torch.save(state, file))
    kept_for_good = {f"state-{epoch + 1:04d}-000000.pth" for epoch in milestones}
    for old in [each for each in list_states(folder) if each.name not in kept_for_good][:-keep]:
        old.unlink()
    return path


def list_states(folder: Path) -> list[Path]:
    """The files of states in a folder, the oldest first."""
    found = [(match, path) for path in folder.glob("state-*.pth") if (match := _FILE_NAME.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda each: tuple(map(int, each[0].groups())))]


def load_state(path: Path) -> dict[str, Any]:
    """The state in a file; ValueError where it is none, or not whole."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a training state: {reason(error)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a training state of linvit; start from its weights by --pretrained-path")
    return state


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
