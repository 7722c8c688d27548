"""Which folder a run writes to, and which state it goes on from; nothing that exists is ever overwritten."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from timm.models import safe_model_name

from linvit.checkpoint import is_checkpoint, list_checkpoints, verify_checkpoint
from linvit.training.config import TrainConfig
from linvit.training.log import say


@dataclass(frozen=True)
class StartingPoint:
    """A run's folder, and the checkpoint it goes on from; None: it begins."""

    folder: Path
    state: Path | None = None


def choose_start(config: TrainConfig, *, img_size: tuple[int, int]) -> StartingPoint:
    """Where `output`, `experiment` and `resume` say that the run is; its folder is made where it begins.

    A folder of that name that is not resumed is left alone: the run's gets a number, as in timm. Raises ValueError
    where there is nothing to resume from or the folder cannot be made.
    """
    name = config.experiment or _default_name(config, img_size)
    folder = config.output / name
    if config.resume == "auto" and folder.is_dir():
        return StartingPoint(folder, _newest_state(folder))
    if config.resume in (None, "auto"):
        return StartingPoint(_make_new_folder(folder))
    state = _state_at(Path(config.resume))
    own_folder = state.absolute().parent.parent
    is_in_run = state.parent.name == "checkpoints" and (own_folder / "args.yaml").is_file()
    if is_in_run and (config.experiment is None or folder.absolute() == own_folder):
        return StartingPoint(state.parent.parent, state)
    return StartingPoint(_make_new_folder(folder), state)


def _default_name(config: TrainConfig, img_size: tuple[int, int]) -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(config.model)}-{img_size[-1]}"


def _make_new_folder(folder: Path) -> Path:
    numbered = (folder.with_name(f"{folder.name}-{number}") if number else folder for number in range(1000))
    for candidate in numbered:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"--output {folder.parent}: cannot make {candidate} there ({error.strerror})") from error
    raise ValueError(f"--experiment {folder.name}: there are 1000 runs of that name already; choose another")


def _state_at(path: Path) -> Path:
    """The checkpoint that `--resume PATH` means: itself, or the newest of a run's folder."""
    if is_checkpoint(path):
        verify_checkpoint(path)
        return path
    if path.is_file():
        raise ValueError(
            f"--resume {path}: is a file; give a run's folder or one of its checkpoints/state-*, or start from its "
            "weights by --pretrained-path"
        )
    if not path.is_dir():
        raise ValueError(f"--resume {path}: there is no such file or folder")
    state = _newest_state(path)
    if state is None:
        raise ValueError(f"--resume {path}: the run has no training states in checkpoints/")
    return state


def _newest_state(run: Path) -> Path | None:
    """The newest checkpoint of a run that is whole; None where it has not come to save one."""
    found = list_checkpoints(run / "checkpoints")
    for path in reversed(found):
        try:
            verify_checkpoint(path)
            return path
        except ValueError as error:
            say(f"{error}; going back to the one before")
    if found or (run / "best").exists():
        raise ValueError(f"{run}: none of its training states can be read; choose another --experiment to begin anew")
    return None
