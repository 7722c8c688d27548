"""Class activation maps add up to the logits, for every pooling that is a sum over patches."""

import numpy as np
import pytest
import timm
import torch
from small_vits import images, make
from timm.models import Eva, VisionTransformer
from torch import nn

from linvit import attention_maps
from linvit.explanation.cam import POOLS, check_class_maps, class_maps
from linvit.explanation.explain import Explainer
from linvit.runs.folder import Classifier

TINY = dict(img_size=(28, 20), patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=5)
MODELS = {
    "linvit": make,
    "timm": lambda **kwargs: VisionTransformer(**TINY, reg_tokens=2, **kwargs),
    "rotary": lambda **kwargs: Eva(**TINY, **kwargs),
}


def changed(model):
    """The model in double precision, with weights of the norm and the classifier that are not their first values."""
    torch.manual_seed(0)
    for parameter in [*model.norm.parameters(), *model.fc_norm.parameters(), *model.head.parameters()]:
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("fc_norm", [True, False], ids=["norm after the pool", "norm before the pool"])
@pytest.mark.parametrize("name", MODELS)
def test_maps_add_up_to_the_logits(name, fc_norm, pool):
    if name == "rotary":
        fc_norm = {"use_fc_norm": fc_norm}
    else:
        fc_norm = {"fc_norm": fc_norm}
    model = changed(MODELS[name](global_pool=pool, **fc_norm))
    x = images(dtype=torch.float64)
    maps = class_maps(model, model.forward_features(x), (7, 5))
    assert maps.shape == (2, 5, 7, 5)
    constant = model.head.bias
    if isinstance(model.fc_norm, nn.LayerNorm):
        constant = constant + model.head.weight @ model.fc_norm.bias
    torch.testing.assert_close(maps.sum((2, 3)) + constant, model(x), rtol=0, atol=1e-12)
    found = attention_maps(model, x, method="cam", classes=[3, 1])
    torch.testing.assert_close(found.maps, maps[[0, 1], [3, 1]].detach(), rtol=0, atol=1e-12)
    assert found.classes.tolist() == [3, 1]
    assert found.approximations == ()
    assert (found.maps < 0).any()


def test_prefix_tokens_in_the_pool_have_their_share():
    model = changed(VisionTransformer(**TINY, global_pool="avg", fc_norm=False, pool_include_prefix=True))
    tokens = model.forward_features(images(dtype=torch.float64))
    expected = (tokens[:, 1:] @ model.head.weight.mT / 36).mT.unflatten(2, (7, 5))
    torch.testing.assert_close(class_maps(model, tokens, (7, 5)), expected)


def test_equal_patches_share_a_maximum():
    model = changed(VisionTransformer(**TINY, class_token=False, global_pool="max"))
    maps = class_maps(model, torch.randn(1, 1, 24, dtype=torch.float64).expand(-1, 35, -1), (7, 5))
    torch.testing.assert_close(maps, maps[..., :1, :1].expand_as(maps))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: make(), "pooling 'token' does not give them; train with --gp avg, max or avgmax"),
        (lambda: VisionTransformer(**TINY, global_pool="map"), "pooling 'map' does not"),
        (
            lambda: make(global_pool="avg", norm_layer="rmsnorm"),
            "a LayerNorm before it or none, not RmsNorm and Linear",
        ),
        (lambda: timm.create_model("test_resnet"), "ResNet is not a Vision Transformer"),
    ],
)
def test_other_models_are_refused(model, words):
    with pytest.raises(ValueError, match=words):
        check_class_maps(model())


def test_a_model_that_reads_its_class_token_has_the_other_maps():
    explainer = Explainer(Classifier(make(), ["a", "b", "c", "d", "e"], "weights", {}))
    assert explainer.possible(["relevance", "cam", "rollout"]) == ["relevance", "rollout"]
    with pytest.raises(ValueError, match="pooling 'token' does not give them"):
        explainer.explain(np.zeros((28, 20, 3), np.uint8), method="cam")
