"""`--batch-size auto`: the largest batch that fits in the device's memory, found by trial before the run."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from linvit.data.augment.build import InputSpec
from linvit.data.sources.base import ImageSet
from linvit.distributed import Ranks
from linvit.model.build import TimmModel
from linvit.runs.folder import RunFolder
from linvit.settings.yaml import read_settings
from linvit.training.config import TrainConfig
from linvit.training.setup import build_step
from linvit.training.step import TrainStep

# Devices on which running out of memory raises an error instead of ending the process.
LIMITED_DEVICES = ("cuda",)


def resolve_batch_size(
    config: TrainConfig, model: TimmModel, train_set: ImageSet, *, spec: InputSpec, ranks: Ranks
) -> TrainConfig:
    """Replace `batch_size` "auto" by a number: that of the resumed run, else the largest that fits.

    Args:
        model: the model on its device. Copies of it are trained for one step and discarded.
        train_set: the training images.

    Raises ValueError if no batch fits, or on a device that raises no error when its memory runs out.
    """
    if config.batch_size != "auto":
        return config
    size = recorded_setting(config, "batch_size")
    if not isinstance(size, int):
        if ranks.device.type not in LIMITED_DEVICES:
            raise ValueError(
                f"--batch-size auto: on {ranks.device} running out of memory ends the process, so nothing can be "
                "tried; give a number"
            )
        size = find_largest_batch(
            lambda size: _trains(size, config, model, train_set, spec=spec, device=ranks.device),
            limit=len(train_set) // ranks.world_size,
            multiple=2 if config.uses_mixing else 1,
        )
        size = _smallest_over_ranks(size, ranks)
    return config.model_copy(update={"batch_size": size})


def find_largest_batch(fits: Callable[[int], bool], *, limit: int, multiple: int) -> int:
    """Search for the largest batch that fits, up to `limit`.

    Starts at `multiple`, doubles the size while it fits, and tries 1.5 times the last one that did. All sizes are
    multiples of `multiple`. Raises ValueError if not even `multiple` fits.
    """
    limit = max(limit - limit % multiple, multiple)
    largest, size = 0, multiple
    while fits(size):
        largest, size = size, min(2 * size, limit)
        if largest == limit:
            return largest
    if not largest:
        raise ValueError(
            f"--batch-size auto: not even a batch of {multiple} fits in memory; set --grad-checkpointing or a smaller "
            "--img-size, or give a number: a batch that does not fit is trained in parts"
        )
    between = largest + largest // 2 // multiple * multiple
    return between if largest < between < size and fits(between) else largest


def _trains(
    size: int, config: TrainConfig, model: TimmModel, train_set: ImageSet, *, spec: InputSpec, device: torch.device
) -> bool:
    """Whether a full step on `size` images fits in memory: forward, backward and the optimizer's update."""
    with torch.random.fork_rng():
        trial = config.model_copy(update={"batch_size": size})
        # A learning rate too small to make the loss non-finite; the weights are discarded.
        step = build_step(trial, copy.deepcopy(model), train_set, spec=spec, ranks=Ranks(device), lr=1e-6)
        fits = _try_step(step, size, spec)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def _try_step(step: TrainStep, size: int, spec: InputSpec) -> bool:
    device = step.ranks.device
    step.start_epoch(0)
    # Accumulating over two batches needs as much memory as over more: gradients are kept between batches.
    group_size = min(step.config.grad_accum_steps, 2)
    try:
        for number in range(group_size):
            images = torch.zeros(size, 3, *spec.size, device=device)
            labels = torch.zeros(size, dtype=torch.int64, device=device)
            step.backward(images, labels, group_size=group_size, closes_group=number == group_size - 1)
        step.update()
    except torch.OutOfMemoryError:
        return False
    return step.micro_batches.size is None


def _smallest_over_ranks(size: int, ranks: Ranks) -> int:
    if ranks.world_size == 1:
        return size
    smallest = torch.tensor(size, device=ranks.device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return int(smallest)


def recorded_setting(config: TrainConfig, name: str) -> Any:
    """A setting in the args.yaml of the run that is resumed; None for a new run."""
    if config.resume is None:
        return None
    if config.resume == "auto":
        assert config.experiment is not None
        folders = [config.output / config.experiment]
    else:
        # `resume` is a run folder, or a training state in its checkpoints.
        state = Path(config.resume).absolute()
        folders = [state, *state.parents[:2]]
    for folder in folders:
        args = RunFolder(folder).args
        if args.is_file():
            return read_settings(args).get(name)
    return None
