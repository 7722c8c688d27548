"""Runs with repeated augmentation, balanced classes, class weights and growing images, stopped and resumed exactly."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from stopped_runs import assert_stopping_changes_nothing
from tiny_runs import make_images, train

from linvit.data.loader import Loader
from linvit.training.step import TrainStep

SIZES = [16, 24, 32]
MIXING: dict[str, Any] = {"mixup": 0.8, "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.3, "drop_path": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_images(tmp_path_factory.mktemp("data"), train=10)
    for number in range(3, 10):
        (folder / "train" / "red" / f"{number}.png").unlink()
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The images and labels of every training batch."""
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    backward = TrainStep.backward

    def watched(self: TrainStep, images: torch.Tensor, labels: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        batches.append((images.clone(), labels.clone()))
        backward(self, images, labels, *args, **kwargs)

    monkeypatch.setattr(TrainStep, "backward", watched)
    return batches


def test_repeats_are_augmented_differently(data: Path, tmp_path: Path, seen: list) -> None:
    assert train(data, tmp_path, epochs=1, aug_repeats=2.0) == 0
    images = torch.cat([images for images, _ in seen])
    assert len(images) == 16
    assert len({image.numpy().tobytes() for image in images}) == 16


def test_the_balanced_sampler_balances_classes(data: Path, tmp_path: Path, seen: list) -> None:
    assert train(data, tmp_path, epochs=1, batch_size=23, sampler="balanced") == 0
    (_, labels), *_ = seen
    assert sorted(Counter(labels.tolist()).values()) == [7, 8, 8]


def test_training_images_grow_to_the_input_size_of_the_model(
    data: Path, tmp_path: Path, seen: list, capsys: Any
) -> None:
    assert train(data, tmp_path, epochs=6, k=2, train_img_sizes=SIZES, workers=2) == 0
    assert [images.shape[-1] for images, _ in seen] == [16] * 4 + [24] * 4 + [32] * 4
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if "training at" in line] == [
        "epoch 0: training at 16×16 px",
        "epoch 2: training at 24×24 px",
        "epoch 4: training at 32×32 px",
    ]


def test_a_rotary_model_trains_at_growing_sizes(data: Path, tmp_path: Path, seen: list) -> None:
    model = {"model": "linvit_mini_patch4_rope_64", "k": 2, "local": 3, "patch_drop": 0.25}
    jitter = {"rope_type": "mixed", "rope_rotate_half": False, "rope_jitter_coords": 1.5, "patch_size": 8, "depth": 1}
    options = {"train_img_sizes": [16, 32], "model_ema": True, "layer_decay": 0.7, "grad_checkpointing": "full"}
    assert train(data, tmp_path, epochs=2, model_kwargs=jitter, **model, **options) == 0
    assert {images.shape[-1] for images, _ in seen} == {16, 32}
    trained = timm.create_model(f"local-dir:{tmp_path}/run/best", pretrained=True)
    assert trained.blocks[0].attn.local.weight.any()
    assert trained(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_evaluation_uses_the_input_size_of_the_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    iter_from = Loader.iter_from

    def watched(self: Loader, batch: int) -> Any:
        for each in iter_from(self, batch):
            sizes.append(each.images.shape[-1])
            yield each

    monkeypatch.setattr(Loader, "iter_from", watched)
    assert train(data, tmp_path, epochs=2, k=2, train_img_sizes=[16, 32]) == 0
    # Each epoch has two training batches and two validation batches.
    assert sizes == [16, 16, 32, 32, 32, 32, 32, 32]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "resnet18", "k": None, "model_kwargs": {}}, "resnet18 supports images of one size only"),
        ({"train_img_sizes": [20, 32]}, "--train-img-sizes: the model does not support 20×20 px"),
        # Four patches cannot be projected to four keys.
        ({"train_img_sizes": [16, 32], "k": 4, "projection": "linear"}, "does not support 16×16 px"),
    ],
)
def test_unsupported_image_sizes_are_refused(
    settings: dict[str, Any], words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path, **{"train_img_sizes": [16, 32], **settings}) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"train_img_sizes": [16, 32], "k": 2, "projection": "linear"},
        {"sampler": "balanced"},
        {"aug_repeats": 2.0, "class_weights": "balanced"},
    ],
    ids=["sizes", "balanced", "repeats"],
)
def test_stopping_within_an_epoch_changes_nothing(
    settings: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_stopping_changes_nothing(data, tmp_path, monkeypatch, after=1, **MIXING, **settings)
