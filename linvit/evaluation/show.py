"""An evaluation's results as a CSV file of images and as Markdown to paste.

An evaluation's results on the terminal.

One set of weights at several image sizes, as a picture.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from math import sqrt
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich import box
from rich.console import Console
from rich.table import Table

from linvit.evaluation.classes import describe, in_words
from linvit.evaluation.metrics import ImageResults
from linvit.evaluation.report import Report
from linvit.evaluation.run import Evaluated
from linvit.output.files import write_file, write_text
from linvit.settings.fields import listed

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
    lines = _markdown_figures(reports) + _markdown_comparisons(reports)
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


def _markdown_figures(reports: Sequence[Report]) -> list[str]:
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


def _markdown_comparisons(reports: Sequence[Report]) -> list[str]:
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


MOST_CLASSES, MOST_PAIRS, MOST_IMAGES = 10, 5, 3


def show(reports: Sequence[Report]) -> None:
    """What was evaluated on what, the figures, comparisons, and where the last result is worst."""
    console = Console(highlight=False)
    first, last = reports[0], reports[-1]
    names = short_names(reports)
    if len(names) == 1:
        _line(console, f"{first['model']} ({first['weights']})")
    _line(
        console,
        f"{first['num_images']:,} images of {first['num_present_classes']} classes ({first['labels']}): "
        f"{first['data']}, {first['split']}; {first['images_per_second']:.0f} images/s",
    )
    console.print(_figures(reports, names))
    for note in dict.fromkeys(note for found in reports for note in found["notes"]):
        _line(console, note)
    if last["num_unreadable"]:
        of_all = f"{last['num_unreadable']} of {last['num_unreadable'] + last['num_images']} images"
        _line(console, f"{of_all} cannot be read and are not counted: {listed(last['unreadable'])}")
    for found in reports:
        _show_extras(console, found, f"{names[found['source']]} at {size_of(found)}")
    if len(reports) > 1:
        _line(console, f"Against {names[first['source']]} at {size_of(first)}, top-1 in points:")
        console.print(_comparisons(reports[1:], names))
    _show_faults(console, last)


def short_names(reports: Sequence[Report]) -> dict[str, str]:
    """For each source its last part, "a" for "runs/a", or all of it where another has the same last part."""
    sources = list(dict.fromkeys(found["source"] for found in reports))
    last_parts = [Path(source).name for source in sources]
    return {source: last if last_parts.count(last) == 1 else source for source, last in zip(sources, last_parts)}


def _line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, markup=False)


def _table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table whose first columns hold words, which may be broken, and whose others hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _figures(reports: Sequence[Report], names: Mapping[str, str]) -> Table:
    sources = ["source"] if len(names) > 1 else []
    classes = ["classes"] if any(found["masked"] is not None for found in reports) else []
    table = _table(sources, ["size", "patches", *classes, *["top-1 %", "95 % CI", "top-5 %", "F1 %", "ECE %", "loss"]])
    for found, scores, num_classes in rows_of(reports):
        interval = scores["confidence"].get("top1")
        table.add_row(
            *([names[found["source"]]] if sources else []),
            size_of(found),
            "–" if found["num_tokens"] is None else str(found["num_tokens"]),
            *([str(num_classes)] if classes else []),
            f"{scores['top1']:.2f}",
            "–" if interval is None else f"{interval[0]:.1f}–{interval[1]:.1f}",
            f"{scores['top5']:.2f}",
            f"{scores['macro_f1']:.2f}",
            f"{scores['ece']:.2f}",
            f"{scores['loss']:.4f}",
        )
    return table


def _show_extras(console: Console, found: Report, name: str) -> None:
    if "real" in found:
        real = found["real"]
        _line(console, f"{name}: ReaL accuracy {real['top1']:.2f} % of {real['num_images']:,} images that have labels")
    if found["calibration"] is not None:
        fit = found["calibration"]
        loss = f"loss {fit['loss_before']:.4f} → {fit['loss']:.4f}"
        ece = f"ECE {fit['ece_before']:.2f} → {fit['ece']:.2f} %"
        judged = f"on {fit['num_images']:,} images"
        _line(console, f"{name}: temperature {fit['temperature']:.3f} ({fit['fitted_on']}): {ece}, {loss} {judged}")


def _comparisons(reports: Sequence[Report], names: Mapping[str, str]) -> Table:
    table = _table(["source"], ["size", "difference", "95 % CI", "only it right", "only it wrong", "McNemar p"])
    for found in reports:
        against = found["against_first"]
        interval = against["confidence"].get("top1_difference")
        table.add_row(
            names[found["source"]],
            size_of(found),
            f"{against['top1_difference']:+.2f}",
            "–" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}",
            str(against["only_here"]),
            str(against["only_baseline"]),
            f"{against['mcnemar_p']:.2g}",
        )
    return table


def _show_faults(console: Console, found: Report) -> None:
    """The worst classes, pairs and images."""
    scores = found["masked"] or found
    accuracies = scores["per_class"]
    worst = sorted(accuracies, key=lambda name: accuracies[name])[:MOST_CLASSES]
    which = "class" if len(worst) == len(accuracies) else f"the {len(worst)} worst of {len(accuracies)} classes"
    table = _table([which], ["images", "top-1 %"])
    for name in worst:
        table.add_row(describe(name), str(scores["images_per_class"][name]), f"{accuracies[name]:.2f}")
    console.print(table)
    pairs = [
        f"{in_words(pair['label'])} for {in_words(pair['prediction'])} ({pair['images']})"
        for pair in scores["most_confused"][:MOST_PAIRS]
    ]
    if pairs:
        _line(console, f"most often taken for another: {'; '.join(pairs)}")
    for image in [image for image in found["worst_images"] if image["label"] != image["prediction"]][:MOST_IMAGES]:
        taken_for = f"{in_words(image['prediction'])} ({100 * image['probability']:.0f} %)"
        _line(console, f"{image['path']}: {in_words(image['label'])} taken for {taken_for}, loss {image['loss']:.2f}")


# Okabe and Ito's, told apart without red and green; markers tell lines apart without colour.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def write_sweep(reports: Sequence[Report], path: Path) -> None:
    """Draw top-1 and its interval over the size, a line a source, and write the PNG."""
    figure = draw(reports)
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=150))


def draw(reports: Sequence[Report]) -> Figure:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (source, name) in enumerate(short_names(reports).items()):
        points = sorted((_side(found), (found["masked"] or found)) for found in reports if found["source"] == source)
        sides = [side for side, _ in points]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        values = [scores["top1"] for _, scores in points]
        axes.plot(sides, values, label=name, markersize=5, color=colour, marker=marker)
        intervals = [scores["confidence"].get("top1") for _, scores in points]
        if all(interval is not None for interval in intervals):
            low, high = zip(*intervals)
            axes.fill_between(sides, low, high, color=colour, alpha=0.2, linewidth=0)
    sides = sorted({_side(found) for found in reports})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sides, [f"{side:.0f}" for side in sides])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="image size, px (shaded: 95 % interval)", ylabel="top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _side(found: Report) -> float:
    """The side of a square of the image's area."""
    size = found["img_size"]
    return float(size) if isinstance(size, int) else sqrt(size[0] * size[1])
