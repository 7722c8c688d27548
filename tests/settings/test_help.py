"""`--help` of every command: an example that parses, and options under headings."""

import shlex
from pathlib import Path

import pytest

from linvit import cli
from linvit.settings import flags
from linvit.settings.help import EXAMPLES, HEADINGS
from linvit.training import config

PROGRAMS = ["train_imagenet.py", *(f"linvit {name}" for name in cli.MODULES)]


class Parsed(BaseException):
    """Stops a command once its options are known."""


def start(program: str, arguments: list[str]) -> None:
    if program == "train_imagenet.py":
        config.parse(arguments)
    else:
        cli.main([program.removeprefix("linvit "), *arguments])


@pytest.fixture
def stop_at_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands end when their options are valid."""
    validate = flags.validate

    def validate_and_stop(*arguments, **settings):
        validate(*arguments, **settings)
        raise Parsed

    for module in (flags, config):
        monkeypatch.setattr(module, "validate", validate_and_stop)
    monkeypatch.chdir(tmp_path)


def test_every_program_has_an_example() -> None:
    assert sorted(EXAMPLES) == sorted(PROGRAMS)


@pytest.mark.usefixtures("stop_at_options")
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_example_parses(program: str) -> None:
    words = shlex.split(EXAMPLES[program])
    start_of_command = ["python", program] if program == "train_imagenet.py" else program.split()
    assert words[:2] == start_of_command
    with pytest.raises(Parsed):
        start(program, words[2:])


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_starts_with_the_example_and_puts_each_option_under_one_heading(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        start(program, ["--help"])
    text = capsys.readouterr().out
    usage, description, example, *rest = text.split("\n\n")
    assert usage.startswith(f"usage: {program} ")
    assert description[0].isupper()
    assert example == f"example:\n  {EXAMPLES[program]}"
    headings = [section.partition("\n")[0] for section in rest]
    assert all(heading.endswith(":") for heading in headings)
    assert len(set(headings)) == len(headings)


def test_required_options_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["average", "--help"])
    assert "(required)" in capsys.readouterr().out.partition("--output")[2]


def test_a_field_has_one_heading_which_a_command_uses() -> None:
    names = [name for fields in HEADINGS.values() for name in fields]
    assert len(set(names)) == len(names)
    sources = "".join(path.read_text() for path in Path(cli.__file__).parent.glob("**/*.py"))
    assert [name for name in names if f"    {name}: " not in sources] == []
