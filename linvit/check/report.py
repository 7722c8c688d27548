"""The report of a check: everything found, as written to the JSON file and printed on the terminal."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from linvit.check.duplicates import NearDuplicates
from linvit.check.faults import FAULTS, Finding
from linvit.check.listing import Listing
from linvit.check.reader import Measurements
from linvit.check.splits import describe_sizes, mean_and_std, training_split
from linvit.data.sources.open import open_images
from linvit.output.terminal import printable, show_line, table
from linvit.version import __version__

# Cases of each finding in the table.
_EXAMPLES = 2
_WOULD_START = "would start"
# Consequences of faults, in the order and words of the verdict.
_CONSEQUENCES = {
    "stops_training": "stops training",
    "leaks": "leaks into evaluation",
    "distorts": "distorts training or evaluation",
}


def try_training(data: str | os.PathLike[str]) -> str:
    """The error that training would raise when it opens its splits; "" if there is none."""
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
    colour_sample: np.ndarray,
    training_error: str,
    near_duplicates: NearDuplicates | None,
    allow: Sequence[str],
    seconds: float,
    workers: int,
) -> dict[str, Any]:
    """The report as a dict, with the findings grouped by code, faults first.

    Args:
        colour_sample: images that the colours are computed from, (N,) bool; all of them were decoded at full size.
        training_error: the error of `try_training`.
        near_duplicates: None if they were not looked for.
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
        "verdict": _verdict(described),
        "training": training_error or _WOULD_START,
        "splits": splits,
        "colours": {"split": training_split(listing), **mean_and_std(measurements, colour_sample)},
        "near_duplicates": near_duplicates.describe() if near_duplicates is not None else None,
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
    entries = {code: _entry(code, found, allow) for code, found in cases.items() if found}
    return dict(sorted(entries.items(), key=lambda item: item[1]["severity"] != "fault"))


def _entry(code: str, cases: list[dict[str, Any]], allow: Sequence[str]) -> dict[str, Any]:
    fault = FAULTS[code]
    return {
        "severity": "note" if code in allow else fault.severity,
        "effect": fault.effect,
        "what": fault.what,
        "training": fault.training,
        # The file format keeps its first name for the fix.
        "mend": fault.fix,
        "evaluation": fault.evaluation,
        "prediction": fault.prediction,
        "count": len(cases),
        "cases": sorted(cases, key=lambda case: case["path"]),
    }


def _verdict(findings: dict[str, Any]) -> dict[str, list[str]]:
    """The codes of the faults by their consequence."""
    verdict: dict[str, list[str]] = {name: [] for name in _CONSEQUENCES}
    for code, entry in findings.items():
        if entry["severity"] == "fault":
            verdict[_consequence(code, entry["effect"])].append(code)
    return verdict


def _consequence(code: str, effect: str) -> str:
    if effect in ("unread", "refused"):
        return "stops_training"
    return "leaks" if code.endswith("across_splits") else "distorts"


def show_report(console: Console, report: dict[str, Any]) -> None:
    """Print the verdict, then the contents of DATA, a table of findings, and sizes and colours of the images."""
    for line in describe_verdict(report):
        show_line(console, line)
    show_line(console, f"{report['data']}: {describe_splits(report)}")
    if report["findings"]:
        console.print(_findings_table(report["findings"]))
    near = report["near_duplicates"]
    if near and near["compared_pairs"] < near["candidate_pairs"]:
        show_line(
            console,
            f"many images look alike: compared only the {near['compared_pairs']:,} most similar of "
            f"{near['candidate_pairs']:,} pairs",
        )
    for line in describe_images(report):
        show_line(console, line)
    show_line(
        console,
        f"checked {report['num_images']:,} images in {report['seconds']:.1f} s, "
        f"{report['images_per_second']:,.0f} images/s",
    )


def describe_verdict(report: dict[str, Any]) -> list[str]:
    """The number of faults and notes, then a line for each consequence of the faults: what stops training comes first.

    A fault's cases are counted behind its name, and kinds apart from cases.
    """
    findings = report["findings"]
    lines = [f"{_count(findings, 'fault')}, {_count(findings, 'note')}"]
    if report["layout"] in ("splits", "lists") and report["training"] != _WOULD_START:
        lines.append(f"training would not start: {report['training']}")
    for name, words in _CONSEQUENCES.items():
        codes = [f"{code} ({findings[code]['count']:,})" for code in report["verdict"][name]]
        if codes:
            lines.append(f"{words}: {', '.join(codes)}")
    return lines


def _count(findings: dict[str, Any], severity: str) -> str:
    counts = [entry["count"] for entry in findings.values() if entry["severity"] == severity]
    if not counts:
        return f"no {severity}s"
    kinds, cases = ("s" if number != 1 else "" for number in (len(counts), sum(counts)))
    return f"{len(counts)} kind{kinds} of {severity} ({sum(counts):,} case{cases})"


def describe_splits(report: dict[str, Any]) -> str:
    """The number of images and classes of each split, in one line."""
    parts = []
    for split, entry in report["splits"].items():
        images = f"{entry['num_images']:,} images"
        classes = len(entry["classes"])
        in_classes = f" in {classes:,} class{'es' if classes != 1 else ''}" if classes else ""
        parts.append(f"{printable(split)} {images}{in_classes}".strip())
    return ", ".join(parts)


def describe_images(report: dict[str, Any]) -> list[str]:
    """Lines about the image sizes of each split, and about the colours of the training split."""
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


def _findings_table(findings: dict[str, Any]) -> Table:
    columns = ("finding", "count", "description", "examples")
    made = table(columns, text={columns[0], *columns[2:]})
    made.show_lines = True
    for code, entry in findings.items():
        style = "bold red" if entry["severity"] == "fault" else "cyan"
        made.add_row(
            Text.assemble((code, style), "\n", (entry["severity"], "dim")),
            f"{entry['count']:,}",
            Text(f"{entry['what']}\ntraining {entry['training']}\nfix: {entry['mend']}"),
            Text("\n".join(map(_example, entry["cases"][:_EXAMPLES]))),
        )
    return made


def _example(case: dict[str, Any]) -> str:
    other = f" = {printable(case['others'][0])}" if case["others"] else ""
    more = f" and {len(case['others']) - 1} more" if len(case["others"]) > 1 else ""
    detail = f" ({printable(case['detail'])})" if case["detail"] else ""
    return f"{printable(case['path'])}{other}{more}{detail}"
