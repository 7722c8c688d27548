"""Distillation: the input of the teacher, the loss for logits and features, and exact resuming."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from stopped_runs import assert_stopping_changes_nothing
from tiny_runs import make_images, train
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.data.augment.build import InputSpec
from linvit.model.build import create_model
from linvit.runs.folder import save_classifier
from linvit.training.config import TrainConfig
from linvit.training.distill import Distillation, _TeacherInput, create_distillation
from linvit.training.optim import create_optimizer

CLASSES = ["blue", "green", "red"]
CPU = torch.device("cpu")
STUDENT = InputSpec((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0, "center")
TEACHER = InputSpec((48, 48), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 1.0, "center")


def save_teacher(
    folder: Path, name: str = "vit_tiny_patch16_224", class_names: list[str] = CLASSES, **kwargs: Any
) -> str:
    torch.manual_seed(1)
    if name.startswith("vit"):
        kwargs = {"img_size": 48, "embed_dim": 24, "depth": 1, "num_heads": 2, **kwargs}
    model = timm.create_model(name, num_classes=len(class_names), **kwargs)
    save_classifier(folder, model, model.state_dict(), class_names=class_names, spec=TEACHER, about={})
    return str(folder)


def build(teacher: str, class_names: list[str] = CLASSES, **settings: Any) -> tuple[nn.Module, Distillation]:
    torch.manual_seed(2)
    size = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = create_model("linvit_mini_patch4_64", num_classes=3, img_size=(32, 32), k=4, **size)
    config = TrainConfig(data_dir=Path("data"), kd_model_name=teacher, lr=0.1, **settings)
    distillation = create_distillation(model, config, spec=STUDENT, class_names=class_names, device=CPU)
    assert distillation is not None
    return model, distillation


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


def normalised(pixels: Tensor, spec: InputSpec) -> Tensor:
    return (pixels - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)


def test_the_teacher_sees_the_pixels_in_its_own_normalisation_and_size() -> None:
    # Each half is constant, so resampling does not change the middle of a half.
    pixels = torch.cat([torch.full((2, 3, 16, 32), 0.2), torch.full((2, 3, 16, 32), 0.9)], dim=2)
    seen = _TeacherInput(STUDENT, TEACHER, CPU)(normalised(pixels, STUDENT))
    assert seen.shape == (2, 3, 48, 48)
    expected = normalised(torch.tensor([0.2, 0.9]).view(2, 1, 1, 1).expand(2, 3, 1, 1), TEACHER)
    torch.testing.assert_close(seen[0, :, 8, 20], expected[0, :, 0, 0])
    torch.testing.assert_close(seen[0, :, 40, 20], expected[1, :, 0, 0])
    same = torch.randn(2, 3, 32, 32)
    assert _TeacherInput(STUDENT, STUDENT, CPU)(same) is same


@pytest.mark.parametrize(
    ("weights", "of_labels", "of_teacher"),
    [
        ({}, 1.0, 1.0),
        ({"distill_loss_weight": 5.0}, 1.0, 5.0),
        ({"task_loss_weight": 0.75}, 0.75, 0.25),
        ({"task_loss_weight": 2.0, "distill_loss_weight": 0.5}, 2.0, 0.5),
    ],
)
def test_logits_are_matched_at_a_temperature(
    weights: dict[str, float], of_labels: float, of_teacher: float, teacher: str
) -> None:
    model, distillation = build(teacher, kd_temperature=3.0, **weights)
    assert distillation.trained is model
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    logits = model(images)
    loss = distillation.loss(logits, images, labels, nn.CrossEntropyLoss())
    wanted = distillation.teacher(_TeacherInput(STUDENT, TEACHER, CPU)(images))
    p, q = (F.softmax(each / 3.0, dim=1) for each in (wanted, logits))
    divergence = (p * (p.log() - q.log())).sum(1).mean() * 9
    torch.testing.assert_close(loss, of_labels * F.cross_entropy(logits, labels) + of_teacher * divergence)


def test_a_teacher_stays_in_evaluation_mode_and_is_not_trained(tmp_path: Path) -> None:
    model, distillation = build(save_teacher(tmp_path / "teacher", "resnet18"))
    before = copy.deepcopy(distillation.teacher.state_dict())
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    model.train()
    distillation.loss(model(images), images, labels, nn.CrossEntropyLoss()).backward()
    assert not distillation.teacher.training
    assert all(parameter.grad is None for parameter in distillation.teacher.parameters())
    # In training mode batch norms would have changed their buffers.
    assert all(torch.equal(before[name], value) for name, value in distillation.teacher.state_dict().items())
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_features_are_the_last_tokens_of_both(name: str, tmp_path: Path) -> None:
    model, distillation = build(
        save_teacher(tmp_path / "teacher", name), kd_distill_type="feature", task_loss_weight=0.0
    )
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    logits, tokens = distillation.trained(images)
    torch.testing.assert_close(logits, model(images))
    width = {"vit_tiny_patch16_224": 24, "resnet18": 512}[name]
    assert tokens.shape == (4, width, 4, 4)
    loss = distillation.loss((logits, tokens), images, labels, nn.CrossEntropyLoss())
    assert 0 < loss.item() < 2
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in distillation.parameters())
    # Equal tokens have a loss of zero.
    wanted = distillation._teacher_tokens(images)
    torch.testing.assert_close(
        distillation.loss((logits, wanted), images, labels, nn.CrossEntropyLoss()), torch.tensor(0.0), atol=1e-6, rtol=0
    )


def test_the_projection_is_trained_with_the_model(teacher: str) -> None:
    model, distillation = build(teacher, kd_distill_type="feature", layer_decay=0.5)
    config = TrainConfig(data_dir=Path("data"), lr=0.1, layer_decay=0.5)
    optimizer = create_optimizer(model, config, lr=0.1, extra_params=distillation.parameters())
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(trained) == len(set(trained))
    assert {id(each) for each in [*model.parameters(), *distillation.parameters()]} == set(trained)


@pytest.mark.parametrize(
    ("settings", "status", "words"),
    [
        ({"kd_model_name": "{two}"}, 1, "has 2 classes (blue, red), the data has 3 (blue, green, red)"),
        ({"kd_model_name": "{other}"}, 1, "has 3 classes (blue, green, grey), the data has 3 (blue, green, red)"),
        ({"kd_model_name": "vit_tinny_patch16_224"}, 2, "unknown model 'vit_tinny_patch16_224'; did you mean"),
        (
            {
                "kd_model_name": "{two}",
                "kd_distill_type": "feature",
                "model": "resnet18",
                "k": None,
                "model_kwargs": {},
            },
            1,
            "--kd-distill-type feature needs a Vision Transformer, not resnet18",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    settings: dict[str, Any], status: int, words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {
        "two": save_teacher(tmp_path / "two", class_names=["blue", "red"]),
        "other": save_teacher(tmp_path / "other", class_names=["blue", "green", "grey"]),
    }
    settings["kd_model_name"] = settings["kd_model_name"].format(**folders)
    assert train(data, tmp_path, **settings) == status
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_teacher_without_class_names_in_an_ambiguous_order_is_refused(tmp_path: Path) -> None:
    teacher = Path(save_teacher(tmp_path / "teacher"))
    config = json.loads((teacher / "config.json").read_text())
    del config["label_names"]
    (teacher / "config.json").write_text(json.dumps(config))
    build(str(teacher))
    ambiguous = ["class1", "class10", "class2"]
    with pytest.raises(ValueError, match=r"no class names, and label 1 is 'class10' .*: use --class-map timm if timm"):
        build(str(teacher), class_names=ambiguous)
    build(str(teacher), class_names=ambiguous, class_map=Path("torchvision"))


@pytest.mark.parametrize("mode", ["logit", "feature"])
def test_stopping_in_an_epoch_changes_nothing(
    mode: str, teacher: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"kd_model_name": teacher, "kd_distill_type": mode, "mixup": 0.8, "model_ema": True, "clip_grad": 1.0}
    assert_stopping_changes_nothing(data, tmp_path, monkeypatch, after=2, **settings)
    # Only the model is exported.
    assert not [
        name for name in load_file(tmp_path / "uninterrupted/best/model.safetensors") if name.startswith("projection")
    ]


def test_a_run_can_be_the_teacher(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "first", epochs=1) == 0
    assert train(data, tmp_path, "second", epochs=1, kd_model_name=str(tmp_path / "first"), amp=True) == 0
