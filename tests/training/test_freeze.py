from typing import Any

import pytest
import timm

from linvit.training.model import freeze


@pytest.fixture
def model() -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=4, num_heads=2, num_classes=4)


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_modules_parameters_and_patterns(model: Any) -> None:
    everything = trained(model)
    assert freeze(model, ["patch_embed", "cls_token", "blocks.[0-1].*", "blocks.3.norm?.bias"]) == []
    frozen = everything - trained(model)
    assert {name.split(".")[0] for name in frozen} == {"patch_embed", "cls_token", "blocks"}
    blocks = {name for name in frozen if name.startswith("blocks")}
    assert blocks == {
        name for name in everything if name.startswith(("blocks.0.", "blocks.1.")) or name in _biases_of_norms_3
    }


_biases_of_norms_3 = {"blocks.3.norm1.bias", "blocks.3.norm2.bias"}


def test_a_prefix_of_a_name_is_not_the_module(model: Any) -> None:
    with pytest.raises(ValueError, match=r"--freeze: unknown parameter or module 'block'; did you mean 'blocks'"):
        freeze(model, ["block"])


def test_the_backbone_is_all_but_the_classifier(model: Any) -> None:
    freeze(model, ["backbone"])
    assert trained(model) == {"head.weight", "head.bias"}


def test_something_must_be_left_to_train(model: Any) -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(model, ["*"])


def test_nothing_is_frozen_unless_asked(model: Any) -> None:
    everything = trained(model)
    assert freeze(model, []) == []
    assert trained(model) == everything


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
        # The first layer with a projection names it.
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
