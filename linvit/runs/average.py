"""`linvit average`: average the weights of several checkpoints or runs of one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from linvit.settings.flags import check_folder, parse_options
from linvit.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from linvit.runs.weights import SavedWeights

SUMMARY = "average the weights of checkpoints or runs"


class AverageOptions(BaseModel):
    """Weights to average, and the output folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[str, ...] = Field(
        min_length=1,
        description="one run, whose checkpoints at the ends of epochs are averaged; or several runs (the best weights "
        "of each), folders with config.json and weights, or checkpoints",
    )
    output: Path = Field(description="folder to write the average to; timm loads it as local-dir:FOLDER")
    newest: int | None = Field(None, ge=1, description="average only the newest N checkpoints of a run (default: all)")
    use_ema: bool = Field(False, description="average the EMA weights of checkpoints that have them")


def main(argv: Sequence[str]) -> int:
    """Average weights and write a folder that timm loads as `local-dir:`; returns the exit status.

    Raises ValueError if the sources are not weights of one model with the same classes, and OSError if the folder
    cannot be written.
    """
    options = parse_options(
        AverageOptions,
        argv,
        prog="linvit average",
        description="Average the weights of a run's checkpoints, or of several runs, into a folder that timm loads.",
        positionals={"sources": "SOURCE"},
        spellings={"output": ["-o", "--output"]},
    )
    from linvit.data.augment.build import resolve_input
    from linvit.data.options import InputOptions
    from linvit.output.terminal import print_line
    from linvit.runs.folder import load_classifier, save_classifier
    from linvit.runs.weights import load_exactly

    paths = _find_weights(options)
    if options.output.exists():
        raise ValueError(f"--output {options.output} exists already: choose another folder")
    check_folder("--output", options.output)
    averaged, files = average(paths, use_ema=options.use_ema)
    classifier = load_classifier(str(paths[-1]), use_ema=options.use_ema)
    load_exactly(classifier.model, averaged, path=options.output)
    if classifier.class_names is None:
        raise ValueError(f"{paths[-1]} does not name its classes: average runs or their checkpoints")
    settings = {name: classifier.settings.get(name) for name in InputOptions.model_fields}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_classifier(
        options.output,
        classifier.model,
        class_names=classifier.class_names,
        spec=resolve_input(classifier.model, InputOptions(**settings)),
        about={"version": __version__, "average_of": files},
    )
    print_line(f"{options.output}: average of {len(files)} sets of weights")
    return 0


def average(paths: Sequence[Path], *, use_ema: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """The mean of several state dicts, summed in float64, and the files they were read from.

    Integer tensors, such as the counters of batch norms, are taken from the last one. Raises ValueError if names,
    shapes or classes differ.
    """
    import torch

    from linvit.runs.weights import read_weights

    first: SavedWeights | None = None
    sums: dict[str, Tensor] = {}
    files = []
    # One at a time, since all of them may not fit in memory.
    for path in paths:
        saved = read_weights(path, use_ema=use_ema)
        files.append(str(saved.path))
        first = first or saved
        _check_same_model(saved, first)
        for name, tensor in saved.state_dict.items():
            if tensor.is_floating_point():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + tensor.double()
            else:
                sums[name] = tensor
    assert first is not None
    means = {
        name: (total / len(files)).to(first.state_dict[name].dtype) if total.is_floating_point() else total
        for name, total in sums.items()
    }
    return means, files


def _find_weights(options: AverageOptions) -> list[Path]:
    from linvit.runs.checkpoint import list_checkpoints
    from linvit.runs.folder import RunFolder

    paths = [Path(source) for source in options.sources]
    if len(paths) > 1:
        if options.newest is not None:
            raise ValueError("--newest selects checkpoints of one run: give a single run, or leave --newest out")
        return paths
    run = RunFolder(paths[0])
    if not run.args.is_file():
        raise ValueError(f"{paths[0]} is not the folder of a run: give a run, or several weights to average")
    # Checkpoints within an epoch exist only for resuming, and the one before the first epoch is untrained.
    ends = [path for path in list_checkpoints(run.checkpoints) if path.name.endswith("-000000")]
    ends = [path for path in ends if path.name != "state-0000-000000"]
    if not ends:
        raise ValueError(f"{paths[0]} has no checkpoint at the end of an epoch yet: let the run finish an epoch")
    return ends[-(options.newest or len(ends)) :]


def _check_same_model(saved: SavedWeights, first: SavedWeights) -> None:
    from linvit.runs.weights import compact

    differing = first.state_dict.keys() ^ saved.state_dict.keys()
    if differing:
        raise ValueError(f"{saved.path} and {first.path} are not of one model: only one has {compact(differing)}")
    reshaped = {name for name, tensor in saved.state_dict.items() if tensor.shape != first.state_dict[name].shape}
    if reshaped:
        raise ValueError(f"{saved.path} and {first.path} are not of one model: shapes differ for {compact(reshaped)}")
    if saved.class_names != first.class_names:
        raise ValueError(f"{saved.path} and {first.path} have different classes: average weights for the same classes")
