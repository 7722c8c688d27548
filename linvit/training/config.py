"""Options that cannot go together, each refused in one sentence that says how to mend it.

`TrainConfig`: every option of a training run, read from YAML and flags, checked, and saved as args.yaml.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from linvit.data.options import AugmentOptions, DataOptions, InputOptions, LoaderOptions
from linvit.settings.fields import unknown, validate
from linvit.settings.flags import UsageError, build_parser, flag_of, read_flags
from linvit.settings.yaml import read_settings, write_settings
from linvit.training.options import (
    MODEL_ARGUMENTS,
    DeviceOptions,
    DistillOptions,
    EmaOptions,
    LossOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    ScheduleOptions,
    TrackerOptions,
)
from linvit.training.timm_flags import NOT_TAKEN, review

_LINFORMER_OPTIONS = ("k", "projection", "share", "projection_init")
# Known to take the same steps on weights that are divided among processes as on whole ones. Others form norms, products
# or factors of a whole matrix.
SHARDED_OPTIMIZERS = ("adam", "adamw", "lion", "momentum", "nadam", "nadamw", "nesterov", "sgd")
# Options that do nothing without another one.
_NEEDS = {
    "bce_sum": "bce_loss",
    "bce_target_thresh": "bce_loss",
    "bce_pos_weight": "bce_loss",
    "model_ema_warmup": "model_ema",
    "model_ema_force_cpu": "model_ema",
    "layer_decay_min_scale": "layer_decay",
    "layer_decay_no_opt_scale": "layer_decay",
    "torchcompile_mode": "torchcompile",
    "no_resume_opt": "resume",
    "kd_distill_type": "kd_model_name",
    "kd_temperature": "kd_model_name",
    "distill_loss_weight": "kd_model_name",
    "task_loss_weight": "kd_model_name",
    "wandb_project": "log_wandb",
    "wandb_tags": "log_wandb",
    "wandb_resume_id": "log_wandb",
}


def check_combinations(config: TrainConfig) -> None:
    """Raise ValueError for the first options that contradict each other or do nothing."""
    for name, other in _NEEDS.items():
        is_set = getattr(config, name) != type(config).model_fields[name].default
        if is_set and not getattr(config, other):
            raise ValueError(f"{name} does nothing without {other}: set {other} or remove {name}")
    _check_model(config)
    _check_training(config)
    _check_sharding(config)
    _check_schedule(config)
    _check_loss(config)
    _check_sampling(config)
    _check_sizes(config)
    _check_distillation(config)


def _check_model(config: TrainConfig) -> None:
    # A folder or a hub name says nothing about the architecture inside.
    is_linformer = "linvit" in config.model or ":" in config.model
    for name in _LINFORMER_OPTIONS:
        if getattr(config, name) is not None and not is_linformer:
            raise ValueError(f"{name} is for linvit models, not for {config.model}: remove it or change the model")
    for name, argument in MODEL_ARGUMENTS.items():
        if getattr(config, name) and argument in config.model_kwargs:
            raise ValueError(f"{name} and {argument} in model_kwargs are the same: keep one")
    if config.initial_checkpoint and (config.pretrained or config.pretrained_path):
        other = "pretrained_path" if config.pretrained_path else "pretrained"
        raise ValueError(f"initial_checkpoint and {other} both give the first weights: keep one")


def _check_training(config: TrainConfig) -> None:
    if config.clip_mode != "norm" and config.clip_grad is None:
        raise ValueError(f"clip_mode {config.clip_mode} does nothing without clip_grad: set the value to clip at")
    if config.layer_decay is not None and "backbone" in config.freeze:
        raise ValueError("layer_decay has no layers left when freeze holds the backbone: remove one of them")
    if config.resume == "auto" and config.experiment is None:
        raise ValueError("resume auto goes on with the experiment of that name in output: set experiment")


def _check_sharding(config: TrainConfig) -> None:
    if not config.fsdp:
        return
    if config.opt.lower() not in SHARDED_OPTIMIZERS:
        raise ValueError(f"fsdp goes with the optimizers {', '.join(SHARDED_OPTIMIZERS)}, not with {config.opt}")
    if config.batch_size == "auto":
        raise ValueError("batch_size auto is tried on one process alone: give a number, or remove fsdp")
    if config.amp and config.amp_dtype == "float16":
        raise ValueError("fsdp goes with amp_dtype bfloat16, which needs no loss scaler: set it, or remove fsdp")
    if config.clip_mode == "agc":
        raise ValueError("fsdp goes with clip_mode norm or value: agc needs the norms of whole rows")
    if config.model_ema_force_cpu:
        raise ValueError("fsdp divides the moving average among processes: remove model_ema_force_cpu")


def _check_schedule(config: TrainConfig) -> None:
    if config.warmup_epochs > config.epochs and not config.warmup_prefix:
        raise ValueError(
            f"warmup_epochs {config.warmup_epochs} is longer than epochs {config.epochs}: "
            "set it lower (0 is no warm-up) or set warmup_prefix"
        )
    if config.lr is not None:
        if config.min_lr > config.lr:
            raise ValueError(f"min_lr {config.min_lr:g} is above lr {config.lr:g}: set it lower")
        if config.warmup_epochs and config.warmup_lr > config.lr:
            raise ValueError(
                f"warmup_lr {config.warmup_lr:g} is above lr {config.lr:g}: set it lower, or warmup_epochs to 0"
            )
    if list(config.decay_milestones) != sorted(set(config.decay_milestones)):
        raise ValueError(f"decay_milestones {list(config.decay_milestones)} must rise")
    if config.lr_noise is not None and len(config.lr_noise) not in (1, 2):
        raise ValueError("lr_noise takes where the noise starts, or where it starts and stops, as shares of the run")


def _check_sampling(config: TrainConfig) -> None:
    if config.aug_repeats > 1 and config.sampler == "balanced":
        raise ValueError("aug_repeats and sampler balanced both say how often an image is shown: keep one")
    if config.class_weights is not None and config.bce_loss:
        raise ValueError("class_weights weighs the classes of cross-entropy: remove it or bce_loss")
    if config.class_weights == "balanced" and config.sampler == "balanced":
        raise ValueError("class_weights balanced and sampler balanced both even out the classes: keep one")


def _check_sizes(config: TrainConfig) -> None:
    sizes = config.train_img_sizes
    if sizes is None:
        return
    if not sizes:
        raise ValueError("train_img_sizes takes at least one size; remove it to train at img_size alone")
    if config.img_size not in (None, (sizes[-1], sizes[-1])):
        raise ValueError(
            f"train_img_sizes must end with the model's own size: set img_size to {sizes[-1]} or remove it"
        )
    if len(sizes) > config.epochs:
        raise ValueError(f"train_img_sizes has {len(sizes)} sizes for {config.epochs} epochs: give each size an epoch")


def _check_distillation(config: TrainConfig) -> None:
    if config.kd_model_name is None:
        return
    if config.batch_size == "auto":
        raise ValueError("batch_size auto is tried without the teacher: give a number, or remove kd_model_name")
    if config.distill_loss_weight is None and (config.task_loss_weight or 0.0) > 1:
        raise ValueError("task_loss_weight above 1 leaves the teacher less than nothing: set distill_loss_weight, too")
    if config.kd_distill_type == "feature":
        if config.patch_drop:
            raise ValueError("kd_distill_type feature compares all tokens: remove patch_drop")
        if config.kd_temperature != 4.0:
            raise ValueError("kd_temperature softens logits: remove it or set kd_distill_type logit")


def _check_loss(config: TrainConfig) -> None:
    is_mixing = config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None
    if config.cutmix_minmax is not None and config.cutmix_minmax[0] >= config.cutmix_minmax[1]:
        raise ValueError(f"cutmix_minmax {list(config.cutmix_minmax)} must rise from the smallest to the largest box")
    if config.mixup_off_epoch and not is_mixing:
        raise ValueError("mixup_off_epoch has nothing to turn off: set mixup or cutmix, or remove it")
    if is_mixing and config.batch_size != "auto" and config.batch_size % 2:
        raise ValueError(f"mixup and cutmix pair the images of a batch: batch_size {config.batch_size} must be even")


_POSITIONALS = {"data_dir": "DATA"}
# timm's further spellings.
_SPELLINGS = {
    "batch_size": ("-b", "--batch-size"),
    "validation_batch_size": ("-vb", "--validation-batch-size"),
    "workers": ("-j", "--workers"),
    "decay_rate": ("--decay-rate", "--dr"),
}
_BARE = {"torchcompile": "inductor", "grad_checkpointing": "full"}


class TrainConfig(
    DataOptions,
    ModelOptions,
    InputOptions,
    LoaderOptions,
    DeviceOptions,
    OptimizerOptions,
    ScheduleOptions,
    AugmentOptions,
    LossOptions,
    DistillOptions,
    EmaOptions,
    RunOptions,
    TrackerOptions,
):
    """The resolved configuration of one training run: flat fields under the names of timm's flags."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_combinations(self)
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The configuration in a YAML file, such as a run's args.yaml or timm's; raises UsageError."""
        return cls._from_settings(_read_taken(Path(path)), flags={}, path=Path(path))

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], flags: Mapping[str, Any], path: Path | None) -> Self:
        def spell(name: str) -> str:
            return f"{path}: {name}" if name in settings and name not in flags else flag_of(name)

        source = f"{path}: " if path and not flags else f"{path} and the flags: " if path else ""
        try:
            return validate(cls, _with_model({**settings, **flags}), source=source, spell=spell)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def save(self, path: str | Path) -> None:
        """Write every option to a YAML file, from which `load` gives an equal configuration."""
        write_settings(Path(path), self.settings())

    def settings(self) -> dict[str, Any]:
        """Every option as plain values, in the order of the sections."""
        values = self.model_dump(mode="json")
        sections = [base.model_fields for base in type(self).__bases__ if issubclass(base, BaseModel)]
        return {name: values[name] for section in sections for name in section}

    @property
    def images_per_batch(self) -> int:
        """`batch_size`, once it is a number."""
        assert isinstance(self.batch_size, int), "batch_size auto is settled before it is read"
        return self.batch_size

    def model_arguments(self) -> dict[str, Any]:
        """The keywords for `timm.create_model` that were set, besides `num_classes` and what concerns weights."""
        values = {argument: getattr(self, name) for name, argument in MODEL_ARGUMENTS.items()}
        if self.train_img_sizes is not None:
            # Built at the last size: other grids are resampled per batch, and no parameter is ever replaced.
            values |= {"img_size": (self.train_img_sizes[-1],) * 2, "dynamic_img_size": True}
        return {name: value for name, value in values.items() if value is not None} | self.model_kwargs


Config = TypeVar("Config", bound=TrainConfig)


def training_parser(
    prog: str = "train_imagenet.py",
    kind: type[TrainConfig] = TrainConfig,
    description: str = "Train an image classifier on folders of images.",
    spellings: Mapping[str, Sequence[str]] | None = None,
) -> argparse.ArgumentParser:
    parser = build_parser(
        kind,
        prog=prog,
        description=f"{description} Flags carry timm's names and override the YAML.",
        positionals=_POSITIONALS,
        spellings={**_SPELLINGS, **(spellings or {})},
        bare=_BARE,
    )
    parser.add_argument(
        "-c", "--config", metavar="FILE", type=Path, default=argparse.SUPPRESS, help="YAML file of options"
    )
    return parser


def parse(argv: Sequence[str], prog: str = "train_imagenet.py") -> TrainConfig:
    """The configuration that a command line gives, over its `--config` file and the defaults; raises UsageError."""
    return parse_with(training_parser(prog), argv, TrainConfig)


def parse_with(parser: argparse.ArgumentParser, argv: Sequence[str], kind: type[Config]) -> Config:
    """`parse` for options beside those of training, with a `training_parser` for that kind of configuration."""
    not_taken = {flag_of(name): entry.reason for name, entry in NOT_TAKEN.items()}
    not_taken["--local_rank"] = not_taken["--local-rank"]
    flags = read_flags(parser, kind, argv, positionals=_POSITIONALS, not_taken=not_taken)
    path = flags.pop("config", None)
    config = kind._from_settings(_read_taken(path) if path else {}, flags, path)
    if config.data_dir is None:
        raise UsageError("give the folder of images: DATA on the command line or data_dir in the YAML")
    return config


def _with_model(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings and, where they name a folder of weights but no model, the model that lies in that folder."""
    folder = settings.get("pretrained_path")
    if not isinstance(folder, str | Path) or "model" in settings:
        return settings
    places = (Path(folder) / "best", Path(folder))
    found = next((place for place in places if (place / "config.json").is_file()), None)
    return settings if found is None else {**settings, "model": f"local-dir:{found}"}


def _read_taken(path: Path) -> dict[str, Any]:
    try:
        settings, refused = review(read_settings(path))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if refused:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in refused.items())
        raise UsageError(f"{path}: linvit does not take these of timm's options, remove them: {reasons}")
    for name in settings:
        if name not in TrainConfig.model_fields:
            raise UsageError(f"{path}: {unknown('option', name, TrainConfig.model_fields)}")
    return settings
