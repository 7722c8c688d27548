"""The start of a run: its folder, the checkpoint it resumes from, and the changes that resuming allows.

A run never overwrites an existing one.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from timm.models import safe_model_name

from linvit.output.files import reason
from linvit.runs.checkpoint import is_checkpoint, list_checkpoints, verify_checkpoint
from linvit.training.config import TrainConfig
from linvit.training.log import print_line

# These are the place and end of a run; they do not affect its training.
_IGNORED = {"resume", "no_resume_opt", "allow_changed_data", "output", "experiment", "stop_epoch", "dry_run", "report"}
# These may not change: always, with the optimizer's state, and within an epoch (where they order the images).
_FIXED = (
    "model",
    "k",
    "projection",
    "share",
    "local",
    "stem",
    "gp",
    "model_kwargs",
    "input_range",
    "eval_metric",
    "lora",
    "lora_targets",
)
_FIXED_WITH_OPTIMIZER = ("opt", "opt_kwargs", "freeze")
_FIXED_WITHIN_EPOCH = ("seed", "sampler", "aug_repeats")


@dataclass(frozen=True)
class StartingPoint:
    """A run's folder, and the checkpoint that it resumes from; None for a new run."""

    folder: Path
    state: Path | None = None


def choose_start(config: TrainConfig, *, img_size: tuple[int, int]) -> StartingPoint:
    """Choose the folder and checkpoint by `output`, `experiment` and `resume`; creates the folder of a new run.

    If a folder of that name exists and is not resumed, the new folder gets a number, as in timm. Raises ValueError if
    there is nothing to resume from or the folder cannot be created.
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


def check_output(config: TrainConfig) -> None:
    """Raise ValueError if the run's folder cannot be created or, if it exists, not be written."""
    folder = config.output / (config.experiment or "")
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        # Such as a name that is too long.
        raise ValueError(f"--output {folder}: {reason(error)}; choose another --output or --experiment") from error
    if not existing.is_dir():
        raise ValueError(f"--output {config.output}: {existing} is not a folder; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--output {config.output}: {existing} cannot be written; choose another folder")
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"--output {folder}: the name is not UTF-8, which safetensors needs; choose another") from None


def find_state(config: TrainConfig) -> Path | None:
    """The checkpoint that `resume` selects; None for a new run. Raises ValueError as `choose_start` does."""
    if config.resume is None:
        return None
    if config.resume != "auto":
        return _state_at(Path(config.resume))
    folder = config.output / (config.experiment or "")
    return _newest_state(folder) if folder.is_dir() else None


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
            raise ValueError(f"--output {folder.parent}: cannot create {candidate} ({error.strerror})") from error
    raise ValueError(f"--experiment {folder.name}: 1000 runs have this name already; choose another")


def _state_at(path: Path) -> Path:
    """The checkpoint that `--resume PATH` means: `path` itself, or the newest one of a run's folder."""
    if is_checkpoint(path):
        verify_checkpoint(path)
        return path
    if path.is_file():
        raise ValueError(
            f"--resume {path}: this is a file; give a run's folder or one of its checkpoints/state-*, or start from "
            "its weights with --pretrained-path"
        )
    if not path.is_dir():
        raise ValueError(f"--resume {path}: there is no such file or folder")
    state = _newest_state(path)
    if state is None:
        raise ValueError(f"--resume {path}: the run has no checkpoints yet")
    return state


def _newest_state(run: Path) -> Path | None:
    """The newest intact checkpoint of a run; None if the run has not saved anything yet."""
    found = list_checkpoints(run / "checkpoints")
    for path in reversed(found):
        try:
            verify_checkpoint(path)
            return path
        except ValueError as error:
            print_line(f"{error}; trying the one before")
    if found or (run / "best").exists():
        raise ValueError(f"{run}: none of its checkpoints can be read; choose another --experiment to start over")
    return None


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that a resumed run changes, each as "name: before → now"."""
    return [
        f"{name}: {before.get(name)} → {value}"
        for name, value in now.items()
        if name not in _IGNORED and before.get(name) != value
    ]


def check_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], *, within_epoch: bool, with_optimizer: bool
) -> None:
    """Raise ValueError for the first changed setting that makes resuming meaningless.

    Args:
        before: settings of the checkpoint's run. A setting that it lacks is new and may have any value.
        now: settings of this run.
        within_epoch: whether the checkpoint was saved within an epoch.
        with_optimizer: whether the optimizer's state is restored.
    """
    fixed = [
        (_FIXED, "a run keeps its model, its input range and its metric; resume with its own args.yaml"),
        (
            _FIXED_WITH_OPTIMIZER if with_optimizer else (),
            "keep it, or resume with a fresh optimizer (--no-resume-opt)",
        ),
        (
            _FIXED_WITHIN_EPOCH if within_epoch else (),
            "this changes the order of the images within an epoch; keep it, or resume from the end of an epoch "
            "(state-*-000000)",
        ),
    ]
    for names, remedy in fixed:
        for name in names:
            if name in before and before[name] != now[name]:
                raise ValueError(f"--resume: {name} was {before[name]} and is now {now[name]}: {remedy}")


def check_batches(before: Mapping[str, Any], now: Mapping[str, Any], *, batch: int) -> None:
    """Raise ValueError if the batches changed so that position or schedule of the checkpoint lose their meaning.

    Args:
        before: the checkpoint's state.
        now: `settings`, `world_size`, `num_images` and `num_batches` of this run.
        batch: the checkpoint's position in the epoch.
    """
    if batch:
        batches_before, batches_now = _describe_batches(before), _describe_batches(now)
        if batches_before != batches_now:
            raise ValueError(
                f"--resume: the checkpoint is at batch {batch} of {batches_before}, but an epoch now has "
                f"{batches_now}; keep the data and --batch-size times the number of processes, or resume from the end "
                "of an epoch (state-*-000000)"
            )
        group_size = now["settings"]["grad_accum_steps"]
        if batch % group_size and batch != now["num_batches"]:
            raise ValueError(
                f"--resume: the checkpoint is at batch {batch}, within a group of --grad-accum-steps {group_size}; "
                "keep --grad-accum-steps, or resume from the end of an epoch (state-*-000000)"
            )
    updates = [-(-each["num_batches"] // each["settings"]["grad_accum_steps"]) for each in (before, now)]
    if now["settings"]["sched_on_updates"] and updates[0] != updates[1]:
        raise ValueError(
            f"--resume: an epoch had {updates[0]} updates and now has {updates[1]}, which --sched-on-updates counts: "
            "keep the data, --batch-size times the number of processes and --grad-accum-steps"
        )


def _describe_batches(state: Mapping[str, Any]) -> str:
    total = state["settings"]["batch_size"] * state["world_size"]
    return f"{state['num_batches']} batches of {total} from {state['num_images']:,} images"
