"""Options of `linvit convert`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from linvit.settings.fields import ImageSize, LayerLengths, Length, height_and_width


class ConvertOptions(BaseModel):
    """Which model is converted, to what, by which images, and where it goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="a timm model name, a run's folder, or a folder with config.json and weights")
    weights: Path | None = Field(None, description="file with the weights of a timm model name")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of the model")
    images: Path = Field(description="folder of images, at any depth, without labels")
    output: Path = Field(description="folder for the converted model, which timm loads as local-dir:")

    k: Length | LayerLengths | Literal["plan"] = Field(
        "plan",
        title="a length of at least 1, a length or none for each layer, or plan",
        description="projected length: one number; one per layer ('none' is ordinary attention there); or plan, which "
        "tries lengths in each layer and takes those that lose least at --speedup",
    )
    speedup: float | None = Field(
        None, gt=1, description="of a plan: so many times fewer operations, at the first --target-size (default: 1.5)"
    )
    layers: tuple[str, ...] = Field(
        (),
        description="layers to convert, from 0, as 6-11 or 3 5 7-9; the others keep ordinary attention (default: all)",
    )
    projection: str = Field("separable", description="kind of E and F")
    share: Literal["none", "headwise", "kv", "layerwise"] = Field("kv", description="who shares E and F")
    start_from: Path | None = Field(
        None,
        description="folder of an earlier conversion of the same model, as at a smaller size, where more "
        "images are fitted in the time; it brings k, projection and share along",
    )
    img_size: ImageSize | None = Field(
        None, description="size to convert at, as 518 or 768x512; the model's own if none"
    )

    num_images: int = Field(
        512,
        ge=8,
        description="images drawn from the folder; an eighth of them, at most 64, chooses penalties, and as many "
        "others tell what came out",
    )
    steps: int = Field(0, ge=0, description="steps of descent in each layer, before what is fitted in closed form")
    max_error: float | None = Field(
        None, gt=0, description="a layer whose tokens are off by a larger share goes back to ordinary attention"
    )
    distill_steps: int | None = Field(None, gt=0, description="steps of end-to-end distillation after the fit")
    distill_minutes: float | None = Field(None, gt=0, description="minutes of end-to-end distillation after the fit")
    distill_rate: float = Field(1e-5, gt=0, description="learning rate of the distillation")
    distill_batch_size: int = Field(4, gt=0, description="images of a step of the distillation")
    amp: bool = Field(False, description="fit and distil in bfloat16: faster on CPUs with units for it, and on GPUs")
    batch_size: int = Field(8, gt=0, description="images at once")
    seed: int = Field(0, ge=0, description="of the draw of images, and of the order they are used in")
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")

    min_cosine: float | None = Field(
        None, gt=0, lt=1, description="refuse a model whose features have a lower cosine to the original's than this"
    )
    target_size: tuple[ImageSize, ...] = Field(
        (), description="sizes it is meant for: planned for the first, timed at all; the size of the conversion if none"
    )
    rounds: int = Field(5, ge=0, description="how often both are timed at each size; 0 leaves it out")
    json_file: Path | None = Field(None, description="file for the results, which also lie in OUT/convert.json")

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        for part in layers:
            ends = part.split("-")
            if len(ends) > 2 or not all(end.isdecimal() for end in ends) or int(ends[0]) > int(ends[-1]):
                raise ValueError(f"{part!r} is no layer and no range of layers, such as 3 or 6-11")
        return layers

    @property
    def size(self) -> tuple[int, int] | None:
        """`img_size` as (height, width)."""
        return None if self.img_size is None else height_and_width(self.img_size)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.speedup is not None and self.k != "plan":
            raise ValueError("--speedup is of a plan: leave out --k, or give --k plan")
        if self.layers and not isinstance(self.k, int):
            raise ValueError("--layers goes with one length for all of them: give --k N")
        brought = [name for name in ("k", "speedup", "layers", "projection", "share") if name in self.model_fields_set]
        if self.start_from is not None and brought:
            raise ValueError(f"--start-from brings its own along: leave out --{brought[0]}")
        if self.distill_steps is not None and self.distill_minutes is not None:
            raise ValueError("--distill-steps and --distill-minutes say the same: give one")
        return self

    @property
    def converted_layers(self) -> list[int] | None:
        """The layers that `layers` names; None where it names none."""
        numbers: set[int] = set()
        for part in self.layers:
            first, _, last = part.partition("-")
            numbers |= set(range(int(first), int(last or first) + 1))
        return sorted(numbers) or None
