"""The results of an evaluation as plain values for JSON; accuracies, F1 and calibration error in percent."""

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch

from linvit.evaluation.metrics import ImageResults
from linvit.evaluation.options import EvalOptions
from linvit.evaluation.scores import most_confused, real_accuracy, scorer
from linvit.evaluation.source import Evaluation
from linvit.evaluation.uncertainty import LEVEL, bootstrap, compare
from linvit.version import __version__

# Entries listed under "most_confused" and "worst_images".
NUM_CONFUSED, NUM_WORST = 20, 20

Report = dict[str, Any]


def build_report(evaluation: Evaluation, options: EvalOptions) -> Report:
    """The scores of one source at one size, and how they were obtained."""
    results, masked = evaluation.collected.results, evaluation.collected.masked
    match, size = evaluation.match, evaluation.size
    report: Report = {
        "source": evaluation.source,
        "model": evaluation.model,
        "weights": evaluation.weights,
        "data": str(options.data_dir),
        "split": options.split,
        "labels": match.how,
        "notes": [note for note in (evaluation.images.note, match.note) if note],
        "num_classes": len(match.class_names),
        "num_present_classes": len(match.present),
        "img_size": size[0] if size[0] == size[1] else list(size),
        "num_tokens": evaluation.num_tokens,
        "views": {"sizes": [list(each) for each in evaluation.sizes], "flips": options.tta},
        **_scores(results, match.class_names, options),
        "masked": None if masked is None else _scores(masked, match.class_names, options),
        "calibration": evaluation.calibration,
        "num_unreadable": len(results.unreadable),
        "unreadable": [str(evaluation.images.path(index)) for index in results.unreadable],
        "images_per_second": len(results.labels) / evaluation.seconds,
        "worst_images": _worst_images(evaluation),
        "device": evaluation.device,
        "bootstrap": {"resamples": options.bootstrap, "level": LEVEL, "seed": options.seed},
        "versions": {
            "linvit": __version__,
            "timm": timm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    if evaluation.conformal is not None:
        rule, found = evaluation.conformal
        report["conformal"] = {**rule.model_dump(exclude={"class_names", "num_calibration"}), **found}
    if evaluation.numbers is not None:
        report["real"] = real_accuracy(
            results, evaluation.numbers, match.class_names, num_resamples=options.bootstrap, seed=options.seed
        )
    return report


def add_comparisons(reports: Sequence[Report], evaluations: Sequence[Evaluation], options: EvalOptions) -> None:
    """Add "against_first" to all reports but the first: the comparison on the images that both evaluated.

    If one of the models has classes that the data lacks, predictions are restricted to the data's classes.
    """
    is_masked = any(each.collected.masked is not None for each in evaluations)
    first, *others = evaluations
    for report, each in zip(reports[1:], others):
        _, rows, first_rows = np.intersect1d(
            each.data_indices, first.data_indices, assume_unique=True, return_indices=True
        )
        against = compare(
            _restricted(each).take(torch.from_numpy(rows)),
            _restricted(first).take(torch.from_numpy(first_rows)),
            num_resamples=options.bootstrap,
            seed=options.seed,
        )
        report["against_first"] = {"is_masked": is_masked, **against}


def _restricted(evaluation: Evaluation) -> ImageResults:
    """The results among the data's classes."""
    return evaluation.collected.masked or evaluation.collected.results


def _scores(results: ImageResults, class_names: Sequence[str], options: EvalOptions) -> Report:
    metrics = results.metrics(class_names)
    score = scorer(results, num_classes=len(class_names))
    scores = score(np.ones(metrics.num_images))
    present = {name: count for name, count in metrics.images_per_class.items() if count}
    return {
        # The metrics are those of training: exact sums, rounded once.
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


def _worst_images(evaluation: Evaluation) -> list[Report]:
    """The images with the highest loss, among the data's classes."""
    results, names = _restricted(evaluation), evaluation.match.class_names
    order = results.losses.argsort(descending=True, stable=True)[:NUM_WORST].tolist()
    return [
        {
            "path": str(evaluation.images.path(int(results.indices[row]))),
            "label": names[int(results.labels[row])],
            "prediction": names[int(results.predictions[row])],
            "probability": float(results.probabilities[row]),
            "loss": float(results.losses[row]),
        }
        for row in order
    ]
