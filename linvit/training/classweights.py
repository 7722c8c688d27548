"""A weight for every class in the loss: the inverse of how many images it has, or from a file."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from linvit.validation import unknown


def read_class_weights(value: str | None, *, class_names: Sequence[str], labels: Sequence[int]) -> Tensor | None:
    """The weights (C,) that `class_weights` means, scaled to a mean of 1 over the training images; None for none.

    So the learning rate keeps its meaning. "balanced" gives all classes the same share of the loss; anything else is a
    YAML or JSON file with a line `class name: weight` for each class.

    Args:
        class_names: name of every label.
        labels: of all training images.

    Raises ValueError where the file cannot be read, or does not give each class a weight of at least 0.
    """
    if value is None:
        return None
    counts = torch.bincount(torch.tensor(labels), minlength=len(class_names)).double()
    if value == "balanced":
        weights = torch.where(counts > 0, 1 / counts, 0.0)
    else:
        weights = torch.tensor(_read_file(Path(value), class_names), dtype=torch.float64)
    mean = (weights * counts).sum() / counts.sum()
    if mean == 0:
        raise ValueError(f"--class-weights {value}: no class with images has a weight above 0")
    return (weights / mean).float()


def _read_file(path: Path, class_names: Sequence[str]) -> list[float]:
    weights: dict[str, float] = {}
    for name, text in _read_pairs(path):
        if name not in class_names:
            raise ValueError(f"--class-weights {path}: {unknown('class', name, class_names)}")
        if name in weights:
            raise ValueError(f"--class-weights {path}: {name!r} is there twice")
        weights[name] = _number(text)
        if not (math.isfinite(weights[name]) and weights[name] >= 0):
            raise ValueError(f"--class-weights {path}: {name!r} needs a number of at least 0, not {text!r}")
    missing = [name for name in class_names if name not in weights]
    if missing:
        raise ValueError(f"--class-weights {path}: gives no weight to {', '.join(map(repr, missing[:5]))}")
    return [weights[name] for name in class_names]


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    """The pairs of a YAML or JSON file as text, since classes may be called 1 or no."""
    try:
        document = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"--class-weights {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--class-weights {path}: is not valid YAML or JSON") from error
    if not isinstance(document, yaml.MappingNode):
        raise ValueError(f"--class-weights {path}: holds something else than lines of `class name: weight`")
    return [(str(name.value), str(weight.value)) for name, weight in document.value]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
