"""Parameters that stay as they are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from linvit.timmmodel import TimmModel
from linvit.validation import unknown


def freeze(model: TimmModel, patterns: Sequence[str]) -> int:
    """Stop training the parameters that `patterns` name, as parameters, modules or with wildcards; returns how many.

    "backbone" means all but the classifier. Raises ValueError for a pattern that names nothing, or where nothing would
    be left to train.
    """
    parameters = dict(model.named_parameters())
    classifier = {id(parameter) for parameter in model.get_classifier().parameters()}
    for pattern in patterns:
        if pattern == "backbone":
            names = [name for name, parameter in parameters.items() if id(parameter) not in classifier]
        else:
            names = [name for name in parameters if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not names:
            raise ValueError(f"--freeze: {unknown('parameter or module', pattern, _names(model))}")
        for name in names:
            parameters[name].requires_grad_(False)
    frozen = sum(parameter.numel() for parameter in parameters.values() if not parameter.requires_grad)
    if frozen == sum(parameter.numel() for parameter in parameters.values()):
        raise ValueError("--freeze leaves nothing to train: name fewer parameters")
    return frozen


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
