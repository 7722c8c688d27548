"""`TrainConfig`: every option of a training run, read from YAML and flags, checked, and saved as args.yaml."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from linvit.commandline import UsageError, build_parser, flag_of, read_flags
from linvit.data.options import AugmentOptions, DataOptions, InputOptions, LoaderOptions
from linvit.training.combinations import check_combinations
from linvit.training.not_taken import NOT_TAKEN, review
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
from linvit.validation import unknown, validate
from linvit.yamlfile import read_settings, write_settings

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
