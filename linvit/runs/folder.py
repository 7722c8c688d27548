"""The folder of a run: its paths, its lock, and saving and loading the classifiers in it.

args.yaml       the resolved configuration; training from it alone repeats the run
summary.csv     one row per epoch
best/ last/     config.json and model.safetensors, for `timm.create_model("local-dir:RUN/best", pretrained=True)`
checkpoints/    training states to resume from (`linvit.runs.checkpoint`)
predictions.csv predictions of the best weights for each validation image (`linvit.evaluation.predictions`)
report.html     what the run did, as one page (`linvit.report`)
README.md       model card
bad_images.txt  images that could not be read and were skipped, if there are any
.lock           locked by the process that trains in the folder
logs/           messages of the processes other than the first
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg
from timm.models._hub import save_config_for_hf
from torch import Tensor

from linvit.data.augment.build import InputSpec
from linvit.model.build import HUB, LOCAL, TimmModel, create_model, download_config
from linvit.model.description import ModelDescription, read_json
from linvit.output.files import cannot_write, replace_files, scratch_of
from linvit.runs.checkpoint import write_weights
from linvit.runs.weights import SavedWeights, check_finite, compact, fit_weights, read_weights, recorded_range
from linvit.settings.yaml import read_settings

LOCK = ".lock"
# A model has at most this many times the parameters of the weights that its description lies with.
MOST_GROWTH = 4


@dataclass(frozen=True)
class RunFolder:
    """The paths in the folder of a run."""

    path: Path

    @property
    def args(self) -> Path:
        return self.path / "args.yaml"

    @property
    def summary(self) -> Path:
        return self.path / "summary.csv"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def last(self) -> Path:
        return self.path / "last"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def bad_images(self) -> Path:
        return self.path / "bad_images.txt"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.csv"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        return self.path / "README.md"


def source_files(source: str) -> list[Path]:
    """The files read for a source (see `load_classifier`): the file itself, or a run's weights and settings."""
    run = RunFolder(Path(source))
    if not run.path.is_dir():
        return [run.path]
    folders = (run.path, run.best, run.last, *run.checkpoints.glob("*"))
    weights = [
        file
        for folder in folders
        for name in ("config.json", "*.safetensors", "*.bin", "*.xml")
        for file in folder.glob(name)
    ]
    return [run.args, run.summary, run.checkpoints, *weights]


def lock_run(folder: Path) -> IO[bytes] | None:
    """Lock the folder of a run until the returned file is closed or the process ends, even if it is killed.

    Returns None on systems without such locks. Raises ValueError if another process holds the lock.
    """
    if os.name != "posix":
        return None
    import fcntl

    file = (folder / LOCK).open("ab")
    try:
        # Not `flock`: workers inherit such a lock and would hold it for as long as they outlive a killed process.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"{folder}: another process is training in it; wait for it, stop it or choose another --experiment"
        ) from None
    except OSError:
        # The file system has no locks.
        file.close()
        return None
    return file


