"""Optimizer, schedule and moving average, built by timm from the options of a run."""

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

# What options, and timm's scheduler from them, put into an optimizer's groups.
_FROM_SETTINGS = ("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum", "use_fallback")


def learning_rate(config: TrainConfig, *, world_size: int) -> float:
    """`lr`, or `lr_base` grown with the global batch as timm grows it."""
    if config.lr is not None:
        return config.lr
    ratio = config.images_per_batch * config.grad_accum_steps * world_size / config.lr_base_size
    adaptive = any(family in config.opt.lower() for family in ("ada", "lamb"))
    scale = config.lr_base_scale or ("sqrt" if adaptive else "linear")
    return float(config.lr_base * (ratio**0.5 if scale == "sqrt" else ratio))


def create_optimizer(
    model: nn.Module, options: OptimizerOptions, *, lr: float, extra_params: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """timm's optimizer of that name, with its parameter groups (weight decay, layer decay).

    `extra_params`, which are not the model's, are trained without either. Muon leaves what the model exempts from weight decay
    (E and F, position embedding, tokens) to its fallback, AdamW or NAdamW: they are not matrices between features,
    whatever their shape.

    Raises ValueError for an argument that the optimizer does not take; its name was checked with the options.
    """
    settings = {
        "fallback_no_weight_decay": True,
        **optimizer_kwargs(options.model_copy(update={"lr": lr})),
        **options.opt_kwargs,
    }
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(model, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--opt {options.opt} does not take these options: {error}") from error
    if extra_params:
        optimizer.add_param_group({"params": list(extra_params), "weight_decay": 0.0})
    return optimizer


def trained_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of an optimizer's parameters, in its order; of those that are not the model's, their number."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # `besides.N` is what checkpoints call the extra parameters.
    others = itertools.count()
    return [
        names[id(parameter)] if id(parameter) in names else f"besides.{next(others)}"
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], *, names: Sequence[str], names_before: Sequence[str]
) -> None:
    """Load a state dict, by the parameters' names and into today's groups.

    torch's own `load_state_dict` goes by numbers, and brings back the learning rate, weight decay, ... of then without
    a word. Raises ValueError where other parameters are trained now, or Muon had some that its fallback has now.
    """
    if set(names) != set(names_before):
        other = sorted(set(names) ^ set(names_before))
        raise ValueError(f"{compact(other)} {'is' if len(other) == 1 else 'are'} trained in one of them alone")
    number = {name: index for index, name in enumerate(names)}
    group_before = {names_before[index]: group for group in saved["param_groups"] for index in group["params"]}
    groups = []
    left_to_fallback: set[str] = set()
    for group in optimizer.state_dict()["param_groups"]:
        if group.get("use_fallback"):
            left_to_fallback.update(names[index] for index in group["params"])
        # Some optimizers count their steps in the group.
        kept = {
            key: value
            for key, value in group_before[names[group["params"][0]]].items()
            if key not in (*_FROM_SETTINGS, "params")
        }
        groups.append(kept | {key: group[key] for key in (*_FROM_SETTINGS, "params") if key in group})
    # Muon keeps its choice in each parameter's state, where it would outlive the groups.
    had_muon = {names_before[index] for index, values in saved["state"].items() if values.get("use_muon")}
    if moved := had_muon & left_to_fallback:
        raise ValueError(f"Muon updated {compact(moved)}, which its fallback optimizer updates now")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {}
    for index, values in saved["state"].items():
        now = number[names_before[index]]
        state[now] = {key: shard_like(value, parameters[now]) for key, value in values.items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


class Schedule(NamedTuple):
    """timm's scheduler (None: the rate stays as it is) and the epochs that it lasts."""

    scheduler: Scheduler | None
    num_epochs: int


def create_schedule(optimizer: torch.optim.Optimizer, options: ScheduleOptions, *, updates_per_epoch: int) -> Schedule:
    """timm's learning-rate schedule, a function of the epoch or the update alone: it can be resumed anywhere."""
    settings = scheduler_kwargs(options)
    return Schedule(*create_scheduler_v2(optimizer, **settings, updates_per_epoch=updates_per_epoch))


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the layers that are not slowed down by layer decay."""
    return float(max(group["lr"] for group in optimizer.param_groups))


def create_ema(model: nn.Module, options: EmaOptions) -> ModelEmaV3 | None:
    """A moving average of the model's weights, beginning at them; None where it is off."""
    if not options.model_ema:
        return None
    return ModelEmaV3(
        model,
        decay=options.model_ema_decay,
        use_warmup=options.model_ema_warmup,
        device="cpu" if options.model_ema_force_cpu else None,
    )
