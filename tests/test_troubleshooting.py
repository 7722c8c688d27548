"""docs/troubleshooting.md quotes messages word for word."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# Messages of pip, the shell, timm and huggingface_hub, and those put together from words.
OTHERS = (
    "requires a different Python",
    "command not found",
    "did you mean",
)


def program() -> str:
    """The source of the package with adjacent string literals joined and `option` written as --option."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("linvit/**/*.py"))
    text = re.sub(r'"\s*\n\s*f?"', "", text)
    return re.sub(r"`([a-z_]+|\{\w+\})`", lambda name: "--" + name[1].replace("_", "-"), text)


def quoted() -> list[str]:
    """The messages in the first column of the tables, without those of other programs."""
    rows = re.findall(r"^\| (`.+?`) \|", PAGE.partition("## No message")[0], flags=re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    return [message for message in messages if not any(words in message for words in OTHERS)]


def test_every_quoted_message_is_in_the_program():
    messages, source = quoted(), program()
    assert len(messages) > 40
    for message in messages:
        for piece in message.split("…"):
            assert is_joined_from(source, piece.strip(" ':")), (message, piece)


def is_joined_from(source: str, text: str) -> bool:
    """Whether the text is in the source, in one string or in several long ones."""
    if text in source:
        return True
    end = next((end for end in range(len(text) - 1, 15, -1) if text[:end] in source), None)
    rest = text[end:].strip(" ':")
    return end is not None and len(rest) > 15 and is_joined_from(source, rest)
