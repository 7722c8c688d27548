"""`--batch-size auto`: the largest batch that trains in the device's memory, found by trial before the run."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from linvit.data.augment.build import InputSpec
from linvit.data.sources.base import ImageSet
from linvit.distributed import Ranks
from linvit.model.build import TimmModel
from linvit.runs.folder import RunFolder
from linvit.settings.yaml import read_settings
from linvit.training.config import TrainConfig
from linvit.training.loss import mixes
from linvit.training.setup import build_step
from linvit.training.step import TrainStep

# Where memory that runs out is an error, not the end of the process.
LIMITED_DEVICES = ("cuda",)


def settle_batch_size(
    config: TrainConfig, model: TimmModel, train_set: ImageSet, *, spec: InputSpec, ranks: Ranks
) -> TrainConfig:
    """The configuration with a number for `batch_size`: that of the run gone on with, else the largest that fits.

    Args:
        model: on its device; copies of it are trained for a step and thrown away.
        train_set: the images to train on.

    Raises ValueError where no batch fits, and on a device that does not say that its memory has run out.
    """
    if config.batch_size != "auto":
        return config
    size = _recorded_batch_size(config)
    if size is None:
        if ranks.device.type not in LIMITED_DEVICES:
            raise ValueError(
                f"--batch-size auto: on {ranks.device} memory that runs out ends the process, so that nothing can be "
                "tried; give a number"
            )
        size = find_largest_batch(
            lambda size: _trains(size, config, model, train_set, spec=spec, device=ranks.device),
            limit=len(train_set) // ranks.world_size,
            multiple=2 if mixes(config) else 1,
        )
        size = _smallest_over_ranks(size, ranks)
    return config.model_copy(update={"batch_size": size})


def find_largest_batch(fits: Callable[[int], bool], *, limit: int, multiple: int) -> int:
    """The largest size that fits among `multiple` doubled again and again, half as much again as the last, and `limit`.

    Raises ValueError where not even `multiple` fits.
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
            "--img-size, or give a number, which is trained on in parts"
        )
    between = largest + largest // 2 // multiple * multiple
    return between if largest < between < size and fits(between) else largest


def _trains(
    size: int, config: TrainConfig, model: TimmModel, train_set: ImageSet, *, spec: InputSpec, device: torch.device
) -> bool:
    """Whether a step on `size` images fits: forward, backward, and the optimizer with its state."""
    with torch.random.fork_rng():
        trial = config.model_copy(update={"batch_size": size})
        # The weights are thrown away: a rate that changes them little cannot make the loss explode.
        step = build_step(trial, copy.deepcopy(model), train_set, spec=spec, ranks=Ranks(device), lr=1e-6)
        fits = _try_step(step, size, spec)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def _try_step(step: TrainStep, size: int, spec: InputSpec) -> bool:
    device = step.ranks.device
    step.start_epoch(0)
    # A group of two batches takes the memory of any longer one: gradients are kept between its batches.
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


def _recorded_batch_size(config: TrainConfig) -> int | None:
    """What the run that is gone on with was trained with; None where there is none yet."""
    if config.resume is None:
        return None
    if config.resume == "auto":
        assert config.experiment is not None
        folders = [config.output / config.experiment]
    else:
        # A run's folder, or a state in its checkpoints.
        state = Path(config.resume).absolute()
        folders = [state, *state.parents[:2]]
    for folder in folders:
        args = RunFolder(folder).args
        if args.is_file():
            size = read_settings(args).get("batch_size")
            return size if isinstance(size, int) else None
    return None
