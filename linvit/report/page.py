"""Put the pages together: the page of one or several runs, and the page of an evaluation."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from linvit.evaluation.predictions import Predictions
from linvit.output.page import render
from linvit.report.curves import build_charts, describe_idle_counts
from linvit.report.evaluated import compare_predictions, evaluate_predictions, wilson
from linvit.report.examples import Worst
from linvit.report.facts import Facts, settings_table
from linvit.report.run import Run

# Rows in the tables of classes, shared by the evaluations on a page; those with the most errors.
MOST_CLASSES, FEWEST_CLASSES = 1000, 50
# Classes in the table of several evaluations, those with the most errors first.
MOST_SIDE_BY_SIDE = 200
_SCRIPTS = ("chart.js", "templates/confusion.js")


@dataclass(frozen=True)
class Evaluated:
    """Predictions for the page, with the pictures of the worst images."""

    name: str
    subject: str
    predictions: Predictions
    worst: Worst
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunPage:
    """A run for the page, with what was computed from its weights and its images."""

    run: Run
    training: Facts
    cost: Facts
    evaluated: Evaluated | None
    augmented: list[dict[str, Any]] = field(default_factory=list)
    augmented_note: str | None = None


def render_runs(pages: Sequence[RunPage]) -> str:
    """The page of one run, or of several side by side."""
    runs = [page.run for page in pages]
    charts = build_charts(runs)
    evaluated = [page.evaluated for page in pages]
    contexts = [_context(each, index, len(pages)) if each else None for index, each in enumerate(evaluated)]
    sections = [
        ("overview", "Overview"),
        ("curves", "Curves"),
        ("evaluation", "Evaluation"),
        ("augmentation", "Augmentation"),
        ("settings", "Settings"),
        ("use", "Use it"),
    ]
    return render(
        "linvit.report",
        "templates/run.html.j2",
        scripts=_SCRIPTS,
        title=f"Training of {', '.join(run.name for run in runs)}",
        sections=sections,
        pages=pages,
        figures=[figures_of(run, each) for run, each in zip(runs, contexts)],
        comparisons=_comparisons(evaluated),
        charts=charts,
        idle=describe_idle_counts(runs),
        evaluations=contexts,
        side_by_side=_side_by_side(contexts),
        settings=settings_table(runs),
        # The first run with weights is the one whose use is shown.
        usable=next((run for run in runs if run.best is not None), runs[0]),
        quote=lambda value: shlex.quote(str(value)),
        repr=lambda value: repr(str(value)),
    )


def render_evaluations(evaluated: Sequence[Evaluated], *, title: str, facts: Facts) -> str:
    """The page of `linvit eval --html`."""
    contexts = [_context(each, index, len(evaluated)) for index, each in enumerate(evaluated)]
    return render(
        "linvit.report",
        "templates/eval.html.j2",
        scripts=_SCRIPTS,
        title=title,
        facts=facts,
        names=[each.name for each in evaluated],
        comparisons=_comparisons(evaluated),
        evaluations=contexts,
        side_by_side=_side_by_side(contexts),
    )


def figures_of(run: Run, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Epoch, top-1 and loss of the best weights and of the last ones.

    The interval of top-1 is that of the evaluation for the best weights, and Wilson's for the others.
    """
    count = len(run.predictions.paths) if run.predictions is not None else 0
    found = []
    if run.best is not None:
        metrics = run.best.get("metrics", {})
        averaged = ", averaged (EMA)" if run.best.get("weights") == "ema" else ""
        name = f"best by {run.setting('eval_metric')}{averaged}"
        found.append(_figure(name, run.best.get("epoch"), metrics.get("top1"), metrics.get("loss"), count))
        if evaluation is not None:
            found[-1]["interval"] = evaluation["scores"][0]["interval"]
    for prefix, name in (("eval", "last"), ("eval_ema", "last, averaged (EMA)")):
        evaluated = [row for row in run.rows if row.get(f"{prefix}_loss") is not None or row.get(f"{prefix}_top1")]
        if evaluated:
            row = evaluated[-1]
            found.append(_figure(name, row["epoch"], row.get(f"{prefix}_top1"), row.get(f"{prefix}_loss"), count))
    return found


def _figure(name: str, epoch: Any, top1: float | None, loss: float | None, count: int) -> dict[str, Any]:
    interval = wilson(round(top1 * count / 100), count) if top1 is not None and count else None
    return {"name": name, "epoch": epoch, "top1": top1, "interval": interval, "loss": loss}


def _context(evaluated: Evaluated, index: int, num_pages: int) -> dict[str, Any]:
    found = evaluate_predictions(evaluated.predictions)
    return {
        "index": index,
        "name": evaluated.name,
        "subject": evaluated.subject,
        "notes": evaluated.notes,
        "worst": evaluated.worst.images,
        "worst_note": evaluated.worst.note,
        "shown_classes": found["classes"][: max(MOST_CLASSES // num_pages, FEWEST_CLASSES)],
        **found,
    }


def _side_by_side(evaluations: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Scores and accuracies of classes of several evaluations in columns; None for a single one."""
    found = [each for each in evaluations if each is not None]
    if len(found) < 2:
        return None
    by_name = [{score["id"]: score for score in each["scores"]} for each in found]
    accuracies = [{row["name"]: row["accuracy"] for row in each["classes"]} for each in found]
    classes = list(dict.fromkeys(name for each in accuracies for name in each))
    return {
        "names": [each["name"] for each in found],
        "scores": [{**score, "cells": [each.get(score["id"]) for each in by_name]} for score in found[0]["scores"]],
        "classes": [
            {"name": name, "values": [each.get(name) for each in accuracies]} for name in classes[:MOST_SIDE_BY_SIDE]
        ],
        "num_classes": len(classes),
    }


def _comparisons(evaluated: Sequence[Evaluated | None]) -> list[dict[str, Any]]:
    """Top-1 of each evaluation against the first, on the same images."""
    if len(evaluated) < 2 or evaluated[0] is None:
        return []
    found = []
    for each in evaluated[1:]:
        against = None if each is None else compare_predictions(each.predictions, evaluated[0].predictions)
        if each is not None and against is not None:
            found.append({"name": each.name, "first": evaluated[0].name, **against})
    return found
