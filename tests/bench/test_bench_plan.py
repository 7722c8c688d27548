"""Models as written on the command line, the errors for wrong ones, and their facts."""

import csv
import io

import pytest
from bench_groups import OURS, TIMM, group

from linvit.bench.options import Group
from linvit.bench.plan import Facts, Plan, describe, make_row, to_csv
from linvit.measure.memory import StepMemory
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
        ("resnet18", "only timm's VisionTransformer and Eva, and linvit's models, are compared here"),
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


FACTS = Facts(patches=64, k=(4, 16), kind="separable", share="kv", num_parameters=1000, num_projection_parameters=10)


def row(model=OURS, *, own=(1.0, 2.0, 4.0), base=(4.0, 4.0, 6.0), measured=None, **others):
    return make_row(
        model,
        measured or group(batch_size=2),
        FACTS,
        **{
            "flops": 10**9,
            "seconds": own,
            "baseline_seconds": base,
            "is_out_of_memory": False,
            "gemm_flops_per_second": 2e9,
            "memory": StepMemory(100, 300),
            **others,
        },
    )


def test_ratios_are_taken_round_by_round():
    found = row()
    assert (found.seconds, found.spread, found.n) == (2.0, (1.0, 4.0), 3)
    # 4/1, 4/2 and 6/4. The ratio of the medians is 2 too, so the next row distinguishes the two.
    assert (found.ratio, found.ratio_spread) == (2.0, (1.5, 4.0))
    assert row(own=(1.0, 2.0, 3.0), base=(9.0, 2.0, 3.0)).ratio == 1.0
    assert found.baseline == TIMM
    assert (found.images_per_second, found.tokens_per_second) == (1.0, 64.0)
    assert found.peak_share == 0.25
    assert (found.step_bytes, found.process_bytes) == (100, 300)
    assert found.all_seconds == [1.0, 2.0, 4.0]


def test_an_interrupted_round_is_not_compared():
    assert row(own=(1.0,), base=(3.0, 5.0)).ratio == 3.0


def test_out_of_memory_keeps_only_the_seconds_measured_before():
    found = row(is_out_of_memory=True, own=(1.0,), memory=None)
    assert found.status == "out of memory"
    assert (found.seconds, found.ratio, found.peak_share, found.step_bytes) == (None, None, None, None)
    assert found.all_seconds == [1.0]


def test_a_model_alone_has_no_baseline():
    found = row(measured=group(models=(OURS,)), base=(1.0, 2.0, 4.0))
    assert (found.baseline, found.ratio, found.ratio_spread) == (None, None, None)
    assert found.seconds == 2.0


@pytest.mark.parametrize(("size", "written"), [((32, 32), 32), ((32, 64), (32, 64))])
def test_square_sizes_are_one_number(size, written):
    assert row(measured=group(img_size=size)).image_size == written


def test_csv_has_a_line_per_row():
    lines = list(csv.DictReader(io.StringIO(to_csv([row(), row(TIMM, is_out_of_memory=True)]))))
    assert [line["model"] for line in lines] == [OURS, TIMM]
    assert (lines[0]["k"], lines[0]["ratio_spread"], lines[0]["all_seconds"]) == ("4 16", "1.5 4.0", "1.0 2.0 4.0")
    assert (lines[1]["status"], lines[1]["seconds"]) == ("out of memory", "")
