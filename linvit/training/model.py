"""Parameters that stay as they are.

Image sizes that grow through training: shorter sequences at first, the model's own size at the end.

The model is built at the last size with `dynamic_img_size=True`: for other grids the position embedding is resampled
and E and F are remapped by overlap area with every batch, so that no parameter, gradient or moment ever changes shape.

The model of a run: built by its timm name, started from given weights, placed, compiled, spread over processes.
"""

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from linvit.distributed import Ranks
from linvit.model.build import TimmModel, create_model
from linvit.model.vit import LinformerViT
from linvit.output.files import reason
from linvit.runs.weights import classifier_parameters, compact, fit_weights, load_exactly, read_weights
from linvit.settings.fields import unknown
from linvit.training.config import TrainConfig
from linvit.training.options import DeviceOptions, ModelOptions, ScheduleOptions


def freeze(model: TimmModel, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters that `patterns` name, as parameters, modules or with wildcards.

    "backbone" means all but the classifier. A parameter that layers share goes by its first name and is frozen for all
    of them; returns a note for the log where the patterns name only some of them. Raises ValueError for a pattern that
    names nothing, or where nothing would be left to train.
    """
    parameters = dict(model.named_parameters())
    classifier = {id(parameter) for parameter in model.get_classifier().parameters()}

    def is_named(name: str, parameter: nn.Parameter, pattern: str) -> bool:
        if pattern == "backbone":
            return id(parameter) not in classifier
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")

    frozen: dict[int, str] = {}
    for pattern in patterns:
        named = {id(each): name for name, each in parameters.items() if is_named(name, each, pattern)}
        if not named:
            raise ValueError(f"--freeze: {unknown('parameter or module', pattern, _names(model))}")
        frozen |= named
    for name in frozen.values():
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError("--freeze leaves nothing to train: name fewer parameters")
    unnamed = {
        name: frozen[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in frozen and not any(is_named(name, parameter, pattern) for pattern in patterns)
    }
    if not unnamed:
        return []
    return [f"--freeze also freezes {compact(list(unnamed))}: shared with {compact(set(unnamed.values()))}"]


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]


def size_in(epoch: int, options: ScheduleOptions) -> int | None:
    """The size of that epoch's images: the epochs are divided evenly; None where `train_img_sizes` is not set."""
    sizes = options.train_img_sizes
    if sizes is None:
        return None
    return sizes[min(epoch * len(sizes) // options.epochs, len(sizes) - 1)]


def epoch_sizes(options: ScheduleOptions) -> list[tuple[int, int]]:
    """(height, width) of each epoch's images, of later epochs those of the last; empty where sizes do not change."""
    sizes = [size_in(epoch, options) for epoch in range(options.epochs)]
    return [(size, size) for size in sizes if size is not None]


def check_sizes(model: TimmModel, sizes: Sequence[int]) -> None:
    """Raise ValueError for the first size that the model does not take."""
    # There a forward pass costs nothing.
    shadow = copy.deepcopy(model).to("meta")
    for size in sizes:
        try:
            shadow(torch.empty(1, 3, size, size, device="meta"))
        except (AssertionError, ValueError, RuntimeError) as error:
            raise ValueError(f"--train-img-sizes: the model does not take {size}×{size} px: {reason(error)}") from error


def build_model(config: TrainConfig, *, class_names: Sequence[str]) -> tuple[TimmModel, list[str]]:
    """The run's model with a class for each name, on the CPU, and which of its parameters no given weights cover.

    Raises ValueError where name, arguments, classes or weights do not fit.
    """
    if config.num_classes not in (None, len(class_names)):
        raise ValueError(f"--num-classes {config.num_classes}: the data has {len(class_names)} classes; leave it out")
    try:
        model = create_model(
            config.model,
            num_classes=len(class_names),
            pretrained=config.pretrained and config.pretrained_path is None,
            **config.model_arguments(),
        )
    except ValueError as error:
        if config.train_img_sizes is not None and "dynamic_img_size" in str(error):
            raise ValueError(f"--train-img-sizes: {config.model} takes images of one size only; remove it") from error
        raise
    if config.train_img_sizes is not None:
        check_sizes(model, config.train_img_sizes)
    if config.initial_checkpoint is not None:
        saved = read_weights(config.initial_checkpoint)
        load_exactly(model, saved.state_dict, path=saved.path)
        return model, []
    new = [name for name, _ in model.named_parameters()]
    if config.pretrained:
        other_classes = model.pretrained_cfg["num_classes"] != model.num_classes
        new = classifier_parameters(model) if other_classes else []
    if config.pretrained_path is not None:
        new = fit_weights(model, read_weights(config.pretrained_path), class_names=class_names)
    _initialise_classifier(model, config)
    return model, new


def _initialise_classifier(model: TimmModel, options: ModelOptions) -> None:
    parameters = dict(model.get_classifier().named_parameters())
    with torch.no_grad():
        if options.head_init_scale is not None:
            for parameter in parameters.values():
                parameter.mul_(options.head_init_scale)
        if options.head_init_bias is not None:
            parameters["bias"].fill_(options.head_init_bias)


def place_model(model: TimmModel, options: DeviceOptions, ranks: Ranks) -> None:
    """Move the model to its device, in the memory layout and with the checkpointing asked for.

    One that is to be divided among processes stays as it is: it may not fit whole, and is divided along rows.
    """
    if not options.fsdp:
        model.to(ranks.device)
        if options.channels_last:
            model.to(memory_format=torch.channels_last)
    checkpointing = options.grad_checkpointing
    if not isinstance(model, LinformerViT):
        if checkpointing == "mlp":
            raise ValueError(f"--grad-checkpointing mlp is for linvit models, not for {type(model).__name__}: use full")
        checkpointing = checkpointing in (True, "full")
    model.set_grad_checkpointing(checkpointing)


def wrap_model(model: nn.Module, options: DeviceOptions, ranks: Ranks) -> nn.Module:
    """What the training step calls: the model itself, compiled and averaging gradients over processes as asked for.

    One that `linvit.training.fsdp` has divided does both already.
    """
    if options.fsdp:
        return model
    wrapped: nn.Module = model
    if options.torchcompile is not None:
        wrapped = cast(nn.Module, torch.compile(model, backend=options.torchcompile, mode=options.torchcompile_mode))
    if ranks.world_size > 1:
        devices = [ranks.device.index] if ranks.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=devices)
        # Buffers are the same in all processes; sending a large fixed projection with every step would be slow.
        wrapped.broadcast_buffers = False
    return wrapped
