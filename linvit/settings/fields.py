"""Field types that the options share, strict validation against pydantic models, and one-sentence error messages.

A validator that concerns several options writes their names in backquotes, as in "`lr` is below `min_lr`". `validate`
replaces each by what the user wrote: a flag or a key in a file.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)


def parse_size(value: Any) -> Any:
    """Parse an image size given as text, "384" or "768x512" (height x width); other values are returned unchanged.

    Raises ValueError for any other text.
    """
    if not isinstance(value, str):
        return value
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"image size {value!r} is neither a number nor HEIGHTxWIDTH, such as 384 or 768x512")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """An image size in pixels as (height, width); a single number is a square."""
    return (size, size) if isinstance(size, int) else size


Side = Annotated[int, Field(gt=0)]
PositiveNumber = Annotated[float, Field(gt=0)]
ImageSize = Annotated[Side | tuple[Side, Side], BeforeValidator(parse_size)]
Count = Annotated[int, Field(ge=0)]
# NumPy's counter-based generator keys on signed 64-bit numbers.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
# A projected length k.
Length = Annotated[int, Field(ge=1)]
# One entry per layer: a length, a length per head, or None for ordinary attention.
LayerLengths = tuple[Length | tuple[Length, ...] | None, ...]


def _model_keywords(value: dict[str, Any]) -> dict[str, Any]:
    # Commands pass these to the factory themselves, so they would arrive there twice.
    for name in ("model", "pretrained"):
        if name in value:
            raise ValueError(f"takes arguments of the model's class, not {name!r}")
    return value


# Keyword arguments of a model, as users give them.
ModelKeywords = Annotated[dict[str, Any], AfterValidator(_model_keywords)]
# What a timed step runs: a forward pass, or a forward and a backward pass.
Mode = Literal["forward", "train"]
DType = Literal["float32", "bfloat16", "float16"]


def nearest(name: str, choices: Collection[str]) -> str | None:
    """The choice most similar to `name`, or None if none is similar."""
    matches = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(kind: str, name: str, choices: Collection[str]) -> str:
    """Error message for an unknown `name` of this `kind`; it suggests the most similar choice."""
    suggestion = nearest(name, choices)
    return f"unknown {kind} {name!r}" + (f"; did you mean {suggestion!r}?" if suggestion else "")


def unknown_choice(kind: str, name: object, choices: Collection[str]) -> str:
    """Error message for an unknown `name` of this `kind` that lists all `choices`, for short lists."""
    return f"unknown {kind} {name!r}: choose {one_of(choices)}{_suggestion(name, choices)}"


def one_of(choices: Collection[str]) -> str:
    """The choices in quotes: "one of 'kv', 'none'", or a single choice alone."""
    return ("one of " if len(choices) > 1 else "") + _quoted(choices)


def listed(names: Sequence[str], *, most: int = 8) -> str:
    """The first `most` names on one line, and the number of the others: "a, b and 3 more"."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _quoted(choices: Collection[str]) -> str:
    return ", ".join(map(repr, choices))


def _suggestion(name: object, choices: Collection[str]) -> str:
    suggestion = nearest(name, choices) if isinstance(name, str) else None
    return f" (did you mean {suggestion!r}?)" if suggestion else ""


def validate(
    model: type[Model],
    settings: Mapping[str, Any],
    *,
    source: Callable[[str | None], str] = lambda name: "",
    spell: Callable[[str], str] = str,
) -> Model:
    """Build a `model` from `settings` as YAML, JSON or a command line gives them.

    Types are strict: text is not converted to numbers, nor numbers to booleans. "none" means None for a field that may
    be None, and an empty string means "not given" for a field that is not text.

    Args:
        source: returns a prefix for the error, such as the file that sets this field; None stands for several fields.
        spell: returns a field's name as the user wrote it, such as its flag.

    Raises ValueError, in one sentence, for an unknown name, a wrong value or options that contradict each other.
    """
    fields = model.model_fields
    for name in settings:
        if name not in fields:
            raise ValueError(unknown("option", name, fields))
    # timm's scripts and args.yaml write an empty string for an option that is not set.
    given = {name: value for name, value in settings.items() if value != "" or fields[name].annotation is str}
    typed = {name: _strictly(leaf_types(fields[name].annotation), value) for name, value in given.items()}
    try:
        return model.model_validate(typed, strict=True)
    except ValidationError as error:
        sentences: dict[str, list[str]] = {}
        for field, reason in _explain(error, fields, given).items():
            reason = re.sub(r"`(\w+)`", lambda match: spell(match[1]) if match[1] in fields else match[0], reason)
            sentences.setdefault(source(field), []).append(f"{spell(field)} {reason}" if field else reason)
        raise ValueError("; ".join(prefix + "; ".join(each) for prefix, each in sentences.items())) from None


