"""Evaluation on a set of images: during training and by `linvit eval`, one and the same."""

import copy
import json

import torch
from torch import nn

from linvit.data.loader import Loader
from linvit.distributed import joined_ranks, recorded
from linvit.evaluation.collect import collect
from linvit.evaluation.confusion import confusion, write_confusion
from linvit.evaluation.metrics import Metrics
from linvit.evaluation.options import EvalOptions, height_and_width
from linvit.evaluation.report import add_comparisons, report
from linvit.evaluation.run import Evaluated, Size, evaluate_source, say_on_stderr
from linvit.evaluation.show import show, write_images, write_markdown, write_sweep
from linvit.output.files import write_text
from linvit.settings.flags import check_files


def evaluate(
    model: nn.Module, loader: Loader, *, device: torch.device, amp_dtype: torch.dtype | None = None
) -> Metrics:
    """Metrics of a model over all images of a loader, and of the loaders of all other processes.

    Args:
        model: left in the mode that it was in; a copy is evaluated where it lies on another device.
        loader: from `create_eval_loader`, its images on `device`.
        amp_dtype: precision of automatic mixed precision; None is off.

    A batch that does not fit in memory is halved, which is said on stderr; with sharded weights it raises ValueError.
    """
    if next(model.parameters()).device != device:
        model = copy.deepcopy(model).to(device)
    found = collect([model], [loader], device=device, amp_dtype=amp_dtype, say=say_on_stderr)
    return found.results.metrics(loader.class_names)


@recorded
def evaluate_command(options: EvalOptions) -> int:
    """`linvit eval`: evaluate each source at each size, show tables and write files; returns the exit status.

    Raises ValueError where sources, data or options do not fit together.
    """
    check_files(*options.files)
    sizes: list[Size | None] = [height_and_width(size) for size in options.img_size]
    with joined_ranks(options.device) as ranks:
        evaluated = [
            evaluate_source(source, size, options, ranks)
            for source in (options.source, *options.compare)
            for size in sizes or [None]
        ]
        if ranks.is_primary:
            _tell(evaluated, options)
    return 0


def _tell(evaluated: list[Evaluated], options: EvalOptions) -> None:
    reports = [report(each, options) for each in evaluated]
    add_comparisons(reports, evaluated, options)
    show(reports)
    if options.json_file is not None:
        # One result gives an object, several a list of them.
        write_text(options.json_file, json.dumps(reports if len(reports) > 1 else reports[0], indent=2) + "\n")
    if options.csv_file is not None:
        write_images(evaluated, options.csv_file)
    if options.markdown_file is not None:
        write_markdown(reports, options.markdown_file)
    if options.plot_file is not None:
        write_sweep(reports, options.plot_file)
    for path in options.confusion:
        collected = evaluated[0].collected
        write_confusion(confusion(collected.masked or collected.results, evaluated[0].match.class_names), path)
