"""Options of `linvit lr-find`: those of training and a few of its own; imports nothing heavy."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from linvit.commandline import UsageError
from linvit.training.config import TrainConfig, parse_with, training_parser


class SweepOptions(BaseModel):
    """From where to where the learning rate is raised, and where the result goes."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    start_lr: float = Field(1e-7, gt=0.0, description="learning rate of the first step")
    end_lr: float = Field(1.0, gt=0.0, description="learning rate of the last step")
    num_steps: int = Field(100, ge=10, description="steps in between, each a factor above the one before")
    plot_file: Path = Field(Path("lr-find.png"), description="picture of the loss over the learning rate")
    json_file: Path | None = Field(None, description="file that the result is written to")


class LrFindConfig(TrainConfig, SweepOptions):
    """A training run's configuration, and the sweep."""


def parse_lr_find(argv: Sequence[str]) -> LrFindConfig:
    """What a command line of `linvit lr-find` asks for; raises UsageError."""
    parser = training_parser(
        "linvit lr-find",
        LrFindConfig,
        "Raise the learning rate step by step on throw-away weights, and show where the loss falls and where it rises.",
        spellings={"json_file": ["--json"], "plot_file": ["--plot"]},
    )
    config = parse_with(parser, argv, LrFindConfig)
    if config.start_lr >= config.end_lr:
        raise UsageError(f"--start-lr {config.start_lr:g} must be below --end-lr {config.end_lr:g}")
    return config
