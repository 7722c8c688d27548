from typing import Any

import pytest

from linvit.training.config import TrainConfig
from linvit.training.state import changed_settings, check_settings

SETTINGS: dict[str, Any] = TrainConfig(data_dir="images", model="linvit_tiny_patch16_224", k=32).model_dump(mode="json")


def check(within_epoch: bool = False, with_optimizer: bool = True, **changes: Any) -> None:
    assert changes.keys() <= SETTINGS.keys()
    check_settings(SETTINGS, SETTINGS | changes, within_epoch=within_epoch, with_optimizer=with_optimizer)


def test_changed_settings_are_told() -> None:
    now = SETTINGS | {"epochs": 5, "resume": "auto", "experiment": "b", "stop_epoch": 3}
    assert changed_settings(SETTINGS, now) == ["epochs: 300 → 5"]


@pytest.mark.parametrize(
    "change", [{"lr": 0.1}, {"epochs": 5}, {"workers": 2}, {"weight_decay": 0.1}, {"drop_path": 0.1}, {"amp": True}]
)
def test_what_makes_sense_is_allowed_anywhere(change: dict[str, Any]) -> None:
    check(within_epoch=True, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "linvit_small_patch16_224"},
        {"k": 64},
        {"projection": "dct"},
        {"share": "layerwise"},
        {"gp": "avg"},
        {"model_kwargs": {"depth": 3}},
        {"eval_metric": "loss"},
    ],
)
def test_another_model_or_measure_is_refused(change: dict[str, Any]) -> None:
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"^--resume: {name} was .* and is .* now: a run keeps its model"):
        check(with_optimizer=False, **change)


def test_another_optimizer_is_refused_unless_it_is_a_fresh_one() -> None:
    for change in ({"opt": "lion"}, {"opt_kwargs": {"foreach": False}}, {"freeze": ["backbone"]}):
        with pytest.raises(ValueError, match="by --no-resume-opt"):
            check(**change)
        check(with_optimizer=False, **change)


def test_within_an_epoch_the_order_of_images_stays() -> None:
    for change in ({"seed": 3}, {"sampler": "balanced"}, {"aug_repeats": 3.0}):
        with pytest.raises(ValueError, match="the order of the images in the middle of an epoch"):
            check(within_epoch=True, **change)
        check(**change)


def test_a_setting_that_the_run_did_not_know_is_no_change() -> None:
    before = {name: value for name, value in SETTINGS.items() if name != "share"}
    check_settings(before, SETTINGS | {"share": "kv"}, within_epoch=True, with_optimizer=True)
