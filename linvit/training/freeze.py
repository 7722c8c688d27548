"""Parameters that stay as they are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from linvit.timmmodel import TimmModel
from linvit.validation import unknown
from linvit.weights import compact


def freeze(model: TimmModel, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters that `patterns` name, as parameters, modules or with wildcards.

    "backbone" means all but the classifier. A parameter that layers share goes by its first name and is frozen for all
    of them; returns a note for the log where the patterns name only some of them. Raises ValueError for a pattern that
    names nothing, or where nothing would be left to train.
    """
    parameters = dict(model.named_parameters())
    classifier = {id(parameter) for parameter in model.get_classifier().parameters()}

    def is_named(name: str, parameter: nn.Parameter, pattern: str) -> bool:
        if pattern == "backbone":
            return id(parameter) not in classifier
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")

    frozen: dict[int, str] = {}
    for pattern in patterns:
        named = {id(each): name for name, each in parameters.items() if is_named(name, each, pattern)}
        if not named:
            raise ValueError(f"--freeze: {unknown('parameter or module', pattern, _names(model))}")
        frozen |= named
    for name in frozen.values():
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError("--freeze leaves nothing to train: name fewer parameters")
    unnamed = {
        name: frozen[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in frozen and not any(is_named(name, parameter, pattern) for pattern in patterns)
    }
    if not unnamed:
        return []
    return [f"--freeze also freezes {compact(list(unnamed))}: shared with {compact(set(unnamed.values()))}"]


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
