"""Helpers that run `linvit check` in this process and read its report."""

import json
from pathlib import Path
from typing import Any

from linvit.check.command import CheckOptions, check_command


def checked(data: Path, scratch: Path, **options: Any) -> dict[str, Any]:
    """The JSON report on a folder, with the exit status added as `status`."""
    file = scratch / "check.json"
    settings = {"data_dir": data, "json_file": file, "workers": 0, **options}
    status = check_command(CheckOptions.model_validate(settings))
    return {**json.loads(file.read_text()), "status": status}


def paths_by_code(report: dict[str, Any]) -> dict[str, list[str]]:
    """The paths of each finding, by code."""
    return {code: [case["path"] for case in entry["cases"]] for code, entry in report["findings"].items()}
