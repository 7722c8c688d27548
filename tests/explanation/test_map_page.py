"""The page of `linvit explain`: what is in it, what is left out, and that nothing in it runs but its own script."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coloured import COLOURS, coloured_square
from PIL import Image
from unpacked import Unpacked, token_row

from linvit.cli import main
from linvit.explanation.explain import Explained, Explainer
from linvit.explanation.maps import Method, weighted_rows
from linvit.explanation.page import PAGE_METHODS, MapPage
from linvit.runs.folder import load_classifier

# The name of a folder, and that of an image in it.
EVIL = "a<", "script><script>alert(1)<!-- &amp; \u2028.png"


def explain(*arguments: str | Path) -> int:
    return main(["explain", *map(str, arguments), "--device", "cpu"])


class Page:
    def __init__(self, path: Path) -> None:
        self.html = path.read_text(encoding="utf-8")
        self.data: dict[str, Any] = json.loads(self.element("data-page"))

    def element(self, name: str) -> str:
        (text,) = re.findall(rf'<script [^>]*id="{name}">(.*?)</script>', self.html, re.DOTALL)
        return text

    def pack(self, name: str | int) -> Unpacked:
        return Unpacked(self.element(f"pack-{name}"))


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Maps of three images, of which one has a name that would end a script, and one is larger than a tile."""
    folder = tmp_path_factory.mktemp("page")
    images = [folder / "plain.png", folder.joinpath(*EVIL), folder / "wide.png"]
    images[1].parent.mkdir()
    for label, path in enumerate(images[:2]):
        Image.fromarray(coloured_square(label, seed=label)[0]).save(path)
    Image.fromarray(np.hstack([coloured_square(label, seed=label)[0] for label in (0, 1, 2)])).save(images[2])
    assert explain(model_folder, *images, "-o", folder / "maps", "--tile", "32", "--method", "gradcam") == 0
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(folder / "maps/index.html")


def test_maps_and_rows_are_those_of_the_model(page: Page, model_folder: Path, folder: Path) -> None:
    explainer = Explainer(load_classifier(str(model_folder)))
    image = np.asarray(Image.open(folder / "plain.png"))
    found = explainer.explain(image, method="relevance", more=("gradcam", "cam", "rollout", "attention"))
    assert found.seen is not None
    entry, own = page.data["images"][0], page.pack(0)
    assert page.data["method"] == "gradcam"
    assert entry["classes"][0] == [found.label, pytest.approx(found.probability)]
    assert (entry["grid"], entry["edges"], entry["explained"]) == ([8, 8], [[0, 1], [0, 1]], COLOURS[0])
    for method in ("relevance", "gradcam", "cam", "rollout"):
        numbers, steps = own.rows(entry["maps"][method])
        np.testing.assert_allclose(numbers[0], np.maximum(found.maps[method], 0).ravel(), atol=0.51 * steps[0])
    for number, layer in enumerate(found.seen.layers):
        for token in (0, 30):
            weights = np.zeros(64, np.float32)
            weights[token] = 1
            exact = layer.to_tokens(weighted_rows(layer, found.seen.start.new_tensor(weights))).mean(0).detach().numpy()
            row, error = token_row(
                page.data["model"], page.pack("model"), own, entry["layers"], layer=number, token=token
            )
            assert np.abs(row - exact).max() <= error + 1e-6


def test_tiles_have_merged_maps_alone(page: Page) -> None:
    entry, own = page.data["images"][2], page.pack(2)
    assert (entry["layers"], entry["grid"], entry["shape"]) == (None, [32, 96], [32, 96])
    assert set(entry["maps"]) == set(PAGE_METHODS)
    numbers, _ = own.rows(entry["maps"]["rollout"])
    assert numbers.shape == (1, 32 * 96)
    assert (numbers > 0).all()


def test_names_cannot_leave_their_place(page: Page) -> None:
    # The frame's own elements, and three packs and images each, the model's pack, the data.
    assert page.html.count("<script") == page.html.count("</script>") == 1 + 2 * 3 + 1 + 1
    assert "alert(1)<" not in page.html
    assert page.data["images"][1]["name"].endswith("/a</script><script>alert(1)<!-- &amp; �.png")
    assert "http" not in page.html.replace("http-equiv", "").replace("http://www.w3.org", "")


@pytest.mark.parametrize("size", ["0", "1"])
def test_a_page_of_no_size_is_not_written(size: str, model_folder: Path, images: Path, tmp_path: Path) -> None:
    assert explain(model_folder, images / COLOURS[0], "-o", tmp_path, "--page-size", size) == 0
    assert (tmp_path / "index.html").exists() == (size == "1")


def test_images_that_do_not_fit_are_counted(
    model_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.png").touch()
    # 1 MB is then room for one image and the model, and for the image of another.
    monkeypatch.setattr("linvit.explanation.page.MEGABYTE", 9000)
    assert explain(model_folder, tmp_path / "empty.png", images, "-o", tmp_path / "maps", "--page-size", "1") == 0
    page = Page(tmp_path / "maps/index.html")
    num_images = len(page.data["images"])
    assert 1 <= num_images < 3
    assert f"The first {num_images} of 4 images are on this page." in page.html
    # Without an image there is no page.
    assert explain(model_folder, tmp_path / "empty.png", "-o", tmp_path / "none") == 1
    assert list((tmp_path / "none").iterdir()) == []


def add_map(page: MapPage, name: str, *, side: int, grid: int) -> None:
    """Add a white image with merged maps of a tiled model of two classes."""
    heat = np.random.default_rng(0).random((grid, grid), dtype=np.float32)
    maps: dict[Method, np.ndarray] = dict.fromkeys(PAGE_METHODS, heat)
    found = Explained(np.array([0.9, 0.1]), "red", 0.9, "red", heat, maps, None, None, ())
    page.add(name, np.full((side, side, 3), 255, np.uint8), found)


def test_the_images_of_a_page_are_the_first_ones() -> None:
    page = MapPage(
        "model", method="relevance", methods=PAGE_METHODS, class_names=["red", "blue"], num_images=3, budget=4000
    )
    for name, side in (("a", 8), ("b", 2000), ("c", 8)):
        add_map(page, name, side=side, grid=4)
    assert "The first 1 of 3 images are on this page." in page.html([])


def shown_by_browser(path: Path, address: str) -> str:
    """The document after its script ran."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"file://{path}#{address}"], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_map_may_have_more_patches_than_a_function_takes_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linvit.explanation.page._MAP_SIDE", 512)
    page = MapPage(
        "model", method="relevance", methods=PAGE_METHODS, class_names=["red", "blue"], num_images=1, budget=10**7
    )
    add_map(page, "a", side=600, grid=512)
    (tmp_path / "page.html").write_text(page.html([]), encoding="utf-8")
    shown = shown_by_browser(tmp_path / "page.html", "map=attention&layer=3")
    assert ">attention, merged over tiles.</p>" in shown


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_where_a_patch_looks(page: Page, folder: Path) -> None:
    shown = shown_by_browser(folder / "maps/index.html", "map=patch&layer=1&patch=30&head=99")
    row, _ = token_row(
        page.data["model"], page.pack("model"), page.pack(0), page.data["images"][0]["layers"], layer=1, token=30
    )
    best = int(row.argmax())
    expected = f"the patch at row 4, column 7 looks most at row {best // 8 + 1}, column {best % 8 + 1} (weight "
    assert "Layer 1, mean over heads: " + expected in shown
    weight = float(re.findall(r"looks most at [^(]*\(weight ([\d.e-]+)", shown)[0])
    assert weight == pytest.approx(row.max(), rel=6e-3)
