"""The model of a run: built by its timm name, started from given weights, placed, compiled, spread over processes."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from linvit.timmmodel import TimmModel, create_model
from linvit.training.config import TrainConfig
from linvit.training.distributed import Ranks
from linvit.training.options import DeviceOptions, ModelOptions
from linvit.training.progressive import check_sizes
from linvit.vit import LinformerViT
from linvit.weights import classifier_parameters, fit_weights, load_exactly, read_weights


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

    One that `linvit.training.sharding` has divided does both already.
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
