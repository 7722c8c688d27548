"""The shape of the package: imports run downwards, in no circle; no file is long; the reference stands alone."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up: a wing imports from itself and from the wings before it.
WINGS = [
    "version",
    "reference",
    "output",
    "settings",
    "device",
    "distributed",
    "model",
    "data",
    "measure",
    "runs",
    "runtimes",
    "check",
    "bench",
    "evaluation",
    "explanation",
    "training",
    "probe",
    "report",
    "train_imagenet",
    "prediction",
    "spectrum",
    "conversion",
    "export",
    "cli",
    "__main__",
    "linvit",
]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("linvit/**/*.py"), ROOT / "train_imagenet.py"]
}


def wing(module: str) -> int:
    return WINGS.index((module.removeprefix("linvit.")).split(".")[0])


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {path if path in FILES else str(node.module) for path in inner.values()}
    return names & FILES.keys()


@pytest.mark.parametrize("module", FILES)
def test_imports_run_downwards(module):
    for target in imported(FILES[module]):
        assert wing(target) <= wing(module), f"{module} imports {target}, which is above it"


def test_imports_form_no_circle():
    TopologicalSorter({module: imported(path) for module, path in FILES.items()}).prepare()


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 400


def test_reference_imports_torch_alone():
    tree = ast.parse((ROOT / "linvit/reference.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"math", "torch", "collections.abc"}
