"""Which settings a run may change when it goes on from a checkpoint, and which would make that meaningless.

The state of a training run: all that going on from it needs, as a dict of plain values and tensors.

`linvit.runs.checkpoint` keeps it on disk; `state_dict` and `state_dict_ema` are where timm has the weights, too.

Which folder a run writes to, and which state it goes on from; nothing that exists is ever overwritten.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from timm.models import get_model_args, get_model_input_config, safe_model_name

from linvit.evaluation.metrics import Metrics, best_of, is_better
from linvit.output.files import reason
from linvit.runs.checkpoint import is_checkpoint, list_checkpoints, verify_checkpoint
from linvit.settings.fields import listed
from linvit.training.config import TrainConfig
from linvit.training.fsdp import gathered, load_whole
from linvit.training.log import say
from linvit.training.optim import load_optimizer, trained_names
from linvit.training.step import TrainStep

# Of the run's place or end, not of its course.
_IRRELEVANT = {"resume", "no_resume_opt", "output", "experiment", "stop_epoch", "dry_run"}
_KEPT = ("model", "k", "projection", "share", "gp", "model_kwargs", "eval_metric")
_KEPT_WITH_OPTIMIZER = ("opt", "opt_kwargs", "freeze")
# What the order of an epoch's images is a function of, beside their number and the total batch.
_KEPT_WITHIN_EPOCH = ("seed", "sampler", "aug_repeats")


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a resumed run does otherwise, as "name: before → now"."""
    return [
        f"{name}: {before.get(name)} → {value}"
        for name, value in now.items()
        if name not in _IRRELEVANT and before.get(name) != value
    ]


def check_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], *, within_epoch: bool, with_optimizer: bool
) -> None:
    """Raise ValueError for the first change of settings with which going on would mean nothing.

    Args:
        before, now: settings of the checkpoint's run and of this one; one that `before` does not know is new.
        within_epoch: whether the checkpoint stands inside an epoch.
        with_optimizer: whether the optimizer's state is taken over, too.
    """
    kept = [
        (_KEPT, "a run keeps its model and its measure; resume with its own args.yaml"),
        (_KEPT_WITH_OPTIMIZER if with_optimizer else (), "keep it, or begin with a fresh optimizer by --no-resume-opt"),
        (
            _KEPT_WITHIN_EPOCH if within_epoch else (),
            "that changes the order of the images in the middle of an epoch; keep it, or resume from the end of an "
            "epoch (state-*-000000)",
        ),
    ]
    for names, mend in kept:
        for name in names:
            if name in before and before[name] != now[name]:
                raise ValueError(f"--resume: {name} was {before[name]} and is {now[name]} now: {mend}")


@dataclass
class Progress:
    """How far a run has come."""

    # The next batch to train on.
    epoch: int = 0
    batch: int = 0
    # Of the losses of this epoch's updates so far.
    loss_sum: float = 0.0
    num_losses: int = 0
    # Updates refused because loss or gradients were not finite: of the run, and in a row up to here.
    num_bad: int = 0
    bad_in_row: int = 0
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
) -> dict[str, Any]:
    """The state of a run between two updates; its tensors are those in use, not copies.

    Where they are divided among processes, all of them must call it; the first has them whole, the others none.

    Args:
        settings: the run's configuration as plain values.
        class_names: name of every label.
        num_images: images that there are to train on.
        num_batches: batches that a process sees in an epoch.
    """
    model = step.plain_model
    state = {
        "arch": model.pretrained_cfg["architecture"],
        "model_args": get_model_args(model),
        "settings": settings,
        "class_names": list(class_names),
        "img_size": tuple(get_model_input_config(model)["input_size"][1:]),
        "world_size": step.ranks.world_size,
        "num_images": num_images,
        "num_batches": num_batches,
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
    return gathered(state, keep=step.ranks.is_primary) if step.is_sharded else state


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
    """Put a run's model, average, optimizer and loss scaler back to `state`; returns how far it had come.

    What the settings say of the optimizer (learning rate, weight decay, ...) stays as they say now. Raises ValueError
    where the state is of other classes, another model or optimizer, or stands inside an epoch whose batches are others
    now; several processes may have become more or fewer with the same total batch.
    """
    model = step.plain_model
    if list(class_names) != state["class_names"]:
        raise ValueError(
            f"--resume: the state's classes ({listed(state['class_names'])}) are not the data's "
            f"({listed(class_names)}); to begin anew from its weights use --pretrained-path"
        )
    progress = Progress(**state["progress"])
    check_settings(state["settings"], settings, within_epoch=progress.batch > 0, with_optimizer=with_optimizer)
    now = {"settings": settings, "world_size": step.ranks.world_size, "num_images": num_images}
    _check_batches(state, now | {"num_batches": num_batches}, batch=progress.batch)
    try:
        load_whole(model, state["state_dict"])
        if step.ema is not None:
            averaged = state["state_dict_ema"]
            load_whole(step.ema.module, averaged if averaged is not None else state["state_dict"])
        if step.distillation is not None:
            step.distillation.load_state_dict(state["distillation"])
        if with_optimizer:
            names = trained_names(step.optimizer, model)
            load_optimizer(step.optimizer, state["optimizer"], names=names, names_before=state["optimizer_names"])
            if step.scaler.is_enabled() and state["scaler"]:
                step.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"--resume: the state is of another model or optimizer than asked for ({reason(error)}); "
            "resume with the run's own args.yaml, or with --no-resume-opt if only the optimizer differs"
        ) from error
    step.num_updates, step.num_skipped = state["num_updates"], state["num_skipped"]
    if step.micro_batches.can_split:
        step.micro_batches.size = state["images_at_once"]
    if step.scheduler is not None:
        step.scheduler.step(progress.epoch)
        step.scheduler.step_update(step.num_updates)
    return progress


