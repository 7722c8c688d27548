"""Text in the cells of tables that are written to files: CSV and Markdown."""

import csv
import re
from collections.abc import Iterable
from typing import Any, BinaryIO, TextIO

from linvit.output.files import encode, printable

# Spreadsheets run a cell that begins with one of these as a formula (OWASP, "CSV injection").
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# An underscore within a word is not markup.
_MARKDOWN = re.compile(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def csv_cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would run as a formula gets an apostrophe in front.

    Numbers, also as text, stay as they are. `text_of_cell` restores the text.
    """
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return "'" + value
    return value


def text_of_cell(cell: str) -> str:
    """The text that `csv_cell` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


class Utf8:
    """Writes text to a binary file at once, in UTF-8."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write(encode(text))


class CsvWriter:
    """`csv.writer` that applies `csv_cell` to every cell."""

    def __init__(self, file: TextIO | Utf8) -> None:
        self._writer = csv.writer(file, lineterminator="\n")

    def writerow(self, row: Iterable[Any]) -> None:
        self._writer.writerow([csv_cell(value) for value in row])

    def writerows(self, rows: Iterable[Iterable[Any]]) -> None:
        for row in rows:
            self.writerow(row)


def markdown_cell(text: str) -> str:
    """`text` as it is, on one line, in a cell of a Markdown table: no markup, no HTML, no new cell."""
    return _MARKDOWN.sub(r"\\\1", printable(text).translate(_ENTITIES))
