"""Strict checks of settings against a pydantic model, with errors of one sentence that name the mend."""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo

Model = TypeVar("Model", bound=BaseModel)


def parse_size(value: Any) -> Any:
    """Read an image size as 384, "384", "768x512" (height x width) or (768, 512)."""
    if not isinstance(value, str):
        return value
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"image size {value!r} is neither a number nor HEIGHTxWIDTH, such as 384 or 768x512")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """A size in pixels as (height, width), where one number is a square."""
    return (size, size) if isinstance(size, int) else size


Side = Annotated[int, Field(gt=0)]
PositiveNumber = Annotated[float, Field(gt=0)]
ImageSize = Annotated[Side | tuple[Side, Side], BeforeValidator(parse_size)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
# One length for all layers, or one per layer: a length, a length per head, or none for ordinary attention.
Length = Annotated[int, Field(ge=1)]
LayerLengths = tuple[Length | tuple[Length, ...] | None, ...]
# What a timed step does: a forward pass, or a forward and backward pass.
Mode = Literal["forward", "train"]
DType = Literal["float32", "bfloat16", "float16"]


def nearest(name: str, choices: Collection[str]) -> str | None:
    """The choice that `name` was most likely meant to be, or None."""
    matches = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(kind: str, name: str, choices: Collection[str]) -> str:
    """The sentence that refuses `name`, a `kind` of thing, and suggests the nearest of `choices`."""
    suggestion = nearest(name, choices)
    return f"unknown {kind} {name!r}" + (f"; did you mean {suggestion!r}?" if suggestion else "")


def none_of(kind: str, name: object, choices: Collection[str]) -> str:
    """The sentence that refuses `name`, a `kind` of thing, and lists all `choices`: for few of them."""
    return f"unknown {kind} {name!r}: choose {one_of(choices)}{_perhaps(name, choices)}"


def one_of(choices: Collection[str]) -> str:
    """The choices in quotes: "one of 'kv', 'none'"."""
    return "one of " + ", ".join(map(repr, choices))


def _perhaps(name: object, choices: Collection[str]) -> str:
    suggestion = nearest(name, choices) if isinstance(name, str) else None
    return f" (did you mean {suggestion!r}?)" if suggestion else ""


def listed(names: Sequence[str], *, most: int = 8) -> str:
    """The first `most` names in one line, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def validate(
    model: type[Model], settings: Mapping[str, Any], *, source: str = "", spell: Callable[[str], str] = str
) -> Model:
    """A `model` of `settings`, as YAML or JSON gives them.

    Numbers are not read out of text, nor truth out of numbers. "none" is None where a field may be None, and an empty
    string is "not given" where it may be anything but text. Raises ValueError with one sentence; `source` says where
    the settings come from, `spell` how the user wrote a field's name there.
    """
    fields = model.model_fields
    for name in settings:
        if name not in fields:
            raise ValueError(unknown("option", name, fields))
    # timm's scripts and args.yaml write "not given" as an empty string.
    given = {name: value for name, value in settings.items() if value != "" or fields[name].annotation is str}
    typed = {name: _strictly(leaf_types(fields[name].annotation), value) for name, value in given.items()}
    try:
        return model.model_validate(typed, strict=True)
    except ValidationError as error:
        name, reason = _explain(error, fields, given)
        raise ValueError(f"{spell(name)} {reason}" if name else source + reason) from None


def leaf_types(annotation: Any) -> list[Any]:
    """The types and literal names that a value of `annotation` is made of, unions and tuples opened up."""
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
    """The outermost types of `annotation`: its members if it is a union, else itself."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return element_types(parts[0])
    if origin in (Union, UnionType):
        return set().union(*map(element_types, parts))
    return {origin or annotation}


def _strictly(leaves: Collection[Any], value: Any) -> Any:
    """`value` as pydantic's strict mode wants it: tuples for lists, paths for their text."""
    if isinstance(value, list) and tuple in leaves:
        return tuple(_strictly(leaves, part) for part in value)
    if value == "none" and NoneType in leaves and "none" not in leaves:
        return None
    if isinstance(value, str) and Path in leaves:
        return Path(value)
    return value


def _explain(error: ValidationError, fields: Mapping[str, FieldInfo], given: Mapping[str, Any]) -> tuple[str, str]:
    """The field that the first error is about ("" where it is about several), and what is wrong with it."""
    problem = error.errors()[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "value_error":
        return name, str(problem["ctx"]["error"]).removeprefix(f"{name} ")
    if name not in given:
        return name, f"is missing: {fields[name].description}"
    names = [leaf for leaf in leaf_types(fields[name].annotation) if isinstance(leaf, str)]
    return name, f"takes {_takes(fields[name])}, not {_show(given[name])}{_perhaps(given[name], names)}"


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, str | list | dict) else str(value).lower()


def _takes(field: FieldInfo) -> str:
    """What a field takes, by its title or its type: "a whole number of at least 1, or none"."""
    if field.title is not None:
        return field.title
    words = _words(field.annotation, plural=False) + _limits(field.metadata)
    takes_none = NoneType in element_types(field.annotation) and "none" not in leaf_types(field.annotation)
    return f"{words}, or none" if takes_none else words


_NOUNS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
    dict: ("pairs of name and value", "pairs of name and value"),
    NoneType: ("none", "none"),
}
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _words(annotation: Any, *, plural: bool) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(parts[0], plural=plural) + _limits(parts[1:])
    if origin is Literal:
        return one_of(parts)
    if origin in (Union, UnionType):
        members = [part for part in parts if plural or part is not NoneType]
        return " or ".join(dict.fromkeys(_words(part, plural=plural) for part in members))
    if origin is tuple:
        inner = _words(parts[0], plural=True)
        return f"{'lists' if plural else 'a list'} of {inner}" if parts[-1] is Ellipsis else f"{len(parts)} {inner}"
    return _NOUNS[origin or annotation][plural]


def _limits(metadata: Iterable[Any]) -> str:
    limits = []
    for constraint in metadata:
        # pydantic keeps the bounds of an inner Field(ge=...) one level down.
        for entry in getattr(constraint, "metadata", [constraint]):
            limits += [f"{words} {getattr(entry, name):g}" for name, words in _LIMITS.items() if hasattr(entry, name)]
    return f" of {' and '.join(limits)}" if limits else ""
