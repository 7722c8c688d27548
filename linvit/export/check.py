"""Compare an exported model, opened again by its own runtime, with the original: outputs, accuracy and time.

B batch, C classes.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linvit.data.augment.build import InputSpec
from linvit.data.loader import normalize
from linvit.distributed import joined_ranks
from linvit.evaluation.options import ClassifierOptions, EvalOptions
from linvit.evaluation.source import evaluate_source
from linvit.export.options import ExportOptions
from linvit.measure.timing import Runner, interleave, make_step

# Largest difference of a probability that passes: rounding in float32, and in half precision.
TOLERANCE = {"float32": 1e-4, "fp16": 2e-2, "bf16": 2e-2}
# And of a heat map: rounding decides between patches that are the largest of a channel by a hair.
HEATMAP_TOLERANCE = {"float32": 1e-2, "fp16": 0.25, "bf16": 0.5}
# Batches of random images: each size is a case of its own for a graph with a dynamic batch.
RANDOM_BATCHES = (1, 2, 5)
# Options that an exported model has fixed already.
_FIXED = {"model", "model_kwargs", "use_ema", "amp", "amp_dtype", "mean", "std"}
_WARMUP = 2

# From normalised images (B, 3, H, W) to logits (B, C), and for models with heat maps also these, (B, C, h, w).
Forward = Callable[[Tensor], Tensor] | Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Agreement:
    """How far two models differ on the same images.

    Attributes:
        images: which images, "random" or where they come from.
        difference: largest absolute difference of a probability; NaN if the exported model gives NaN.
        top1: share of images whose most probable class is the same.
        heatmap: largest difference of an image's map of the most probable class, the sum of the absolute differences
            as a share of the sum of absolute values; None for models without heat maps.
    """

    images: str
    num_images: int
    difference: float
    top1: float
    heatmap: float | None = None


@torch.no_grad()
def compare(model: Forward, exported: Forward, batches: Iterable[Tensor], *, images: str) -> Agreement:
    """Compare the probabilities, and the heat maps if there are any, of two models on batches (B, 3, H, W)."""
    count, same, largest, of_maps = 0, 0, torch.zeros(()), None
    for batch in batches:
        (ours, our_maps), (theirs, their_maps) = (_outputs(forward(batch)) for forward in (model, exported))
        classes = ours.argmax(1)
        count += len(batch)
        same += int((classes == theirs.argmax(1)).sum())
        # Unlike Python's `max`, this keeps NaN.
        largest = torch.maximum(largest, (ours.softmax(1) - theirs.softmax(1)).abs().max())
        if our_maps is not None and their_maps is not None:
            index = torch.arange(len(batch))
            one, other = our_maps[index, classes].flatten(1), their_maps[index, classes].flatten(1)
            shares = (one - other).abs().sum(1) / one.abs().sum(1).clamp_min(torch.finfo(one.dtype).tiny)
            of_maps = shares.max() if of_maps is None else torch.maximum(of_maps, shares.max())
    return Agreement(images, count, float(largest), same / count, None if of_maps is None else float(of_maps))


def _outputs(found: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    logits, maps = (found, None) if isinstance(found, Tensor) else found
    return logits.float(), maps


def random_images(spec: InputSpec, *, seed: int) -> Iterator[Tensor]:
    """Batches of noise around random colours, normalised: (B, 3, H, W) for each B of RANDOM_BATCHES."""
    generator = torch.Generator().manual_seed(seed)
    for count in RANDOM_BATCHES:
        colours = torch.rand(count, 1, 1, 3, generator=generator)
        noise = torch.rand(count, *spec.size, 3, generator=generator)
        yield normalize(((colours + noise) * 127.5).to(torch.uint8), spec)


def require(agreement: Agreement, *, precision: str, tolerance: float | None) -> None:
    """Raise ValueError if the models differ by more than rounding, or by NaN.

    Args:
        precision: of the exported model.
        tolerance: largest difference of a probability; None for that of the precision.
    """
    allowed = tolerance or TOLERANCE[precision]
    if not agreement.difference <= allowed:
        raise ValueError(
            f"the exported model differs from the original by {agreement.difference:.2g} on {agreement.images} images, "
            f"more than --tolerance {allowed:g}; nothing was written; choose another --format, or omit --half"
        )
    if agreement.heatmap is not None and not agreement.heatmap <= HEATMAP_TOLERANCE.get(precision, torch.inf):
        raise ValueError(
            f"heat maps of the exported model differ from the original's by {100 * agreement.heatmap:.2g} % on "
            f"{agreement.images} images; nothing was written; choose another --format, or omit --half"
        )


def compare_accuracy(options: ExportOptions, path: str) -> dict[str, Any]:
    """Top-1 of the source and of the quantised model at `path`, in percent, on the split of --data-dir.

    Raises ValueError if the quantised model loses more than --max-drop points.
    """
    shared = {
        name: getattr(options, name) for name in ClassifierOptions.model_fields if name in options.model_fields_set
    }
    assert options.data_dir is not None
    common: dict[str, Any] = {
        "data_dir": options.data_dir,
        "split": options.split,
        "class_map": options.class_map,
        "weights": options.weights,
        "workers": options.workers,
        "on_bad_image": "skip",
    }
    own = {name: value for name, value in shared.items() if name not in _FIXED}
    quantised = {**common, "class_map": None, "source": path, **own, "device": "cpu"}
    found = {}
    with joined_ranks(options.device) as ranks:
        original = EvalOptions(source=options.source, **common, **shared)
        for name, each in (("float", original), ("int8", EvalOptions(**quantised))):
            evaluation = evaluate_source(each.source, options.size, each, ranks)
            results = evaluation.collected.masked or evaluation.collected.results
            found[name] = results.metrics(evaluation.match.class_names)
    drop = found["float"].top1 - found["int8"].top1
    if drop > options.max_drop:
        raise ValueError(
            f"int8 loses {drop:.2f} points of top-1 ({found['float'].top1:.2f} % to {found['int8'].top1:.2f} %), more "
            f"than --max-drop {options.max_drop:g}; nothing was written; use more --calibration-images, or --half fp16"
        )
    return {"num_images": found["int8"].num_images, **{name: metrics.top1 for name, metrics in found.items()}}


def time_models(models: Mapping[str, nn.Module], spec: InputSpec, options: ExportOptions) -> dict[str, Any]:
    """Seconds per image of each model at batch 1 on the CPU, run in turn: median, all values and their number."""
    images = torch.zeros(1, 3, *spec.size)
    runners = [
        Runner(name, make_step(model, images, mode="forward", dtype=torch.float32)) for name, model in models.items()
    ]
    interleave(runners, rounds=options.rounds, warmup=_WARMUP, clock=time.perf_counter, report=lambda index: None)
    return {
        each.model: {"median": statistics.median(each.seconds), "seconds": each.seconds, "n": len(each.seconds)}
        for each in runners
    }
