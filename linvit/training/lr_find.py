"""`linvit lr-find`: suggests a learning rate from a sweep on weights that are discarded."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from linvit.settings.flags import UsageError, check_files
from linvit.training.config import TrainConfig, parse_with, training_parser

SUMMARY = "find a learning rate by raising it step by step on throw-away weights"


class SweepOptions(BaseModel):
    """The range of learning rates and the output files."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    start_lr: float = Field(1e-7, gt=0.0, description="learning rate of the first step")
    end_lr: float = Field(1.0, gt=0.0, description="learning rate of the last step")
    num_steps: int = Field(
        100, ge=10, description="number of steps; each multiplies the learning rate by the same factor"
    )
    plot_file: Path = Field(Path("lr-find.png"), description="write a plot of the loss over the learning rate (PNG)")
    json_file: Path | None = Field(None, description="write the result as JSON")


class LrFindConfig(SweepOptions, TrainConfig):
    """The configuration of the sweep and of a training run."""


def parse_lr_find(argv: Sequence[str]) -> LrFindConfig:
    """Parse the command line of `linvit lr-find`; raises UsageError."""
    parser = training_parser(
        "linvit lr-find",
        LrFindConfig,
        "Raise the learning rate step by step on throw-away weights, and plot where the loss falls and where it rises.",
        spellings={"json_file": ["--json"], "plot_file": ["--plot"]},
    )
    config = parse_with(parser, argv, LrFindConfig)
    if config.start_lr >= config.end_lr:
        raise UsageError(f"--start-lr {config.start_lr:g} must be below --end-lr {config.end_lr:g}")
    return config


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    config = parse_lr_find(argv)
    check_files(("--plot", config.plot_file), ("--json", config.json_file))
    from linvit.distributed import record_errors

    return record_errors(find_lr)(config)


def find_lr(config: LrFindConfig) -> int:
    """Run the sweep, write the plot and print a suggestion; returns the exit status.

    Raises ValueError if options, data and weights do not fit together, or if the loss never falls.
    """
    from linvit.distributed import joined_ranks
    from linvit.output.files import write_json
    from linvit.output.plots import save_figure
    from linvit.training.log import print_line
    from linvit.training.sweep import plot_sweep, prepare_sweep, run_sweep

    check_files(("--plot", config.plot_file), ("--json", config.json_file))
    with joined_ranks(config.device) as ranks:
        step, loader = prepare_sweep(config, ranks)
        found = run_sweep(
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
            raise ValueError(f"the loss does not fall above --start-lr {config.start_lr:g}: lower it")
        figure = plot_sweep(found, title=f"{config.model}, batches of {loader.batch_size * ranks.world_size}")
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
