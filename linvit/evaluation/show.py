"""An evaluation's results on the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from linvit.evaluation.imagenet import describe, in_words
from linvit.evaluation.report import Report
from linvit.evaluation.tables import rows_of, size_of
from linvit.validation import listed

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
