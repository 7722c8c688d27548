import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from linvit.data.augment.build import InputSpec
from linvit.runs.folder import save_classifier

SPEC = InputSpec(
    size=(48, 64), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=0.7, crop_mode="squash"
)


def linformer(**arguments: Any) -> Any:
    return timm.create_model("linvit_mini_patch4_64", img_size=(48, 64), num_classes=2, **arguments)


def save(folder: Path, model: Any, **about: Any) -> None:
    save_classifier(folder, model, class_names=["cat", "dog"], spec=SPEC, about=about)


def test_what_is_saved_is_what_timm_loads(tmp_path: Path) -> None:
    # Its strides are what safetensors refuses.
    model = linformer(k=8, drop_path_rate=0.3).to(memory_format=torch.channels_last)
    save(tmp_path / "best", model, epoch=3)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True)
    images = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(loaded.eval()(images), model.eval()(images))
    found = timm.data.resolve_model_data_config(loaded)
    assert found == {
        "input_size": (3, 48, 64),
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "crop_pct": 0.7,
        "crop_mode": "squash",
    }
    config = json.loads((tmp_path / "best/config.json").read_text())
    assert config["label_names"] == ["cat", "dog"]
    assert config["linvit"] == {"epoch": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = linformer(), linformer()
    save(tmp_path / "best", old, epoch=1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*best: no space left on device; make room"):
        save(tmp_path / "best", new, epoch=2)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True)
    assert torch.equal(loaded.head.weight, old.head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
