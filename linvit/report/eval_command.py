"""`linvit eval` with its page, `--html`. The rest of the command is in `linvit.evaluation.command`, which is below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from linvit.evaluation import command

if TYPE_CHECKING:
    from pathlib import Path

    from linvit.evaluation.options import EvalOptions
    from linvit.evaluation.source import Evaluation
    from linvit.report.page import Evaluated

SUMMARY = command.SUMMARY


def main(argv: Sequence[str]) -> int:
    """Evaluate, and return the exit status."""
    return command.main(argv, write_page=write_page)


def write_page(evaluations: Sequence[Evaluation], options: EvalOptions, path: Path) -> None:
    """Write the page of evaluations. Raises OSError, naming the file, if it cannot be written."""
    from linvit.output.files import write_text
    from linvit.output.terminal import format_size
    from linvit.report.page import render_evaluations

    first = evaluations[0]
    facts = [
        ("Images", f"{options.data_dir}, {options.split}, classes matched {first.match.how}"),
        *((f"{each.model} at {format_size(each.size)} px", each.weights) for each in evaluations),
    ]
    evaluated = [_describe(each, options, num_pages=len(evaluations)) for each in evaluations]
    title = f"Evaluation of {', '.join(dict.fromkeys(each.source for each in evaluations))}"
    write_text(path, render_evaluations(evaluated, title=title, facts=facts))


def _describe(evaluation: Evaluation, options: EvalOptions, *, num_pages: int) -> Evaluated:
    import torch

    from linvit.evaluation.inference import load_source
    from linvit.evaluation.predictions import predictions_of
    from linvit.output.terminal import format_size
    from linvit.report.examples import MOST_WORST, PICTURES_PER_PAGE, worst_images
    from linvit.report.page import Evaluated

    collected = evaluation.collected
    found = predictions_of(collected.masked or collected.results, evaluation.images)
    classifier = load_source(evaluation.source, options, weights=options.weights, img_size=evaluation.size)
    classifier.model.to(torch.device(evaluation.device))
    most = max(min(MOST_WORST, PICTURES_PER_PAGE // num_pages), 2)
    notes = [text for text in (evaluation.images.note, evaluation.match.note) if text]
    if collected.masked is not None:
        notes.append("Predictions are restricted to the classes of the data.")
    if unreadable := len(collected.results.unreadable):
        notes.append(f"{unreadable:,} images cannot be read and are not counted.")
    size = format_size(evaluation.size)
    return Evaluated(
        name=f"{evaluation.source} at {size}",
        subject=f"{evaluation.model} at {size} px",
        predictions=found,
        worst=worst_images(found, evaluation.images, classifier, most=most),
        notes=tuple(notes),
    )
