"""Options of `linvit bench`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linvit.evaluate_options import ImageSize

Mode = Literal["forward", "train"]
DType = Literal["float32", "bfloat16", "float16"]

# What a preset decides by itself.
_SELECTION = ("models", "img_size", "modes", "batch_size", "dtype", "compile", "rounds", "baseline", "memory")


class BenchOptions(BaseModel):
    """Which models are measured, how, and where the numbers go."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...] = Field(
        ("linvit_small_patch16_224:k=64",),
        description="timm names with keywords, as linvit_small_patch16_224:k=64,projection=separable,share=kv; "
        "grad_checkpointing=mlp or =full is a keyword too",
    )
    baseline: str = Field("vit_small_patch16_224", description="what every other model is compared with")
    img_size: tuple[ImageSize, ...] = Field((512, 1024), description="image sizes, as 512 or 768x512")
    modes: tuple[Mode, ...] = Field(("forward", "train"), description="forward pass, training step, or both")
    batch_size: tuple[Annotated[int, Field(gt=0)], ...] = Field((1,), description="images a step; one or more")
    dtype: tuple[DType, ...] = Field(
        ("float32",), description="precisions; all but float32 are automatic mixed precision"
    )
    compile: bool = Field(False, description="run every model through torch.compile")
    rounds: int = Field(5, gt=0, description="how often every model is timed")
    memory: bool = Field(
        False, description="on a CPU too, measure what a step adds to memory, in a process of its own per model"
    )
    preset: Literal["readme", "gpu"] | None = Field(
        None, description="a fixed selection instead: the README's numbers, or a GPU's"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")

    json_file: Path | None = Field(None, description="file for all numbers, and how they came to be")
    csv_file: Path | None = Field(None, description="file for a table with a row per measurement")
    plot_file: Path | None = Field(None, description="PNG file for a plot of time and memory over patches")

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        given = [name for name in _SELECTION if name in self.model_fields_set]
        if self.preset is not None and given:
            flag = "--" + given[0].replace("_", "-")
            raise ValueError(f"--preset {self.preset} decides what is measured: leave out {flag}")
        for name in ("models", "img_size", "modes", "batch_size", "dtype"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} needs at least one value")
        return self
