"""The website: every page is in its menu, every public name in the API page, and generated pages are current."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import linvit

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_settings", DOCS / "site" / "settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(menu: Any) -> Iterator[str]:
    if isinstance(menu, str):
        yield menu
    else:
        for part in menu.values() if isinstance(menu, dict) else menu:
            yield from entries(part)


def test_the_menu_has_every_page_once() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    names = list(entries(menu))
    assert len(set(names)) == len(names)
    assert {page.name for page in DOCS.glob("*.md")} <= set(names)


def test_the_api_page_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text()
    documented = re.findall(r"^::: (\S+)\n    options: \{heading: (linvit\.\w+)", text, flags=re.MULTILINE)
    assert dict(documented).keys() == {f"{module}.{name}" for name, module in linvit._PUBLIC.items()}
    assert {heading for _, heading in documented} | {"linvit.__version__"} == {f"linvit.{n}" for n in linvit.__all__}
    assert "`linvit.__version__`" in text


def test_the_tables_of_options_are_those_of_the_help(generator: ModuleType) -> None:
    for name, text in generator.pages().items():
        assert (DOCS / name).read_text() == text, "run python docs/site/settings.py"


def test_the_tables_of_options_have_every_flag(generator: ModuleType) -> None:
    from linvit.cli import MODULES

    listed = "".join((DOCS / name).read_text() for name in ("settings.md", "commands.md"))
    for command in MODULES:
        for action in generator.parser_of(command)._actions:
            for flag in action.option_strings:
                assert action.help == "==SUPPRESS==" or flag in ("-h", "--help") or f"`{flag}" in listed, flag
