"""What every results file says about how it came to be."""

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from linvit.version import __version__


def provenance(command: str, *, seed: int | Sequence[int], n: int | Sequence[int]) -> dict[str, Any]:
    """The command, commit, versions and hardware of this process; `n` is how often each number was measured."""
    return {
        "command": command,
        "commit": _commit(),
        "versions": {
            "linvit": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "hardware": _hardware(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "n": n,
    }


def _commit() -> str:
    """The commit of the source tree, with "+changes" where files differ from it; "unknown" for an installed copy."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, check=False).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + ("+changes" if changed else "")


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
