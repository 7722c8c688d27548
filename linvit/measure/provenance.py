"""Provenance of results: command, commit, versions and hardware, for every results file."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from linvit.version import __version__

ROOT = Path(__file__).parents[2]


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


def script_command() -> str:
    """The command line of the running script, such as "python benchmarks/loader.py --rounds 7".

    Absolute paths are reduced to their last part, so that results do not name folders of this machine.
    """
    script = Path(sys.argv[0]).resolve()
    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return " ".join(["python", f"{script.parent.name}/{script.name}", *words])


def _commit() -> str:
    """The source tree's commit, with "+changes" if files differ from it; "unknown" for an installed package."""
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        has_changes = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, check=False).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + ("+changes" if has_changes else "")


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"
