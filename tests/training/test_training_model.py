"""The model of a run: built, initialised, placed and compiled; frozen parameters; image sizes that change."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from linvit.conversion.convert import convert_vit
from linvit.distributed import Ranks
from linvit.model.build import create_model
from linvit.training.config import TrainConfig, parse
from linvit.training.model import build_model, check_sizes, epoch_sizes, freeze, place_model, train_size, wrap_model
from linvit.training.options import ScheduleOptions

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


def test_a_misspelt_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        ValueError, match="unknown model 'linvit_smal_patch16_224'; did you mean 'linvit_small_patch16_224'"
    ):
        create_model("linvit_smal_patch16_224")


def test_an_unknown_argument_of_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 does not take these arguments: .*depht"):
        build_model(config(model_kwargs={"depht": 3}), class_names=CLASSES)


def test_k_must_shorten_the_sequence() -> None:
    with pytest.raises(ValueError, match="k=16 does not shorten a sequence of 16 patches"):
        build_model(config(model="linvit_tiny_patch16_224", k=16), class_names=CLASSES)


def test_weights_that_are_not_published_are_refused() -> None:
    with pytest.raises(ValueError, match="no weights of linvit_tiny_patch16_224 are published; give a file"):
        build_model(config(model="linvit_tiny_patch16_224", k=4, pretrained=True), class_names=CLASSES)


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise LocalEntryNotFoundError("An error happened while trying to locate the file")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(ValueError, match=r"the weights of vit_tiny_patch16_224 cannot be downloaded .*give the file"):
        build_model(config(model="vit_tiny_patch16_224", pretrained=True), class_names=CLASSES)


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


def test_a_folder_of_weights_sets_the_model(tmp_path: Path) -> None:
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
        ("{", "config.json cannot be read as JSON (Expecting property name"),
        ("[]", "config.json holds no JSON object"),
        ("{}", "config.json does not describe a model (architecture: field required)"),
        ('{"architecture": "vit_huge_patch1_7"}', "config.json: unknown model 'vit_huge_patch1_7'; did you mean"),
        ('{"architecture": "hf-hub:a/b"}', "config.json: unknown model 'hf-hub:a/b'"),
    ],
)
def test_a_folder_that_describes_no_model_is_named(tmp_path: Path, config_json: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config_json)
    with pytest.raises(ValueError, match=f"{tmp_path}/{re.escape(message)}"):
        create_model(f"local-dir:{tmp_path}")


def test_the_classifier_is_initialised_by_the_options() -> None:
    model, _ = build_model(config(head_init_scale=0.0, head_init_bias=-4.6), class_names=CLASSES)
    assert model.head.weight.eq(0).all()
    torch.testing.assert_close(model.head.bias, torch.full((3,), -4.6))


def test_memory_format_checkpointing_and_compilation() -> None:
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


def test_only_linvit_models_checkpoint_mlps_alone() -> None:
    ranks = Ranks(torch.device("cpu"))
    model, _ = build_model(config(model="linvit_tiny_patch16_224", k=4), class_names=CLASSES)
    place_model(model, config(grad_checkpointing="mlp"), ranks)
    assert model.blocks[0].mlp.recompute == "hidden"
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(ValueError, match="--grad-checkpointing mlp is for linvit models, not for VisionTransformer"):
        place_model(theirs, config(grad_checkpointing="mlp"), ranks)
    place_model(theirs, config(grad_checkpointing="full"), ranks)
    assert theirs.grad_checkpointing is True


@pytest.fixture
def vit() -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=4, num_heads=2, num_classes=4)


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_modules_parameters_and_patterns(vit: Any) -> None:
    everything = trained(vit)
    assert freeze(vit, ["patch_embed", "cls_token", "blocks.[0-1].*", "blocks.3.norm?.bias"]) == []
    frozen = everything - trained(vit)
    assert {name.split(".")[0] for name in frozen} == {"patch_embed", "cls_token", "blocks"}
    blocks = {name for name in frozen if name.startswith("blocks")}
    norm_biases = {"blocks.3.norm1.bias", "blocks.3.norm2.bias"}
    assert blocks == {name for name in everything if name.startswith(("blocks.0.", "blocks.1."))} | norm_biases


def test_a_prefix_of_a_name_is_not_the_module(vit: Any) -> None:
    with pytest.raises(ValueError, match=r"--freeze: unknown parameter or module 'block'; did you mean 'blocks'"):
        freeze(vit, ["block"])


def test_the_backbone_is_all_but_the_classifier(vit: Any) -> None:
    freeze(vit, ["backbone"])
    assert trained(vit) == {"head.weight", "head.bias"}


def test_freezing_everything_is_refused(vit: Any) -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(vit, ["*"])


def test_nothing_is_frozen_by_default(vit: Any) -> None:
    everything = trained(vit)
    assert freeze(vit, []) == []
    assert trained(vit) == everything


def linformer(**kwargs: Any) -> Any:
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 4, "k": 4}
    return timm.create_model("linvit_mini_patch4_64", projection="linear", **{**sizes, **kwargs})


@pytest.mark.parametrize(
    ("patterns", "k", "note"),
    [
        (
            ["blocks.[0-1].*"],
            4,
            "blocks.2-3.attn.key_projection.weight: shared with blocks.0.attn.key_projection.weight",
        ),
        # A shared projection has the name of the first layer that uses it.
        (
            ["blocks.1", "blocks.3"],
            [None, 4, 4, 4],
            "blocks.2.attn.key_projection.weight: shared with blocks.1.attn.key_projection.weight",
        ),
    ],
)
def test_freezing_a_shared_projection_for_some_of_its_layers_is_reported(
    patterns: list[str], k: Any, note: str
) -> None:
    model = linformer(share="layerwise", k=k)
    assert freeze(model, patterns) == [f"--freeze also freezes {note}"]
    assert not model.blocks[2].attn.key_projection.weight.requires_grad
    assert model.blocks[2].mlp.fc1.weight.requires_grad


@pytest.mark.parametrize("patterns", [["blocks.[2-3].*"], ["blocks"], ["backbone"], ["patch_embed"]])
def test_no_note_where_no_or_every_layer_of_a_shared_projection_is_frozen(patterns: list[str]) -> None:
    model = linformer(share="layerwise")
    assert freeze(model, patterns) == []
    is_frozen = not model.blocks[3].attn.key_projection.weight.requires_grad
    assert is_frozen == (patterns[0] in ("blocks", "backbone"))


def test_a_projection_that_layers_do_not_share_is_frozen_with_its_layer() -> None:
    model = linformer(share="kv")
    assert freeze(model, ["blocks.[0-1].*"]) == []
    assert [block.attn.key_projection.weight.requires_grad for block in model.blocks] == [False, False, True, True]


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(3, [16, 24, 32]), (6, [16, 16, 24, 24, 32, 32]), (7, [16, 16, 16, 24, 24, 32, 32]), (4, [16, 16, 24, 32])],
)
def test_sizes_share_the_epochs_evenly(epochs: int, expected: list[int]) -> None:
    options = ScheduleOptions(epochs=epochs, train_img_sizes=(16, 24, 32))
    assert [size for size, _ in epoch_sizes(options)] == expected
    # Epochs after the schedule, such as a cooldown, keep the last size.
    assert train_size(epochs + 5, options) == 32


def test_without_train_img_sizes_there_are_no_sizes() -> None:
    assert epoch_sizes(ScheduleOptions()) == []
    assert train_size(3, ScheduleOptions()) is None


@pytest.mark.parametrize("projection", ["linear", "separable", "conv", "avgpool", "dct"])
def test_checking_sizes_does_not_change_the_model(projection: str) -> None:
    model = create_model(
        "linvit_mini_patch4_64", img_size=(32, 32), patch_size=4, k=4, projection=projection, dynamic_img_size=True
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_sizes(model, [16, 24, 32])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model(torch.zeros(1, 3, 16, 16)).shape == model(torch.zeros(1, 3, 32, 32)).shape


def test_a_finer_grid_of_the_same_patches_gives_the_same_keys() -> None:
    # Remapping by overlap area keeps the region of each key: after training at 16 px it is the same at 32 px.
    torch.manual_seed(0)
    model = create_model(
        "linvit_mini_patch4_64", img_size=(32, 32), patch_size=4, k=4, projection="linear", dynamic_img_size=True
    ).eval()
    attention = model.blocks[0].attn
    coarse = torch.randn(1, 1, 16, 8)
    fine = coarse.view(1, 1, 4, 4, 8).repeat_interleave(2, 2).repeat_interleave(2, 3).reshape(1, 1, 64, 8)
    key, _ = attention.projections()
    torch.testing.assert_close(key(coarse, (4, 4)), key(fine, (8, 8)))


def test_a_kept_classifier_of_unknown_or_other_classes_is_reported(tmp_path: Path) -> None:
    source, _ = build_model(config(), class_names=CLASSES)
    said: list[str] = []
    for labels in (None, CLASSES, ["x", "y", "z"]):
        folder = tmp_path / str(labels)
        timm.models.save_for_hf(source, folder, safe_serialization=True, model_config={"label_names": labels})
        for option in ("pretrained_path", "initial_checkpoint"):
            build_model(config(**{option: folder}), class_names=CLASSES, log=said.append)
    unnamed, also_unnamed, other = said
    assert unnamed == also_unnamed
    assert "has no class names; its classifier of 3 classes is kept, with label 0 as" in unnamed
    assert "was trained on other classes (x, y, z); its classifier is kept" in other
    said.clear()
    build_model(config(pretrained_path=tmp_path / "None"), class_names=["class1", "class10", "class2"], log=said.append)
    assert "label 1 is 'class10' in torchvision's order and 'class2' in timm's: if timm trained" in said[0]
