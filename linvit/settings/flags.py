"""Command lines from pydantic models: a flag per field, `--help` from the descriptions, one-sentence errors."""

import argparse
import ast
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from linvit.output.files import check_writable, reason, scratch_of, target_of
from linvit.output.streams import check_stream, goes_to_stdout, is_stream
from linvit.settings.fields import Model, element_types, leaf_types, unknown, validate
from linvit.settings.help import HelpFormatter, describe, help_of, sections
from linvit.settings.process import UsageError
from linvit.settings.yaml import parse_yaml

# Extensions of files that hold neither images nor lists of images.
_REPORTS = (".html", ".json", ".jsonl", ".md")
# argparse's own pattern lacks exponents and infinity, so it reads -1e-2 as a flag.
_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-\.?(inf|infinity|nan)$", re.IGNORECASE)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._negative_number_matcher = _NEGATIVE_NUMBER

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_options(
    options: type[Model],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    positionals: Mapping[str, str],
    spellings: Mapping[str, Sequence[str]],
) -> Model:
    """Parse a command line into `options`; raises UsageError for a mistake, SystemExit after `--help`.

    `positionals` and `spellings` are those of `build_parser`.
    """
    parser = build_parser(options, prog=prog, description=description, positionals=positionals, spellings=spellings)
    values = read_flags(parser, options, argv, positionals=positionals)
    try:
        return validate(
            options, values, spell=lambda name: positionals.get(name) or spellings.get(name, [flag_of(name)])[-1]
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_files(*files: tuple[str, Path | None], inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Raise UsageError for an output file that cannot be written, before time is spent on its contents.

    Args:
        files: pairs of a flag and its path; None is skipped. No two may be the same file, also through links.
        inputs: what the command reads. No file may be one of them, nor replace a file in one that is a folder, unless
            its name is that of a report.
    """
    flags: dict[Path, str] = {}
    for flag, path in files:
        if path is None:
            continue
        check_file(flag, path)
        name = Path("/dev/stdout") if goes_to_stdout(path) else target_of(path)
        if name in flags:
            raise UsageError(f"{flags[name]} and {flag} are both {path}; choose two files")
        flags[name] = flag
        for source in () if is_stream(path) else inputs:
            if _is_read(name, target_of(Path(source))):
                raise UsageError(f"{flag} {path} would replace a file that is read ({source}); choose another file")


def _is_read(file: Path, source: Path) -> bool:
    is_below = source in file.parents and file.exists()
    return file == source or (is_below and file.suffix.lower() not in _REPORTS)


def check_file(flag: str, path: Path) -> None:
    """Raise UsageError for an output file that cannot be written; `check_files` checks several."""
    try:
        if is_stream(path):
            check_stream(path)
            return
        folder = target_of(path).parent
        if not folder.is_dir():
            folder = folder if path.parent.is_dir() else path.parent
            raise UsageError(f"{flag} {path}: folder {folder} does not exist; create it first")
        if path.is_dir():
            raise UsageError(f"{flag} {path} is a folder; give a file name")
        if path.exists() and not path.is_file():
            raise UsageError(f"{flag} {path} is neither a file nor a pipe; give a file name")
        check_writable(path)
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written: {reason(error)}; choose another file") from None


def check_folder(flag: str, path: Path) -> None:
    """Raise UsageError if an output folder and its parents neither exist nor can be created."""
    if path.is_dir():
        return
    target = target_of(path)
    parent = next(folder for folder in target.parents if folder.exists())
    try:
        scratch = scratch_of(parent / target.name)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        scratch.rmdir()
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be created: {reason(error)}; choose another folder") from None


@contextmanager
def created_folder(flag: str, path: Path) -> Iterator[None]:
    """A context with an output folder, created with its parents; an error removes the new folders that are empty.

    Raises UsageError if it cannot be created.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot create the folder ({error.strerror})") from None
    try:
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise


def check_inputs(*inputs: tuple[str, Path | None]) -> None:
    """Raise UsageError for an input file or folder that does not exist, before time is spent on others.

    Each is a pair of its flag and its path; None is skipped.
    """
    for flag, path in inputs:
        if path is not None and not path.exists():
            raise UsageError(f"{flag} {path}: there is no such file or folder")


def flag_of(name: str) -> str:
    """The default flag of a field: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")


def build_parser(
    options: type[BaseModel],
    *,
    prog: str,
    description: str,
    positionals: Mapping[str, str],
    spellings: Mapping[str, Sequence[str]] | None = None,
    bare: Mapping[str, str] | None = None,
) -> argparse.ArgumentParser:
    """A parser with a flag per field of `options`, under the headings of `linvit.settings.help`.

    Args:
        positionals: maps fields to the placeholders of their positional arguments. A positional field that has a
            default also has a flag.
        spellings: replaces the flag of a field by these.
        bare: value of a field whose flag is given without one.
    """
    spellings, bare = spellings or {}, bare or {}
    names = [_usage_of(placeholder, options.model_fields[name]) for name, placeholder in positionals.items()]
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *names, "[options]"]),
        description=describe(prog, description),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    for name, placeholder in positionals.items():
        field = options.model_fields[name]
        nargs = "+" if tuple in leaf_types(field.annotation) else None
        parser.add_argument(
            placeholder,
            nargs=nargs if field.is_required() else "?",
            default=argparse.SUPPRESS,
            help=field.description,
        )
    for title, fields in sections(options):
        # argparse has a section "options" for --help.
        section = parser if title == "options" else parser.add_argument_group(title)
        for name, field in fields.items():
            if not (name in positionals and field.is_required()):
                _add_flag(section, name, field, spellings.get(name, [flag_of(name)]), bare.get(name))
    return parser


def read_flags(
    parser: argparse.ArgumentParser,
    options: type[BaseModel],
    argv: Sequence[str],
    *,
    positionals: Mapping[str, str],
    unsupported: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The values on a command line by field name, typed as in YAML; further arguments of the parser by their own names.

    Args:
        unsupported: timm's flags that are refused, and the reason of each.

    Raises UsageError for anything that the parser does not know.
    """
    _refuse_single_dashes(parser, argv)
    given, rest = parser.parse_known_args(argv)
    flags = [part.partition("=")[0] for part in rest if part.startswith("-")]
    if flags:
        reasons = unsupported or {}
        faults = [unknown("option", flag, parser._option_string_actions) for flag in flags if flag not in reasons]
        faults += [
            f"linvit does not support timm's option {flag}: {reasons[flag]}" for flag in flags if flag in reasons
        ]
        raise UsageError("; ".join(dict.fromkeys(faults)))
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}")
    values = vars(given)
    for name, placeholder in positionals.items():
        if placeholder in values:
            if name in values:
                raise UsageError(f"{placeholder} and {flag_of(name)} set the same option: give only one")
            values[name] = values.pop(placeholder)
    fields = options.model_fields
    return {name: _typed(name, fields[name], raw) if name in fields else raw for name, raw in values.items()}


def _refuse_single_dashes(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    # argparse reads -crop-pct as -c with the value rop-pct.
    for part in argv:
        if len(part) > 2 and "-" + part in parser._option_string_actions:
            raise UsageError(unknown("option", part, ["-" + part]))


def _usage_of(placeholder: str, field: FieldInfo) -> str:
    several = f"{placeholder} ..." if tuple in leaf_types(field.annotation) else placeholder
    return several if field.is_required() else f"[{several}]"


def _add_flag(
    section: argparse._ActionsContainer, name: str, field: FieldInfo, flags: Sequence[str], bare: str | None
) -> None:
    text = help_of(field)
    if field.annotation is bool:
        _add_switch(section, name, flags, text)
        return
    leaves = leaf_types(field.annotation)
    nargs: str | None = None
    if dict in leaves or field.default == ():
        nargs = "*"
    elif tuple in leaves:
        nargs = "+"
    elif bare is not None:
        nargs = "?"
    section.add_argument(
        *flags,
        dest=name,
        nargs=nargs,
        const=bare,
        metavar=_placeholder(leaves),
        default=argparse.SUPPRESS,
        help=text,
    )
    if bool in leaves:
        section.add_argument(
            *_opposites(flags),
            dest=name,
            action="store_const",
            const=False,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def _add_switch(section: argparse._ActionsContainer, name: str, flags: Sequence[str], text: str) -> None:
    for spellings, value, words in ((flags, True, text), (_opposites(flags), False, argparse.SUPPRESS)):
        section.add_argument(
            *spellings, dest=name, action="store_const", const=value, default=argparse.SUPPRESS, help=words
        )


def _opposites(flags: Sequence[str]) -> list[str]:
    # timm has a field no_aug with the flag --no-aug, whose opposite is --aug.
    return ["--" + flag[5:] if flag.startswith("--no-") else "--no-" + flag[2:] for flag in flags]


def _placeholder(leaves: Collection[Any]) -> str:
    names = [leaf for leaf in leaves if isinstance(leaf, str)]
    if names and not {str, int, float} & set(leaves):
        return "{" + ",".join(names) + "}"
    for kind, placeholder in ((dict, "NAME=VALUE"), (Path, "PATH"), (str, "NAME"), (float, "X")):
        if kind in leaves:
            return placeholder
    return "N"


def _typed(name: str, field: FieldInfo, raw: Any) -> Any:
    """The value that argparse read for a field, typed as in YAML."""
    leaves = leaf_types(field.annotation)
    if isinstance(raw, bool):
        return raw
    if dict in leaves:
        return dict(_pair(flag_of(name), text) for text in raw)
    if isinstance(raw, str):
        return _scalar(leaves, raw)
    values = [_scalar(leaves, text) for text in raw]
    kinds = element_types(field.annotation)
    # `--k 32` is one length for all layers, and `--img-size none` is no size: not lists with one entry.
    is_single = len(values) == 1 and (bool(kinds - {tuple, NoneType}) or (values == ["none"] and NoneType in kinds))
    return values[0] if is_single else values


def _scalar(leaves: Collection[Any], text: str) -> Any:
    if text in leaves or str in leaves or Path in leaves or text == "none":
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _pair(flag: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"{flag} takes NAME=VALUE pairs, not {text!r}")
    # Python literals as in timm (True, None, (1, 2)), then YAML's (true, null, [1, 2]).
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        pass
    try:
        return name, parse_yaml(value)
    except yaml.YAMLError:
        return name, value
