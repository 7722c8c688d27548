"""No page shows a misspelt command or option: every command is parsed as it is written, also those that are not run."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import PAGES, blocks_of, linvit_arguments, pipelines_of

from linvit import cli
from linvit.settings import flags
from linvit.settings.help import EXAMPLES
from linvit.training import config

# Why a block is not run; any other reason must be entered here.
REASONS = {
    "downloads a data set",
    "downloads weights",
    "installs packages",
    "needs a GPU",
    "needs ImageNet",
    "needs a network",
    "needs several machines",
    "starts a server",
}
# Files of options that a page names, or that its commands write.
WRITTEN = ("FILE", "args.yaml", "plan.yaml")
RUN_OR_SHOWN = {"bash", "python", "yaml", "json", "csv", "text", "toml"}
# A command in the text.
_INLINE = re.compile(r"(?<!`)`(linvit [a-z][^`]*)`(?!`)")


class Parsed(BaseException):
    """Stops a command once its options are known."""


@pytest.fixture(autouse=True)
def _stop_at_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    validate, read = flags.validate, config.read_settings

    def validate_and_stop(*arguments: Any, **settings: Any) -> None:
        validate(*arguments, **settings)
        raise Parsed

    for module in (flags, config):
        monkeypatch.setattr(module, "validate", validate_and_stop)
    monkeypatch.setattr(
        config, "read_settings", lambda path: {"experiment": "RUN"} if path.name in WRITTEN else read(path)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(PAGES[0].parent / "configs")


def parse(arguments: list[str]) -> None:
    """Raise an error unless a command accepts these arguments."""
    if arguments in ([], ["--help"], ["--version"]) or arguments[1:] == ["--help"]:
        assert len(arguments) < 2 or arguments[0] in cli.MODULES
        return
    words = [word for word in arguments[: end_of_command(arguments)] if word != "…"]
    with pytest.raises(Parsed):
        cli.load(words[0]).main(words[1:])


def end_of_command(words: list[str]) -> int | None:
    """Where a redirection or the end of a command starts."""
    ends = (i for i, word in enumerate(words) if word[0] in "<>&)" or (word == "2" and ">" in words))
    return next(ends, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for block in blocks_of(page):
        if block.language != "bash":
            continue
        for pipeline in pipelines_of(block.text):
            for words in pipeline:
                arguments = linvit_arguments(words)
                if arguments is not None:
                    try:
                        parse(arguments)
                    except BaseException as error:
                        raise AssertionError(f"{page.name}: {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize(
    "line",
    ["linvit eval RUN data --img-sizes 384", "torchrun --nproc-per-node 8 train_imagenet.py data --epoch 3 \\\n -b 4"],
)
def test_a_misspelt_option_is_noticed(line: str) -> None:
    ((words,),) = pipelines_of(line)
    arguments = linvit_arguments(words)
    assert arguments is not None
    with pytest.raises(flags.UsageError, match="unknown option"):
        parse(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for code in _INLINE.findall(" ".join(text.split())):
        name, *words = code.split()[1:]
        if name in cli.MODULES:
            shown = {word.partition("=")[0].strip(",.'") for word in words if re.match(r"--?[a-z]", word)}
            assert shown <= spellings(name), f"{page.name}: {code}"
        else:
            assert name == "COMMAND" or not re.match("[a-z]+$", name) or f"linvit {name}" in EXAMPLES, code


def spellings(command: str) -> set[str]:
    """Every flag of a command."""
    found: set[str] = {"--help"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("argparse.ArgumentParser.print_help", lambda parser: found.update(parser._option_string_actions))
        with pytest.raises(SystemExit):
            cli.load(command).main(["--help"])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_named_and_have_known_reasons(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in RUN_OR_SHOWN, f"{page.name}, line {block.line}: name the language of the block"
        is_known = block.reason in (None, *REASONS) or re.match(r"takes \d+ (minutes|hours)", str(block.reason))
        assert is_known, f"{page.name}, line {block.line}: {block.reason}"
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- not run:") == sum(block.reason is not None for block in blocks_of(page)), page.name
