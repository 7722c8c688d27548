"""Numbers and names as commands print them."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from linvit.output.terminal import (
    format_bytes,
    format_count,
    format_duration,
    format_lengths,
    format_size,
    note,
    page,
    print_line,
    printable,
    progress_bar,
    show_line,
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
    assert printable("a\nb\x1b[31m\udcff\u202e") == "a�b�[31m��"
    assert printable("9.41\u202fPM é 裂纹") == "9.41\u202fPM é 裂纹"


def test_lines_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    note("a\x1b]0;b")
    print_line("c\nd")
    show_line(page(), "[/nope] :warning: \x1b[2J" + "x" * 200)
    out, err = capsys.readouterr()
    assert err == "a�]0;b\n"
    assert out == "c�d\n[/nope] :warning: �[2J" + "x" * 200 + "\n"


def test_cells_headings_and_titles_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    made = table(["[/a]", "[bold]b"], text=["[/a]"], title="[/nope] :warning:")
    made.add_row("[/nope] :warning:\x1b", "[red]1")
    for console in (page(), Console()):
        console.print(made)
        shown = capsys.readouterr().out
        for text in ("[/a]", "[bold]b", "[/nope] :warning:�", "[red]1"):
            assert text in shown


def test_tables_are_on_stderr_where_an_output_is_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    show_line(page(outputs=[None, Path("a.json")]), "a")
    show_line(page(outputs=[None, Path("-")]), "b")
    show_line(page(outputs=[Path("/dev/stdout")]), "c")
    assert capsys.readouterr() == ("a\n", "b\nc\n")


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


def plain_progress(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Progress, Callable[[float], None]]:
    """A progress bar that is not on a terminal, and a function that lets seconds pass."""
    now = [0.0]
    monkeypatch.setattr("linvit.output.terminal.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return progress_bar(**settings), lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_progress_is_lines_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress, wait = plain_progress(monkeypatch)
    with progress as bar:
        task = bar.add_task("planning\n", total=None)
        wait(60)
        bar.update(task, completed=0)
        bar.update(task, completed=1, total=4)
        for _ in range(3):
            wait(6)
            bar.advance(task)
        later = bar.add_task("timing", total=10)
        wait(1)
        bar.advance(later)
        wait(9)
        bar.advance(later, 4)
    assert capsys.readouterr() == (
        "",
        "planning\ufffd  1/4  left 0:03:00\nplanning\ufffd  3/4  left 0:00:24\ntiming  5/10  left 0:00:10\n",
    )


def test_progress_that_is_not_shown_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress, wait = plain_progress(monkeypatch, is_shown=False)
    with progress as bar:
        for _ in bar.track(range(3)):
            wait(60)
    assert capsys.readouterr() == ("", "")
