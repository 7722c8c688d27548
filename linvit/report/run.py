"""Read the folder of a run, finished or not."""

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linvit.evaluation.predictions import Predictions, read_predictions
from linvit.output.cells import text_of_cell
from linvit.output.files import parse_json
from linvit.runs.folder import RunFolder
from linvit.settings.yaml import read_settings

# A row of summary.csv; values that are missing or not finite are None.
Row = dict[str, float | None]


@dataclass(frozen=True)
class Run:
    """A run's folder, as far as it was written.

    Attributes:
        settings: the options in args.yaml.
        rows: the finished epochs.
        class_names: the names of the classes; empty while there are no best weights.
        best: epoch, weights ("raw" or "ema"), metrics and version of the best weights; None while there are none.
        predictions: the predictions of the best weights for the validation images; None if they are not there.
        notes: what is missing and why, as full sentences.
    """

    folder: RunFolder
    name: str
    settings: dict[str, Any]
    rows: list[Row]
    class_names: list[str]
    best: dict[str, Any] | None
    predictions: Predictions | None
    notes: tuple[str, ...]

    def with_predictions(self, predictions: Predictions) -> "Run":
        """The run with predictions that were measured again."""
        notes = tuple(note for note in self.notes if not note.startswith(_NO_PREDICTIONS))
        return replace(self, predictions=predictions, notes=notes)

    def setting(self, name: str) -> Any:
        """The value of an option; None if it is not set, or unknown to the version that trained."""
        return self.settings.get(name)

    @property
    def num_epochs(self) -> int:
        """The number of finished epochs."""
        return len(self.rows)

    def column(self, name: str) -> list[float | None]:
        """A column of summary.csv, one value per finished epoch."""
        return [row.get(name) for row in self.rows]

    def numbers(self, name: str) -> list[float]:
        """The values of a column that there are."""
        return [value for value in self.column(name) if value is not None]


_NO_PREDICTIONS = "There are no predictions"


def read_run(path: Path) -> Run:
    """Read a run's folder. A run that was stopped early has fewer epochs, or none.

    Raises ValueError, naming the file, if the folder is not of a run or one of its files is damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give the folder of a run")
    folder = RunFolder(path)
    if not folder.args.is_file():
        raise ValueError(f"{path}: is not the folder of a run, since it has no args.yaml; give the folder of a run")
    settings = read_settings(folder.args)
    rows = _read_rows(folder.summary)
    best, class_names = _read_best(folder.best / "config.json")
    notes = []
    if not rows:
        notes.append("No epoch was finished.")
    if best is None:
        notes.append("There are no best weights yet, because no epoch was finished and evaluated.")
    predictions = None
    if best is not None and folder.predictions.is_file():
        predictions = read_predictions(folder.predictions, class_names)
        if not _is_of(predictions, best):
            predictions = None
            notes.append(f"{_NO_PREDICTIONS} of the best weights: {folder.predictions.name} is of another epoch.")
    elif best is not None:
        notes.append(f"{_NO_PREDICTIONS} in the folder: `linvit report {path} --data DATA` evaluates the best weights.")
    return Run(
        folder=folder,
        name=path.resolve().name,
        settings=settings,
        rows=rows,
        class_names=class_names,
        best=best,
        predictions=predictions,
        notes=tuple(notes),
    )


def _read_rows(path: Path) -> list[Row]:
    """The rows of summary.csv; none if there is no file yet."""
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [
                {name: _number(text_of_cell(cell)) for name, cell in row.items() if name}
                for row in csv.DictReader(file)
            ]
    except (OSError, UnicodeError, csv.Error, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: is damaged: restore it, or resume the run, which writes it again") from error
    if any(row.get("epoch") is None for row in rows):
        raise ValueError(f"{path}: has rows without an epoch: restore it, or resume the run, which writes it again")
    return rows


def _number(cell: str) -> float | None:
    value = float(cell) if cell else math.nan
    return value if math.isfinite(value) else None


def _read_best(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The record of the best weights in config.json, and the class names; None and no names if the file is missing."""
    try:
        config = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None, []
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is damaged: restore it") from error
    about = config.get("linvit") if isinstance(config, dict) else None
    names = config.get("label_names") if isinstance(config, dict) else None
    if not isinstance(about, dict) or not isinstance(names, list):
        raise ValueError(f"{path}: is not of a run: restore it")
    return about, [str(name) for name in names]


def _is_of(predictions: Predictions, best: dict[str, Any]) -> bool:
    """Whether these predictions are those of the best weights; a run that was killed may have older ones."""
    found = predictions.results.metrics(predictions.class_names)
    recorded = best.get("metrics", {})
    return math.isclose(found.loss, recorded.get("loss", math.nan), rel_tol=1e-6) and math.isclose(
        found.top1, recorded.get("top1", math.nan), rel_tol=1e-9
    )
