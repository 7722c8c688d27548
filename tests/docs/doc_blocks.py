"""The code blocks of README.md and docs/, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
_OPERATORS = "|&;<>()"
# Starts one process or several, with options of its own.
_LAUNCHERS = ("torchrun", "srun")


class Block(NamedTuple):
    """A fenced block; `reason` says why it is not run, if so, and `line` is that of its fence."""

    language: str
    text: str
    reason: str | None
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        lines = [line.removeprefix(match["indent"]) for line in match["text"].splitlines()]
        number = text.count("\n", 0, match.start("indent")) + 1
        found.append(Block(match["language"], "\n".join(lines) + "\n", match["reason"], number))
    return found


def statements_of(text: str) -> Iterator[list[str]]:
    """The words of each line of a shell script, operators as words of their own; `\\` continues a line."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=_OPERATORS)
        lexer.whitespace_split = True
        words = list(lexer)
        if words:
            yield words


def pipelines_of(text: str) -> Iterator[list[list[str]]]:
    """The pipelines of a script, each a list of commands; `&&` and `;` separate pipelines."""
    for words in statements_of(text):
        pipeline: list[list[str]] = [[]]
        for word in words:
            if word in ("&&", ";"):
                yield pipeline
                pipeline = [[]]
            elif word == "|":
                pipeline.append([])
            else:
                pipeline[-1].append(word)
        yield pipeline


def linvit_arguments(words: list[str]) -> list[str] | None:
    """The arguments of `linvit` if a command runs it or train_imagenet.py, else None."""
    words = list(words)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    if words and words[0] in _LAUNCHERS:
        starts = [index for index, word in enumerate(words) if word in ("python", "linvit", "-m", "train_imagenet.py")]
        if not starts:
            return None
        words = words[starts[0] :]
    if words[:1] == ["python"]:
        del words[0]
    if words[:2] == ["-m", "linvit"]:
        del words[0]
    if words[:1] == ["train_imagenet.py"]:
        return ["train", *words[1:]]
    return words[1:] if words[:1] == ["linvit"] else None
