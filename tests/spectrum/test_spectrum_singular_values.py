"""Attention matrices in blocks of rows, and their singular values: known ones, and random projection against all."""

import numpy as np
import pytest
import torch

from linvit.measure import attention
from linvit.measure.attention import AttentionMatrix
from linvit.spectrum.singular_values import exact_singular_values, randomized_singular_values


def make_matrix(tokens=90, keys=70, width=8, sharpness=2.0, **others):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(count, width, generator=generator, dtype=torch.float64) for count in (tokens, keys))
    return AttentionMatrix(q, k, scale=sharpness, **others)


def dense(matrix):
    return torch.cat([block for _, block in matrix.row_blocks()])


def test_identity_attention_has_singular_values_of_one():
    found = exact_singular_values(AttentionMatrix(torch.eye(20), torch.eye(20), scale=1e3))
    np.testing.assert_allclose(found.values, np.ones(20), rtol=1e-6)
    assert found.energy == pytest.approx(20)


def test_even_attention_has_rank_one():
    found = exact_singular_values(AttentionMatrix(torch.zeros(20, 4), torch.randn(20, 4), scale=1.0))
    np.testing.assert_allclose(found.values, [1.0] + [0.0] * 19, atol=1e-7)
    assert found.energy == pytest.approx(1)


def test_all_values_are_those_of_the_decomposition():
    matrix = make_matrix()
    expected = torch.linalg.svdvals(dense(matrix))
    found = exact_singular_values(matrix)
    # Half the digits of double precision, relative to the largest value.
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-7 * expected[0].item())
    assert found.energy == pytest.approx(expected.square().sum().item(), rel=1e-12)


def test_rows_are_softmax_of_scores_bias_and_mixing():
    mixing = torch.randn(70, 5, dtype=torch.float64)
    for bias in (torch.randn(1, 70, dtype=torch.float64), torch.randn(90, 70, dtype=torch.float64)):
        matrix = make_matrix(bias=bias, mixing=mixing)
        plain = make_matrix()
        scores = plain._queries @ plain._keys.mT + bias
        torch.testing.assert_close(dense(matrix), scores.softmax(-1) @ mixing)
        assert matrix.shape == (90, 5)


def test_blocks_of_rows_make_up_the_full_matrix(monkeypatch):
    bias = torch.randn(90, 70, dtype=torch.float64)
    full = dense(make_matrix(bias=bias))
    monkeypatch.setattr(attention, "BLOCK_ENTRIES", 1000)
    matrix = make_matrix(bias=bias)
    assert [rows for rows, _ in matrix.row_blocks()][:2] == [slice(0, 14), slice(14, 28)]
    torch.testing.assert_close(dense(matrix), full)
    torch.testing.assert_close(matrix.gram(), full.mT @ full)
    x, y = torch.randn(70, 3, dtype=torch.float64), torch.randn(90, 3, dtype=torch.float64)
    torch.testing.assert_close(matrix @ x, full @ x)
    torch.testing.assert_close(matrix.transposed_matmul(y), full.mT @ y)
    assert matrix.energy() == pytest.approx(full.square().sum().item())


def test_single_and_half_precision_compute_in_single():
    for dtype in (torch.float32, torch.bfloat16):
        matrix = AttentionMatrix(torch.randn(9, 4, dtype=dtype), torch.randn(9, 4, dtype=dtype), scale=1.0)
        assert dense(matrix).dtype == torch.float32


def test_random_projection_gives_lower_bounds_and_the_missing_energy():
    matrix = make_matrix(tokens=300, keys=300, sharpness=1.0)
    expected = torch.linalg.svdvals(dense(matrix))
    found = randomized_singular_values(matrix, rank=20, seed=0)
    assert found.values.shape == (20,)
    assert (found.values <= expected[:20] * (1 + 1e-12)).all()
    torch.testing.assert_close(found.values, expected[:20], rtol=1e-2, atol=0)
    torch.testing.assert_close(found.values[:10], expected[:10], rtol=1e-4, atol=0)
    assert found.energy == pytest.approx(expected.square().sum().item(), rel=1e-12)


def test_random_projection_of_low_rank_is_exact_and_repeats_by_seed():
    matrix = AttentionMatrix(
        torch.randn(60, 3, dtype=torch.float64), torch.randn(60, 3, dtype=torch.float64), scale=0.05
    )
    expected = torch.linalg.svdvals(dense(matrix))
    one, same, other = (randomized_singular_values(matrix, rank=8, seed=seed) for seed in (3, 3, 4))
    torch.testing.assert_close(one.values, expected[:8], rtol=1e-9, atol=1e-12)
    assert torch.equal(one.values, same.values)
    assert not torch.equal(one.values, other.values)


def test_a_rank_above_the_columns_gives_them_all():
    matrix = make_matrix(keys=12)
    found = randomized_singular_values(matrix, rank=40, seed=0)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(dense(matrix)))
