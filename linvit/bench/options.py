"""Options of `linvit bench`, and the groups of models that they (or a preset) select.

Imports nothing heavy, so that `--help` stays quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linvit.settings.fields import DType, ImageSize, Mode, height_and_width

# Options that a preset replaces.
_SELECTION = ("models", "img_size", "modes", "batch_size", "dtype", "compile", "rounds", "baseline", "memory")

# Models of the presets.
TIMM = "vit_small_patch16_224"
OURS = "linvit_small_patch16_224"
# k = 256, separable, one E per layer.
LONG = "linvit_small_patch16_1024"
LENGTHS = (
    TIMM,
    f"{OURS}:k=256,projection=linear",
    f"{OURS}:k=64,projection=separable,share=kv",
    f"{OURS}:k=32,projection=separable,share=kv",
)
CHECKPOINTED = (f"{LONG}:grad_checkpointing=mlp", f"{LONG}:grad_checkpointing=full")


class BenchOptions(BaseModel):
    """Models to measure, how to measure them, and output files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...] = Field(
        ("linvit_small_patch16_224:k=64",),
        description="timm names, each with optional keywords, such as linvit_small_patch16_224:k=64,share=kv or "
        "linvit_small_patch16_1024:grad_checkpointing=mlp",
    )
    baseline: str = Field("vit_small_patch16_224", description="model that every other model is compared with")
    img_size: tuple[ImageSize, ...] = Field((512, 1024), description="image sizes in pixels, such as 512 or 768x512")
    modes: tuple[Mode, ...] = Field(("forward", "train"), description="forward pass, training step, or both")
    batch_size: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (1,), description="images per step; each of several values is measured"
    )
    dtype: tuple[DType, ...] = Field(
        ("float32",), description="data types; bfloat16 and float16 use automatic mixed precision"
    )
    compile: bool = Field(False, description="compile every model with torch.compile")
    rounds: int = Field(5, gt=0, description="number of timed steps per model")
    memory: bool = Field(False, description="measure the extra memory of a step on CPUs too, in a subprocess per model")
    preset: Literal["readme", "gpu"] | None = Field(
        None, description="measure a fixed selection: that of the README, or one for GPUs"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device; auto uses a GPU if there is one")

    json_file: Path | None = Field(None, description="write all numbers and how they were measured to this file")
    csv_file: Path | None = Field(None, description="write a table with one row per measurement to this file")
    plot_file: Path | None = Field(None, description="write a plot of time and memory over patches to this PNG file")

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


@dataclass(frozen=True)
class Group:
    """Models that are timed under the same conditions; the first is the baseline, unless it is the only one.

    `img_size` is (height, width), `warmup` the number of untimed steps per model. `memory` names those of `models`
    whose memory is measured in subprocesses if there is no GPU.
    """

    models: tuple[str, ...]
    img_size: tuple[int, int]
    mode: Mode
    rounds: int
    warmup: int = 1
    batch_size: int = 1
    dtype: DType = "float32"
    compile: bool = False
    memory: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        from linvit.output.terminal import format_size

        conditions = f"{format_size(self.img_size)} px, {self.mode}, batch {self.batch_size}, {self.dtype}"
        return conditions + (", compiled" if self.compile else "")


def select(options: BenchOptions) -> list[Group]:
    """The groups that the options select, small images first."""
    if options.preset is not None:
        return list({"readme": _readme, "gpu": _gpu}[options.preset]())
    models = tuple(dict.fromkeys([options.baseline, *options.models]))
    return [
        Group(
            models,
            height_and_width(size),
            mode,
            rounds=options.rounds,
            batch_size=batch_size,
            dtype=dtype,
            compile=options.compile,
            memory=models if options.memory else (),
        )
        for size, batch_size, dtype, mode in product(options.img_size, options.batch_size, options.dtype, options.modes)
    ]


def _readme() -> Iterator[Group]:
    """The README's numbers, in under 15 minutes on 2 cores.

    Steps that take many seconds get no warm-up: all code has run at smaller sizes before.
    """
    yield Group((TIMM, OURS), (224, 224), "forward", rounds=15)
    yield Group((TIMM, OURS), (224, 224), "train", rounds=15)
    yield Group(LENGTHS, (512, 512), "forward", rounds=11)
    yield Group((*LENGTHS, LONG), (512, 512), "train", rounds=7, memory=(TIMM, LONG))
    yield Group((*LENGTHS, LONG), (1024, 1024), "forward", rounds=5, warmup=0)
    yield Group(
        (*LENGTHS, LONG, *CHECKPOINTED),
        (1024, 1024),
        "train",
        rounds=2,
        warmup=0,
        memory=(TIMM, LONG, *CHECKPOINTED),
    )
    yield Group(LENGTHS, (2048, 2048), "forward", rounds=2, warmup=0)
    yield Group(LENGTHS, (2048, 2048), "train", rounds=1, warmup=0)
    yield Group((LONG,), (4096, 4096), "forward", rounds=1, warmup=0, memory=(LONG,))


def _gpu() -> Iterator[Group]:
    """Batches of about equally many patches, enough to fill a GPU; then compiled models, then single precision."""
    batches = {512: 32, 1024: 8, 2048: 2, 4096: 1}
    modes: tuple[Mode, ...] = ("forward", "train")
    timm, linear, separable, _ = LENGTHS
    models = (timm, linear, separable, LONG)
    yield Group((TIMM, OURS), (224, 224), "train", rounds=7, batch_size=128, dtype="bfloat16")
    for size, mode in product(batches, modes):
        checkpointed = CHECKPOINTED if (size, mode) == (2048, "train") else ()
        yield Group((*models, *checkpointed), (size, size), mode, 7, batch_size=batches[size], dtype="bfloat16")
    for mode, size in product(reversed(modes), (1024, 2048)):
        compiled = (timm, separable, LONG)
        yield Group(compiled, (size, size), mode, 7, warmup=3, batch_size=batches[size], dtype="bfloat16", compile=True)
    yield Group(models, (1024, 1024), "train", rounds=3, batch_size=8)
