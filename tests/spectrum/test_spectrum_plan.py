"""Plans stay within their budget, improve with more of it and fit the model; they and the knapsack are optimal."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from spectra import images, linformer_vit, make_spectrum, timm_vit

import linvit
from linvit.measure.timing import count_flops
from linvit.model.eva import rotary_of_layers
from linvit.model.projections.grid import factor_pair
from linvit.spectrum.plan import (
    UNITS,
    Item,
    attention_flops,
    choose,
    layer_choices,
    lengths_to_try,
    make_plan,
    uniform_plans,
)
from linvit.spectrum.result import read_spectra

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
SETTINGS = {"projection": "separable", "share": "kv", "min_k": 16}
# High ranks early, low ones late, as in trained models.
RANKS = [[3.0, 2.0, 4.0], [60.0, 90.0, 150.0], [40.0, 200.0, 30.0], [9.0, 12.0, 20.0], [3.0, 5.0, 4.0]]


def plan(spectrum=None, *, min_k=16, share="kv", projection="separable", **budget):
    return make_plan(spectrum or make_spectrum(RANKS), budget, projection=projection, share=share, min_k=min_k)


@pytest.mark.parametrize("grid_size", [(16, 16), (37, 37), (12, 30), (7, 5)])
def test_lengths_are_cells_near_square_below_the_number_of_patches(grid_size):
    lengths = lengths_to_try(grid_size, min_k=4)
    height, width = grid_size
    assert lengths == sorted(set(lengths))
    assert 4 <= lengths[0] < 12
    assert 0.65 * height * width < lengths[-1] < height * width
    for k in lengths:
        k_h, k_w = factor_pair(k, grid_size)
        assert 2 / 3 <= (height / k_h) / (width / k_w) <= 1.5
    assert max(b / a for a, b in itertools.pairwise(lengths)) < 1.6


@pytest.mark.parametrize("share", ["none", "headwise", "kv", "layerwise"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_costs_are_those_of_the_model(share, prefix):
    spectrum = make_spectrum(RANKS, grid_size=(8, 6), num_prefix_tokens=prefix)
    model = timm.create_model(
        "linvit_mini_patch4_64",
        img_size=(32, 24),
        patch_size=4,
        embed_dim=96,
        num_heads=3,
        depth=1,
        k=12,
        share=share,
        class_token=prefix > 0,
        reg_tokens=max(prefix - 1, 0),
        global_pool="avg",
    ).to("meta")
    tokens = torch.empty(1, 48 + prefix, 96, device="meta")
    expected = count_flops(model.blocks[0].attn, tokens, mode="forward")
    assert attention_flops(spectrum, 12, projection="separable", share=share) == expected


@pytest.mark.parametrize("k", [12, None])
def test_costs_are_those_of_a_rotary_model(k):
    spectrum = replace(make_spectrum(RANKS, grid_size=(8, 6), num_prefix_tokens=1), rotary=True)
    model = timm.create_model(
        "linvit_mini_patch4_rope_64", img_size=(32, 24), embed_dim=96, num_heads=3, depth=1, k=[k], class_token=True
    ).to("meta")
    tokens = torch.empty(1, 49, 96, device="meta")
    rope = rotary_of_layers(model)[0]
    expected = count_flops(model.blocks[0].attn, tokens, mode="forward", rope=rope)
    assert attention_flops(spectrum, k, projection="separable", share="kv") == expected
    # Wk of all patches, instead of 12 rows; two operations per multiply-add.
    unrotated = attention_flops(replace(spectrum, rotary=False), k, projection="separable", share="kv")
    assert k is None or expected > unrotated + 2 * 96**2 * (48 - 12)


@pytest.mark.parametrize("speedup", [1.0, 1.05, 1.2, 1.4, 1.6])
def test_a_plan_is_within_its_budget(speedup):
    found = plan(speedup=speedup)
    assert found.speedup >= speedup
    assert found.flops == 10**8 + sum(layer.flops for layer in found.layers)
    ordinary = attention_flops(make_spectrum(RANKS), None, projection="separable", share="kv")
    assert found.ordinary_flops == 10**8 + 5 * ordinary
    assert plan(flops=1 / speedup) == found
    assert all(k is None or 16 <= k < 256 for k in found.k)
    if speedup == 1.0:
        assert found.energy > 1 - 1e-6


def test_more_budget_never_keeps_less():
    budgets = np.linspace(1.0, 1.75, 25)
    for share in ("kv", "layerwise"):
        energies = [plan(speedup=float(speedup), share=share).energy for speedup in budgets]
        assert all(more >= less for more, less in itertools.pairwise(energies))
    shares = np.linspace(0.3, 1.0, 30)
    flops = [plan(energy=float(energy)).flops for energy in shares]
    assert all(less <= more for less, more in itertools.pairwise(flops))


def test_a_plan_is_better_than_one_length_for_all():
    spectrum = make_spectrum(RANKS)
    for uniform in uniform_plans(spectrum, **SETTINGS)[1:-1]:
        assert plan(spectrum, flops=uniform.flops / uniform.ordinary_flops).energy > uniform.energy


def test_no_other_choice_is_better():
    spectrum = make_spectrum(RANKS[1:4], grid_size=(9, 9), flops_besides_attention=10**6)
    layers = layer_choices(spectrum, **SETTINGS)
    everything = [
        (10**6 + sum(choice.flops for choice in choices), sum(choice.energy for choice in choices) / 3)
        for choices in itertools.product(*layers)
    ]
    rounding = 3 * layers[0][-1].flops / UNITS
    for speedup in np.linspace(1.0, 1.5, 20):
        found = plan(spectrum, speedup=float(speedup))
        budget = found.ordinary_flops / speedup
        assert found.energy >= max(energy for flops, energy in everything if flops <= budget - rounding) - 1e-12
        assert found.energy <= max(energy for flops, energy in everything if flops <= budget) + 1e-12


def test_ranks_decide_where_the_keys_go():
    lengths = [256 if k is None else k for k in plan(speedup=1.4).k]
    assert max(lengths[0], lengths[4]) <= 24
    assert min(lengths[1], lengths[2]) > 2 * lengths[3] > 2 * lengths[0]


def test_energy_is_kept_in_every_layer_by_the_least_length():
    spectrum = make_spectrum(RANKS)
    found = plan(spectrum, energy=0.95)
    lengths = lengths_to_try(spectrum.grid_size, min_k=16)
    for layer, choice in enumerate(found.layers):
        kept = {k: spectrum.cumulative_energy[layer, :, k - 1].mean() for k in lengths}
        assert choice.energy >= 0.95
        if choice.k is not None:
            assert choice.energy == pytest.approx(kept[choice.k])
            assert all(kept[k] < 0.95 for k in lengths if k < choice.k)
    assert plan(spectrum, energy=1.0).k == [None] * 5


def test_one_projection_for_all_layers_has_one_length():
    for budget in ({"speedup": 1.3}, {"energy": 0.9}):
        found = plan(share="layerwise", **budget)
        assert len({k for k in found.k if k is not None}) == 1
    assert plan(share="layerwise", speedup=1.3).speedup >= 1.3


def test_lengths_that_cost_as_much_as_ordinary_attention_are_left_out():
    spectrum = make_spectrum(RANKS, grid_size=(12, 12), embed_dim=24)
    for choices in layer_choices(spectrum, projection="linear", share="headwise", min_k=4):
        flops = [choice.flops for choice in choices]
        assert flops == sorted(flops)
        assert choices[-1].k is None
        assert len(choices) < len(lengths_to_try(spectrum.grid_size, min_k=4))


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({}, r"needs exactly one budget \(speedup, flops or energy\), but 0 are given"),
        ({"speedup": 2, "energy": 0.9}, "2 are given"),
        ({"speedup": 0.5}, "speedup=0.5 is not a valid budget"),
        ({"flops": 0}, "flops=0 is not a valid budget"),
        ({"flops": 1.5}, "flops=1.5 is not a valid budget"),
        ({"energy": 95}, "energy=95 is not a share"),
        (
            {"speedup": 20},
            r"speedup=20 cannot be reached: k=16 in every layer gives a speedup of 2\.\d\d; set a larger budget",
        ),
        (
            {"speedup": 1.2, "projection": "avgpool", "share": "headwise"},
            "with share='headwise' all maps would be the same",
        ),
        ({"speedup": 1.2, "projection": "seperable"}, "did you mean 'separable'"),
    ],
)
def test_wrong_budgets_are_refused(budget, words):
    with pytest.raises(ValueError, match=words):
        linvit.plan_k(make_spectrum(RANKS), **budget)


@pytest.mark.parametrize("share", ["none", "headwise", "kv", "layerwise"])
def test_a_plan_fits_the_model(share):
    image = images(1, (40, 48)).float()
    spectrum = linvit.attention_spectrum(timm_vit(img_size=(40, 48)).float(), image)
    k = linvit.plan_k(spectrum, speedup=1.02, share=share, min_k=30)
    assert any(length is not None for length in k)
    model = linformer_vit(img_size=(40, 48), k=k, share=share).float()
    found = [projections and projections[0].k for projections in (block.attn.projections() for block in model.blocks)]
    assert found == k
    assert model(image).isfinite().all()
    # The model costs what was planned.
    planned = make_plan(spectrum, {"speedup": 1.02}, projection="separable", share=share, min_k=30)
    bare = model.to("meta").requires_grad_(False)
    assert count_flops(bare, image.to("meta"), mode="forward") == planned.flops


def test_early_layers_of_a_real_model_get_the_keys():
    """DINOv2 ViT-S/14 at 518 px: early layers have ranks of hundreds, late ones of tens."""
    (*_, spectrum) = read_spectra(RESULTS / "spectrum_dinov2.json")
    assert spectrum.num_tokens == 1370
    ranks = spectrum.rank(0.99).mean(1)
    assert min(ranks[1:5]) > 250
    assert max(ranks[7:]) < 80
    k = [length or spectrum.num_patches for length in linvit.plan_k(spectrum, speedup=1.8)]
    assert min(k[1:5]) > 4 * max(k[7:])


@pytest.mark.parametrize("budget", [10, 14, 20, 33, 1000])
def test_no_combination_within_the_budget_is_better(budget):
    rng = np.random.default_rng(budget)
    groups = [[Item(int(cost), float(rng.random())) for cost in rng.integers(2, 15, 4)] for _ in range(4)]
    found = choose(groups, budget, unit=1)
    affordable = [
        numbers
        for numbers in itertools.product(range(4), repeat=4)
        if sum(items[number].cost for items, number in zip(groups, numbers)) <= budget
    ]
    if not affordable:
        assert found is None
        return
    assert tuple(found) in affordable

    def value(numbers):
        return sum(items[number].value for items, number in zip(groups, numbers))

    assert value(found) == pytest.approx(max(map(value, affordable)))


def test_costs_are_rounded_up_to_units():
    groups = [[Item(1.0, 0.0), Item(2.1, 1.0)]]
    assert choose(groups, 3.0, unit=1.0) == [1]
    assert choose(groups, 2.9, unit=1.0) == [0]
    assert choose(groups, 2.9, unit=0.1) == [1]


def test_a_budget_below_the_cheapest_items_is_none():
    assert choose([[Item(2, 0.0)], [Item(3, 0.0)]], 4.9, unit=0.1) is None
