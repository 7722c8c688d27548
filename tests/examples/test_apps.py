"""The Gradio page and the FastAPI service predict what linvit predicts, and say what is wrong with an image."""

import runpy
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import linvit
from linvit.data.augment.build import InputSpec
from linvit.model.build import create_model
from linvit.runs.folder import save_classifier

EXAMPLES = Path(__file__).parents[2] / "examples"
SPEC = InputSpec((32, 24), (0.1, 0.2, 0.3), (0.3, 0.3, 0.4), "bilinear", 0.8, "center")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = create_model("linvit_mini_patch4_64", num_classes=3, img_size=SPEC.size, embed_dim=32, depth=1, k=4)
    folder = tmp_path_factory.mktemp("app") / "model"
    save_classifier(folder, model.eval(), class_names=["green", "red", "blue"], spec=SPEC, about={"version": "test"})
    return str(folder)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


def test_the_page_shows_the_prediction_and_its_map(folder, photo, tmp_path):
    gradio = pytest.importorskip("gradio", reason="needs pip install 'linvit[examples]'")
    app = load("gradio_app.py")["create_app"](folder)
    # As Gradio calls it: the uploaded file, then what the page shows of the results.
    (image,), (label, heat_map) = app.input_components, app.output_components
    upload = image.data_model(path=str(photo), orig_name=photo.name)
    probabilities, shown = app.fn(image.preprocess(upload))
    (expected,) = linvit.Predictor(folder)([photo])
    assert probabilities == dict(zip(expected.labels, expected.probabilities))
    assert label.postprocess(probabilities).label == expected.labels[0]
    assert shown.shape == (60, 80, 3)
    assert shown.dtype == np.uint8
    assert np.abs(shown.astype(int) - np.asarray(Image.open(photo))).mean() > 5
    assert Path(heat_map.postprocess(shown).path).is_file()

    (tmp_path / "damaged.png").write_bytes(b"no image")
    for path, reason in ((None, "Choose an image"), (str(tmp_path / "damaged.png"), "not an image")):
        with pytest.raises(gradio.Error, match=reason):
            app.fn(path)


def test_the_service_predicts_or_says_why_not(folder, photo):
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="needs pip install 'linvit[examples]'")
    testclient = pytest.importorskip("fastapi.testclient", reason="needs pip install 'linvit[examples]'")
    module = load("fastapi_app.py")
    client = testclient.TestClient(module["create_app"](folder, topk=2))
    answer = client.post("/predict", content=photo.read_bytes())
    (expected,) = linvit.Predictor(folder, topk=2)([photo])
    assert answer.status_code == 200
    assert answer.json() == {"labels": list(expected.labels), "probabilities": list(expected.probabilities)}

    # A header of a PNG of 60,000 × 60,000 pixels.
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    huge += zlib.crc32(huge[12:]).to_bytes(4, "big") + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    for body, status, reason in (
        (b"", 422, "is not an image"),
        (b"no image", 422, "is not an image"),
        (photo.read_bytes()[:1500], 422, "is truncated"),
        (huge, 422, "more than 50,000,000 pixels"),
        (bytes(module["MAX_BYTES"] + 1), 413, "more than 20,971,520 bytes"),
    ):
        answer = client.post("/predict", content=body)
        assert answer.status_code == status
        assert reason in answer.json()["detail"]
    assert client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["required"]
