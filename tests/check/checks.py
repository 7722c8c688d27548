"""Running `linvit check` in this process and reading what it found."""

import json
from pathlib import Path
from typing import Any

from linvit.check.command import check_command
from linvit.check.options import CheckOptions


def checked(data: Path, scratch: Path, **options: Any) -> dict[str, Any]:
    """The JSON report on a folder, with the exit status beside it."""
    file = scratch / "check.json"
    settings = {"data_dir": data, "json_file": file, "workers": 0, **options}
    status = check_command(CheckOptions.model_validate(settings))
    return {**json.loads(file.read_text()), "status": status}


def places(report: dict[str, Any]) -> dict[str, list[str]]:
    """The paths of every finding."""
    return {code: [case["path"] for case in entry["cases"]] for code, entry in report["findings"].items()}
