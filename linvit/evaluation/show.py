"""Print the results of an evaluation as tables on the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from linvit.evaluation.classes import first_lemma, with_lemma
from linvit.evaluation.report import Report
from linvit.output.terminal import EMPTY, format_size, show_line, table
from linvit.settings.fields import listed

MOST_CLASSES, MOST_PAIRS, MOST_IMAGES = 10, 5, 3


def show(console: Console, reports: Sequence[Report]) -> None:
    """Print what was evaluated, the scores, the comparisons, and the worst cases of the last result."""
    first, last = reports[0], reports[-1]
    names = short_names(reports)
    if len(names) == 1:
        show_line(console, f"{first['model']} ({first['weights']})")
    show_line(
        console,
        f"{first['num_images']:,} images of {first['num_present_classes']} classes ({first['labels']}): "
        f"{first['data']}, {first['split']}; {first['images_per_second']:.0f} images/s",
    )
    console.print(_score_table(reports, names))
    for note in dict.fromkeys(note for report in reports for note in report["notes"]):
        show_line(console, note)
    if last["num_unreadable"]:
        num_images = last["num_unreadable"] + last["num_images"]
        show_line(
            console,
            f"{last['num_unreadable']} of {num_images} images cannot be read and are not counted: "
            f"{listed(last['unreadable'])}",
        )
    for report in reports:
        _show_extras(console, report, f"{names[report['source']]} at {format_size(report['img_size'])}")
    if len(reports) > 1:
        baseline = f"{names[first['source']]} at {format_size(first['img_size'])}"
        show_line(console, f"Compared with {baseline}, top-1 in percentage points:")
        console.print(_comparison_table(reports[1:], names))
        show_line(console, f"Classes and errors of {names[last['source']]} at {format_size(last['img_size'])}:")
    _show_worst(console, last)


def score_rows(reports: Sequence[Report]) -> list[tuple[Report, Report, int]]:
    """Report, scores and number of classes for each row of a table.

    A report has a second row if predictions were also restricted to the data's classes.
    """
    rows = []
    for report in reports:
        rows.append((report, report, report["num_classes"]))
        if report["masked"] is not None:
            rows.append((report, report["masked"], report["num_present_classes"]))
    return rows


def short_names(reports: Sequence[Report]) -> dict[str, str]:
    """The last part of each source, "a" for "runs/a", or all of it if another source has the same last part."""
    sources = list(dict.fromkeys(report["source"] for report in reports))
    last_parts = [Path(source).name for source in sources]
    return {source: last if last_parts.count(last) == 1 else source for source, last in zip(sources, last_parts)}


def _score_table(reports: Sequence[Report], names: Mapping[str, str]) -> Table:
    sources = ["source"] if len(names) > 1 else []
    classes = ["classes"] if any(report["masked"] is not None for report in reports) else []
    numbers = ["size", "patches", *classes, "top-1 %", "95 % CI", "top-5 %", "F1 %", "ECE %", "loss"]
    made = table([*sources, *numbers], text=sources)
    for report, scores, num_classes in score_rows(reports):
        interval = scores["confidence"].get("top1")
        made.add_row(
            *([names[report["source"]]] if sources else []),
            format_size(report["img_size"]),
            EMPTY if report["num_tokens"] is None else str(report["num_tokens"]),
            *([str(num_classes)] if classes else []),
            f"{scores['top1']:.2f}",
            EMPTY if interval is None else f"{interval[0]:.1f}–{interval[1]:.1f}",
            f"{scores['top5']:.2f}",
            f"{scores['macro_f1']:.2f}",
            f"{scores['ece']:.2f}",
            f"{scores['loss']:.4f}",
        )
    return made


def _show_extras(console: Console, report: Report, name: str) -> None:
    """ReaL accuracy and calibration, if they were requested."""
    if "real" in report:
        real = report["real"]
        show_line(
            console, f"{name}: ReaL accuracy {real['top1']:.2f} % on {real['num_images']:,} images with ReaL labels"
        )
    if "conformal" in report:
        found = report["conformal"]
        show_line(
            console,
            f"{name}: sets ({found['method']}, {found['calibrated_on']}) hold the true class of "
            f"{found['coverage']:.1f} % of {found['num_images']:,} images (aim: {100 * (1 - found['alpha']):g} %), "
            f"{found['mean_size']:.2f} classes on average; one class for {found['one_class']:.1f} %, none for "
            f"{found['empty']:.1f} %",
        )
    if report["calibration"] is not None:
        fit = report["calibration"]
        loss = f"loss {fit['loss_before']:.4f} → {fit['loss']:.4f}"
        ece = f"ECE {fit['ece_before']:.2f} → {fit['ece']:.2f} %"
        images = f"on {fit['num_images']:,} images"
        show_line(console, f"{name}: temperature {fit['temperature']:.3f} ({fit['fitted_on']}): {ece}, {loss} {images}")


def _comparison_table(reports: Sequence[Report], names: Mapping[str, str]) -> Table:
    numbers = ["size", "difference", "95 % CI", "only this right", "only this wrong", "McNemar p"]
    made = table(["source", *numbers], text=["source"])
    for report in reports:
        against = report["against_first"]
        interval = against["confidence"].get("top1_difference")
        made.add_row(
            names[report["source"]],
            format_size(report["img_size"]),
            f"{against['top1_difference']:+.2f}",
            EMPTY if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}",
            str(against["only_here"]),
            str(against["only_baseline"]),
            f"{against['mcnemar_p']:.2g}",
        )
    return made


def _show_worst(console: Console, report: Report) -> None:
    """The worst classes, the most frequent confusions and the worst images."""
    scores = report["masked"] or report
    accuracies = scores["per_class"]
    worst = sorted(accuracies, key=lambda name: accuracies[name])[:MOST_CLASSES]
    heading = "class" if len(worst) == len(accuracies) else f"the {len(worst)} worst of {len(accuracies)} classes"
    made = table([heading, "images", "top-1 %"], text=[heading])
    for name in worst:
        made.add_row(with_lemma(name), str(scores["images_per_class"][name]), f"{accuracies[name]:.2f}")
    console.print(made)
    pairs = [
        f"{first_lemma(pair['label'])} as {first_lemma(pair['prediction'])} ({pair['images']})"
        for pair in scores["most_confused"][:MOST_PAIRS]
    ]
    if pairs:
        show_line(console, f"most frequent confusions: {'; '.join(pairs)}")
    for image in [image for image in report["worst_images"] if image["label"] != image["prediction"]][:MOST_IMAGES]:
        prediction = f"{first_lemma(image['prediction'])} ({100 * image['probability']:.0f} %)"
        label = first_lemma(image["label"])
        show_line(console, f"{image['path']}: {label}, predicted as {prediction}, loss {image['loss']:.2f}")