def _check_batches(before: dict[str, Any], now: dict[str, Any], *, batch: int) -> None:
    """Raise ValueError where batches are cut otherwise than before and `batch`, or the schedule, would mean another."""
    if batch:
        here, there = _cut(now), _cut(before)
        if here != there:
            raise ValueError(
                f"--resume: the state stands at batch {batch} of {there}, but now it would be of {here}; keep the data "
                "and --batch-size times the number of processes, or resume from the end of an epoch (state-*-000000)"
            )
        group = now["settings"]["grad_accum_steps"]
        if batch % group and batch != now["num_batches"]:
            raise ValueError(
                f"--resume: the state stands at batch {batch}, inside a group of --grad-accum-steps {group}; keep "
                "--grad-accum-steps, or resume from the end of an epoch (state-*-000000)"
            )
    updates = [-(-each["num_batches"] // each["settings"]["grad_accum_steps"]) for each in (before, now)]
    if now["settings"]["sched_on_updates"] and updates[0] != updates[1]:
        raise ValueError(
            f"--resume: an epoch had {updates[0]} updates and would have {updates[1]} now, which --sched-on-updates "
            "counts: keep the data, --batch-size times the number of processes and --grad-accum-steps"
        )


def _cut(state: dict[str, Any]) -> str:
    total = state["settings"]["batch_size"] * state["world_size"]
    return f"{state['num_batches']} of {total} images each, from {state['num_images']:,}"


@dataclass(frozen=True)
class StartingPoint:
    """A run's folder, and the checkpoint it goes on from; None: it begins."""

    folder: Path
    state: Path | None = None


def choose_start(config: TrainConfig, *, img_size: tuple[int, int]) -> StartingPoint:
    """Where `output`, `experiment` and `resume` say that the run is; its folder is made where it begins.

    A folder of that name that is not resumed is left alone: the run's gets a number, as in timm. Raises ValueError
    where there is nothing to resume from or the folder cannot be made.
    """
    name = config.experiment or _default_name(config, img_size)
    folder = config.output / name
    if config.resume == "auto" and folder.is_dir():
        return StartingPoint(folder, _newest_state(folder))
    if config.resume in (None, "auto"):
        return StartingPoint(_make_new_folder(folder))
    state = _state_at(Path(config.resume))
    own_folder = state.absolute().parent.parent
    is_in_run = state.parent.name == "checkpoints" and (own_folder / "args.yaml").is_file()
    if is_in_run and (config.experiment is None or folder.absolute() == own_folder):
        return StartingPoint(state.parent.parent, state)
    return StartingPoint(_make_new_folder(folder), state)


def _default_name(config: TrainConfig, img_size: tuple[int, int]) -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(config.model)}-{img_size[-1]}"


def _make_new_folder(folder: Path) -> Path:
    numbered = (folder.with_name(f"{folder.name}-{number}") if number else folder for number in range(1000))
    for candidate in numbered:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"--output {folder.parent}: cannot make {candidate} there ({error.strerror})") from error
    raise ValueError(f"--experiment {folder.name}: there are 1000 runs of that name already; choose another")


def _state_at(path: Path) -> Path:
    """The checkpoint that `--resume PATH` means: itself, or the newest of a run's folder."""
    if is_checkpoint(path):
        verify_checkpoint(path)
        return path
    if path.is_file():
        raise ValueError(
            f"--resume {path}: is a file; give a run's folder or one of its checkpoints/state-*, or start from its "
            "weights by --pretrained-path"
        )
    if not path.is_dir():
        raise ValueError(f"--resume {path}: there is no such file or folder")
    state = _newest_state(path)
    if state is None:
        raise ValueError(f"--resume {path}: the run has no training states in checkpoints/")
    return state


def _newest_state(run: Path) -> Path | None:
    """The newest checkpoint of a run that is whole; None where it has not come to save one."""
    found = list_checkpoints(run / "checkpoints")
    for path in reversed(found):
        try:
            verify_checkpoint(path)
            return path
        except ValueError as error:
            say(f"{error}; going back to the one before")
    if found or (run / "best").exists():
        raise ValueError(f"{run}: none of its training states can be read; choose another --experiment to begin anew")
    return None
