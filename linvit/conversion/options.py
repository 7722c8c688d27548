"""Options of `linvit convert`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from linvit.settings.fields import ImageSize, LayerLengths, Length, ModelKeywords, height_and_width


class ConvertOptions(BaseModel):
    """The model to convert, its projections, the images for the fit, and where to write the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="timm model name, run folder, or folder with config.json and weights")
    weights: Path | None = Field(None, description="weights file for a timm model name")
    model_kwargs: ModelKeywords = Field(default_factory=dict, description="extra keyword arguments of the model")
    images: Path = Field(description="folder of images, searched at any depth; labels are not needed")
    output: Path = Field(description="folder to write the converted model to; timm loads it as local-dir:FOLDER")

    k: Length | LayerLengths | Literal["plan"] = Field(
        "plan",
        title="a length of at least 1, one length or 'none' per layer, or 'plan'",
        description="projected length: one number for all layers; one per layer ('none' keeps ordinary attention "
        "there); or 'plan', which tries lengths in each layer and chooses those with the least error at --speedup",
    )
    speedup: float | None = Field(
        None,
        gt=1,
        description="with --k plan: factor by which to speed the model up, at the first --target-size (default: 1.5)",
    )
    plan_by: Literal["time", "flops"] = Field(
        "time",
        description="what --k plan reduces by --speedup: the time of a forward pass on this device, or operations",
    )
    layers: tuple[str, ...] = Field(
        (),
        description="layers to convert, counted from 0, such as 6-11 or 3 5 7-9; the others keep ordinary attention "
        "(default: all)",
    )
    projection: str = Field(
        "separable", description="kind of E and F: linear, separable, conv, avgpool, maxpool, dct, random or identity"
    )
    share: Literal["none", "headwise", "kv", "layerwise"] = Field(
        "kv", description="which heads and layers share E and F"
    )
    local: int | None = Field(
        None,
        description="side of the kernel of a depth-wise convolution beside attention, in patches, fitted with Wo; 3 is "
        "usual (default: none)",
    )
    full_layers: int = Field(
        0,
        ge=0,
        description="layers that get ordinary attention back after the fit, where that helps the last features most; "
        "each costs its share of the speed",
    )
    start_from: Path | None = Field(
        None,
        description="output folder of an earlier conversion of the same model, for example at a smaller size, where "
        "the same time fits more images; it determines k, projection and share",
    )
    img_size: ImageSize | None = Field(
        None, description="image size of the conversion, such as 518 or 768x512 (default: the model's own)"
    )

    num_images: int = Field(
        512,
        ge=8,
        description="number of images to use from the folder; an eighth of them, at most 64, chooses penalties, and as "
        "many others measure the result",
    )
    steps: int = Field(0, ge=0, description="gradient descent steps per layer, before the fit in closed form")
    max_error: float | None = Field(
        None, gt=0, description="largest relative error of a layer; layers above it return to ordinary attention"
    )
    distill_steps: int | None = Field(None, gt=0, description="steps of end-to-end distillation after the fit")
    distill_minutes: float | None = Field(None, gt=0, description="minutes of end-to-end distillation after the fit")
    distill_rate: float = Field(1e-5, gt=0, description="learning rate of the distillation")
    distill_batch_size: int = Field(4, gt=0, description="images per batch of the distillation")
    distill_accumulate: int = Field(1, gt=0, description="batches per distillation step, whose gradients are summed")
    distill_loss: Literal["tokens", "features"] = Field(
        "tokens",
        description="what the distillation compares: the tokens at four depths, or the cosines of the last features",
    )
    amp: bool = Field(
        False, description="fit and distil in bfloat16; faster on GPUs, and on CPUs with bfloat16 instructions"
    )
    batch_size: int = Field(8, gt=0, description="images per batch, except in distillation")
    seed: int = Field(0, ge=0, description="seed of all random choices, such as the images and their order")
    device: str = Field("auto", description="device: cpu, cuda, cuda:1, ...; 'auto' uses a GPU if there is one")

    min_cosine: float | None = Field(
        None, gt=0, lt=1, description="lowest cosine to the original's features at which the model is written"
    )
    target_size: tuple[ImageSize, ...] = Field(
        (),
        description="image sizes the model is meant for: --k plan uses the first, and speed is measured at all of them "
        "(default: the size of the conversion)",
    )
    rounds: int = Field(5, ge=0, description="speed measurements of both models per size; 0 disables them")
    json_file: Path | None = Field(
        None, description="JSON file for the results, which the output folder also holds as convert.json"
    )

    @property
    def size(self) -> tuple[int, int] | None:
        """`img_size` as (height, width)."""
        return None if self.img_size is None else height_and_width(self.img_size)

    @property
    def converted_layers(self) -> list[int] | None:
        """The numbers of the layers in `layers`; None if all layers are converted."""
        numbers: set[int] = set()
        for part in self.layers:
            first, _, last = part.partition("-")
            numbers |= set(range(int(first), int(last or first) + 1))
        return sorted(numbers) or None

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        for part in layers:
            ends = part.split("-")
            if len(ends) > 2 or not all(end.isdecimal() for end in ends) or int(ends[0]) > int(ends[-1]):
                raise ValueError(f"{part!r} is not a layer or a range of layers, such as 3 or 6-11")
        return layers

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.speedup is not None and self.k != "plan":
            raise ValueError("--speedup needs planned lengths: leave out --k, or give --k plan")
        if "plan_by" in self.model_fields_set and self.k != "plan":
            raise ValueError("--plan-by needs planned lengths: leave out --k, or give --k plan")
        if self.layers and not isinstance(self.k, int):
            raise ValueError("--layers needs one length for all these layers: give --k N")
        decided = ("k", "speedup", "plan_by", "layers", "projection", "share", "local")
        fixed = [name for name in decided if name in self.model_fields_set]
        if self.start_from is not None and fixed:
            raise ValueError(f"--start-from uses the settings of the earlier conversion: leave out --{fixed[0]}")
        if self.distill_steps is not None and self.distill_minutes is not None:
            raise ValueError("--distill-steps and --distill-minutes exclude each other: give one")
        return self
