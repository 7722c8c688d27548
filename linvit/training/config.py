"""`TrainConfig`: every option of a training run, from YAML and flags, checked and saved as args.yaml.

Options that contradict each other or do nothing are errors, in one sentence that says what to change. Their names are
in backquotes there, which `validate` replaces by the flag or the YAML key that the user wrote.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from linvit.data.options import AugmentOptions, DataOptions, InputOptions, LoaderOptions
from linvit.settings.fields import one_of, unknown, validate
from linvit.settings.flags import UsageError, build_parser, flag_of, read_flags
from linvit.settings.yaml import read_settings, write_settings
from linvit.training.lora_options import LoraOptions
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
from linvit.training.timm_flags import EARLIER, UNSUPPORTED, split_timm_settings

_POSITIONALS = {"data_dir": "DATA"}
# Options whose flags have further spellings in timm.
_SPELLINGS = {
    "batch_size": ("-b", "--batch-size"),
    "validation_batch_size": ("-vb", "--validation-batch-size"),
    "workers": ("-j", "--workers"),
    "decay_rate": ("--decay-rate", "--dr"),
}
# Values of flags that are given without one.
_BARE = {"torchcompile": "inductor", "grad_checkpointing": "full"}

_LINFORMER_OPTIONS = ("k", "projection", "share", "projection_init", "local", "stem")
# Optimizers known to make the same steps on sharded weights as on full ones. Others compute norms, products or factors
# of full matrices.
SHARDED_OPTIMIZERS = ("adam", "adamw", "lion", "momentum", "nadam", "nadamw", "nesterov", "sgd")
# Options that do nothing without another one.
_REQUIRES = {
    "bce_sum": "bce_loss",
    "bce_target_thresh": "bce_loss",
    "bce_pos_weight": "bce_loss",
    "model_ema_warmup": "model_ema",
    "model_ema_force_cpu": "model_ema",
    "lora_targets": "lora",
    "layer_decay_min_scale": "layer_decay",
    "layer_decay_no_opt_scale": "layer_decay",
    "torchcompile_mode": "torchcompile",
    "no_resume_opt": "resume",
    "allow_changed_data": "resume",
    "kd_distill_type": "kd_model_name",
    "kd_temperature": "kd_model_name",
    "distill_loss_weight": "kd_model_name",
    "task_loss_weight": "kd_model_name",
    "wandb_project": "log_wandb",
    "wandb_tags": "log_wandb",
    "wandb_resume_id": "log_wandb",
}


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
    LoraOptions,
    RunOptions,
    TrackerOptions,
):
    """The resolved configuration of a training run: flat fields under the names of timm's flags."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        _check_requirements(self)
        _check_model(self)
        _check_training(self)
        _check_sharding(self)
        _check_adapters(self)
        _check_schedule(self)
        _check_loss(self)
        _check_sampling(self)
        _check_sizes(self)
        _check_distillation(self)
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the configuration in a YAML file, such as a run's args.yaml or timm's; raises UsageError."""
        return cls._from_settings(_read_yaml(Path(path)), flags={}, path=Path(path))

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], flags: Mapping[str, Any], path: Path | None) -> Self:
        """The configuration of the `settings` in the YAML file at `path`, which the `flags` override."""

        def source(name: str | None) -> str:
            if path is None or name in flags:
                return ""
            return f"{path} and the flags: " if name is None and flags else f"{path}: "

        def spell(name: str) -> str:
            return flag_of(name) if path is None or name in flags else name

        _check_hub(settings, flags, path)
        try:
            return validate(cls, _with_model({**settings, **flags}), source=source, spell=spell)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def save(self, path: str | Path) -> None:
        """Write every option to a YAML file, from which `load` returns an equal configuration."""
        write_settings(Path(path), self.settings())

    def settings(self) -> dict[str, Any]:
        """Every option as a plain value, in the order of the sections."""
        values = self.model_dump(mode="json")
        sections = [base.model_fields for base in type(self).__bases__ if issubclass(base, BaseModel)]
        return {name: values[name] for section in sections for name in section}

    @property
    def images_per_batch(self) -> int:
        """`batch_size` as a number, once `auto` has been resolved."""
        assert isinstance(self.batch_size, int), "batch_size auto must be resolved first"
        return self.batch_size

    def model_arguments(self) -> dict[str, Any]:
        """The keyword arguments for `timm.create_model` that are set, without `num_classes` and pretrained weights."""
        values = {argument: getattr(self, name) for name, argument in MODEL_ARGUMENTS.items()}
        if self.train_img_sizes is not None:
            # The model is built at the last size and resampled per batch for others, so no parameter is ever replaced.
            values |= {"img_size": (self.train_img_sizes[-1],) * 2, "dynamic_img_size": True}
        return {name: value for name, value in values.items() if value is not None} | self.model_kwargs


Config = TypeVar("Config", bound=TrainConfig)


def training_parser(
    prog: str = "train_imagenet.py",
    kind: type[TrainConfig] = TrainConfig,
    description: str = "Train an image classifier on folders of images.",
    spellings: Mapping[str, Sequence[str]] | None = None,
) -> argparse.ArgumentParser:
    """A parser for `kind`, which is TrainConfig or a subclass with further options, and for `--config`."""
    parser = build_parser(
        kind,
        prog=prog,
        description=f"{description} Flags have timm's names and override the YAML file.",
        positionals=_POSITIONALS,
        spellings={**_SPELLINGS, **(spellings or {})},
        bare=_BARE,
    )
    parser.add_argument(
        "-c", "--config", metavar="FILE", type=Path, default=argparse.SUPPRESS, help="YAML file with options"
    )
    return parser


def parse(argv: Sequence[str], prog: str = "train_imagenet.py") -> TrainConfig:
    """The configuration of a command line: its flags, then its `--config` file, then the defaults.

    Raises UsageError for a mistake in either.
    """
    return parse_with(training_parser(prog), argv, TrainConfig)


def parse_with(parser: argparse.ArgumentParser, argv: Sequence[str], kind: type[Config]) -> Config:
    """`parse` for a subclass of TrainConfig, with the `training_parser` for it."""
    unsupported = {flag_of(name): option.reason for name, option in (UNSUPPORTED | EARLIER).items()}
    unsupported["--local_rank"] = unsupported["--local-rank"]
    flags = read_flags(parser, kind, argv, positionals=_POSITIONALS, unsupported=unsupported)
    path = flags.pop("config", None)
    config = kind._from_settings(_read_yaml(path) if path else {}, flags, path)
    if config.data_dir is None:
        raise UsageError("give the folder of images: DATA on the command line or data_dir in the YAML file")
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings, refused = split_timm_settings(read_settings(path))
    except ValueError as error:
        raise UsageError(str(error)) from None
    faults = [
        unknown("option", name, TrainConfig.model_fields) for name in settings if name not in TrainConfig.model_fields
    ]
    if refused:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in refused.items())
        faults.append(f"linvit does not support these options of timm, remove them: {reasons}")
    if faults:
        raise UsageError(f"{path}: {'; '.join(faults)}")
    return settings


def _check_hub(settings: Mapping[str, Any], flags: Mapping[str, Any], path: Path | None) -> None:
    """Raise UsageError if a file names a model or data on the hub; only the command line may start a download."""
    for name in {"model", "kd_model_name", "data_dir"} - flags.keys():
        value = settings.get(name)
        prefixes = ("hf:",) if name == "data_dir" else ("hf-hub:", "hf_hub:")
        if not isinstance(value, str) or not value.lower().startswith(prefixes):
            continue
        # Data sets may lie on the disk, too.
        if name != "data_dir" or not Path(value.removeprefix("hf:")).exists():
            raise UsageError(
                f"{path}: a file cannot start a download; give {flag_of(name)} {value} on the command line"
            )


def _with_model(settings: dict[str, Any]) -> dict[str, Any]:
    """Add the model in the folder `pretrained_path` to settings that name no model."""
    folder = settings.get("pretrained_path")
    if not isinstance(folder, str | Path) or "model" in settings:
        return settings
    places = (Path(folder) / "best", Path(folder))
    found = next((place for place in places if (place / "config.json").is_file()), None)
    return settings if found is None else {**settings, "model": f"local-dir:{found}"}


def _check_requirements(config: TrainConfig) -> None:
    for name, other in _REQUIRES.items():
        is_set = getattr(config, name) != type(config).model_fields[name].default
        if is_set and not getattr(config, other):
            raise ValueError(f"`{name}` does nothing without `{other}`: set `{other}` or remove `{name}`")


def _check_model(config: TrainConfig) -> None:
    # The name of a folder or a hub model does not tell its architecture.
    may_be_linformer = "linvit" in config.model or ":" in config.model
    for name in _LINFORMER_OPTIONS:
        if getattr(config, name) is not None and not may_be_linformer:
            raise ValueError(f"`{name}` is for linvit models, not for {config.model}: remove it or change the model")
    for name, argument in MODEL_ARGUMENTS.items():
        if getattr(config, name) and argument in config.model_kwargs:
            raise ValueError(f"`{name}` and {argument} in `model_kwargs` set the same argument: keep one")
    if "num_classes" in config.model_kwargs:
        raise ValueError("`model_kwargs` takes no num_classes, which the data determine: remove it")
    if config.initial_checkpoint and (config.pretrained or config.pretrained_path):
        other = "pretrained_path" if config.pretrained_path else "pretrained"
        raise ValueError(f"`initial_checkpoint` and `{other}` both set the initial weights: keep one")


def _check_training(config: TrainConfig) -> None:
    if config.clip_mode != "norm" and config.clip_grad is None:
        raise ValueError(f"`clip_mode` {config.clip_mode} does nothing without `clip_grad`: set the value to clip at")
    if config.layer_decay is not None and "backbone" in config.freeze:
        raise ValueError("`layer_decay` does nothing when `freeze` contains the backbone: remove one of them")
    if config.resume == "auto" and config.experiment is None:
        raise ValueError("`resume` auto needs the name of the run to resume: set `experiment`")


def _check_sharding(config: TrainConfig) -> None:
    if not config.fsdp:
        return
    if config.opt.lower() not in SHARDED_OPTIMIZERS:
        raise ValueError(f"`fsdp` does not support `opt` {config.opt}: choose {one_of(SHARDED_OPTIMIZERS)}")
    if config.batch_size == "auto":
        raise ValueError("`batch_size` auto tries batches on an unsharded model: give a number, or remove `fsdp`")
    if config.amp and config.amp_dtype == "float16":
        raise ValueError("`fsdp` does not support the loss scaler of float16: set `amp_dtype` to bfloat16")
    if config.clip_mode == "agc":
        raise ValueError("`fsdp` does not support `clip_mode` agc, which needs norms of full rows: set norm or value")
    if config.model_ema_force_cpu:
        raise ValueError("`fsdp` shards the moving average over the processes: remove `model_ema_force_cpu`")


def _check_adapters(config: TrainConfig) -> None:
    if config.lora is None:
        return
    if not (config.pretrained or config.pretrained_path or config.initial_checkpoint):
        raise ValueError("`lora` adapts given weights: set `pretrained_path`, `pretrained` or `initial_checkpoint`")
    if "backbone" in config.freeze:
        raise ValueError("`freeze` backbone would freeze the adapters of `lora`: remove one of them")
    if config.fsdp:
        raise ValueError("`fsdp` does not support `lora`, whose few trained weights need no sharding: remove one")


def _check_schedule(config: TrainConfig) -> None:
    if config.warmup_epochs > config.epochs and not config.warmup_prefix:
        raise ValueError(
            f"`warmup_epochs` {config.warmup_epochs} is longer than `epochs` {config.epochs}: "
            "set it lower (0 disables the warm-up) or set `warmup_prefix`"
        )
    if config.lr is not None:
        if config.min_lr > config.lr:
            raise ValueError(f"`min_lr` {config.min_lr:g} is above `lr` {config.lr:g}: set it lower")
        if config.warmup_epochs and config.warmup_lr > config.lr:
            raise ValueError(
                f"`warmup_lr` {config.warmup_lr:g} is above `lr` {config.lr:g}: set it lower, or `warmup_epochs` to 0"
            )
    if list(config.decay_milestones) != sorted(set(config.decay_milestones)):
        raise ValueError(f"`decay_milestones` {list(config.decay_milestones)} must be in increasing order")
    if config.lr_noise is not None and len(config.lr_noise) not in (1, 2):
        raise ValueError("`lr_noise` takes one or two fractions of the schedule: where the noise starts and stops")


def _check_loss(config: TrainConfig) -> None:
    if config.cutmix_minmax is not None and config.cutmix_minmax[0] >= config.cutmix_minmax[1]:
        raise ValueError(f"`cutmix_minmax` {list(config.cutmix_minmax)} must have the smaller side first")
    if config.mixup_off_epoch and not config.uses_mixing:
        raise ValueError("`mixup_off_epoch` has nothing to disable: set `mixup` or `cutmix`, or remove it")
    if config.uses_mixing and config.batch_size != "auto" and config.batch_size % 2:
        raise ValueError(f"mixup and cutmix mix pairs of images: `batch_size` {config.batch_size} must be even")


def _check_sampling(config: TrainConfig) -> None:
    if config.val_fraction is not None and config.val_split != type(config).model_fields["val_split"].default:
        raise ValueError("`val_fraction` and `val_split` both select the validation images: keep one")
    if config.aug_repeats > 1 and config.sampler == "balanced":
        raise ValueError("`aug_repeats` and `sampler` balanced both set how often an image is shown: keep one")
    if config.class_weights is not None and config.bce_loss:
        raise ValueError("`class_weights` applies to cross-entropy only: remove it or `bce_loss`")
    if config.class_weights == "balanced" and config.sampler == "balanced":
        raise ValueError("`class_weights` balanced and `sampler` balanced both balance the classes: keep one")


def _check_sizes(config: TrainConfig) -> None:
    sizes = config.train_img_sizes
    if sizes is None:
        return
    if not sizes:
        raise ValueError("`train_img_sizes` needs at least one size; remove it to train at `img_size` only")
    if config.img_size not in (None, (sizes[-1], sizes[-1])):
        raise ValueError(
            f"`train_img_sizes` must end with the model's own size: set `img_size` to {sizes[-1]} or remove it"
        )
    if len(sizes) > config.epochs:
        raise ValueError(
            f"`train_img_sizes` has {len(sizes)} sizes, but `epochs` is {config.epochs}: each size needs an epoch"
        )


def _check_distillation(config: TrainConfig) -> None:
    if config.kd_model_name is None:
        return
    if config.batch_size == "auto":
        raise ValueError(
            "`batch_size` auto tries batches without the teacher: give a number, or remove `kd_model_name`"
        )
    if config.distill_loss_weight is None and (config.task_loss_weight or 0.0) > 1:
        raise ValueError(
            "`task_loss_weight` above 1 makes the weight of the teacher's loss negative: set `distill_loss_weight`, too"
        )
    if config.kd_distill_type == "feature":
        if config.patch_drop:
            raise ValueError("`kd_distill_type` feature compares all tokens: remove `patch_drop`")
        if config.kd_temperature != 4.0:
            raise ValueError("`kd_temperature` applies to logits only: remove it or set `kd_distill_type` to logit")
