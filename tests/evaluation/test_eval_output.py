"""Tables, Markdown and plots of reports, with awkward names and sizes."""

from pathlib import Path
from typing import Any

import cv2
import pytest

from linvit.evaluation.report import Report
from linvit.evaluation.show import short_names, show
from linvit.evaluation.write import write_markdown, write_size_plot
from linvit.output.terminal import page, printable


def report(source: str = "runs/a", *, size: Any = 224, top1: float = 60.0, label: str = "cat", **more: Any) -> Report:
    scores = {"top1": top1, "top5": 90.0, "balanced_accuracy": 50.0, "macro_f1": 40.0, "ece": 3.0, "loss": 1.25}
    return {
        "source": source,
        "model": "linvit",
        "weights": "weights",
        "data": "DATA",
        "split": "val",
        "labels": "by name",
        "notes": [],
        "num_classes": 2,
        "num_present_classes": 2,
        "img_size": size,
        "num_tokens": None,
        **scores,
        "confidence": {name: (value - 1, value + 1) for name, value in scores.items()},
        "num_images": 4,
        "per_class": {label: 50.0, "dog": 75.0},
        "images_per_class": {label: 2, "dog": 2},
        "most_confused": [{"label": label, "prediction": "dog", "images": 1}],
        "masked": None,
        "calibration": None,
        "num_unreadable": 0,
        "unreadable": [],
        "images_per_second": 10.0,
        "worst_images": [{"path": "a.png", "label": label, "prediction": "dog", "probability": 0.9, "loss": 2.0}],
        "bootstrap": {"resamples": 10, "level": 95, "seed": 0},
        **more,
    }


def test_a_name_is_never_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show(page(), [report(label="[red]"), report("runs/[b]", label="[red]", against_first=AGAINST)])
    shown = capsys.readouterr().out
    assert "[red]" in shown
    assert "[b]" in shown
    assert "most frequent confusions: [red] as dog (1)" in shown
    assert "a.png: [red], predicted as dog (90 %), loss 2.00" in shown


def test_a_path_that_is_not_utf8_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show(page(), [report(label="caf\udce9")])
    assert "caf�" in capsys.readouterr().out


NAMES = ["[/nope]", "a|b\nc<i>", "\x1b[31m=1"]


@pytest.mark.parametrize("name", NAMES)
def test_an_awkward_name_is_shown_on_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = [report(label=name), report(f"runs/{name}", label=name, against_first=AGAINST)]
    show(page(), reports)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert f"most frequent confusions: {printable(name)} as dog (1)" in shown
    write_markdown(reports, tmp_path / "table.md")
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").split("\n")
    assert "\x1b" not in "".join(lines)
    assert "<" not in "".join(lines)
    for line in lines:
        cells = line.replace(r"\|", "").count("|")
        assert cells in (0, 4, 8, 11), line


AGAINST = {
    "top1_difference": 2.0,
    "loss_difference": -0.5,
    "confidence": {"top1_difference": (1.0, 3.0), "loss_difference": (-0.6, -0.4)},
    "only_here": 3,
    "only_baseline": 1,
    "mcnemar_p": 0.625,
}


def test_comparisons_are_a_table_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = [report(), report("runs/b", size=[224, 384], against_first=AGAINST)]
    show(page(), reports)
    shown = capsys.readouterr().out
    assert "Compared with a at 224, top-1 in percentage points:" in shown
    assert "+1.0 to +3.0" in shown
    assert "Classes and errors of b at 224×384:" in shown
    write_markdown(reports, tmp_path / "table.md")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2].startswith("| runs/a | 224 | 2 | 60.00 (59.00 to 61.00) | 90.00 (89.00 to 91.00) | ")
    assert "| runs/b | 224×384 | +2.00 (+1.00 to +3.00) | -0.5000 (-0.6000 to -0.4000) | 3 | 1 | 0.62 |" in lines
    assert "4 images of DATA, val; classes matched by name." in lines
    assert "Classes and confusions of runs/b at 224×384:" in lines


def test_sources_are_named_by_their_last_part_if_that_is_unique() -> None:
    assert short_names([report("runs/a"), report("runs/b")]) == {"runs/a": "a", "runs/b": "b"}
    assert short_names([report("x/a"), report("y/a")]) == {"x/a": "x/a", "y/a": "y/a"}


def test_any_source_and_size_is_plotted(tmp_path: Path) -> None:
    sizes = (224, 384, [384, 224], 224)
    reports = [report(source, size=size) for source in ("runs/$a$_b^c", "runs/猫") for size in sizes]
    write_size_plot(reports, tmp_path / "sizes.png")
    assert cv2.imread(str(tmp_path / "sizes.png")).std() > 10
