"""What an evaluation found, as plain values for JSON; accuracies, F1 and calibration error in percent."""

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch

from linvit.evaluation.confusion import most_confused
from linvit.evaluation.metrics import ImageResults
from linvit.evaluation.options import EvalOptions
from linvit.evaluation.run import Evaluated
from linvit.evaluation.scores import real_accuracy, scorer
from linvit.evaluation.uncertainty import LEVEL, bootstrap, compare
from linvit.version import __version__

NUM_CONFUSED, NUM_WORST = 20, 20

Report = dict[str, Any]


def report(evaluated: Evaluated, options: EvalOptions) -> Report:
    """Figures of one source at one size, with what they are of."""
    results, masked = evaluated.collected.results, evaluated.collected.masked
    match, size = evaluated.match, evaluated.size
    found: Report = {
        "source": evaluated.source,
        "model": evaluated.model,
        "weights": evaluated.weights,
        "data": str(options.data_dir),
        "split": options.split,
        "labels": match.how,
        "notes": [note for note in (evaluated.images.note, match.note) if note],
        "num_classes": len(match.class_names),
        "num_present_classes": len(match.present),
        "img_size": size[0] if size[0] == size[1] else list(size),
        "num_tokens": evaluated.num_tokens,
        "views": {"sizes": [list(each) for each in evaluated.sizes], "flips": options.tta},
        **_figures(results, match.class_names, options),
        "masked": None if masked is None else _figures(masked, match.class_names, options),
        "calibration": evaluated.calibration,
        "num_unreadable": len(results.unreadable),
        "unreadable": [str(evaluated.images.path(index)) for index in results.unreadable],
        "images_per_second": len(results.labels) / evaluated.seconds,
        "worst_images": _worst(evaluated),
        "device": evaluated.device,
        "bootstrap": {"resamples": options.bootstrap, "level": LEVEL, "seed": options.seed},
        "versions": {
            "linvit": __version__,
            "timm": timm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    if evaluated.numbers is not None:
        found["real"] = real_accuracy(
            results, evaluated.numbers, match.class_names, num_resamples=options.bootstrap, seed=options.seed
        )
    return found


def add_comparisons(reports: Sequence[Report], evaluated: Sequence[Evaluated], options: EvalOptions) -> None:
    """Compare each with the first on the images that both were evaluated on, under "against_first".

    Predictions are confined to the data's classes where one of the models has more.
    """
    is_masked = any(each.collected.masked is not None for each in evaluated)
    first, *others = evaluated
    for found, each in zip(reports[1:], others):
        _, own, firsts = np.intersect1d(each.places, first.places, assume_unique=True, return_indices=True)
        against = compare(
            _comparable(each).take(torch.from_numpy(own)),
            _comparable(first).take(torch.from_numpy(firsts)),
            num_resamples=options.bootstrap,
            seed=options.seed,
        )
        found["against_first"] = {"is_masked": is_masked, **against}


def _comparable(evaluated: Evaluated) -> ImageResults:
    return evaluated.collected.masked or evaluated.collected.results


def _figures(results: ImageResults, class_names: Sequence[str], options: EvalOptions) -> Report:
    metrics = results.metrics(class_names)
    score = scorer(results, num_classes=len(class_names))
    scores = score(np.ones(metrics.num_images))
    present = {name: count for name, count in metrics.images_per_class.items() if count}
    return {
        # The exact ones, rounded once, are those of training.
        **{**scores, "top1": metrics.top1, "top5": metrics.top5, "loss": metrics.loss},
        "confidence": bootstrap(score, metrics.num_images, num_resamples=options.bootstrap, seed=options.seed),
        "num_images": metrics.num_images,
        "per_class": {name: metrics.per_class[name] for name in present},
        "images_per_class": present,
        "most_confused": [
            {"label": label, "prediction": prediction, "images": count}
            for label, prediction, count in most_confused(results, class_names, most=NUM_CONFUSED)
        ],
    }


def _worst(evaluated: Evaluated) -> list[Report]:
    """The images with the highest loss, among the data's classes where the model has more."""
    results, names = _comparable(evaluated), evaluated.match.class_names
    order = results.losses.argsort(descending=True, stable=True)[:NUM_WORST].tolist()
    return [
        {
            "path": str(evaluated.images.path(int(results.indices[row]))),
            "label": names[int(results.labels[row])],
            "prediction": names[int(results.predictions[row])],
            "probability": float(results.probabilities[row]),
            "loss": float(results.losses[row]),
        }
        for row in order
    ]
