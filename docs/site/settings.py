"""Write docs/settings.md and docs/commands.md, the tables of all options, from what `--help` shows.

python docs/site/settings.py
"""

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

from linvit import cli  # noqa: E402

# Headings of the help that differ from those of the page.
TITLES = {
    "positional arguments": "Command line",
    "options": "Command line",
    "augment options": "Augmentation",
    "distill options": "Distillation",
    "ema options": "Moving average",
    "lora options": "LoRA",
    "tracker options": "Trackers",
}
SETTINGS = """\
# Settings of training

Every option of `linvit train` (and `python train_imagenet.py`), with its default. A flag and a line of a YAML file set
the same option; the name in the file has underscores.

```bash
linvit train data --config configs/imagenet_small_patch16_512_90ep.yaml --no-amp
```

`--batch-size 64` is `batch_size: 64`. A flag overrides the file. Switches have opposites: `--no-amp` turns `--amp` off.
A dash in the column of defaults means that nothing is set. [flags.md](flags.md) compares the options with timm's, and
[commands.md](commands.md) lists those of the other commands. Written by `python docs/site/settings.py` from `--help`.
"""
COMMANDS = """\
# Options of commands

Every option of every command except [training](settings.md), with its default. `linvit COMMAND --help` prints the same,
and an example.

```bash
linvit --help
linvit eval --help
```

A dash in the column of defaults means that nothing is set. [Common options](#common-options) are listed once, at the
end. Written by `python docs/site/settings.py` from `--help`.
"""


class Option(NamedTuple):
    """One row: the spellings with their value, the default, the meaning."""

    spelling: str
    default: str
    meaning: str


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser with which a command prints its help."""
    found: list[argparse.ArgumentParser] = []
    keep = mock.patch.object(argparse.ArgumentParser, "print_help", lambda parser, file=None: found.append(parser))
    with keep, suppress(SystemExit):
        cli.main([command, "--help"])
    return found[0]


def sections_of(parser: argparse.ArgumentParser) -> dict[str, list[Option]]:
    """The options of a parser under the headings of its help, positional arguments first."""
    formatter = argparse.HelpFormatter(parser.prog)
    sections = {}
    for group in parser._action_groups:
        shown = [
            action for action in group._group_actions if action.help != argparse.SUPPRESS and action.dest != "help"
        ]
        if shown:
            sections[str(group.title)] = [_option(action, formatter) for action in shown]
    return sections


def _option(action: argparse.Action, formatter: argparse.HelpFormatter) -> Option:
    if action.option_strings:
        value = formatter._format_args(action, str(action.metavar)) if action.nargs != 0 else ""
        spelling = ", ".join(f"`{flag}`" for flag in action.option_strings[:-1])
        spelling += (", " if spelling else "") + f"`{' '.join(filter(None, [action.option_strings[-1], value]))}`"
    else:
        spelling = f"`{action.dest if action.metavar is None else action.metavar}`"
    text = str(action.help).replace("%%", "%")
    if text.endswith(" (required)") or not action.option_strings:
        return Option(spelling, "required" if action.nargs != "?" else "–", text.removesuffix(" (required)"))
    found = re.fullmatch(r"(.*) \(default: (.*)\)", text, re.DOTALL)
    meaning, default = found.groups() if found else (text, "–")
    return Option(spelling, default, meaning)


def common_options(found: dict[str, dict[str, list[Option]]]) -> dict[Option, list[str]]:
    """The options that three or more commands have with the same text, and those commands."""
    users: dict[Option, list[str]] = {}
    for command, sections in found.items():
        for option in (each for options in sections.values() for each in options):
            users.setdefault(option, []).append(command)
    return {option: commands for option, commands in users.items() if len(commands) >= 3}


def pages() -> dict[str, str]:
    """The text of each generated page, by file name."""
    found = {command: sections_of(parser_of(command)) for command in cli.MODULES}
    train = found.pop("train")
    training = {option for options in train.values() for option in options}
    groups: dict[str, list[Option]] = {}
    for heading, options in train.items():
        title = TITLES.get(heading, heading.removesuffix(" options").capitalize())
        groups.setdefault(title, []).extend(options)
    columns = ("option", "default", "meaning")
    settings = [SETTINGS, *(f"## {title}\n\n{_table(columns, options)}" for title, options in groups.items())]

    common = common_options(found)
    commands = [COMMANDS]
    for command, sections in found.items():
        listed = {*common, *training} if command == "lr-find" else {*common}
        own = [option for options in sections.values() for option in options if option not in listed]
        summary = cli.load(command).SUMMARY
        commands.append(f"## linvit {command}\n\n{summary[0].upper()}{summary[1:]}.\n")
        if command == "lr-find":
            commands.append("Further options are those of [training](settings.md).\n")
        commands.append(_table(columns, own))
    rows = [(*option, ", ".join(users)) for option, users in common.items()]
    commands += ["## Common options\n", _table((*columns, "commands"), rows)]
    return {"settings.md": "\n".join(settings), "commands.md": "\n".join(commands)}


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*") if "`" not in text else text.replace("|", "\\|")


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
