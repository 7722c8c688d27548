"""Run a model over a data set and keep the result of every image."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from linvit.data.loader import Loader
from linvit.distributed import largest_over_ranks, sum_over_ranks
from linvit.evaluation.inference import BatchForward, Flips, ShardedForward, forward_views
from linvit.evaluation.metrics import ImageRecords, ImageResults, Metrics
from linvit.output.terminal import note, progress_bar


@dataclass(frozen=True)
class Collected:
    """The results of an evaluation, the same in all processes."""

    results: ImageResults
    # Results without the logits of the classes that the data lacks; None if it has all of them.
    masked: ImageResults | None
    # (N, C) for the images in `results`, if requested.
    logits: Tensor | None


def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    is_shown: bool = False,
) -> Metrics:
    """Metrics of a model over all images of a loader and of the loaders of the other processes.

    A batch that does not fit in memory is halved, with a message on stderr; with sharded weights it raises ValueError.

    Args:
        model: keeps its mode; if it is on another device, a copy is evaluated.
        loader: from `create_eval_loader`, with its images on `device`.
        amp_dtype: precision of automatic mixed precision; None disables it.
        is_shown: whether this process shows the progress.
    """
    if next(model.parameters()).device != device:
        model = copy.deepcopy(model).to(device)
    with progress_bar(is_shown=is_shown) as bar:
        task = bar.add_task("evaluating", total=loader.num_images)
        collected = collect(
            [model],
            [loader],
            device=device,
            amp_dtype=amp_dtype,
            log=note,
            advance=lambda count: bar.advance(task, count),
        )
    return collected.results.metrics(loader.class_names)


@torch.no_grad()
def collect(
    models: Sequence[nn.Module],
    loaders: Sequence[Loader],
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    log: Callable[[str], object],
    flips: Flips = "none",
    present: Sequence[int] | None = None,
    num_logits: int | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Collected:
    """Evaluate all images of a loader and of the loaders of the other processes.

    Memory use on the device is 28 bytes per image, and twice that with `present`.

    Args:
        models: one per loader, on `device`; they keep their mode. All processes call one with sharded weights equally
            often.
        loaders: the same images, at one size per loader.
        amp_dtype: precision of automatic mixed precision; None disables it.
        log: called with a sentence when a batch does not fit in memory and is halved.
        flips: whether to average over each image and its mirror image.
        present: labels in ascending order; results restricted to these classes are collected too.
        num_logits: number of classes whose logits to keep, in 4 bytes per image and class; None keeps none.
        advance: called with the number of this process's images that another batch has finished.
    """
    own = torch.tensor(loaders[0].num_images, device=device)
    num_images = int(sum_over_ranks(own).item())
    records = ImageRecords(num_images, device)
    masked = None if present is None else ImageRecords(num_images, device)
    columns = None if present is None else torch.tensor(present, device=device)
    kept = None if num_logits is None else torch.zeros(num_images, num_logits)
    forwards: list[BatchForward | ShardedForward] = []
    for model, loader in zip(models, loaders):
        if isinstance(model, FSDPModule):
            num_calls = largest_over_ranks(len(loader), device) * (2 if flips == "hflip" else 1)
            forwards.append(ShardedForward(model, device=device, amp_dtype=amp_dtype, num_calls=num_calls))
        else:
            forwards.append(BatchForward(model, device=device, amp_dtype=amp_dtype, log=log))
    with _evaluation_mode(models):
        for batch, logits in forward_views(forwards, loaders, flips=flips):
            advance(len(batch.images) + len(batch.unreadable))
            records.add_unreadable(batch.unreadable)
            if masked is not None:
                masked.add_unreadable(batch.unreadable)
            if not len(logits):
                continue
            records.add(batch.indices, logits, batch.labels)
            if masked is not None and columns is not None:
                masked.add(batch.indices, logits[:, columns], torch.searchsorted(columns, batch.labels))
            if kept is not None:
                kept[batch.indices] = logits.float().cpu()
        for forward, loader in zip(forwards, loaders):
            if isinstance(forward, ShardedForward):
                forward.finish(loader.img_size)
    results = records.gather()
    return Collected(
        results,
        None if masked is None or columns is None else _with_labels(masked.gather(), columns.cpu()),
        None if kept is None else sum_over_ranks(kept.to(device)).cpu()[results.indices],
    )


def _with_labels(results: ImageResults, columns: Tensor) -> ImageResults:
    """Results with the model's labels in place of positions in `columns`."""
    return replace(results, labels=columns[results.labels], predictions=columns[results.predictions])


@contextmanager
def _evaluation_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in zip(models, were_training):
            model.train(was_training)
