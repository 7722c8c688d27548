"""The example in docs/projections.md: a kind of one class that works in every model and equals the reference."""

import re
from pathlib import Path

import pytest
import timm
import torch

from linvit import LinformerAttention, build_projection, reference
from linvit.model.projections import PROJECTIONS

PAGE = (Path(__file__).parents[3] / "docs/projections.md").read_text()
(CODE,) = re.findall(
    r"^```python\n((?:(?!```).)*class GaussianProjection.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module", autouse=True)
def example():
    """The page's class, registered for these tests only."""
    exec(CODE, {})
    yield
    del PROJECTIONS["gaussian"]


@pytest.mark.parametrize("order", ["per_head", "associative", "folded"])
def test_equals_the_reference_with_its_gradients(order):
    E, F = (build_projection("gaussian", k=9, num_maps=4, grid_size=(7, 5), dtype=torch.float64) for _ in range(2))
    layer = LinformerAttention(32, 4, num_prefix_tokens=2, key_projection=E, value_projection=F, dtype=torch.float64)
    layer.order = order
    x = torch.randn(2, 2 + 35, 32, dtype=torch.float64, requires_grad=True)
    present = torch.rand(2, 35) > 0.4
    mask = torch.cat([torch.ones(2, 2, dtype=torch.bool), present], dim=1)[:, None, None]
    expected = reference.linformer_attention(
        x,
        qkv_weight=layer.qkv.weight,
        qkv_bias=layer.qkv.bias,
        out_weight=layer.proj.weight,
        out_bias=layer.proj.bias,
        E=list(E.matrix()),
        F=list(F.matrix()),
        num_prefix_tokens=2,
        present=present,
    )
    found = layer(x, attn_mask=mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    inputs, cotangent = [x, *layer.parameters()], torch.randn_like(found)
    for ours, plain in zip(
        torch.autograd.grad(found, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)


def test_weights_do_not_depend_on_the_grid():
    model = timm.create_model("linvit_mini_patch4_64", projection="gaussian", k=10, share="layerwise", num_classes=3)
    other = timm.create_model("linvit_mini_patch4_64", img_size=96, projection="gaussian", k=10, share="layerwise")
    projection = model.blocks[0].attn.key_projection
    before = {name: value.clone() for name, value in projection.state_dict().items()}
    model.set_input_size((96, 96))
    projection = model.blocks[0].attn.key_projection
    assert projection.matrix().shape == (1, 10, 576)
    assert all(torch.equal(value, before[name]) for name, value in projection.state_dict().items())
    moved, own = projection.matrix(), other.blocks[0].attn.key_projection
    own.load_state_dict(projection.state_dict())
    torch.testing.assert_close(own.matrix(), moved)