def leaf_types(annotation: Any) -> list[Any]:
    """All types and literals inside `annotation`, looking into unions and tuples."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return leaf_types(parts[0])
    if origin is Literal:
        return list(parts)
    if origin in (Union, UnionType, tuple):
        leaves = [leaf for part in parts if part is not Ellipsis for leaf in leaf_types(part)]
        return [*leaves, tuple] if origin is tuple else leaves
    return [origin or annotation]


def element_types(annotation: Any) -> set[Any]:
    """The members of `annotation` if it is a union, else `annotation` itself."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return element_types(parts[0])
    if origin in (Union, UnionType):
        return set().union(*map(element_types, parts))
    return {origin or annotation}


def _strictly(leaves: Collection[Any], value: Any) -> Any:
    """Convert `value` for pydantic's strict mode: lists to tuples, text to paths, "none" to None."""
    if isinstance(value, list) and tuple in leaves:
        return tuple(_strictly(leaves, part) for part in value)
    if value == "none" and NoneType in leaves and "none" not in leaves:
        return None
    if isinstance(value, str) and Path in leaves:
        return Path(value)
    return value


def _explain(
    error: ValidationError, fields: Mapping[str, FieldInfo], given: Mapping[str, Any]
) -> dict[str | None, str]:
    """The error of each field that has one; None stands for several fields together."""
    explained: dict[str | None, str] = {}
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else None
        # A union has an error for each of its members; the first is as good as the others.
        if name not in explained:
            explained[name] = _explain_one(name, problem, fields, given)
    return explained


def _explain_one(
    name: str | None, problem: ErrorDetails, fields: Mapping[str, FieldInfo], given: Mapping[str, Any]
) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"]).removeprefix(f"{name} ")
    assert name is not None
    if name not in given:
        return f"is missing: {fields[name].description}"
    choices = [leaf for leaf in leaf_types(fields[name].annotation) if isinstance(leaf, str)]
    return f"takes {_accepted(fields[name])}, not {_show(given[name])}{_suggestion(given[name], choices)}"


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, str | list | dict) else str(value).lower()


def _accepted(field: FieldInfo) -> str:
    """The values that a field accepts, from its title or its type: "a whole number of at least 1, or none"."""
    if field.title is not None:
        return field.title
    words = _describe(field.annotation, plural=False) + _limits(field.metadata)
    takes_none = NoneType in element_types(field.annotation) and "none" not in leaf_types(field.annotation)
    return f"{words}, or none" if takes_none else words


_NOUNS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "strings"),
    Path: ("a path", "paths"),
    dict: ("name-value pairs", "name-value pairs"),
    NoneType: ("none", "none"),
}
# By pydantic's name of the constraint.
_LIMITS = {"ge": "of at least", "gt": "greater than", "le": "at most", "lt": "less than"}


def _describe(annotation: Any, *, plural: bool) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(parts[0], plural=plural) + _limits(parts[1:])
    if origin is Literal:
        return f"choices from {_quoted(parts)}" if plural else one_of(parts)
    if origin in (Union, UnionType):
        members = [part for part in parts if plural or part is not NoneType]
        return " or ".join(dict.fromkeys(_describe(part, plural=plural) for part in members))
    if origin is tuple:
        inner = _describe(parts[0], plural=True)
        return f"{'lists' if plural else 'a list'} of {inner}" if parts[-1] is Ellipsis else f"{len(parts)} {inner}"
    return _NOUNS[origin or annotation][plural]


def _limits(metadata: Iterable[Any]) -> str:
    limits = []
    for constraint in metadata:
        # pydantic keeps the limits of an inner Field(ge=...) one level down.
        for entry in getattr(constraint, "metadata", [constraint]):
            for name, words in _LIMITS.items():
                if hasattr(entry, name):
                    limit = getattr(entry, name)
                    limits.append(f"{words} {limit if isinstance(limit, int) else format(limit, 'g')}")
    return f" {' and '.join(limits)}" if limits else ""