def save_classifier(
    folder: Path,
    model: TimmModel,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    class_names: Sequence[str],
    spec: InputSpec,
    about: dict[str, Any],
) -> None:
    """Write a model, its class names and its preprocessing to a folder that timm loads as `local-dir:`.

    Existing files are replaced one by one and atomically, the weights before config.json.

    Args:
        folder: the folder; its parent must exist.
        model: the model, whose architecture and arguments go to config.json.
        state_dict: weights to save instead of the model's own.
        class_names: class name of every label.
        spec: the preprocessing.
        about: saved in config.json under "linvit".

    Raises:
        OSError: if the files cannot be written; the existing files are kept.
    """
    scratch = scratch_of(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        # timm's `save_for_hf` neither takes a state dict nor makes channels-last weights contiguous for safetensors.
        write_weights(scratch / "model.safetensors", state_dict or model.state_dict())
        save_config_for_hf(
            model,
            str(scratch / "config.json"),
            model_config={"label_names": list(class_names), "linvit": {**about, **_saved_range(spec)}},
            data_config={
                "input_size": (3, *spec.size),
                "mean": spec.mean,
                "std": spec.std,
                "interpolation": spec.interpolation,
                "crop_pct": spec.crop_pct,
                "crop_mode": spec.crop_mode,
            },
        )
        replace_files(scratch, folder)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise cannot_write(folder, error) from error


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode with its class names.

    Attributes:
        class_names: class name of every label; None if unknown.
        weights: where the weights come from, a file or a timm name.
        settings: settings of the run that trained the model, as in args.yaml; empty if unknown.
    """

    model: TimmModel
    class_names: list[str] | None
    weights: str
    settings: dict[str, Any]


def load_classifier(
    source: str,
    *,
    weights: Literal["best", "last"] = "best",
    img_size: tuple[int, int] | None = None,
    model_name: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    use_ema: bool = False,
) -> Classifier:
    """Load a classifier from a run, a `local-dir:` folder or a checkpoint, or a pretrained one from timm by name.

    Args:
        source: path or timm model name.
        weights: which weights of a run to load.
        img_size: (height, width) to adapt the model to; by default the model's own.
        model_name: model of a checkpoint that does not name it.
        model_kwargs: further arguments of the model.
        use_ema: load the EMA weights of a checkpoint that has both.

    Raises:
        ValueError: if `source` is none of these, or its weights do not fit the model.
    """
    path = Path(source.removeprefix(LOCAL))
    arguments = {"img_size": img_size, **(model_kwargs or {})}
    if path.exists():
        saved = _read(path, weights, use_ema=use_ema)
        model = _build(saved, model_name, arguments)
        return Classifier(model.eval(), saved.class_names, weights=str(saved.path), settings=saved.settings)
    if "/" in source and ":" not in source:
        raise ValueError(f"{source}: there is no such file or folder, and it is not a timm model name")
    model = create_model(source, pretrained=True, **arguments)
    check_finite(model.state_dict(), path=source)
    subset = infer_imagenet_subset(model)
    names = model.pretrained_cfg.get("label_names") or (ImageNetInfo(subset).label_names() if subset else None)
    # timm's configuration has no place for the input range; the file is in the cache by now.
    config = read_json(download_config(source.removeprefix(HUB))) if source.startswith(HUB) else {}
    return Classifier(model.eval(), names, weights=source, settings=recorded_range(config))


def _saved_range(spec: InputSpec) -> dict[str, Any]:
    return {} if spec.input_range is None else {"input_range": spec.input_range}


def _read(path: Path, weights: str, *, use_ema: bool) -> SavedWeights:
    """The weights at a path, with the settings of the run if it is one."""
    run = RunFolder(path)
    if not run.args.is_file():
        return read_weights(path, use_ema=use_ema)
    folder = path / weights
    if not folder.is_dir():
        raise ValueError(f"{path} is a run without {weights}/ weights yet: let the run finish an epoch")
    saved = read_weights(folder, use_ema=use_ema)
    settings = read_settings(run.args)
    if saved.description is not None:
        # The run may have been resumed with other preprocessing after these weights were saved.
        recorded = saved.description.pretrained_cfg or {}
        settings |= {name: recorded[name] for name in _PREPROCESSING if name in recorded}
    return replace(saved, settings=settings)


# Preprocessing that config.json of the weights records.
_PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def _build(saved: SavedWeights, model_name: str | None, arguments: dict[str, Any]) -> TimmModel:
    """The model with the saved weights. Raises ValueError if they do not determine all of it."""
    model_or_name = saved.description or model_name
    if model_or_name is None:
        raise ValueError(
            f"{saved.path} does not name its model: give --model NAME to eval or predict, or use a folder with "
            "config.json"
        )
    if saved.description is not None:
        _check_effort(saved.description, saved.state_dict, arguments)
    model = create_model(model_or_name, **{"num_classes": _num_classes(saved, model_or_name)} | arguments)
    if new := fit_weights(model, saved):
        raise ValueError(f"{saved.path} does not fit {model.pretrained_cfg['architecture']}: it lacks {compact(new)}")
    return model


def _check_effort(
    description: ModelDescription, state_dict: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> None:
    """Raise ValueError, before it takes memory or hours, if the described model is far larger than the weights.

    The user's own `arguments` have precedence over the described ones. Only an image size may enlarge the model.
    """
    given = {name: value for name, value in arguments.items() if name != "img_size"}
    problem = f"{description.source} describes a far larger model than its weights are of: restore that file"
    for name in ("depth", "depths", "layers"):
        value = {**description.model_args, **given}.get(name)
        depths = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(depth, int) and depth > len(state_dict) for depth in depths):
            raise ValueError(problem)
    try:
        with torch.device("meta"):
            shadow = create_model(description, **given)
    except ValueError:
        # Not every model of timm can be built without memory; what is wrong with this one is reported later.
        return
    num_weights = sum(tensor.numel() for tensor in state_dict.values())
    if sum(parameter.numel() for parameter in shadow.parameters()) > MOST_GROWTH * num_weights:
        raise ValueError(problem)


def _num_classes(saved: SavedWeights, model: str | ModelDescription) -> int | None:
    """The number of classes of weights whose file does not describe the model."""
    if isinstance(model, ModelDescription):
        return None
    known = get_pretrained_cfg(model)
    names = () if known is None or known.classifier is None else known.classifier
    # A model may have several classifiers, of equal size.
    for name in (names,) if isinstance(names, str) else names:
        weight = saved.state_dict.get(f"{name}.weight")
        if weight is not None and weight.ndim:
            return weight.shape[0]
    return None
