"""Write the results of an evaluation to files: a CSV row per image, Markdown tables, a plot over image sizes."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from math import sqrt
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from linvit.evaluation.classes import with_lemma
from linvit.evaluation.metrics import ImageResults
from linvit.evaluation.report import Report
from linvit.evaluation.show import score_rows, short_names
from linvit.evaluation.source import Evaluation
from linvit.output.cells import CsvWriter, Utf8, markdown_cell
from linvit.output.files import write_file, write_text
from linvit.output.plots import drawable, save_figure, series_style
from linvit.output.terminal import format_size

NUM_WORST_CLASSES, NUM_PAIRS = 10, 10
PREDICTED = ("prediction", "probability", "loss", "correct")
# The scores in the Markdown table, with their headings.
_SCORES = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "balanced_accuracy": "balanced %",
    "macro_f1": "macro F1 %",
    "ece": "ECE %",
    "loss": "loss",
}


def write_images(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Write a CSV row for each source, size and image that could be read, in the order of the data.

    The `masked_` columns are for predictions restricted to the data's classes; they are empty if the model has no more.
    """

    def write(file: BinaryIO) -> None:
        writer = CsvWriter(Utf8(file))
        masked = [f"masked_{name}" for name in PREDICTED]
        writer.writerow(["source", "img_size", "path", "label", *PREDICTED, *masked])
        for each in evaluations:
            writer.writerows(_image_rows(each))

    write_file(path, write)


def _image_rows(evaluation: Evaluation) -> Iterator[list[Any]]:
    collected, names = evaluation.collected, evaluation.match.class_names
    size = "x".join(map(str, evaluation.size))
    predicted = zip(*(_predictions(each, names) for each in (collected.results, collected.masked)))
    images = zip(collected.results.indices.tolist(), collected.results.labels.tolist(), predicted)
    for index, label, (own, masked) in images:
        yield [evaluation.source, size, str(evaluation.images.path(index)), names[label], *own, *masked]


def _predictions(results: ImageResults | None, names: Sequence[str]) -> Iterator[list[Any]]:
    if results is None:
        yield from repeat([""] * len(PREDICTED))
        return
    columns = (results.predictions, results.probabilities, results.losses, results.correct)
    for prediction, probability, loss, is_correct in zip(*(column.tolist() for column in columns)):
        # Nine digits identify a float32.
        yield [names[prediction], f"{probability:.9g}", f"{loss:.9g}", int(is_correct)]


def write_markdown(reports: Sequence[Report], path: Path) -> None:
    """Write the scores as tables, with 95 % intervals, then the worst classes and confusions of the last result."""
    lines = _score_table(reports) + _comparison_table(reports)
    scores = reports[-1]["masked"] or reports[-1]
    accuracies = sorted(scores["per_class"].items(), key=lambda item: item[1])[:NUM_WORST_CLASSES]
    if len(reports) > 1:
        last = f"{markdown_cell(reports[-1]['source'])} at {format_size(reports[-1]['img_size'])}"
        lines += ["", f"Classes and confusions of {last}:"]
    lines += ["", "| worst classes | images | top-1 % |", "|---|---|---|"]
    lines += [
        f"| {markdown_cell(with_lemma(name))} | {scores['images_per_class'][name]} | {accuracy:.2f} |"
        for name, accuracy in accuracies
    ]
    if scores["most_confused"]:
        lines += ["", "| label | predicted | images |", "|---|---|---|"]
        lines += [
            f"| {markdown_cell(with_lemma(pair['label']))} | {markdown_cell(with_lemma(pair['prediction']))} "
            f"| {pair['images']} |"
            for pair in scores["most_confused"][:NUM_PAIRS]
        ]
    write_text(path, "\n".join([*lines, "", *_footnotes(reports), ""]))


def _score_table(reports: Sequence[Report]) -> list[str]:
    headings = ["model", "size", "classes", *_SCORES.values(), "images"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for report, scores, num_classes in score_rows(reports):
        cells = " | ".join(_with_interval(scores, name) for name in _SCORES)
        size = format_size(report["img_size"])
        lines.append(
            f"| {markdown_cell(report['source'])} | {size} | {num_classes} | {cells} | {report['num_images']} |"
        )
    return lines


def _with_interval(scores: Report, name: str, *, sign: str = "") -> str:
    spec = f"{sign}.{4 if 'loss' in name else 2}f"
    interval = scores["confidence"].get(name)
    text = format(scores[name], spec)
    return text if interval is None else f"{text} ({interval[0]:{spec}} to {interval[1]:{spec}})"


def _comparison_table(reports: Sequence[Report]) -> list[str]:
    compared = [report for report in reports if "against_first" in report]
    if not compared:
        return []
    first = f"{markdown_cell(reports[0]['source'])} at {format_size(reports[0]['img_size'])}"
    headings = f"compared with {first} | size | top-1, points | loss | only this right | only this wrong | McNemar p"
    lines = ["", f"| {headings} |", "|---|---|---|---|---|---|---|"]
    for report in compared:
        against = report["against_first"]
        points, loss = (_with_interval(against, f"{name}_difference", sign="+") for name in ("top1", "loss"))
        lines.append(
            f"| {markdown_cell(report['source'])} | {format_size(report['img_size'])} | {points} | {loss} "
            f"| {against['only_here']} | {against['only_baseline']} | {against['mcnemar_p']:.2g} |"
        )
    return lines


def _footnotes(reports: Sequence[Report]) -> list[str]:
    first = reports[0]
    data, split, labels = (markdown_cell(first[name]) for name in ("data", "split", "labels"))
    lines = [f"{first['num_images']:,} images of {data}, {split}; classes matched {labels}."]
    if first["bootstrap"]["resamples"]:
        lines.append(
            f"In brackets: 95 % percentile bootstrap over images, {first['bootstrap']['resamples']} resamples, "
            f"seed {first['bootstrap']['seed']}."
        )
    return lines


def write_size_plot(reports: Sequence[Report], path: Path) -> None:
    """Plot top-1 and its interval over the image size, one line per source, as PNG."""
    save_figure(path, draw(reports))


def draw(reports: Sequence[Report]) -> Figure:
    """The plot of `write_size_plot`."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    names = short_names(reports)
    for index, (source, name) in enumerate(zip(names, drawable(list(names.values())))):
        points = sorted(
            ((_side(report), report["masked"] or report) for report in reports if report["source"] == source),
            key=lambda point: point[0],
        )
        sides = [side for side, _ in points]
        style = series_style(index)
        values = [scores["top1"] for _, scores in points]
        axes.plot(sides, values, label=name, markersize=5, color=style["color"], marker=style["marker"])
        intervals = [scores["confidence"].get("top1") for _, scores in points]
        if all(interval is not None for interval in intervals):
            low, high = zip(*intervals)
            axes.fill_between(sides, low, high, color=style["color"], alpha=0.2, linewidth=0)
    sides = sorted({_side(report) for report in reports})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sides, [f"{side:.0f}" for side in sides])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="image size, px (shaded: 95 % interval)", ylabel="top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _side(report: Report) -> float:
    """The side of a square with the image's area, in pixels."""
    size = report["img_size"]
    return float(size) if isinstance(size, int) else sqrt(size[0] * size[1])
