"""Optimizer, learning rate schedule and weight average (EMA), built with timm from the options of a run."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from linvit.runs.weights import compact
from linvit.training.config import TrainConfig
from linvit.training.fsdp import shard_like
from linvit.training.options import EmaOptions, OptimizerOptions, ScheduleOptions

# Entries of a parameter group that come from the options, or from timm's scheduler.
_GROUP_SETTINGS = ("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum", "use_fallback")


def learning_rate(config: TrainConfig, *, world_size: int) -> float:
    """`lr`, or `lr_base` scaled with the global batch size as in timm."""
    if config.lr is not None:
        return config.lr
    ratio = config.images_per_batch * config.grad_accum_steps * world_size / config.lr_base_size
    adaptive = any(family in config.opt.lower() for family in ("ada", "lamb"))
    scale = config.lr_base_scale or ("sqrt" if adaptive else "linear")
    return float(config.lr_base * (ratio**0.5 if scale == "sqrt" else ratio))


def create_optimizer(
    model: nn.Module, options: OptimizerOptions, *, lr: float, extra_params: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """timm's optimizer, with its parameter groups for weight decay and layer decay.

    The Muon optimizers leave parameters that the model exempts from weight decay (E and F, position embedding, tokens)
    to their fallback, AdamW or NAdamW, since these are not matrices between features, whatever their shape.

    Args:
        extra_params: parameters outside the model, trained without weight decay and layer decay.

    Raises ValueError for an argument that the optimizer does not accept. Its name has been checked with the options.
    """
    settings = {
        "fallback_no_weight_decay": True,
        **optimizer_kwargs(options.model_copy(update={"lr": lr})),
        **options.opt_kwargs,
    }
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(model, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--opt {options.opt} does not accept these options: {error}") from error
    if extra_params:
        optimizer.add_param_group({"params": list(extra_params), "weight_decay": 0.0})
    return optimizer


def trained_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of an optimizer's parameters in its order; parameters outside the model are numbered."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # The file format of checkpoints names extra parameters `besides.N`.
    numbers = itertools.count()
    return [
        names[id(parameter)] if id(parameter) in names else f"besides.{next(numbers)}"
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], *, names: Sequence[str], names_before: Sequence[str]
) -> None:
    """Load a saved state dict, matching parameters by name and keeping the current groups and their settings.

    torch's own `load_state_dict` matches parameters by position, and silently restores the saved learning rate, weight
    decay and so on.

    Args:
        names: current `trained_names`.
        names_before: `trained_names` when the state was saved.

    Raises ValueError if the trained parameters differ, or if Muon updated some that its fallback updates now.
    """
    if set(names) != set(names_before):
        other = sorted(set(names) ^ set(names_before))
        raise ValueError(f"{compact(other)} {'is' if len(other) == 1 else 'are'} trained in only one of them")
    number = {name: index for index, name in enumerate(names)}
    group_before = {names_before[index]: group for group in saved["param_groups"] for index in group["params"]}
    groups = []
    left_to_fallback: set[str] = set()
    for group in optimizer.state_dict()["param_groups"]:
        if group.get("use_fallback"):
            left_to_fallback.update(names[index] for index in group["params"])
        # Keep the rest: some optimizers count their steps in the group.
        kept = {
            key: value
            for key, value in group_before[names[group["params"][0]]].items()
            if key not in (*_GROUP_SETTINGS, "params")
        }
        groups.append(kept | {key: group[key] for key in (*_GROUP_SETTINGS, "params") if key in group})
    # Muon stores in each parameter's state whether it updates it, which would override the current groups.
    used_muon = {names_before[index] for index, values in saved["state"].items() if values.get("use_muon")}
    if moved := used_muon & left_to_fallback:
        raise ValueError(f"Muon updated {compact(moved)}, which its fallback optimizer updates now")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {}
    for index, values in saved["state"].items():
        now = number[names_before[index]]
        state[now] = {key: shard_like(value, parameters[now]) for key, value in values.items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


class Schedule(NamedTuple):
    """timm's scheduler (None for a constant learning rate), and its length in epochs."""

    scheduler: Scheduler | None
    num_epochs: int


def create_schedule(optimizer: torch.optim.Optimizer, options: ScheduleOptions, *, updates_per_epoch: int) -> Schedule:
    """timm's learning rate schedule: a function of the epoch or update number only, so it resumes anywhere."""
    settings = scheduler_kwargs(options)
    return Schedule(*create_scheduler_v2(optimizer, **settings, updates_per_epoch=updates_per_epoch))


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate without layer decay, which is that of the last layer."""
    return float(max(group["lr"] for group in optimizer.param_groups))


def create_ema(model: nn.Module, options: EmaOptions) -> ModelEmaV3 | None:
    """A moving average of the weights that starts from their current values; None if it is disabled."""
    if not options.model_ema:
        return None
    return ModelEmaV3(
        model,
        decay=options.model_ema_decay,
        use_warmup=options.model_ema_warmup,
        device="cpu" if options.model_ema_force_cpu else None,
    )
