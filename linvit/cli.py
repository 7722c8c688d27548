"""The `linvit` command: a table of commands.

A command is a module with a `SUMMARY`, its options, and `main(arguments) -> exit status`. It imports heavy packages
(torch, timm, numpy) inside functions, so that `--help` is answered at once.
"""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from linvit.settings.fields import unknown
from linvit.settings.help import EXAMPLES
from linvit.settings.process import UsageError, run
from linvit.version import __version__

# Module of each command, grouped under the headings of `linvit --help`.
COMMANDS = {
    "train": {
        "train": "linvit.training.command",
        "probe": "linvit.probe.command",
        "lr-find": "linvit.training.lr_find",
        "average": "linvit.runs.average",
    },
    "data": {
        "check": "linvit.check.command",
        "data": "linvit.data.demo",
    },
    "evaluate": {
        "eval": "linvit.report.eval_command",
        "predict": "linvit.prediction.command",
        "report": "linvit.report.command",
    },
    "models": {
        "models": "linvit.model.catalog",
        "convert": "linvit.conversion.command",
        "export": "linvit.export.command",
        "push": "linvit.export.push",
    },
    "analyse": {
        "explain": "linvit.explanation.command",
        "bench": "linvit.bench.command",
        "spectrum": "linvit.spectrum.command",
    },
}
MODULES = {name: module for group in COMMANDS.values() for name, module in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `linvit` with these arguments (default: `sys.argv`); returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return run(lambda: _dispatch(arguments))


def load(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(MODULES[name])


def _dispatch(argv: Sequence[str]) -> int:
    if not argv:
        raise UsageError(f"no command given: choose one of {', '.join(map(repr, MODULES))} (see linvit --help)")
    name, *rest = argv
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"linvit {__version__}")
        return 0
    if name not in MODULES:
        raise UsageError(unknown("command", name, MODULES))
    status: int = load(name).main(rest)
    return status


def _usage() -> str:
    width = max(map(len, MODULES))
    lines = ["usage: linvit COMMAND [arguments]", "", "Vision Transformers with Linformer attention."]
    for heading, group in COMMANDS.items():
        lines += ["", f"{heading}:", *(f"  {name:<{width}}  {load(name).SUMMARY}" for name in group)]
    lines += ["", f"Example: {EXAMPLES['linvit train']}"]
    lines += [
        "linvit COMMAND --help shows an example and the options of a command; linvit --version prints the version."
    ]
    return "\n".join(lines)
