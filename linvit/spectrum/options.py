"""Options of `linvit spectrum`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linvit.settings.fields import ImageSize

# Where a flag is not its field's name.
_FLAGS = {"img_size": "img-size", "json_file": "json"}
BUDGETS = ("speedup", "flops", "energy")


class SpectrumOptions(BaseModel):
    """Whose attention is measured, on which images, and what is made of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        description="a timm model name, a run's folder, a folder with config.json and weights, or a file that "
        "--json wrote, which is planned from and drawn without measuring anew"
    )
    images: Path | None = Field(None, description="folder of images, at any depth")
    weights: Path | None = Field(None, description="file with the weights of a timm model name")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of the model")

    img_size: tuple[ImageSize, ...] = Field(
        (), description="one or more sizes, as 518 or 768x512; the model's own if not given"
    )
    num_images: int = Field(16, gt=0, description="images to average over, drawn from the folder")
    seed: int = Field(0, ge=0, description="of the draw of images, and of random projections")
    method: Literal["auto", "exact", "randomized"] = Field(
        "auto", description="all singular values, or the largest by random projection; auto is exact up to 3000 tokens"
    )
    rank: int = Field(512, gt=0, description="singular values that random projection finds")
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")

    speedup: float | None = Field(None, gt=1, description="plan for so many times fewer operations")
    flops: float | None = Field(None, gt=0, lt=1, description="plan for this share of the operations")
    energy: float | None = Field(
        None, gt=0, le=1, description="plan that keeps this share of attention's energy in every layer"
    )
    projection: str = Field("separable", description="kind of projection that is planned for")
    share: Literal["none", "headwise", "kv", "layerwise"] = Field("kv", description="who shares E and F in the plan")
    min_k: int = Field(16, gt=0, description="the least projected length in the plan")

    index: int | None = Field(
        None, gt=0, description="how many singular values the heat map counts (default: a quarter of the tokens)"
    )
    json_file: Path | None = Field(None, description="file for all numbers, to plan from again")
    csv_file: Path | None = Field(None, description="file for a table with a row per size, layer and head")
    plot_file: Path | None = Field(None, description="PNG file for curves, heat map, ranks and growth")
    plan_file: Path | None = Field(
        None, description="YAML or .json file for the plan, as keywords of the model: img_size, k, projection, share"
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
                raise ValueError(f"{self.source} has been measured: leave out --{_FLAGS.get(given[0], given[0])}")
        elif self.images is None:
            raise ValueError("--images is missing: give a folder of images")
        return self

    @property
    def reads_results(self) -> bool:
        """Whether `source` is a file of measured spectra."""
        return self.source.endswith(".json")

    @property
    def budget(self) -> dict[str, float]:
        """The budget of the plan, by its name; empty where none is wanted."""
        return {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}
