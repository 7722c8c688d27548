"""Seconds and memory of original and converted model, side by side, at the sizes that they are for."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.models import VisionTransformer, get_model_args
from torch import Tensor

from linvit.measure.memory import OutOfMemory, can_read_peaks, cuda_step_memory, step_memory_of_own_process
from linvit.measure.timing import Runner, interleave, make_step
from linvit.model.vit import LinformerViT
from linvit.settings.fields import DType

WARMUP = 1


@dataclass(frozen=True)
class Speed:
    """Images of `img_size`, forward: medians of seconds, of times faster in the same round, and their range.

    `bytes` are what a step adds to memory, and None where that cannot be read.
    """

    img_size: tuple[int, int]
    patches: int
    batch_size: int
    dtype: DType
    rounds: int
    original_seconds: float
    converted_seconds: float
    times_faster: float
    spread: tuple[float, float]
    original_bytes: int | None
    converted_bytes: int | None


def measure_speed(
    original: VisionTransformer,
    converted: LinformerViT,
    img_size: tuple[int, int],
    *,
    rounds: int,
    batch_size: int = 1,
    amp: bool = False,
    report: Callable[[int], None] = lambda index: None,
) -> Speed:
    """Both models at (height, width), taken there as `set_input_size` does; they are left as they are.

    With `amp` both compute in bfloat16.
    """
    dtype: DType = "bfloat16" if amp else "float32"
    models = [at_size(model, img_size) for model in (original, converted)]
    images = torch.randn(batch_size, models[0].in_chans, *img_size, generator=torch.Generator().manual_seed(0))
    images = images.to(next(original.parameters()).device)
    runners = [
        Runner(name, make_step(model, images, mode="forward", dtype=getattr(torch, dtype)))
        for name, model in zip(("the original", "the converted model"), models)
    ]
    interleave(runners, rounds=rounds, warmup=WARMUP, clock=lambda: _clock(images), report=report)
    theirs, own = (runner.seconds for runner in runners)
    if not (theirs and own):
        raise ValueError(f"--target-size {img_size[0]}x{img_size[1]} does not fit in memory: leave it out")
    ratios = [a / b for a, b in zip(theirs, own)]
    if images.is_cuda:
        memory: list[int | None] = [cuda_step_memory(runner.run).step_bytes for runner in runners]
    else:
        memory = [_own_process_bytes(model, img_size, batch_size, dtype) for model in (original, converted)]
    return Speed(
        img_size=img_size,
        patches=models[0].patch_embed.num_patches,
        batch_size=batch_size,
        dtype=dtype,
        rounds=rounds,
        original_seconds=statistics.median(theirs),
        converted_seconds=statistics.median(own),
        times_faster=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        original_bytes=memory[0],
        converted_bytes=memory[1],
    )


def at_size(model: VisionTransformer, img_size: tuple[int, int]) -> VisionTransformer:
    """A copy for images of that size; ValueError where its projections would not shorten their sequence."""
    resized = copy.deepcopy(model)
    resized.set_input_size(img_size=img_size)
    return resized


def _own_process_bytes(
    model: VisionTransformer, img_size: tuple[int, int], batch_size: int, dtype: DType
) -> int | None:
    """What a forward pass adds to memory, in a process of its own where another model's memory is not in the way."""
    if not can_read_peaks():
        return None
    spec = model_spec(model)
    try:
        memory = step_memory_of_own_process(spec, img_size, mode="forward", batch_size=batch_size, dtype=dtype)
    except OutOfMemory:
        return None
    return memory.step_bytes


def model_spec(model: VisionTransformer) -> str:
    """A registered model as `linvit bench` takes it, at any size: NAME:keyword=value,…"""
    arguments = {name: value for name, value in get_model_args(model).items() if name != "img_size"}
    keywords = ",".join(f"{name}={value!r}" for name, value in arguments.items() if value is not None)
    return f"{model.pretrained_cfg['architecture']}:{keywords}"


def _clock(images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
