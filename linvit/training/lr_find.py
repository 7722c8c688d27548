"""`linvit lr-find`: a learning rate from a sweep on throw-away weights."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from linvit.settings.flags import UsageError
from linvit.training.config import TrainConfig, parse_with, training_parser

SUMMARY = "find a learning rate by raising it on throw-away weights"


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


def main(argv: Sequence[str]) -> int:
    """Sweep, and return the exit status."""
    config = parse_lr_find(argv)
    from linvit.distributed import record_errors

    return record_errors(lr_find_command)(config)


def lr_find_command(config: LrFindConfig) -> int:
    """`linvit lr-find`: sweep, draw and suggest; returns the exit status.

    Raises ValueError where options, data and weights do not fit together, or the loss falls nowhere.
    """
    from linvit.distributed import joined_ranks
    from linvit.output.files import write_json
    from linvit.output.plots import save_figure
    from linvit.training.log import print_line
    from linvit.training.sweep import draw, prepare, sweep

    with joined_ranks(config.device) as ranks:
        step, loader = prepare(config, ranks)
        found = sweep(
            step,
            loader,
            config,
            ranks,
            start_lr=config.start_lr,
            end_lr=config.end_lr,
            num_steps=config.num_steps,
        )
        if not ranks.is_primary:
            return 0
        if len(found.lr) < 3 or found.lowest == found.lr[0]:
            raise ValueError(f"the loss does not fall above --start-lr {config.start_lr:g}: set it lower")
        figure = draw(found, title=f"{config.model}, batches of {loader.batch_size * ranks.world_size}")
        save_figure(config.plot_file, figure, dpi=120)
        if config.json_file is not None:
            result = {"suggestion": found.suggestion, "steepest": found.steepest, "lowest": found.lowest}
            settings = {"model": config.model, "batch": loader.batch_size * ranks.world_size, "seed": config.seed}
            write_json(config.json_file, {**result, **settings, **asdict(found)})
        print_line(
            f"the loss falls fastest at {found.steepest:.2e} and is lowest at {found.lowest:.2e}: {config.plot_file}"
        )
        print_line(f"suggestion: --lr {found.suggestion:.1e}")
    return 0
