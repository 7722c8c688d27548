"""The package and its upkeep: every file is in the wheel, one version, and the same checks everywhere."""

import itertools
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import linvit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = sorted(
    str(page.relative_to(ROOT)) for folder in ("", "docs", "benchmarks") for page in (ROOT / folder).glob("*.md")
)


def test_the_wheel_has_every_file_of_the_package():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    packaged = {
        path
        for package, globs in patterns.items()
        for glob in globs
        for path in (ROOT / package.replace(".", "/")).glob(glob)
    }
    files = {path for path in ROOT.glob("linvit/**/*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files
    assert files <= packaged


def test_every_folder_of_python_files_is_a_package():
    folders = {path.parent for path in ROOT.glob("linvit/**/*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["project"]["version"] == str(citation["version"]) == linvit.__version__


def test_the_workflow_runs_what_ci_runs_on_the_supported_versions():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert {"run": ".ci/run"} in jobs["test"]["steps"]
    assert {"run": "make wheel"} in jobs["wheel"]["steps"]
    assert {"run": "make docs"} in jobs["docs"]["steps"]
    oldest = min(jobs["test"]["strategy"]["matrix"]["python"], key=lambda version: int(version.split(".")[1]))
    assert PROJECT["project"]["requires-python"] == f">={oldest}"


def test_commit_hooks_run_what_make_check_runs():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [" ".join(hook["entry"].split()[:2]) for hook in local["hooks"]]
    recipe = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    checks = re.findall(r"\$\(BIN\)/(\w+)(?: (\w+))?", recipe)
    assert local["repo"] == "local"
    assert hooks == [" ".join(filter(None, check)) for check in checks]


def test_the_log_is_short_and_its_rows_are_complete():
    lines = (ROOT / "benchmarks/LOG.md").read_text().splitlines()
    assert len(lines) < 200
    for above, row in itertools.pairwise(lines):
        if above.startswith("|") and row.startswith("|"):
            assert row.count("|") == above.count("|"), row


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / page).read_text()):
        name, _, heading = target.partition("#")
        linked = (ROOT / page).parent / name if name else ROOT / page
        assert linked.exists(), target
        anchors = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in headings(linked)]
        assert not heading or heading in anchors, target


def headings(page: Path) -> list[str]:
    return [line for line in page.read_text().splitlines() if line.startswith("#")] if page.suffix == ".md" else []
