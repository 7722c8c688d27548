"""Text in cells of CSV and Markdown tables: no formula, no markup, and the same text again when it is read back."""

import csv
import io
from typing import Any

import pytest

from linvit.output.cells import CsvWriter, Utf8, csv_cell, markdown_cell, text_of_cell

FORMULAS = ["=cmd|' /C calc'!A1", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1+1", "'=1", "''-x", "-a.png"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_becomes_text_and_is_read_back(text: str) -> None:
    assert csv_cell(text) == "'" + text
    assert text_of_cell(csv_cell(text)) == text


@pytest.mark.parametrize("value", ["a=b", "", "'quoted'", "-1", "+2.5", "-1e-09", ".5", -1, -0.5, None, True])
def test_numbers_and_other_text_stay(value: Any) -> None:
    assert csv_cell(value) == value
    if isinstance(value, str):
        assert text_of_cell(value) == value


def test_every_cell_of_a_table_is_text_or_a_number() -> None:
    file = io.BytesIO()
    writer = CsvWriter(Utf8(file))
    writer.writerow(["label", "=1"])
    writer.writerows([["-x", -1.5], ["caf\udce9", "a\nb"], ["\ud800", ""]])
    assert file.getvalue() == b"label,'=1\n'-x,-1.5\ncaf\xe9,\"a\nb\"\n?,\n"
    rows = list(csv.reader(io.StringIO(file.getvalue().decode("latin-1"))))[:2]
    assert [[text_of_cell(cell) for cell in row] for row in rows] == [["label", "=1"], ["-x", "-1.5"]]


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("cat", "cat"),
        ("a|b\nc", r"a\|b�c"),
        ("<img src=x> & `x` [a](b)", r"&lt;img src=x&gt; &amp; \`x\` \[a\](b)"),
        ("*_~$\\", r"\*\_\~\$\\"),
        ("vit_small _a_", r"vit_small \_a\_"),
    ],
)
def test_markdown_shows_text_as_it_is(text: str, cell: str) -> None:
    assert markdown_cell(text) == cell
