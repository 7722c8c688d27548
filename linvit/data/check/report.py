"""Everything that a check found, in the form that the JSON file has."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import linvit
from linvit.data.check.classes import training_split
from linvit.data.check.faults import FAULTS, Finding
from linvit.data.check.nearcopies import NearCopies
from linvit.data.check.reading import Measurements
from linvit.data.check.statistics import describe_sizes, mean_and_std
from linvit.data.check.tree import Listing


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
        "versions": {"linvit": linvit.__version__, "python": platform.python_version()},
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
