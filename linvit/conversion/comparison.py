"""Compare a converted model with its original: features on unseen images, and speed and memory side by side."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.models import get_model_args
from torch import Tensor

from linvit.conversion.blocks import Vit
from linvit.measure.memory import OutOfMemory, can_read_peaks, cuda_step_memory, step_memory_in_subprocess
from linvit.measure.timing import Runner, interleave, make_step
from linvit.model.transformer import LinformerTransformer
from linvit.settings.fields import DType

WARMUP_ROUNDS = 1


@dataclass(frozen=True)
class Fidelity:
    """Means over images: cosines between the converted model's tokens or features and the original's, after the last
    norm, and the share of images with the same top-1 class. None where a model lacks such an output."""

    num_images: int
    class_cosine: float | None
    patch_cosine: float
    # Of the classifier's input.
    feature_cosine: float | None
    top1_agreement: float | None

    @property
    def cosines(self) -> list[float]:
        """The cosines that are not None."""
        return [each for each in (self.class_cosine, self.patch_cosine, self.feature_cosine) if each is not None]

    @property
    def mean_cosine(self) -> float:
        """Mean of `cosines`."""
        return sum(self.cosines) / len(self.cosines)


class Comparison:
    """Images with the original's outputs on them, in single precision.

    Args:
        original: in evaluation mode.
        images: (n, 3, H, W).
        batch_size: images per forward pass.
    """

    def __init__(self, original: Vit, images: Tensor, *, batch_size: int) -> None:
        self.original, self.batches = original, images.split(batch_size)
        with torch.no_grad():
            self.expected = [_outputs(original, batch) for batch in self.batches]

    @torch.no_grad()
    def fidelity(self, model: Vit, *, amp: bool = False) -> Fidelity:
        """How close a model in evaluation mode is to the original.

        With `amp` the model computes in bfloat16, and its rounding lowers the cosines a little.
        """
        original, rows = self.original, []
        for batch, (tokens, pooled, logits) in zip(self.batches, self.expected):
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=amp):
                own_tokens, own_pooled, own_logits = (each.float() for each in _outputs(model, batch))
            cosines = torch.cosine_similarity(tokens, own_tokens, dim=-1)
            row = [cosines[:, 0], cosines[:, original.num_prefix_tokens :].mean(1)]
            row.append(torch.cosine_similarity(pooled, own_pooled))
            row.append((logits.argmax(1) == own_logits.argmax(1)).float())
            rows.append(torch.stack(row))
        class_cosine, patch_cosine, feature_cosine, agreement = torch.cat(rows, dim=1).mean(1).tolist()
        return Fidelity(
            num_images=sum(map(len, self.batches)),
            class_cosine=class_cosine if original.cls_token is not None else None,
            patch_cosine=patch_cosine,
            feature_cosine=feature_cosine if original.global_pool else None,
            top1_agreement=agreement if original.num_classes > 0 else None,
        )


def _outputs(model: Vit, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens after the last norm (B, T, D), the classifier's input and its output, both (B, ·)."""
    tokens = model.forward_features(images)
    pooled = model.forward_head(tokens, pre_logits=True)
    return tokens, pooled.flatten(1), model.head(pooled).flatten(1)


@dataclass(frozen=True)
class Speed:
    """Forward passes on images of `img_size`, (height, width).

    Seconds are medians. `times_faster` is the median over rounds of original / converted, `spread` its range. `bytes`
    are the memory that a pass adds, None where it cannot be measured.
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
    original: Vit,
    converted: LinformerTransformer,
    img_size: tuple[int, int],
    *,
    rounds: int,
    batch_size: int = 1,
    amp: bool = False,
    report: Callable[[int], None] = lambda index: None,
) -> Speed:
    """Time both models side by side at `img_size`, (height, width), on copies resized by `set_input_size`.

    With `amp` both compute in bfloat16. `report` is called with each round's index before it starts. Raises
    ValueError if a model does not fit in memory, fails, or cannot be resized.
    """
    dtype: DType = "bfloat16" if amp else "float32"
    models = [resized_copy(model, img_size) for model in (original, converted)]
    images = torch.randn(batch_size, models[0].in_chans, *img_size, generator=torch.Generator().manual_seed(0))
    images = images.to(next(original.parameters()).device)
    runners = [
        Runner(name, make_step(model, images, mode="forward", dtype=getattr(torch, dtype)))
        for name, model in zip(("the original", "the converted model"), models)
    ]
    interleave(runners, rounds=rounds, warmup=WARMUP_ROUNDS, clock=lambda: synchronised_clock(images), report=report)
    original_seconds, converted_seconds = (runner.seconds for runner in runners)
    if not (original_seconds and converted_seconds):
        raise ValueError(f"--target-size {img_size[0]}x{img_size[1]} does not fit in memory: leave this size out")
    ratios = [a / b for a, b in zip(original_seconds, converted_seconds)]
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
        original_seconds=statistics.median(original_seconds),
        converted_seconds=statistics.median(converted_seconds),
        times_faster=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        original_bytes=memory[0],
        converted_bytes=memory[1],
    )


def resized_copy(model: Vit, img_size: tuple[int, int]) -> Vit:
    """A copy for images of this size, (height, width); raises ValueError if its projections would be too long."""
    resized = copy.deepcopy(model)
    resized.set_input_size(img_size=img_size)
    return resized


def _own_process_bytes(model: Vit, img_size: tuple[int, int], batch_size: int, dtype: DType) -> int | None:
    """Memory that a forward pass adds, measured in a separate process that holds no other model."""
    if not can_read_peaks():
        return None
    spec = model_spec(model)
    try:
        memory = step_memory_in_subprocess(spec, img_size, mode="forward", batch_size=batch_size, dtype=dtype)
    except OutOfMemory:
        return None
    return memory.step_bytes


def model_spec(model: Vit) -> str:
    """A registered model as a spec for `linvit bench`, without its size: NAME:keyword=value,…"""
    arguments = {name: value for name, value in get_model_args(model).items() if name != "img_size"}
    keywords = ",".join(f"{name}={value!r}" for name, value in arguments.items() if value is not None)
    return f"{model.pretrained_cfg['architecture']}:{keywords}"


def synchronised_clock(images: Tensor) -> float:
    """Seconds, after all work on the device of `images` is done."""
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
