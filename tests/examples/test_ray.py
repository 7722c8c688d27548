"""`examples/ray_predict.py` on a local cluster of two workers predicts what linvit predicts."""

import runpy
from collections.abc import Iterator
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

ray = pytest.importorskip("ray", reason="needs pip install 'linvit[examples]'")
pytest.importorskip("ray.data", reason="needs pip install 'linvit[examples]'")
pyarrow = pytest.importorskip("pyarrow")
dataset = pytest.importorskip("pyarrow.dataset")
parquet = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.slow

SPEC = InputSpec((32, 24), (0.1, 0.2, 0.3), (0.3, 0.3, 0.4), "bilinear", 0.8, "center")


@pytest.fixture(scope="module")
def script() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Tokens would lie in the home folder.
        patched.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
        yield runpy.run_path(str(Path(__file__).parents[2] / "examples" / "ray_predict.py"))
        ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    rng = np.random.default_rng(0)
    for name in ("0.jpg", "1.png", "2.JPG", "sub/3.png"):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / name)
    (folder / "sub/broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not read")
    return folder


def test_two_workers_predict_what_one_process_predicts(script: dict[str, Any], images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("linvit_mini_patch4_64", num_classes=3, img_size=SPEC.size, embed_dim=32, depth=1, k=4)
    folder = tmp_path / "model"
    save_classifier(folder, model.eval(), class_names=["green", "red", "blue"], spec=SPEC, about={"version": "test"})
    # As a URL, like one of S3.
    script["predict"](str(folder), f"file://{images}", f"file://{tmp_path}/out", actors=2, batch_size=2, topk=2)
    rows = {row["path"]: row for row in dataset.dataset(tmp_path / "out").to_table().to_pylist()}
    assert len(rows) == 5
    for expected in linvit.Predictor(folder, topk=2)(images):
        row = rows.pop(expected.path)
        assert (tuple(row["labels"]), row["error"]) == (expected.labels, expected.error)
        assert row["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
    assert rows == {}
    with pytest.raises(SystemExit, match="3 actors, but the cluster has 2 CPUs and 0 GPUs"):
        script["predict"](str(folder), str(images), str(tmp_path / "more"), actors=3, batch_size=2, topk=2)


def test_a_parquet_list_gives_the_files(
    script: dict[str, Any], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(images / name) for name in ("1.png", "sub/3.png")]
    parquet.write_table(pyarrow.table({"path": paths, "label": [0, 1]}), tmp_path / "list.parquet")
    monkeypatch.chdir(images.parent)
    listed = script["read_images"](str(tmp_path / "list.parquet")).take_all()
    assert {row["path"]: row["bytes"] for row in listed} == {path: Path(path).read_bytes() for path in paths}
    assert script["read_images"](images.name).count() == 5
