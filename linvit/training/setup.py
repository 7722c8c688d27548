"""The parts of a run, built from its configuration: seeds, images, model, loaders, training step.

train_imagenet.py, `linvit lr-find` and the search for the largest batch size share these functions.

All randomness of a training step is a function of (seed, epoch, batch, rank), so that a run can be resumed anywhere.
timm's Mixup uses numpy's global generator, dropout and stochastic depth use torch's. The loader seeds its own samples.
"""

import os
import random
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from linvit.data.augment.build import InputSpec
from linvit.data.decode import UnreadableImage
from linvit.data.loader import Loader, create_eval_loader, create_train_loader
from linvit.data.sources.base import ImageSet, NoSuchSplit, join_notes, split_names
from linvit.data.sources.classes import classes_in_order, is_class_order, read_class_map
from linvit.data.sources.open import open_fraction, open_images
from linvit.distributed import Ranks, StopRequest, usable_workers
from linvit.model.build import TimmModel, check_model_name
from linvit.settings.flags import check_inputs
from linvit.training.config import TrainConfig
from linvit.training.distill import create_distillation
from linvit.training.fsdp import shard
from linvit.training.log import print_line
from linvit.training.lora import add_adapters
from linvit.training.loss import create_loss, create_mixup, read_class_weights
from linvit.training.model import build_model, check_options, epoch_sizes, freeze, place_model, wrap_model
from linvit.training.optim import create_ema, create_optimizer, create_schedule, learning_rate
from linvit.training.step import TrainStep


def prepare_process(config: TrainConfig) -> None:
    """Check input files and the model's options and seed this process, before anything is read or built.

    Raises UsageError for a file that does not exist, an unknown model and options that do not fit it.
    """
    is_file = config.class_map is not None and not is_class_order(config.class_map)
    check_inputs(
        ("--class-map", config.class_map if is_file else None),
        ("--pretrained-path", config.pretrained_path),
        ("--initial-checkpoint", config.initial_checkpoint),
        ("--aug-file", config.aug_file),
    )
    check_model_name(config.model)
    check_options(config)
    if config.deterministic:
        use_deterministic_algorithms()
    seed_run(config.seed)


class ImageOptions(Protocol):
    """The options that name the images of a run; those of `DataOptions`, and what to do about unreadable images."""

    data_dir: Path | None
    train_split: str
    val_split: str
    val_fraction: float | None
    class_map: Path | None
    on_bad_image: Literal["stop", "skip"]


def open_train_set(config: ImageOptions) -> ImageSet:
    """The training images. The folders of their split, or --class-map, name and number the classes."""
    class_map = config.class_map
    is_order = class_map is not None and is_class_order(class_map)
    names = None if class_map is None or is_order else read_class_map(class_map)
    images = _open_part(config, "train", class_names=names)
    if class_map is not None and is_order:
        images.renumber(classes_in_order(class_map, images.class_names))
    check_readable(images, config)
    return images


def open_val_set(config: ImageOptions, *, class_names: list[str]) -> ImageSet:
    """The validation images, labelled by the training classes."""
    images = _open_part(config, "val", class_names=class_names)
    check_readable(images, config)
    return images


def _open_part(config: ImageOptions, part: Literal["train", "val"], *, class_names: list[str] | None) -> ImageSet:
    assert config.data_dir is not None
    if config.val_fraction is not None:
        images = open_fraction(
            config.data_dir, split=config.train_split, fraction=config.val_fraction, part=part, class_names=class_names
        )
        # Test images are not to be validated on, so these are rightly unused.
        others = (name for name in split_names(config.val_split) if name != "test")
        unused = next((name for name in others if (config.data_dir / name).is_dir()), None)
        if part == "val" and unused is not None:
            note = f"{config.data_dir / unused} is not used: --val-fraction takes validation images from the others"
            images.note = join_notes(note, images.note)
        return images
    split = {"train": config.train_split, "val": config.val_split}[part]
    try:
        return open_images(config.data_dir, split=split, class_names=class_names)
    except NoSuchSplit as error:
        raise NoSuchSplit(f"{error}; or set --val-fraction 0.2 to take validation images from the others") from None


def check_readable(images: ImageSet, config: ImageOptions) -> None:
    """Raise ValueError if bad images are to be skipped, but none can be read. Reads up to the first good image."""
    if config.on_bad_image == "stop":
        return
    first = ""
    for index in range(len(images)):
        try:
            images.read(index)
            return
        except UnreadableImage as error:
            first = first or str(error)
    raise ValueError(f"{images.root}: none of the {len(images):,} images can be read; the first is {first}")


