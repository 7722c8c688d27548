"""Features are kept in files, and are computed again as soon as anything that they depend on changed."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from tiny_runs import SETTINGS, make_images

from linvit.data.augment.build import InputSpec, resolve_input
from linvit.data.loader import create_eval_loader
from linvit.data.options import InputOptions
from linvit.data.sources.open import open_images
from linvit.probe.features import Features, View, facts_of, image_features

NUM_IMAGES = 6


class Setting:
    """A model and a folder of images, and the features of the latter by the former."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        torch.manual_seed(0)
        settings = {**SETTINGS["model_kwargs"], "depth": 1, "k": 4, "img_size": 32}
        self.model: Any = timm.create_model(SETTINGS["model"], **settings, num_classes=0).eval()
        self.spec: InputSpec = resolve_input(self.model, InputOptions())
        self.amp_dtype: torch.dtype | None = None
        self.batch_size = 4

    def features(self, *views: View) -> tuple[list[Features], bool]:
        images = open_images(self.data, split="train")
        return image_features(
            self.model,
            images,
            views or ("image",),
            folder=self.folder,
            facts=facts_of(self.model, self.spec, self.amp_dtype),
            create_loader=lambda: create_eval_loader(
                images, self.spec, batch_size=self.batch_size, workers=0, device="cpu", on_bad_image="skip"
            ),
            amp_dtype=self.amp_dtype,
        )

    def files(self) -> Sequence[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), train=2, val=0)


@pytest.fixture
def setting(images: Path, tmp_path: Path) -> Setting:
    # With the times of the files.
    return Setting(tmp_path / "features", Path(shutil.copytree(images, tmp_path / "data")))


def test_they_are_what_the_classifier_reads(setting: Setting) -> None:
    images = open_images(setting.data, split="train")
    (plain, mirrored), reused = setting.features("image", "mirrored")
    assert not reused
    loader = create_eval_loader(images, setting.spec, batch_size=NUM_IMAGES, workers=0, device="cpu")
    (batch,) = loader
    for found, x in ((plain, batch.images), (mirrored, batch.images.flip(3))):
        with torch.no_grad():
            expected = setting.model.forward_head(setting.model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-6)
        assert found.readable.all()


def test_they_are_computed_once_view_by_view(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    (plain,), reused = setting.features()
    assert not reused
    setting.batch_size = 1
    (again, _), reused = setting.features("image", "mirrored")
    assert not reused, "the mirror images are new"
    # Exactly, though batches of another size would differ in the last digit.
    assert torch.equal(again.values, plain.values)
    monkeypatch.setattr("linvit.probe.features.BatchForward", None)
    (_, mirrored), reused = setting.features("image", "mirrored")
    assert reused
    assert not torch.equal(mirrored.values, plain.values)
    assert len(setting.files()) == 2


def rewrite_image(setting: Setting) -> None:
    cv2.imwrite(str(setting.data / "train/red/0.png"), np.zeros((36, 40, 3), dtype=np.uint8))


def touch_image(setting: Setting) -> None:
    os.utime(setting.data / "train/red/0.png", ns=(1, 1))


def rename_image(setting: Setting) -> None:
    (setting.data / "train/red/0.png").rename(setting.data / "train/red/a.png")


def change_weight(setting: Setting) -> None:
    with torch.no_grad():
        setting.model.blocks[0].attn.qkv.bias[-1] += 1e-6


def change_input(setting: Setting) -> None:
    setting.spec = replace(setting.spec, crop_pct=0.5)


def change_precision(setting: Setting) -> None:
    setting.amp_dtype = torch.bfloat16


def change_pooling(setting: Setting) -> None:
    setting.model.reset_classifier(0, global_pool="avg")


def move_class(setting: Setting) -> None:
    (setting.data / "train/red").rename(setting.data / "train/rouge")


@pytest.mark.parametrize(
    "change",
    [
        *(rewrite_image, touch_image, rename_image, change_weight, change_input, change_precision, change_pooling),
        move_class,
    ],
)
def test_any_change_computes_them_again(change: Callable[[Setting], None], setting: Setting) -> None:
    assert not setting.features()[1]
    assert setting.features()[1]
    change(setting)
    assert not setting.features()[1]
    assert setting.features()[1]


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-7], lambda content: b"x" * 100])
def test_a_damaged_file_is_written_again(
    damage: Callable[[bytes], bytes], setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    setting.features()
    (file,) = setting.files()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert not setting.features()[1]
    assert f"{file} is not used (" in capsys.readouterr().err
    assert file.read_bytes() == content


def test_a_file_of_others_is_not_used(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    setting.features()
    (before,) = setting.files()
    change_weight(setting)
    setting.features()
    (after,) = set(setting.files()) - {before}
    before.replace(after)
    assert not setting.features()[1]
    assert "it belongs to another model or other images" in capsys.readouterr().err


def test_infinite_features_are_refused_and_not_kept(setting: Setting) -> None:
    with torch.no_grad():
        setting.model.norm.weight[0] = torch.inf
    with pytest.raises(ValueError, match=r"NaN or infinite for 6 of 6 images, such as .*0\.png"):
        setting.features()
    assert not setting.folder.exists()


def test_unreadable_images_have_no_features(setting: Setting) -> None:
    (setting.data / "train/green/1.png").write_bytes(b"")
    (found,), _ = setting.features()
    assert found.readable.tolist() == [True, True, True, False, True, True]
    assert not found.values[3].any()
    (again,), reused = setting.features()
    assert reused
    assert torch.equal(again.readable, found.readable)
    for path in setting.data.glob("train/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 6 images can be read"):
        setting.features()
