"""The run's numbers in TensorBoard and Weights & Biases, where asked for; neither package is loaded otherwise."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from linvit.files import reason
from linvit.training.config import TrainConfig

# Takes numbers by name, and how many batches the run has trained on by then.
Track = Callable[[Mapping[str, float], int], None]


def open_trackers(config: TrainConfig, folder: Path, *, first_batch: int) -> Track:
    """What passes numbers on to where `config` asks for.

    Args:
        folder: the run's.
        first_batch: that training goes on from; what was logged for later ones is dropped.

    Raises ValueError where a package is missing or wandb does not start.
    """
    tracks = []
    if config.log_tensorboard:
        tracks.append(_open_tensorboard(folder / "tensorboard", first_batch))
    if config.log_wandb:
        tracks.append(_open_wandb(config, folder))

    def track(numbers: Mapping[str, float], batch: int) -> None:
        for each in tracks:
            each(numbers, batch)

    return track


def _open_tensorboard(folder: Path, first_batch: int) -> Track:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("--log-tensorboard", "tensorboard") from error
    writer = SummaryWriter(str(folder), purge_step=first_batch or None)

    def track(numbers: Mapping[str, float], batch: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, batch)
        # At once: a run may be killed.
        writer.flush()

    return track


def _open_wandb(config: TrainConfig, folder: Path) -> Track:
    try:
        import wandb
    except ImportError as error:
        raise _missing("--log-wandb", "wandb") from error
    try:
        run = wandb.init(
            project=config.wandb_project,
            name=folder.name,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            tags=list(config.wandb_tags),
            id=config.wandb_resume_id,
            resume="must" if config.wandb_resume_id else None,
        )
    except wandb.Error as error:
        raise ValueError(
            f"--log-wandb does not start: {reason(error)}; log in by `wandb login`, or set WANDB_MODE=offline"
        ) from error
    return lambda numbers, batch: run.log(dict(numbers), step=batch)


def _missing(flag: str, package: str) -> ValueError:
    return ValueError(f"{flag} needs the package {package}: pip install 'linvit[log]', or leave the flag out")


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a row of summary.csv, by the names that trackers show them under."""
    return {f"epoch/{name}": value for name, value in row.items() if isinstance(value, int | float) and name != "epoch"}
