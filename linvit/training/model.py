"""The model of a run: built, initialised, frozen in part, placed on its device, compiled and wrapped.

`train_img_sizes` trains on shorter sequences first and at the model's own size last. The model is built at the last
size with `dynamic_img_size=True`: for every batch of another size the position embedding is resampled, and E and F are
remapped by overlap area. So no parameter, gradient or optimizer state ever changes shape.
"""

import copy
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from linvit.data.augment.build import resolve_input
from linvit.data.sources.classes import order_conflict
from linvit.distributed import Ranks
from linvit.model.build import LOCAL, TimmModel, create_model
from linvit.model.transformer import LinformerTransformer
from linvit.output.files import reason
from linvit.runs.weights import SavedWeights, classifier_parameters, compact, fit_weights, load_exactly, read_weights
from linvit.settings.fields import listed, unknown
from linvit.settings.flags import UsageError
from linvit.training.config import TrainConfig
from linvit.training.log import print_line
from linvit.training.lora import check_adapters
from linvit.training.options import DeviceOptions, ModelOptions, ScheduleOptions


def build_model(
    config: TrainConfig, *, class_names: Sequence[str], log: Callable[[str], object] = print_line
) -> tuple[TimmModel, list[str]]:
    """The model of a run on the CPU, and the names of its parameters that do not come from given weights.

    `log` is called with a warning if a classifier is kept whose classes are unknown or others than `class_names`.

    Raises ValueError if the name, arguments, classes or weights do not fit together.
    """
    if config.num_classes not in (None, len(class_names)):
        raise ValueError(
            f"--num-classes {config.num_classes}: the data has {len(class_names)} classes; correct or remove it"
        )
    weights = config.pretrained_path
    if config.pretrained and weights is None and config.model.startswith(LOCAL):
        weights = Path(config.model.removeprefix(LOCAL))
    model = _create(config, num_classes=len(class_names), pretrained=config.pretrained and weights is None)
    if config.initial_checkpoint is not None:
        saved = read_weights(config.initial_checkpoint)
        load_exactly(model, saved.state_dict, path=saved.path)
        _report_classifier(saved, class_names, log)
        return model, []
    new = [name for name, _ in model.named_parameters()]
    if config.pretrained:
        other_classes = model.pretrained_cfg["num_classes"] != model.num_classes
        new = classifier_parameters(model) if other_classes else []
    if weights is not None:
        saved = read_weights(weights)
        new = fit_weights(model, saved, class_names=class_names)
        _report_input_range(saved, config, log)
        if not set(new) & set(classifier_parameters(model)):
            _report_classifier(saved, class_names, log)
    _initialise_classifier(model, config)
    return model, new


def check_options(config: TrainConfig) -> None:
    """Raise UsageError for options that do not fit the model, before images are read. Nothing is computed for it."""
    try:
        with torch.device("meta"):
            # Initial weights take most of the time, even on the meta device.
            fast = {"weight_init": "skip"} if config.model.startswith("linvit_") else {}
            model = _create(config, num_classes=None, pretrained=False, **fast)
        check_adapters(model, config)
        freeze(model, config.freeze)
        resolve_input(model, config)
    except ValueError as error:
        # A few models cannot be built without computing; building the real one will show whether it fits.
        if not isinstance(error.__cause__, RuntimeError):
            raise UsageError(str(error)) from error


def _create(config: TrainConfig, *, num_classes: int | None, pretrained: bool, **defaults: Any) -> TimmModel:
    arguments = {**defaults, **config.model_arguments()}
    try:
        model = create_model(config.model, num_classes=num_classes, pretrained=pretrained, **arguments)
    except ValueError as error:
        if config.train_img_sizes is not None and "dynamic_img_size" in str(error):
            raise ValueError(
                f"--train-img-sizes: {config.model} supports images of one size only; remove it"
            ) from error
        raise
    if config.train_img_sizes is not None:
        check_sizes(model, config.train_img_sizes)
    return model


def _report_classifier(saved: SavedWeights, class_names: Sequence[str], log: Callable[[str], object]) -> None:
    """Log that the classifier of these weights is kept, if its classes are unknown or others."""
    if saved.class_names is None:
        conflict = order_conflict(class_names)
        advice = "" if conflict is None else f"; {conflict}: if timm trained the weights, use --class-map timm"
        log(
            f"{saved.path} has no class names; its classifier of {len(class_names)} classes is kept, with label 0 as "
            f"{class_names[0]!r}{advice}"
        )
    elif list(saved.class_names) != list(class_names):
        log(
            f"{saved.path} was trained on other classes ({listed(saved.class_names, most=3)}); its classifier is kept, "
            "because --initial-checkpoint keeps every weight; --pretrained-path starts a new classifier"
        )


