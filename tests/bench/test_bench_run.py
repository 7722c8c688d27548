"""A model that does not compute Linformer attention is refused."""

import pytest
from bench_groups import OURS, TIMM

from linvit import reference
from linvit.bench import run
from linvit.bench.run import check_attention, size_to_check
from linvit.model.attention import LinformerAttention
from linvit.model.build import parse_spec

SIZE = (32, 48)


@pytest.mark.parametrize(
    "keywords",
    [
        "k=16",
        "k=(4,16)",
        "k=16,projection=linear,share=headwise",
        "k=((4,6),None),share=none",
        "k=16,projection=avgpool",
    ],
)
def test_layers_are_compared_with_the_reference(keywords):
    found = check_attention(parse_spec(f"linvit_mini_patch4_64:depth=2,{keywords}"), SIZE)
    assert found.compared == "first Linformer layer and linvit.reference, both in float64"
    assert found.image_size == SIZE
    assert 0 < found.largest_difference < found.bound == 1e-10


@pytest.mark.parametrize(
    "spec",
    [
        "linvit_mini_patch4_rope_64:depth=1,k=16",
        "linvit_mini_patch4_rope_64:depth=2,k=(None,16),class_token=True,rope_type='mixed',rope_rotate_half=False",
        "linvit_mini_patch4_rope_64:depth=1,k=16,attn_type='eva',scale_attn_inner=True,qk_norm=True",
    ],
)
def test_rotary_layers_are_compared_with_the_reference(spec):
    found = check_attention(parse_spec(spec), SIZE)
    assert found.compared == "first Linformer layer and linvit.reference, both in float64"
    assert 0 < found.largest_difference < 1e-10


@pytest.mark.parametrize("kind", ["maxpool", "conv"])
def test_projections_that_are_not_a_matrix_are_compared_with_float64(kind):
    found = check_attention(parse_spec(f"linvit_mini_patch4_64:depth=1,k=16,projection={kind}"), SIZE)
    assert "float32" in found.compared
    assert 1e-12 < found.largest_difference < found.bound


def test_full_attention_has_nothing_to_compare():
    assert check_attention(parse_spec(TIMM), SIZE) is None
    assert check_attention(parse_spec(f"{OURS},projection=identity"), SIZE) is None


def test_long_sequences_are_compared_at_a_smaller_size(monkeypatch):
    monkeypatch.setattr(run, "MAX_PATCHES", 32)
    spec = parse_spec("linvit_mini_patch4_64:depth=1,k=15")
    assert size_to_check(spec, (128, 64)) == (32, 16)
    assert size_to_check(spec, (32, 16)) == (32, 16)
    # A quarter of the patches would not exceed k.
    assert size_to_check(parse_spec("linvit_mini_patch4_64:depth=1,k=64"), (64, 64)) == (64, 64)


def test_a_forward_that_differs_is_refused(monkeypatch):
    honest = reference.linformer_attention
    monkeypatch.setattr(reference, "linformer_attention", lambda x, **others: honest(x, **others) * (1 + 1e-8))
    with pytest.raises(ValueError, match=rf"^{OURS} is not timed: its attention differs from the reference"):
        check_attention(parse_spec(OURS), SIZE)


def test_a_gradient_that_differs_is_refused(monkeypatch):
    honest = LinformerAttention.forward

    def forward(self, x, **others):
        # The right value with half the gradient.
        return honest(self, 0.5 * x + 0.5 * x.detach(), **others)

    monkeypatch.setattr(LinformerAttention, "forward", forward)
    with pytest.raises(ValueError, match="is not timed"):
        check_attention(parse_spec(OURS), SIZE)


def test_outputs_of_nan_are_refused(monkeypatch):
    honest = LinformerAttention.forward
    monkeypatch.setattr(
        LinformerAttention, "forward", lambda self, x, **others: honest(self, x, **others) * float("nan")
    )
    with pytest.raises(ValueError, match="is not timed"):
        check_attention(parse_spec(OURS), SIZE)
