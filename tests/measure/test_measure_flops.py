"""Operations against a count by hand, and the speed of matrix products by a fake clock."""

import pytest
import timm
import torch

from linvit.measure.flops import GEMM_REPEATS, count_flops, gemm_flops_per_second
from linvit.model.attention import LinformerAttention
from linvit.model.projections import build_projection

B, D, P, SIZE, CLASSES = 2, 64, 8, 32, 10
T = (SIZE // P) ** 2 + 1


def vit(depth):
    with torch.device("meta"):
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=SIZE, patch_size=P, embed_dim=D, num_heads=2, depth=depth, num_classes=10
        )


@pytest.mark.parametrize("depth", [1, 2])
def test_a_transformer_counts_as_by_hand(depth):
    images = torch.empty(B, 3, SIZE, SIZE, device="meta")
    patch_embedding = 2 * B * (T - 1) * D * 3 * P * P
    block = 2 * B * T * D * 3 * D + 2 * 2 * B * T * T * D + 2 * B * T * D * D + 2 * 2 * B * T * D * 4 * D
    forward = patch_embedding + depth * block + 2 * B * D * CLASSES
    assert count_flops(vit(depth), images, mode="forward") == forward
    # Each product has two gradients, except that the images need none.
    assert count_flops(vit(depth), images, mode="train") == 3 * forward - patch_embedding


def test_linformer_attention_counts_as_by_hand():
    N, k = 256, 4
    with torch.device("meta"):
        layer = LinformerAttention(
            D, 2, qkv_bias=True, key_projection=build_projection("linear", k=k, grid_size=(16, 16))
        )
        layer.order = "associative"
        x = torch.empty(1, N, D)
    projecting, keys_and_values = 2 * k * N * D, 2 * 2 * k * D * D
    attention = 2 * N * D * D + 2 * 2 * N * k * D + 2 * N * D * D
    by_hand = projecting + keys_and_values + attention
    # The row sums of E, for the bias, come on top.
    assert by_hand <= count_flops(layer, x, mode="forward") <= by_hand + 2 * 2 * k * N


def test_the_fastest_product_counts(monkeypatch):
    monkeypatch.setattr("linvit.measure.flops.GEMM_SIZES", {"cpu": (32,)})
    durations = [5.0, 2.0, 4.0, 3.0, 6.0]
    assert len(durations) == GEMM_REPEATS
    times = iter([time for start, taken in enumerate(durations) for time in (start * 10.0, start * 10.0 + taken)])
    found = gemm_flops_per_second(torch.bfloat16, torch.device("cpu"), clock=lambda: next(times))
    assert found == 2 * 32**3 / 2.0
