"""Options of `linvit bench`; imports nothing heavy, so that `--help` stays quick.

What is measured: groups of models that are timed side by side, from the options or from a preset.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linvit.settings.fields import DType, ImageSize, Mode

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


@dataclass(frozen=True)
class Group:
    """Models under the same conditions; the first is the baseline, unless it is alone.

    `img_size` is (height, width); `warmup` counts untimed steps a model; `memory` names those of `models` whose steps
    are measured in processes of their own where there is no GPU.
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
        height, width = self.img_size
        size = f"{height} px" if height == width else f"{height}×{width} px"
        return f"{size}, {self.mode}, batch {self.batch_size}, {self.dtype}" + (", compiled" if self.compile else "")


def select(options: BenchOptions) -> list[Group]:
    """The groups that the options ask for, small ones first."""
    if options.preset is not None:
        return list({"readme": _readme, "gpu": _gpu}[options.preset]())
    models = tuple(dict.fromkeys([options.baseline, *options.models]))
    return [
        Group(
            models,
            (size, size) if isinstance(size, int) else size,
            mode,
            rounds=options.rounds,
            batch_size=batch_size,
            dtype=dtype,
            compile=options.compile,
            memory=models if options.memory else (),
        )
        for size, batch_size, dtype, mode in product(options.img_size, options.batch_size, options.dtype, options.modes)
    ]


TIMM = "vit_small_patch16_224"
OURS = "linvit_small_patch16_224"
# k = 256, separable, one E a layer.
LONG = "linvit_small_patch16_1024"
LENGTHS = (
    TIMM,
    f"{OURS}:k=256,projection=linear",
    f"{OURS}:k=64,projection=separable,share=kv",
    f"{OURS}:k=32,projection=separable,share=kv",
)
CHECKPOINTED = (f"{LONG}:grad_checkpointing=mlp", f"{LONG}:grad_checkpointing=full")


def _readme() -> Iterator[Group]:
    """Under 15 minutes on 2 cores: steps of many seconds get no warm-up, all code having run at smaller sizes."""
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
    """About as many patches in every batch, which fill a GPU; in the end compiled models, and single precision."""
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
