"""Accuracy of a quantised model beside the float model's, on the same images."""

from typing import Any

from linvit.distributed import joined_ranks
from linvit.evaluation.options import ClassifierOptions, EvalOptions
from linvit.evaluation.source import evaluate_source
from linvit.export.options import ExportOptions
from linvit.settings.fields import height_and_width

# Options that an exported model has fixed already.
_FIXED = {"model", "model_kwargs", "use_ema", "amp", "amp_dtype", "mean", "std"}


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
    size = None if options.img_size is None else height_and_width(options.img_size)
    own = {name: value for name, value in shared.items() if name not in _FIXED}
    quantised = {**common, "class_map": None, "source": path, **own, "device": "cpu"}
    found = {}
    with joined_ranks(options.device) as ranks:
        original = EvalOptions(source=options.source, **common, **shared)
        for name, each in (("float", original), ("int8", EvalOptions(**quantised))):
            evaluation = evaluate_source(each.source, size, each, ranks)
            results = evaluation.collected.masked or evaluation.collected.results
            found[name] = results.metrics(evaluation.match.class_names)
    drop = found["float"].top1 - found["int8"].top1
    if drop > options.max_drop:
        raise ValueError(
            f"int8 loses {drop:.2f} points of top-1 ({found['float'].top1:.2f} % to {found['int8'].top1:.2f} %), more "
            f"than --max-drop {options.max_drop:g}; nothing was written; use more --calibration-images, or --half fp16"
        )
    return {"num_images": found["int8"].num_images, **{name: metrics.top1 for name, metrics in found.items()}}
