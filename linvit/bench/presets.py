"""What is measured: groups of models that are timed side by side, from the options or from a preset."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from linvit.bench.options import BenchOptions, DType, Mode


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
