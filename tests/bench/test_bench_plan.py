"""Models as written on the command line, the errors for wrong ones, and their facts."""

import pytest

from linvit.bench.options import Group
from linvit.bench.plan import Plan, describe
from linvit.model.build import build, parse_spec
from linvit.settings.flags import UsageError

CHECKPOINTING = (",grad_checkpointing=mlp", ",grad_checkpointing=full")


def test_a_spec_is_a_name_and_keywords():
    spec = parse_spec("linvit_mini_patch4_64:k=(16,None,8,4),projection=linear,share=kv,grad_checkpointing=full")
    assert spec.name == "linvit_mini_patch4_64"
    assert spec.kwargs == {"k": (16, None, 8, 4), "projection": "linear", "share": "kv"}
    assert spec.grad_checkpointing == "full"
    assert parse_spec("vit_tiny_patch16_224").kwargs == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("linvit_mini_patch4_46", "unknown model 'linvit_mini_patch4_46'; did you mean 'linvit_mini_patch4_64'?"),
        ("linvit_mini_patch4_64:k", "'k' is not keyword=value"),
        ("linvit_mini_patch4_64:k=", "'k=' is not keyword=value"),
        ("linvit_mini_patch4_64:img_size=64", "image sizes are given by --img-size"),
        ("linvit_mini_patch4_64:grad_checkpointing=all", "takes one of 'none', 'mlp', 'full', not 'all'"),
        ("linvit_mini_patch4_64:projektion=linear", "unknown keyword 'projektion'; did you mean 'projection'?"),
        ("linvit_mini_patch4_64:k=64", "k=64 does not shorten a sequence of 64 patches"),
        ("vit_tiny_patch16_224:grad_checkpointing=mlp", "take grad_checkpointing=full"),
        ("resnet18", "only timm's VisionTransformer, and linvit's, are compared here"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(text, words):
    with pytest.raises(UsageError) as caught:
        Plan([Group((text,), (32, 32), "forward", rounds=1)])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checkpointing_reaches_the_model():
    size = (32, 32)
    assert not build(parse_spec("vit_tiny_patch16_224"), size, device="meta").grad_checkpointing
    assert build(parse_spec("vit_tiny_patch16_224:grad_checkpointing=full"), size, device="meta").grad_checkpointing


@pytest.mark.parametrize(
    ("text", "k", "kind", "share", "projection_parameters"),
    [
        ("linvit_mini_patch4_64:k=16", 16, "separable", "kv", 4 * 2 * 4 * 8),
        ("linvit_mini_patch4_64:k=16,projection=linear,share=layerwise", 16, "linear", "layerwise", 16 * 64),
        ("linvit_mini_patch4_64:k=(16,None,8,4)", (4, 16), "separable", "kv", (2 * 4 + 2 + 4 + 2 * 2) * 8),
        ("linvit_mini_patch4_64:projection=avgpool", 16, "avgpool", "kv", 0),
        ("vit_tiny_patch16_224:patch_size=4", None, "full attention", "", 0),
    ],
)
def test_facts_of_a_model(text, k, kind, share, projection_parameters):
    model = build(parse_spec(text), (32, 32), device="meta")
    facts = describe(model)
    assert facts.patches == 64
    assert (facts.k, facts.kind, facts.share) == (k, kind, share)
    assert facts.num_projection_parameters == projection_parameters
    assert facts.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_recomputation_does_not_count_as_work():
    models = tuple(f"linvit_mini_patch4_64:k=16{more}" for more in ("", *CHECKPOINTING))
    group = Group(models, (32, 32), "train", rounds=1)
    plan = Plan([group])
    assert len({plan.flops(model, group) for model in models}) == 1
    assert plan.specs[models[-1]].grad_checkpointing == "full"
