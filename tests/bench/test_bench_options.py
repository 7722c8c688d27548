"""The groups that options and presets select."""

import pytest

from linvit.bench.options import BenchOptions, select


def test_the_selection_is_a_product_and_the_baseline_comes_first():
    options = BenchOptions(models=("b", "a"), baseline="a", img_size=(32, (32, 64)), batch_size=(1, 2), memory=True)
    groups = select(options)
    assert [(group.img_size, group.batch_size, group.mode) for group in groups] == [
        (size, batch_size, mode)
        for size in ((32, 32), (32, 64))
        for batch_size in (1, 2)
        for mode in ("forward", "train")
    ]
    assert {(group.models, group.memory, group.rounds) for group in groups} == {(("a", "b"), ("a", "b"), 5)}


@pytest.mark.parametrize("preset", ["readme", "gpu"])
def test_presets_measure_memory_of_models_that_they_time(preset):
    groups = select(BenchOptions(preset=preset))
    assert len(set(groups)) == len(groups)
    for group in groups:
        assert set(group.memory) <= set(group.models)
        assert len(set(group.models)) == len(group.models)


# Seconds of a step of timm's ViT-S on two cores, by mode and image size, and at least how many times faster k = 256, 64
# and 32 are.
TIMM_SECONDS = {
    ("forward", 224): 0.08,
    ("forward", 512): 0.45,
    ("forward", 1024): 5,
    ("forward", 2048): 45,
    ("train", 224): 0.25,
    ("train", 512): 1.5,
    ("train", 1024): 16,
    ("train", 2048): 160,
}
GAINS = {
    ("forward", 224): (1, 1, 1),
    ("forward", 512): (1.3, 1.55, 1.7),
    ("forward", 1024): (2.6, 2.8, 3.0),
    ("forward", 2048): (7.5, 8.5, 9.3),
    ("train", 224): (1, 1, 1),
    ("train", 512): (1.4, 1.65, 1.85),
    ("train", 1024): (3.0, 3.4, 3.9),
    ("train", 2048): (7.5, 8.5, 10),
}
RECOMPUTING = {"mlp": 1.15, "full": 1.3}


def seconds_of_a_step(model, mode, size):
    if size == 4096:
        return 16 * seconds_of_a_step(model, mode, 1024)
    if model == "vit_small_patch16_224":
        return TIMM_SECONDS[mode, size]
    long, middle, short = GAINS[mode, size]
    gain = middle if "k=64" in model else short if "k=32" in model else long
    return TIMM_SECONDS[mode, size] / gain * RECOMPUTING.get(model.partition("grad_checkpointing=")[2], 1)


def test_the_readme_preset_takes_under_fifteen_minutes():
    building_and_checking, start_of_a_process = 50, 5
    total = building_and_checking
    for group in select(BenchOptions(preset="readme")):
        seconds = {model: seconds_of_a_step(model, group.mode, group.img_size[0]) for model in group.models}
        total += (group.rounds + group.warmup) * sum(seconds.values())
        total += sum(start_of_a_process + 2 * seconds[model] for model in group.memory)
    assert total < 15 * 60
