"""Whether training would start on DATA, found by opening it as training does.

Everything that a check found, in the form that the JSON file has.

A report as a table for the terminal.
"""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from linvit.check.classes import describe_sizes, mean_and_std, training_split
from linvit.check.duplicates import NearCopies
from linvit.check.faults import FAULTS, Finding
from linvit.check.listing import Listing
from linvit.check.run import Measurements
from linvit.data.sources.open import open_images
from linvit.output.terminal import printable
from linvit.version import __version__


def try_training(data: str | os.PathLike[str]) -> str:
    """What training says when it opens its splits, "" where it finds nothing wrong."""
    try:
        classes = open_images(data, split="train").class_names
        open_images(data, split="val", class_names=classes)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def build_report(
    data: Path,
    listing: Listing,
    measurements: Measurements,
    findings: Sequence[Finding],
    *,
    coloured: np.ndarray,
    training: str,
    near_copies: NearCopies | None,
    allow: Sequence[str],
    seconds: float,
    workers: int,
) -> dict[str, Any]:
    """The report: `findings` by their code, faults first, each with what becomes of it and all its cases.

    Args:
        coloured: which images of the training split were decoded whole, (N,) bool.
        training: what training says against the data, if anything.
        near_copies: how near duplicates were looked for, if they were.
        allow: codes of faults that count as notes.
    """
    split_of = np.array([image.split for image in listing.images])
    splits = {
        split: {
            "num_images": int((split_of == split).sum()),
            "classes": classes,
            "sizes": describe_sizes(measurements, split_of == split),
        }
        for split, classes in listing.classes.items()
    }
    described = _by_code(findings, allow)
    num_images = len(listing.images)
    return {
        "data": str(data),
        "layout": listing.layout,
        "num_images": num_images,
        "num_bytes": int(measurements.num_bytes.sum()),
        "num_faults": sum(entry["count"] for entry in described.values() if entry["severity"] == "fault"),
        "training": training or "would start",
        "splits": splits,
        "colours": {"split": training_split(listing), **mean_and_std(measurements, coloured)},
        "near_duplicates": near_copies.describe() if near_copies is not None else None,
        "findings": described,
        "seconds": round(seconds, 3),
        "images_per_second": round(num_images / seconds, 1),
        "workers": workers,
        "versions": {"linvit": __version__, "python": platform.python_version()},
    }


def _by_code(findings: Sequence[Finding], allow: Sequence[str]) -> dict[str, Any]:
    cases: dict[str, list[dict[str, Any]]] = {code: [] for code in FAULTS}
    for finding in findings:
        cases[finding.code].append({"path": finding.path, "detail": finding.detail, "others": list(finding.others)})
    described = {
        code: {
            **FAULTS[code]._asdict(),
            "severity": "note" if code in allow else FAULTS[code].severity,
            "count": len(found),
            "cases": sorted(found, key=lambda case: case["path"]),
        }
        for code, found in cases.items()
        if found
    }
    return dict(sorted(described.items(), key=lambda item: item[1]["severity"] != "fault"))


_EXAMPLES = 2


def show_report(console: Console, report: dict[str, Any]) -> None:
    """Print what DATA holds, what is wrong with it and what becomes of that, and how the images are."""
    console.print(f"{printable(report['data'])}: {contents(report)}", markup=False, soft_wrap=True)
    if report["findings"]:
        console.print(_table(report["findings"]))
    if report["training"] != "would start" and report["layout"] in ("splits", "lists"):
        console.print(f"training refuses: {printable(report['training'])}", markup=False, soft_wrap=True)
    near = report["near_duplicates"]
    if near and near["compared_pairs"] < near["candidate_pairs"]:
        console.print(
            f"many images look alike: of {near['candidate_pairs']:,} such pairs the nearest {near['compared_pairs']:,} "
            "were compared",
            highlight=False,
        )
    for line in describe_images(report):
        console.print(line, markup=False, soft_wrap=True)
    faults, notes = (_count(report, severity) for severity in ("fault", "note"))
    counts = [
        f"{count or 'no'} {what}{'' if count == 1 else 's'}" for count, what in ((faults, "fault"), (notes, "note"))
    ]
    kinds = f"kinds found: {', '.join(counts)}"
    console.print(
        f"{kinds}; {report['num_images']:,} images in {report['seconds']:.1f} s, "
        f"{report['images_per_second']:,.0f} a second",
        highlight=False,
    )


def contents(report: dict[str, Any]) -> str:
    """How many images and classes each split has, in a line."""
    parts = []
    for split, entry in report["splits"].items():
        images = f"{entry['num_images']:,} images"
        classes = len(entry["classes"])
        of_classes = f" of {classes:,} class{'es' if classes != 1 else ''}" if classes else ""
        parts.append(f"{printable(split)} {images}{of_classes}".strip())
    return ", ".join(parts)


def describe_images(report: dict[str, Any]) -> list[str]:
    """Lines on the sizes of the images of each split, and on the colours of the one that is trained on."""
    lines = []
    for split, entry in report["splits"].items():
        sizes = entry["sizes"]
        if sizes:
            width, height, aspect = (sizes[name] for name in ("width", "height", "aspect"))
            lines.append(
                f"{printable(split) or 'images'}: {width['min']:g} to {width['max']:g} px wide (median "
                f"{width['median']:g}), {height['min']:g} to {height['max']:g} px high (median {height['median']:g}), "
                f"width / height {aspect['min']:.2f} to {aspect['max']:.2f}"
            )
    colours = report["colours"]
    if "mean" in colours:
        mean, std = (" ".join(f"{value:g}" for value in colours[name]) for name in ("mean", "std"))
        lines.append(f"colours of {printable(colours['split']) or 'the images'}: --mean {mean} --std {std}")
    return lines


def _table(findings: dict[str, Any]) -> Table:
    table = Table("finding", "count", "what it is → what training does; the mend", "examples", show_lines=True)
    table.columns[1].justify = "right"
    for code, entry in findings.items():
        style = "bold red" if entry["severity"] == "fault" else "cyan"
        table.add_row(
            f"[{style}]{code}[/]\n[dim]{entry['severity']}[/]",
            f"{entry['count']:,}",
            escape(f"{entry['what']} → {entry['training']}; {entry['mend']}"),
            escape("\n".join(_examples(entry["cases"]))),
        )
    return table


def _examples(cases: list[dict[str, Any]]) -> list[str]:
    lines = []
    for case in cases[:_EXAMPLES]:
        others = f" = {printable(case['others'][0])}" if case["others"] else ""
        more = f" and {len(case['others']) - 1} more" if len(case["others"]) > 1 else ""
        detail = f" ({printable(case['detail'])})" if case["detail"] else ""
        lines.append(f"{printable(case['path'])}{others}{more}{detail}")
    return lines


def _count(report: dict[str, Any], severity: str) -> int:
    return sum(entry["severity"] == severity for entry in report["findings"].values())
