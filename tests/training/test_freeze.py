from typing import Any

import pytest
import timm

from linvit.training.freeze import freeze


@pytest.fixture
def model() -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=4, num_heads=2, num_classes=4)


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_modules_parameters_and_patterns(model: Any) -> None:
    everything = trained(model)
    num_frozen = freeze(model, ["patch_embed", "cls_token", "blocks.[0-1].*", "blocks.3.norm?.bias"])
    frozen = everything - trained(model)
    assert {name.split(".")[0] for name in frozen} == {"patch_embed", "cls_token", "blocks"}
    blocks = {name for name in frozen if name.startswith("blocks")}
    assert blocks == {
        name for name in everything if name.startswith(("blocks.0.", "blocks.1.")) or name in _biases_of_norms_3
    }
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert num_frozen == sum(sizes[name] for name in frozen)


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
    assert freeze(model, []) == 0
