"""Numbers and names as commands print them."""

import io

import pytest
from rich.console import Console

from linvit.output.terminal import (
    format_bytes,
    format_count,
    format_duration,
    format_lengths,
    format_size,
    printable,
    table,
)


@pytest.mark.parametrize(
    ("count", "text"), [(None, "–"), (0, "0 B"), (6144, "6 KiB"), (45 * 2**20, "45 MiB"), (1.234 * 2**30, "1.23 GiB")]
)
def test_bytes(count: float | None, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (7, "7"), (1234, "1.23 k"), (5.67e9, "5.67 G")])
def test_counts(value: float | None, text: str) -> None:
    assert format_count(value) == text


def test_durations_sizes_and_lengths() -> None:
    assert format_duration(3723.4) == "1:02:03"
    assert (format_size(384), format_size((384, 384)), format_size((768, 512))) == ("384", "384", "768×512")
    assert (format_lengths(None), format_lengths(64), format_lengths([32, 16])) == ("–", "64", "16…32")


def test_names_are_printed_on_one_line_without_control_characters() -> None:
    assert printable("a\nb\x1b[31m\udcff") == "a�b�[31m�"


def test_numbers_are_to_the_right_and_text_is_not_cut() -> None:
    made = table(["name", "value"], text=["name"])
    made.add_row("a name that is longer than its column", "1")
    made.add_row("b", "100")
    out = io.StringIO()
    Console(file=out, width=30).print(made)
    text = out.getvalue()
    assert set(["a", "name", "that", "is", "longer", "than", "its", "column"]) <= set(text.split())
    rows = [line for line in text.splitlines() if line.rstrip().endswith(("1", "100"))]
    assert len({len(row.rstrip()) for row in rows}) == 1
    assert "…" not in text
