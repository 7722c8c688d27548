"""The page of a run in a real browser: clicks, hover, keys. Needs Chromium or Chrome; playwright brings none itself."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from linvit.evaluation.metrics import ImageResults
from linvit.evaluation.predictions import Predictions
from linvit.report.examples import Worst
from linvit.report.page import Evaluated, RunPage, render_runs
from linvit.report.run import Run
from linvit.runs.folder import RunFolder

playwright = pytest.importorskip("playwright.sync_api")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NAMES = ["few", "most", "</script><img src=x onerror=document.title='broken'>"]


def run_page(name: str, *, seed: int) -> RunPage:
    """A run of five epochs with known figures; the second class has the most errors."""
    rng = np.random.default_rng(seed)
    labels = torch.arange(60) % 3
    wrong = torch.from_numpy(rng.permutation(60)) < torch.tensor([5, 50, 20])[labels]
    results = ImageResults(
        indices=torch.arange(60),
        labels=labels,
        losses=torch.from_numpy(rng.exponential(size=60)),
        predictions=torch.where(wrong, (labels + 1) % 3, labels),
        probabilities=torch.from_numpy(rng.random(60)),
        in_top5=torch.ones(60, dtype=torch.bool),
    )
    rows = [
        {"epoch": epoch, "train_loss": 2.0 - epoch / 4, "eval_loss": None if epoch == 2 else 1.0, "lr": 0.1, "seed": 1}
        for epoch in range(5)
    ]
    predictions = Predictions(results, NAMES, [f"{number}.png" for number in range(60)])
    run = Run(
        folder=RunFolder(Path(f"output/{name}")),
        name=name,
        settings={"model": "tiny", "seed": seed, "lr": 0.1},
        rows=rows,
        class_names=NAMES,
        best={"epoch": 4, "weights": "raw", "metrics": {"top1": 50.0, "loss": 1.0}},
        predictions=predictions,
        notes=(),
    )
    return RunPage(run, [("Model", "tiny")], [], Evaluated(name, "tiny", predictions, Worst([], None)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as started:
        # The sandbox of Chromium does not start for root, as in containers. The page is our own.
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_runs([run_page("one", seed=1), run_page("two", seed=2)]))
    return path


@pytest.fixture
def page(browser: Any, path: Path) -> Iterator[Any]:
    """The open page; fails the test if a script failed or something was requested."""
    errors: list[str] = []
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(10_000)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text))
    opened.on("request", lambda request: errors.append(request.url) if request.url != path.as_uri() else None)
    opened.goto(path.as_uri())
    yield opened
    opened.close()
    assert errors == []


def column(page: Any, table: str, number: int) -> list[str]:
    cells: list[str] = page.locator(f"{table} tbody tr > :nth-child({number})").all_inner_texts()
    return cells


def test_a_click_on_a_heading_sorts_and_a_second_one_reverses(page: Any) -> None:
    table = "[aria-label='Classes of one'] table"
    assert column(page, table, 1)[0] == "most"
    page.click(f"{table} button:has-text('accuracy')")
    values = list(map(float, column(page, table, 4)))
    assert values == sorted(values, reverse=True)
    assert page.locator(f"{table} th[aria-sort=descending]").inner_text() == "accuracy, %"
    page.click(f"{table} button:has-text('accuracy')")
    assert list(map(float, column(page, table, 4))) == sorted(values)
    page.locator(f"{table} button:has-text('class')").press("Enter")
    assert column(page, table, 1) == [NAMES[2], "few", "most"]


def test_hovering_a_curve_shows_the_values_of_the_epoch(page: Any) -> None:
    plot = page.locator(".chart svg.plot").first
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] - 15, "y": 80})
    text = page.inner_text("#tooltip")
    assert "epoch 4" in text
    assert "one, training" in text
    assert "1.0" not in text.split("epoch")[0]
    plot.focus()
    plot.press("ArrowLeft")
    # At epoch 2 there was no evaluation.
    plot.press("ArrowLeft")
    text = page.inner_text("#tooltip")
    assert "epoch 2" in text
    assert "–" in text
    # The same epoch is marked in the other charts.
    assert page.locator(".chart line.cursor").count() == page.locator(".chart").count()
    page.keyboard.press("Escape")
    assert page.locator("#tooltip").is_hidden()


def test_a_curve_disappears_when_its_name_is_clicked(page: Any) -> None:
    chart = page.locator(".chart").first
    lines = chart.locator("svg.plot path")
    before = lines.count()
    chart.locator("button.key").first.click()
    assert lines.count() == before - 1
    chart.locator("button.key").first.click()
    assert lines.count() == before


def test_tabs_show_one_run_at_a_time_by_click_and_by_key(page: Any) -> None:
    tabs = page.locator("#evaluation [role=tab]")
    panels = page.locator("#evaluation [role=tabpanel]")
    assert [panels.nth(number).is_visible() for number in range(2)] == [True, False]
    tabs.nth(1).click()
    assert [panels.nth(number).is_visible() for number in range(2)] == [False, True]
    # A matrix that was drawn while it was hidden has its full width.
    assert panels.nth(1).locator(".matrix svg").bounding_box()["width"] > 150
    tabs.nth(1).press("ArrowLeft")
    assert [panels.nth(number).is_visible() for number in range(2)] == [True, False]


def test_the_confusion_matrix_answers_to_pointer_keys_and_controls(page: Any) -> None:
    matrix = page.locator(".confusion").first
    drawing = matrix.locator(".matrix svg")
    cells = matrix.locator("rect.cell")
    cells.nth(1).hover()
    assert page.inner_text("#tooltip").startswith("few\npredicted as most\n")
    drawing.focus()
    for key in ("ArrowLeft", "ArrowDown"):
        drawing.press(key)
    assert page.inner_text("#tooltip").startswith("most\npredicted as few\n")
    matrix.locator("select[name=order]").select_option("most errors first")
    drawing.press("ArrowUp")
    cells.nth(0).hover()
    assert page.inner_text("#tooltip").startswith("most\npredicted correctly\n")
    counts = matrix.locator("text.count")
    shown = counts.count()
    matrix.locator("input[name=diagonal]").check()
    assert counts.count() == shown - 3
    matrix.locator("select[name=unit]").select_option("shares")
    assert all(0 < int(text) <= 100 for text in counts.all_text_contents())


def test_settings_show_differences_or_all(page: Any) -> None:
    rows = page.locator("#settings-table tbody tr:visible")
    assert rows.count() == 1
    page.click("[data-of=settings-table]")
    assert rows.count() == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_scrolling_sideways(browser: Any, path: Path, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 27)"}[scheme]
    page.close()
