"""The registered models as a table: `linvit models`."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from linvit.output.files import write_json
from linvit.settings.fields import unknown
from linvit.settings.flags import parse_options

SUMMARY = "list the registered models"


class CatalogOptions(BaseModel):
    """Which models to list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str = Field("linvit_*", description="names to list, with * and ? (default: all)")
    json_file: Path | None = Field(None, description="file that the table is written to")


class ModelEntry(NamedTuple):
    """A registered model and its defaults: size in pixels, patches, parameters with its own 1,000 classes."""

    name: str
    img_size: int
    num_tokens: int
    num_parameters: int
    k: int
    projection: str
    share: str


def main(argv: Sequence[str]) -> int:
    """List the models, and return the exit status."""
    return print_catalog(
        parse_options(
            CatalogOptions,
            argv,
            prog="linvit models",
            description="List the registered models.",
            positionals={"pattern": "PATTERN"},
            spellings={"json_file": ["--json"]},
        )
    )


def print_catalog(options: CatalogOptions) -> int:
    """Print the models of a pattern; raises ValueError where there is none."""
    entries = list_entries(options.pattern)
    print(f"{'model':<28}{'size':>6}{'tokens':>9}{'parameters':>14}{'k':>6}  projection  share")
    for entry in entries:
        print(
            f"{entry.name:<28}{entry.img_size:>6}{entry.num_tokens:>9,}{entry.num_parameters:>14,}{entry.k:>6}"
            f"  {entry.projection:<10}  {entry.share}"
        )
    if options.json_file is not None:
        write_json(options.json_file, [entry._asdict() for entry in entries])
    return 0


def list_entries(pattern: str) -> list[ModelEntry]:
    """The linvit models whose names match `pattern`, smallest image and width first."""
    import timm

    import linvit.model.registry  # noqa: F401  registers the names

    registered = timm.list_models("linvit_*")
    names = [name for name in registered if fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(unknown("model", pattern, registered))
    return sorted((_describe(name) for name in names), key=lambda entry: (entry.img_size, entry.num_parameters))


def _describe(name: str) -> ModelEntry:
    import timm
    import torch

    # No memory and no random numbers are spent on weights that are only counted.
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
