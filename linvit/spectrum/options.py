"""Options of `linvit spectrum`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linvit.settings.fields import ImageSize

# Flags that differ from their field's name.
_FLAGS = {"img_size": "img-size", "json_file": "json"}
BUDGETS = ("speedup", "flops", "energy")


class SpectrumOptions(BaseModel):
    """Which model is measured on which images, what is planned, and which files are written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        description="a timm model name, a run's folder, a folder with config.json and weights, or a file written by "
        "--json, from which to plan and draw without measuring again"
    )
    images: Path | None = Field(None, description="folder of images, at any depth")
    weights: Path | None = Field(None, description="weights file for a timm model name")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="extra arguments of the model")

    img_size: tuple[ImageSize, ...] = Field(
        (), description="one or more image sizes in pixels, such as 518 or 768x512 (default: the model's own)"
    )
    num_images: int = Field(16, gt=0, description="number of images to average over, drawn from the folder")
    seed: int = Field(0, ge=0, description="seed for drawing images and for random projections")
    method: Literal["auto", "exact", "randomized"] = Field(
        "auto",
        description="find all singular values (exact), or the largest by random projection (randomized); auto is exact "
        "up to 3000 tokens",
    )
    rank: int = Field(512, gt=0, description="number of singular values that random projection finds")
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto uses a GPU if there is one")

    speedup: float | None = Field(
        None, gt=1, description="plan to divide the model's operations by this; 2 halves them"
    )
    flops: float | None = Field(
        None, gt=0, lt=1, description="plan to use this share of the model's operations; 0.5 halves them"
    )
    energy: float | None = Field(
        None, gt=0, le=1, description="plan to keep this share of attention's energy in every layer"
    )
    projection: str = Field("separable", description="kind of projection to plan for")
    share: Literal["none", "headwise", "kv", "layerwise"] = Field("kv", description="sharing of E and F to plan for")
    min_k: int = Field(16, gt=0, description="smallest projected length in the plan")

    index: int | None = Field(
        None, gt=0, description="number of singular values that the heat map sums (default: a quarter of the tokens)"
    )
    json_file: Path | None = Field(None, description="write all numbers to this file, from which to plan again")
    csv_file: Path | None = Field(None, description="write a table with one row per size, layer and head to this file")
    plot_file: Path | None = Field(None, description="write curves, heat map, ranks and growth to this PNG file")
    plan_file: Path | None = Field(
        None,
        description="write the plan to this YAML or .json file, as keywords of the model: img_size, k, projection, "
        "share",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        budgets = [f"--{name}" for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"a plan has one budget: give {budgets[0]} or {budgets[1]}")
        if self.plan_file is not None and not budgets:
            raise ValueError("--plan needs a budget: give --speedup, --flops or --energy")
        if self.reads_results:
            given = [name for name in ("images", "weights", "img_size", "json_file") if name in self.model_fields_set]
            if given:
                flag = _FLAGS.get(given[0], given[0])
                raise ValueError(f"{self.source} holds measured spectra: leave out --{flag}")
        elif self.images is None:
            raise ValueError("--images is missing: give a folder of images")
        return self

    @property
    def reads_results(self) -> bool:
        """Whether `source` is a file of measured spectra."""
        return self.source.endswith(".json")

    @property
    def budget(self) -> dict[str, float]:
        """The plan's budget by its name; empty if no plan is requested."""
        return {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}
