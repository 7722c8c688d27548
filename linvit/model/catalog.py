"""`linvit models`: a table of the registered models."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from linvit.output.files import write_json
from linvit.settings.fields import nearest, unknown
from linvit.settings.flags import check_files, parse_options

SUMMARY = "list the registered models"


class CatalogOptions(BaseModel):
    """Which models to list, and where to write the list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str = Field("linvit_*", description="model names to list, may contain * and ? (default: all)")
    json_file: Path | None = Field(None, description="write the table to this JSON file")


class ModelEntry(NamedTuple):
    """A registered model with its defaults; the image size is in pixels, the parameters include 1,000 classes."""

    name: str
    img_size: int
    num_tokens: int
    num_parameters: int
    k: int
    projection: str
    share: str


def main(argv: Sequence[str]) -> int:
    """Run `linvit models` and return the exit status. Raises ValueError if no model matches the pattern."""
    options = parse_options(
        CatalogOptions,
        argv,
        prog="linvit models",
        description="List the registered models.",
        positionals={"pattern": "PATTERN"},
        spellings={"json_file": ["--json"]},
    )
    check_files(("--json", options.json_file))
    entries = list_entries(options.pattern)
    if options.json_file is not None:
        write_json(options.json_file, [entry._asdict() for entry in entries])
    print_entries(entries, options.json_file)
    return 0


def list_entries(pattern: str) -> list[ModelEntry]:
    """The linvit models whose names match `pattern`, by image size, then by parameters; ValueError if none does."""
    import timm

    import linvit.model.registry  # noqa: F401  registers the names

    registered = timm.list_models("linvit_*")
    names = [name for name in registered if fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(_no_match(pattern, registered))
    return sorted((_describe(name) for name in names), key=lambda entry: (entry.img_size, entry.num_parameters))


def _no_match(pattern: str, registered: Sequence[str]) -> str:
    for wider in (pattern.lower(), f"*{pattern.lower()}*"):
        if any(fnmatchcase(name, wider) for name in registered):
            return f"no model matches {pattern!r}; did you mean {wider!r}?"
    suggestion = nearest(pattern, registered)
    if suggestion is None:
        return f"no model of linvit matches {pattern!r}: `linvit models` lists all of them"
    return unknown("model", pattern, registered)


def print_entries(entries: Sequence[ModelEntry], json_file: Path | None = None) -> None:
    """Print the models as a table of at most 100 columns when piped."""
    from linvit.output.terminal import page, table

    columns = ["model", "size", "tokens", "parameters", "k", "projection", "share"]
    models = table(columns, text={"model", "projection", "share"})
    for entry in entries:
        models.add_row(
            entry.name,
            str(entry.img_size),
            f"{entry.num_tokens:,}",
            f"{entry.num_parameters:,}",
            str(entry.k),
            entry.projection,
            entry.share,
        )
    page(outputs=[json_file]).print(models)


def _describe(name: str) -> ModelEntry:
    import timm
    import torch

    # The weights are only counted, so none are allocated or initialised.
    with torch.device("meta"):
        model = timm.create_model(name, weight_init="skip")
    projections = model.blocks[0].attn.projections()
    return ModelEntry(
        name,
        img_size=model.pretrained_cfg["input_size"][-1],
        num_tokens=model.patch_embed.num_patches,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        k=projections[0].k,
        projection=projections[0].kind,
        share=model.share,
    )
