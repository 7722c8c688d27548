"""An evaluation's results as a CSV file of images and as Markdown to paste."""

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

from linvit.evaluation.imagenet import describe
from linvit.evaluation.report import Report
from linvit.evaluation.subject import Evaluated
from linvit.files import write_file, write_text
from linvit.training.metrics import ImageResults

NUM_WORST_CLASSES, NUM_PAIRS = 10, 10
PREDICTED = ("prediction", "probability", "loss", "correct")


def write_images(evaluated: Sequence[Evaluated], path: Path) -> None:
    """A row per source, size and image that could be read, in the order of the data.

    The columns after `correct` are of predictions confined to the data's classes; empty where the model has no more.
    """

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        masked = [f"masked_{name}" for name in PREDICTED]
        writer.writerow(["source", "img_size", "path", "label", *PREDICTED, *masked])
        for each in evaluated:
            writer.writerows(_rows(each))
        text.flush()
        text.detach()

    write_file(path, write)


def _rows(evaluated: Evaluated) -> Iterator[list[Any]]:
    results, names = evaluated.collected.results, evaluated.match.class_names
    size = "x".join(map(str, evaluated.size))
    predicted = zip(*(_predictions(each, names) for each in (results, evaluated.collected.masked)))
    for index, label, (own, masked) in zip(results.indices.tolist(), results.labels.tolist(), predicted):
        yield [evaluated.source, size, evaluated.images.path(index), names[label], *own, *masked]


def _predictions(results: ImageResults | None, names: Sequence[str]) -> Iterator[list[Any]]:
    if results is None:
        yield from repeat([""] * len(PREDICTED))
        return
    columns = (results.predictions, results.probabilities, results.losses, results.correct)
    for prediction, probability, loss, is_correct in zip(*(column.tolist() for column in columns)):
        # float32 has nine digits to tell.
        yield [names[prediction], f"{probability:.9g}", f"{loss:.9g}", int(is_correct)]


def write_markdown(reports: Sequence[Report], path: Path) -> None:
    """The figures as tables, each with its 95 % interval, then the worst classes and pairs of the last result."""
    lines = _figures(reports) + _comparisons(reports)
    found = reports[-1]["masked"] or reports[-1]
    accuracies = sorted(found["per_class"].items(), key=lambda item: item[1])[:NUM_WORST_CLASSES]
    lines += ["", "| worst classes | images | top-1 % |", "|---|---|---|"]
    lines += [f"| {describe(name)} | {found['images_per_class'][name]} | {value:.2f} |" for name, value in accuracies]
    if found["most_confused"]:
        lines += ["", "| label | predicted | images |", "|---|---|---|"]
        lines += [
            f"| {describe(pair['label'])} | {describe(pair['prediction'])} | {pair['images']} |"
            for pair in found["most_confused"][:NUM_PAIRS]
        ]
    write_text(path, "\n".join([*lines, "", *_footnotes(reports), ""]))


def _figures(reports: Sequence[Report]) -> list[str]:
    names = ["top1", "top5", "balanced_accuracy", "macro_f1", "ece", "loss"]
    heads = ["top-1 %", "top-5 %", "balanced %", "macro F1 %", "ECE %", "loss"]
    lines = ["| model | size | classes | " + " | ".join(heads) + " | images |", "|---" * (len(heads) + 4) + "|"]
    for found, scores, classes in rows_of(reports):
        cells = [_with_interval(scores, name) for name in names]
        lines.append(
            f"| {found['source']} | {size_of(found)} | {classes} | {' | '.join(cells)} | {found['num_images']} |"
        )
    return lines


def _with_interval(scores: Report, name: str, *, sign: str = "") -> str:
    spec = f"{sign}.{4 if 'loss' in name else 2}f"
    interval = scores["confidence"].get(name)
    text = format(scores[name], spec)
    return text if interval is None else f"{text} ({interval[0]:{spec}} to {interval[1]:{spec}})"


def _comparisons(reports: Sequence[Report]) -> list[str]:
    compared = [found for found in reports if "against_first" in found]
    if not compared:
        return []
    first = f"{reports[0]['source']} at {size_of(reports[0])}"
    lines = ["", f"| against {first} | size | top-1, points | loss | only it right | only it wrong | McNemar p |"]
    lines.append("|---|---|---|---|---|---|---|")
    for found in compared:
        against = found["against_first"]
        points, loss = (_with_interval(against, f"{name}_difference", sign="+") for name in ("top1", "loss"))
        lines.append(
            f"| {found['source']} | {size_of(found)} | {points} | {loss} | {against['only_here']} | "
            f"{against['only_baseline']} | {against['mcnemar_p']:.2g} |"
        )
    return lines


def _footnotes(reports: Sequence[Report]) -> list[str]:
    first = reports[0]
    lines = [f"{first['num_images']:,} images of {first['data']}, {first['split']}, classes {first['labels']}."]
    if first["bootstrap"]["resamples"]:
        lines.append(
            f"In brackets: 95 % percentile bootstrap over images, {first['bootstrap']['resamples']} resamples, "
            f"seed {first['bootstrap']['seed']}."
        )
    return lines


def rows_of(reports: Sequence[Report]) -> list[tuple[Report, Report, int]]:
    """A row per report, and one more for predictions confined to the data's classes: report, scores, classes."""
    rows = []
    for found in reports:
        rows.append((found, found, found["num_classes"]))
        if found["masked"] is not None:
            rows.append((found, found["masked"], found["num_present_classes"]))
    return rows


def size_of(found: Report) -> str:
    size = found["img_size"]
    return str(size) if isinstance(size, int) else f"{size[0]}×{size[1]}"
