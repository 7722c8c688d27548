import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from linvit.conversion.convert import convert_vit
from linvit.distributed import Ranks
from linvit.model.build import create_model
from linvit.training.config import TrainConfig, parse
from linvit.training.model import build_model, place_model, wrap_model

CLASSES = ["a", "b", "c"]
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def config(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"data_dir": "data", "model": "vit_tiny_patch16_224", "img_size": (32, 32), "model_kwargs": TINY} | settings
    )


def test_classes_size_and_arguments_reach_the_model() -> None:
    model, new = build_model(
        config(model="linvit_tiny_patch16_224", k=4, share="none", drop_path=0.3, gp="avg", img_size=(32, 48)),
        class_names=CLASSES,
    )
    assert model.num_classes == 3
    assert model.patch_embed.img_size == (32, 48)
    assert model.share == "none"
    assert model.global_pool == "avg"
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    assert new == [name for name, _ in model.named_parameters()]


def test_a_misspelt_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError, match="unknown model 'linvit_smal_patch16_224'; did you mean 'linvit_small_patch16_224'"
    ):
        create_model("linvit_smal_patch16_224")


def test_an_argument_that_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 does not take these arguments: .*depht"):
        build_model(config(model_kwargs={"depht": 3}), class_names=CLASSES)


def test_k_must_shorten_the_sequence() -> None:
    with pytest.raises(ValueError, match="k=16 does not shorten a sequence of 16 patches"):
        build_model(config(model="linvit_tiny_patch16_224", k=16), class_names=CLASSES)


def test_weights_that_are_not_published_are_refused() -> None:
    with pytest.raises(ValueError, match="linvit_tiny_patch16_224 cannot be built: No pretrained weights exist"):
        build_model(config(model="linvit_tiny_patch16_224", k=4, pretrained=True), class_names=CLASSES)


def test_the_number_of_classes_can_be_checked() -> None:
    build_model(config(num_classes=3), class_names=CLASSES)
    with pytest.raises(ValueError, match="--num-classes 10: the data has 3 classes"):
        build_model(config(num_classes=10), class_names=CLASSES)


def test_pretrained_path_adapts_and_initial_checkpoint_does_not(tmp_path: Path) -> None:
    source, _ = build_model(config(), class_names=CLASSES)
    timm.models.save_for_hf(source, tmp_path, safe_serialization=True, model_config={"label_names": CLASSES})
    model, new = build_model(config(pretrained_path=tmp_path, img_size=(64, 64)), class_names=["x", "y"])
    assert new == ["head.bias", "head.weight"]
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    model, new = build_model(config(initial_checkpoint=tmp_path), class_names=CLASSES)
    assert new == []
    assert torch.equal(model.head.weight, source.head.weight)
    with pytest.raises(ValueError, match="does not fit"):
        build_model(config(initial_checkpoint=tmp_path), class_names=["x", "y"])


def test_a_folder_of_weights_brings_its_model(tmp_path: Path) -> None:
    converted, run = tmp_path / "converted", tmp_path / "run"
    (run / "best").mkdir(parents=True)
    converted.mkdir()
    for folder in (converted, run / "best"):
        (folder / "config.json").touch()
    default = TrainConfig().model
    assert parse(["data", "--pretrained-path", str(converted)]).model == f"local-dir:{converted}"
    assert parse(["data", "--pretrained-path", str(run)]).model == f"local-dir:{run / 'best'}"
    assert parse(["data", "--pretrained-path", str(converted), "--model", default]).model == default
    assert parse(["data", "--pretrained-path", "weights.safetensors"]).model == default
    file = tmp_path / "c.yaml"
    file.write_text(f"pretrained_path: {run}\n")
    assert parse(["data", "--config", str(file)]).model == f"local-dir:{run / 'best'}"


def test_a_converted_model_is_fine_tuned_at_a_larger_size(tmp_path: Path) -> None:
    original = create_model("vit_tiny_patch16_224", img_size=(32, 32), **TINY)
    converted = convert_vit(original, k=[4, None], projection="separable")
    timm.models.save_for_hf(converted, tmp_path, safe_serialization=True)
    settings = parse(["data", "--pretrained-path", str(tmp_path), "--img-size", "48", "64"])
    model, new = build_model(settings, class_names=CLASSES)
    assert new == ["head.bias", "head.weight"]
    assert model.patch_embed.grid_size == (6, 8)
    assert [projected is None for projected in (block.attn.projections() for block in model.blocks)] == [False, True]
    assert torch.equal(model.blocks[1].mlp.fc1.weight, original.blocks[1].mlp.fc1.weight)
    assert model(torch.randn(1, 3, 48, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("config_json", "message"),
    [
        ("{", "config.json does not describe a model (Expecting property name"),
        ("{}", "config.json does not describe a model"),
        ('{"architecture": "vit_huge_patch1_7"}', "cannot be built: Unknown model (vit_huge_patch1_7)"),
    ],
)
def test_a_folder_that_describes_no_model_is_named(tmp_path: Path, config_json: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config_json)
    with pytest.raises(ValueError, match=f"local-dir:{tmp_path}.*{re.escape(message)}"):
        create_model(f"local-dir:{tmp_path}")


def test_the_classifier_starts_as_asked() -> None:
    model, _ = build_model(config(head_init_scale=0.0, head_init_bias=-4.6), class_names=CLASSES)
    assert model.head.weight.eq(0).all()
    torch.testing.assert_close(model.head.bias, torch.full((3,), -4.6))


def test_layout_checkpointing_and_compilation() -> None:
    settings = config(channels_last=True, grad_checkpointing=True, torchcompile="eager")
    model, _ = build_model(settings, class_names=CLASSES)
    ranks = Ranks(torch.device("cpu"))
    place_model(model, settings, ranks)
    assert model.grad_checkpointing
    assert model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
    wrapped = wrap_model(model, settings, ranks)
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    assert wrapped is not model
    torch.testing.assert_close(wrapped(images), model(images))
    assert wrap_model(model, config(), ranks) is model


def test_checkpointing_of_mlps_is_for_linvit_models() -> None:
    ranks = Ranks(torch.device("cpu"))
    model, _ = build_model(config(model="linvit_tiny_patch16_224", k=4), class_names=CLASSES)
    place_model(model, config(grad_checkpointing="mlp"), ranks)
    assert model.blocks[0].mlp.recompute == "hidden"
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(ValueError, match="--grad-checkpointing mlp is for linvit models, not for VisionTransformer"):
        place_model(theirs, config(grad_checkpointing="mlp"), ranks)
    place_model(theirs, config(grad_checkpointing="full"), ranks)
    assert theirs.grad_checkpointing is True
