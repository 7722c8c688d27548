"""The shape of the package: imports point downwards only, files stay small, the reference stands alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("linvit/**/*.py"), ROOT / "train_imagenet.py"])

# What each part may import, beside itself. "tools" are the small files that know nothing of the rest.
TOOLS = {"commandline", "files", "terminal", "validation", "yamlfile"}
MAY_IMPORT: dict[str, set[str]] = {
    "linvit": {"models"},
    "reference": set(),
    "projections": set(),
    "eager": set(),
    "splitting": {"eager"},
    "layout": {"projections"},
    "attention": {"projections", "layout", "eager", "splitting", "scripting"},
    "scripting": {"projections", "layout", "attention"},
    "mlp": {"eager"},
    "layers": {"mlp"},
    "blocks": {"layout"},
    "vit": {"projections", "layout", "attention", "blocks", "mlp", "layers"},
    "models": {"vit"},
    "tools": set(),
    "data": set(),
    "training": {"data.options", "data.transforms", "data.loader", "evaluation", "models", "vit", "runs"},
    "runs": {"models", "data.transforms"},
    "evaluation": {
        "models",
        "data",
        "runs",
        "inference",
        "training.metrics",
        "training.distributed",
        "training.precision",
    },
    "inference": {"data", "runs", "training.precision"},
    "prediction": {"data", "runs", "inference", "evaluate_options", "evaluation.imagenet", "training.distributed"},
    "catalog": {"models"},
    "bench": {
        "reference",
        "projections",
        "attention",
        "vit",
        "models",
        "evaluate_options",
        "training.distributed",
        "training.precision",
    },
    "spectrum": {
        "projections",
        "attention",
        "vit",
        "data",
        "runs",
        "inference",
        "prediction.inputs",
        "evaluate_options",
        "bench.flops",
        "bench.provenance",
        "training.distributed",
    },
    "conversion": {
        "projections",
        "attention",
        "mlp",
        "vit",
        "models",
        "data",
        "runs",
        "inference",
        "evaluate_options",
        "bench",
        "spectrum",
        "training.options",
        "training.distributed",
    },
    "command": {
        "attention",
        "models",
        "data",
        "training",
        "runs",
        "evaluation",
        "prediction",
        "catalog",
        "bench",
        "spectrum",
        "conversion",
        "linvit",
    },
}
PARTS = {
    "__init__": "linvit",
    "runs": "runs",
    "checkpoint": "runs",
    "weights": "runs",
    "timmmodel": "runs",
    "evaluate": "evaluation",
    "evaluate_options": "evaluation",
    "catalog": "catalog",
    "cli": "command",
    "average": "command",
    "average_options": "command",
    "dryrun": "command",
    "lrfind": "command",
    "lrfind_options": "command",
    "__main__": "command",
    "train_imagenet": "command",
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("linvit.").removesuffix(".__init__")


def part_of(module: str) -> str:
    first = module.split(".")[0]
    return "tools" if first in TOOLS else PARTS.get(first, first)


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "linvit":
            found |= {node.module} if node.module != "linvit" else {f"linvit.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "linvit"}
    return {name.removeprefix("linvit.") if name != "linvit" else "__init__" for name in found} - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_downwards(path):
    own = part_of(module_of(path))
    for target in imported(path):
        part = part_of(target)
        allowed = MAY_IMPORT[own]
        fine = part in (own, "tools", "linvit") or part in allowed or any(target.startswith(name) for name in allowed)
        assert fine, f"{module_of(path)} ({own}) may not import linvit.{target} ({part})"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_is_long(path):
    lines = len(path.read_text().splitlines())
    assert lines <= (300 if path.name == "train_imagenet.py" else 400)


def test_reference_imports_torch_alone():
    tree = ast.parse((ROOT / "linvit/reference.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"math", "torch", "collections.abc"}