def prepare_model(config: TrainConfig, *, class_names: list[str], ranks: Ranks) -> tuple[TimmModel, list[str]]:
    """The model, frozen as requested and on its device, and the names of the parameters that the given weights lack.

    Raises ValueError if name, arguments, classes or weights do not fit together.
    """
    log = print_line if ranks.is_primary else _discard
    model, new_parameters = build_model(config, class_names=class_names, log=log)
    for note in (*add_adapters(model, config), *freeze(model, config.freeze)):
        log(note)
    place_model(model, config, ranks)
    return model, new_parameters


def _discard(text: str) -> None:
    pass


def build_train_loader(config: TrainConfig, train_set: ImageSet, *, spec: InputSpec, ranks: Ranks) -> Loader:
    """The training batches. They depend neither on the number of workers nor on where a run resumes."""
    return create_train_loader(
        train_set,
        config,
        spec,
        batch_size=config.images_per_batch,
        seed=config.seed,
        sampling=config.sampler,
        repeats=max(config.aug_repeats, 1.0),
        epoch_sizes=epoch_sizes(config),
        **_loading(config, ranks),
    )


def build_val_loader(config: TrainConfig, val_set: ImageSet, *, spec: InputSpec, ranks: Ranks) -> Loader:
    """The validation batches."""
    batch_size = config.validation_batch_size or config.images_per_batch
    return create_eval_loader(val_set, spec, batch_size=batch_size, **_loading(config, ranks))


def _loading(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    return {
        "workers": usable_workers(config.workers),
        "device": ranks.device,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "pin_memory": config.pin_mem,
        "channels_last": config.channels_last,
        "on_bad_image": config.on_bad_image,
        # A dry run writes nothing but its image.
        "caching": None if config.dry_run else config,
    }


def build_step(
    config: TrainConfig,
    model: TimmModel,
    train_set: ImageSet,
    *,
    spec: InputSpec,
    ranks: Ranks,
    stop: StopRequest | None = None,
    lr: float | None = None,
) -> TrainStep:
    """A training step: the model with optimizer, loss, mixing, moving average and teacher, without a schedule yet.

    Args:
        stop: the stop request of this process; None if nothing stops the step.
        lr: the optimizer's learning rate; None uses the configuration's.

    Raises ValueError if the options do not fit the model, the classes or the processes.
    """
    class_names = train_set.class_names
    class_weights = read_class_weights(config.class_weights, class_names=class_names, labels=train_set.labels)
    distillation = create_distillation(model, config, spec=spec, class_names=class_names, device=ranks.device)
    ema = create_ema(model, config)
    trained = model if distillation is None else distillation.trained
    if config.fsdp:
        shard(trained, model, ema=ema, options=config, ranks=ranks)
    optimizer = create_optimizer(
        model,
        config,
        lr=learning_rate(config, world_size=ranks.world_size) if lr is None else lr,
        extra_params=distillation.parameters() if distillation is not None else (),
    )
    return TrainStep(
        wrap_model(trained, config, ranks),
        model,
        optimizer=optimizer,
        scheduler=None,
        ema=ema,
        mixup=create_mixup(config, num_classes=len(class_names)),
        loss_fn=create_loss(config, class_weights=class_weights),
        config=config,
        ranks=ranks,
        stop=stop or StopRequest(),
        distillation=distillation,
    )


def set_schedule(step: TrainStep, config: TrainConfig, *, num_batches: int) -> int:
    """Give the step its learning-rate schedule; returns the number of epochs to train.

    `num_batches` is the number of batches per epoch in each process.
    """
    updates_per_epoch = -(-num_batches // config.grad_accum_steps)
    step.scheduler, num_epochs = create_schedule(step.optimizer, config, updates_per_epoch=updates_per_epoch)
    return min(num_epochs, config.stop_epoch or num_epochs)


def seed_run(seed: int) -> None:
    """Seed everything before the first step: initial weights are equal in all processes."""
    _seed_generators(np.random.SeedSequence(seed))


def seed_step(seed: int, *, epoch: int, batch: int, rank: int) -> None:
    """Seed the training step on one batch, differently in each process."""
    _seed_generators(np.random.SeedSequence([seed, epoch, batch, rank]))


def _seed_generators(sequence: np.random.SeedSequence) -> None:
    for_torch, for_numpy, for_python = (int(word) for word in sequence.generate_state(3))
    # torch.manual_seed would also queue the seed for absent devices, which takes longer than everything else here.
    torch.default_generator.manual_seed(for_torch)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(for_torch)
    np.random.seed(for_numpy)
    random.seed(for_python)


def use_deterministic_algorithms() -> None:
    """Make torch raise an error for operations whose result varies from run to run on a GPU."""
    # cuBLAS needs this to be deterministic, and reads it when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
