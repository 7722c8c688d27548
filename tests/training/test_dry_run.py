"""`--dry-run` prints what a run would do and saves one image of a batch."""

import re
from pathlib import Path

import cv2
import pytest
import torch
import yaml
from rich.console import Console
from tiny_runs import make_images, train

import train_imagenet
from linvit.data.augment.build import InputSpec
from linvit.data.loader import Batch
from linvit.model.build import create_model
from linvit.training.config import TrainConfig
from linvit.training.dry_run import estimate_memory, layer_table, save_batch, saved_bytes, show_plan

CONFIG = TrainConfig(data_dir=Path("data"))
SPEC = InputSpec((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 1.0, "center")


def shown(table: object) -> list[list[str]]:
    """The cells of a table's rows, which are separated by at least two spaces."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    lines = [line.strip() for line in capture.get().splitlines()]
    return [re.split(r" {2,}", line) for line in lines if line and "─" not in line]


def small_vit(**kwargs: object) -> torch.nn.Module:
    return create_model("linvit_mini_patch4_64", img_size=(32, 32), num_classes=3, **{"depth": 3, **kwargs})


def test_a_dry_run_prints_everything_and_saves_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_images(tmp_path / "data")
    assert train(data, tmp_path / "out", dry_run=True, batch_size=8, smoothing=0.125) == 0
    printed = capsys.readouterr().out
    configuration = printed.split(" layer  tokens")[0]
    (tmp_path / "again.yaml").write_text(configuration)
    again = TrainConfig.load(tmp_path / "again.yaml")
    assert (again.smoothing, again.dry_run, again.batch_size) == (0.125, True, 8)
    for words in ("separable", "in E and F", "GFLOP", "batches per epoch", "activations", "nothing was trained"):
        assert words in printed
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".yaml"] == ["dry-run.png"]
    assert cv2.imread(str(tmp_path / "out" / "dry-run.png")).shape[2] == 3


def test_other_models_have_no_layer_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_images(tmp_path / "data", train=3)
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"model": "resnet18", "img_size": 32, "output": str(tmp_path)})
    )
    argv = [str(data), "--config", str(tmp_path / "config.yaml"), "--dry-run", "-b", "4", "-j", "0", "--device", "cpu"]
    assert train_imagenet.main(argv) == 0
    assert "in E and F" not in capsys.readouterr().out


def test_the_table_counts_a_shared_projection_once() -> None:
    model = small_vit(share="layerwise", projection="linear", k=4)
    header, *layers, total = shown(layer_table(model))
    assert header == ["layer", "tokens", "k", "projection", "parameters", "in E and F"]
    # The shared E is 4 × 64.
    assert [row[5] for row in layers] == ["256", "0", "0"]
    assert total[2:] == [f"{sum(each.numel() for each in model.parameters()):,}", "256"]
    assert layers[0][1:4] == ["65" if model.num_prefix_tokens else "64", "4", "linear"]


def test_the_table_shows_the_length_and_kind_of_each_layer() -> None:
    _, *layers, _ = shown(layer_table(small_vit(k=(4, 16, None))))
    assert [row[2:4] for row in layers] == [["4", "separable"], ["16", "separable"], ["–", "full attention"]]


def test_saved_activations_are_counted_once_and_without_the_weights() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    model.set_grad_checkpointing = lambda enable: None
    images = torch.randn(2, 8)
    # The inputs of both linear layers and of GELU, in float32.
    assert saved_bytes(CONFIG, model, images) == 4 * 2 * (8 + 16 + 16)


def test_memory_grows_with_the_batch_and_the_optimizer() -> None:
    model = small_vit()
    weights = sum(each.nbytes for each in model.parameters())
    small, large = (estimate_memory(CONFIG, model, torch.randn(size, 3, 32, 32)) for size in (4, 8))
    assert large["activations"] == 2 * small["activations"]
    assert (small["weights"], small["gradients"], small["optimizer"]) == (weights, weights, 2 * weights)
    plain = TrainConfig(data_dir=Path("data"), opt="sgd", model_ema=True)
    assert estimate_memory(plain, model, torch.randn(4, 3, 32, 32))["moving average"] == weights
    model.patch_embed.requires_grad_(False)
    assert estimate_memory(CONFIG, model, torch.randn(4, 3, 32, 32))["gradients"] < weights


def test_the_image_shows_pixels_not_normalised_values(tmp_path: Path) -> None:
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1]]).view(2, 3, 1, 1).expand(2, 3, 32, 32)
    images = (colours - torch.tensor(SPEC.mean).view(3, 1, 1)) / torch.tensor(SPEC.std).view(3, 1, 1)
    batch = Batch(images, torch.tensor([0, 1]), torch.tensor([0, 1]))
    save_batch(tmp_path / "batch.png", batch, ["red", "green"], SPEC)
    picture = cv2.imread(str(tmp_path / "batch.png"), cv2.IMREAD_COLOR_RGB).reshape(-1, 3)
    for colour in ((230, 26, 26), (26, 230, 26)):
        assert (abs(picture.astype(int) - colour).max(axis=1) <= 1).sum() > 1000


def test_an_output_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file" / "output"
    blocked.parent.write_text("")
    config = CONFIG.model_copy(update={"output": blocked})
    spec = InputSpec((32, 32), SPEC.mean, SPEC.std, "bicubic", 1.0, "center")
    batch = Batch(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=re.escape(f"--output {blocked}: cannot create the folder")):
        show_plan(config, small_vit(), [batch], spec)  # type: ignore[arg-type]
