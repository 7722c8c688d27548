"""docs/troubleshooting.md quotes messages word for word."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# Messages of pip, the shell, timm and huggingface_hub, and those put together from words.
OTHERS = (
    "requires a different Python",
    "command not found",
    "No pretrained weights exist",
    "An error happened while",
    "did you mean",
)


def literal(node: ast.AST) -> str:
    """The text of a string with … for each value, and its option names as flags."""
    if isinstance(node, ast.JoinedStr):
        parts = [each.value if isinstance(each, ast.Constant) else "…" for each in node.values]
        return "".join(map(str, parts))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def texts() -> list[str]:
    files = [*ROOT.glob("linvit/**/*.py"), ROOT / "train_imagenet.py"]
    found = {literal(node) for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))}
    as_flags = [re.sub(r"`([a-z_]+)`", lambda name: "--" + name[1].replace("_", "-"), text) for text in found]
    return [re.sub(r"`…`", "--…", text).replace("`", "'") for text in as_flags if len(text) > 3]


def quoted() -> list[str]:
    rows = [line for line in PAGE.partition("## No message")[0].splitlines() if line.startswith("| `")]
    cells = [row.split("|")[1] for row in rows]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def test_every_quoted_message_is_in_the_program():
    messages = [message for message in quoted() if not any(words in message for words in OTHERS)]
    assert len(messages) > 40
    program = "\n".join(texts())
    for message in messages:
        for piece in message.split("…"):
            assert is_joined_from(program, piece.strip(" ':")), (message, piece)


def is_joined_from(program: str, text: str) -> bool:
    """Whether the text is in the program, in one string or in several long ones joined."""
    if text in program:
        return True
    ends = (end for end in range(len(text) - 1, 15, -1) if text[:end] in program)
    end = next(ends, None)
    return end is not None and is_joined_from(program, text[end:].strip(" ':"))