def _report_input_range(saved: SavedWeights, config: TrainConfig, log: Callable[[str], object]) -> None:
    recorded = saved.settings.get("input_range")
    if isinstance(recorded, list) and config.input_range is None:
        log(
            f"{saved.path} was trained with --input-range {' '.join(map(str, recorded))}, but this run has no "
            "--input-range; set it if its images have 16 bits"
        )


def _initialise_classifier(model: TimmModel, options: ModelOptions) -> None:
    parameters = dict(model.get_classifier().named_parameters())
    with torch.no_grad():
        if options.head_init_scale is not None:
            for parameter in parameters.values():
                parameter.mul_(options.head_init_scale)
        if options.head_init_bias is not None:
            parameters["bias"].fill_(options.head_init_bias)


def check_sizes(model: TimmModel, sizes: Sequence[int]) -> None:
    """Raise ValueError for the first size that the model does not support."""
    # On the meta device a forward pass costs nothing.
    shadow = copy.deepcopy(model).to("meta")
    for size in sizes:
        try:
            shadow(torch.empty(1, 3, size, size, device="meta"))
        except (AssertionError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"--train-img-sizes: the model does not support {size}×{size} px: {reason(error)}"
            ) from error


def freeze(model: TimmModel, patterns: Sequence[str]) -> list[str]:
    """Freeze the parameters that match `patterns`.

    A pattern is the name of a parameter or module, a name with wildcards, or "backbone" for all but the classifier.
    A parameter that layers share has the name of the first layer and is frozen for all of them. Returns notes for the
    log about shared parameters of which the patterns match only some names.

    Raises ValueError for a pattern that matches nothing, or if nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    classifier = {id(parameter) for parameter in model.get_classifier().parameters()}

    def matches(name: str, parameter: nn.Parameter, pattern: str) -> bool:
        if pattern == "backbone":
            return id(parameter) not in classifier
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")

    names = [name for name, _ in model.named_modules()] + list(parameters)
    # By the parameter's id.
    frozen: dict[int, str] = {}
    for pattern in patterns:
        matched = {id(each): name for name, each in parameters.items() if matches(name, each, pattern)}
        if not matched:
            raise ValueError(f"--freeze: {unknown('parameter or module', pattern, names)}")
        frozen |= matched
    for name in frozen.values():
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError("--freeze leaves nothing to train: name fewer parameters")
    unmatched = {
        name: frozen[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in frozen and not any(matches(name, parameter, pattern) for pattern in patterns)
    }
    if not unmatched:
        return []
    return [f"--freeze also freezes {compact(list(unmatched))}: shared with {compact(set(unmatched.values()))}"]


def place_model(model: TimmModel, options: DeviceOptions, ranks: Ranks) -> None:
    """Move the model to its device, and set its memory format and gradient checkpointing.

    A model that will be sharded stays on the CPU, since it may not fit on one device, and keeps its memory format,
    since it is sharded by rows.

    Raises ValueError if the model does not support this checkpointing.
    """
    if not options.fsdp:
        model.to(ranks.device)
        if options.channels_last:
            model.to(memory_format=torch.channels_last)
    checkpointing = options.grad_checkpointing
    if not isinstance(model, LinformerTransformer):
        if checkpointing == "mlp":
            raise ValueError(f"--grad-checkpointing mlp is for linvit models, not for {type(model).__name__}: use full")
        checkpointing = checkpointing in (True, "full")
    model.set_grad_checkpointing(checkpointing)


def wrap_model(model: nn.Module, options: DeviceOptions, ranks: Ranks) -> nn.Module:
    """The module that the training step calls: the model, compiled and wrapped in DistributedDataParallel if needed.

    A model that `linvit.training.fsdp` has sharded needs neither and is returned as it is.
    """
    if options.fsdp:
        return model
    wrapped: nn.Module = model
    if options.torchcompile is not None:
        wrapped = cast(nn.Module, torch.compile(model, backend=options.torchcompile, mode=options.torchcompile_mode))
    if ranks.world_size > 1:
        devices = [ranks.device.index] if ranks.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=devices)
        # Buffers are equal in all processes, and broadcasting a large fixed projection at every step would be slow.
        wrapped.broadcast_buffers = False
    return wrapped


def train_size(epoch: int, options: ScheduleOptions) -> int | None:
    """Size of the training images in this epoch, in pixels; None if `train_img_sizes` is not set.

    The sizes share the epochs of the schedule evenly, and later epochs keep the last one.
    """
    sizes = options.train_img_sizes
    if sizes is None:
        return None
    return sizes[min(epoch * len(sizes) // options.epochs, len(sizes) - 1)]


def epoch_sizes(options: ScheduleOptions) -> list[tuple[int, int]]:
    """(height, width) of the training images in each epoch of the schedule; empty if `train_img_sizes` is not set."""
    sizes = [train_size(epoch, options) for epoch in range(options.epochs)]
    return [(size, size) for size in sizes if size is not None]
