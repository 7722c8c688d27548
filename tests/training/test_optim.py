from typing import Any

import pytest
import timm
import torch

from linvit.training.config import TrainConfig
from linvit.training.freeze import freeze
from linvit.training.optim import (
    create_ema,
    create_optimizer,
    create_schedule,
    current_lr,
    learning_rate,
    load_optimizer,
    trained_names,
)
from linvit.training.options import EmaOptions, OptimizerOptions, ScheduleOptions


def tiny_vit() -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=3, num_heads=2, num_classes=4)


@pytest.mark.parametrize(
    ("settings", "world_size", "expected"),
    [
        ({"lr": 0.3}, 8, 0.3),
        ({"lr_base": 0.1, "opt": "sgd", "batch_size": 128}, 4, 0.2),
        ({"lr_base": 0.1, "opt": "sgd", "batch_size": 128, "grad_accum_steps": 2}, 4, 0.4),
        ({"lr_base": 0.1, "opt": "adamw", "batch_size": 256}, 4, 0.2),
        ({"lr_base": 0.1, "opt": "lamb", "batch_size": 256}, 4, 0.2),
        ({"lr_base": 0.1, "opt": "adamw", "batch_size": 256, "lr_base_scale": "linear"}, 4, 0.4),
    ],
)
def test_the_learning_rate_grows_with_the_global_batch(settings: dict, world_size: int, expected: float) -> None:
    assert learning_rate(TrainConfig(data_dir="data", **settings), world_size=world_size) == pytest.approx(expected)


def test_an_unknown_optimizer_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown optimizer 'adamq'; did you mean 'adam"):
        create_optimizer(tiny_vit(), OptimizerOptions(opt="adamq"), lr=1e-3)


def test_an_argument_that_the_optimizer_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--opt adamw does not take these options: .*sharpness"):
        create_optimizer(tiny_vit(), OptimizerOptions(opt="adamw", opt_kwargs={"sharpness": 1}), lr=1e-3)


def test_second_derivatives_are_refused() -> None:
    with pytest.raises(ValueError, match="--opt adahessian needs second derivatives"):
        create_optimizer(tiny_vit(), OptimizerOptions(opt="adahessian"), lr=1e-3)


def test_biases_and_frozen_weights_are_left_alone() -> None:
    model = tiny_vit()
    freeze(model, ["blocks.0", "patch_embed"])
    optimizer = create_optimizer(model, OptimizerOptions(weight_decay=0.1, layer_decay=0.5), lr=1e-3)
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (
                0.1 if parameter.ndim > 1 and parameter is not model.pos_embed else 0.0
            ) or (parameter is model.cls_token and group["weight_decay"] == 0.0)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert max(scales) == 1
    assert len(scales) > 2


def test_the_schedule_goes_by_updates_or_epochs() -> None:
    for on_updates, expected in ((False, 1e-3), (True, 1e-3 / 2)):
        optimizer = create_optimizer(tiny_vit(), OptimizerOptions(), lr=1e-3)
        options = ScheduleOptions(epochs=2, warmup_epochs=0, sched_on_updates=on_updates)
        scheduler, num_epochs = create_schedule(optimizer, options, updates_per_epoch=10)
        scheduler.step_update(10)
        assert num_epochs == 2
        assert current_lr(optimizer) == pytest.approx(expected)
        scheduler.step(1)
        assert current_lr(optimizer) == pytest.approx(1e-3 / 2)


def test_cooldown_and_warm_up_prefix_lengthen_the_run() -> None:
    optimizer = create_optimizer(tiny_vit(), OptimizerOptions(), lr=1e-3)
    options = ScheduleOptions(epochs=10, warmup_epochs=2, warmup_prefix=True, cooldown_epochs=3)
    assert create_schedule(optimizer, options, updates_per_epoch=10).num_epochs == 15


def test_without_a_schedule_the_rate_stays() -> None:
    optimizer = create_optimizer(tiny_vit(), OptimizerOptions(), lr=1e-3)
    assert create_schedule(optimizer, ScheduleOptions(sched="none", epochs=4), updates_per_epoch=3) == (None, 4)


def test_the_average_begins_at_the_weights() -> None:
    model = tiny_vit()
    assert create_ema(model, EmaOptions()) is None
    ema = create_ema(model, EmaOptions(model_ema=True))
    assert all(torch.equal(a, b) for a, b in zip(ema.module.parameters(), model.parameters()))
    assert not ema.module.training


def trained(model: Any, **options: Any) -> torch.optim.Optimizer:
    """An optimizer that has made two steps."""
    optimizer = create_optimizer(model, OptimizerOptions(**options), lr=options.pop("lr", 1e-2))
    for _ in range(2):
        model(torch.ones(1, 3, 32, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def reloaded(optimizer: torch.optim.Optimizer, model: Any, **options: Any) -> torch.optim.Optimizer:
    names = trained_names(optimizer, model)
    saved = optimizer.state_dict()
    other = create_optimizer(model, OptimizerOptions(**options), lr=1e-3)
    load_optimizer(other, saved, names=trained_names(other, model), names_before=names)
    return other


@pytest.mark.parametrize("options", [{"weight_decay": 0.0}, {"layer_decay": 0.5}, {"weight_decay": 0.3}])
def test_an_optimizer_goes_on_in_other_groups_by_the_names_of_its_parameters(options: dict[str, Any]) -> None:
    model = tiny_vit()
    before = trained(model)
    after = reloaded(before, model, **options)
    assert trained_names(after, model) != trained_names(before, model) or options == {"weight_decay": 0.3}
    for parameter in model.parameters():
        assert torch.equal(before.state[parameter]["exp_avg"], after.state[parameter]["exp_avg"])
    expected = create_optimizer(model, OptimizerOptions(**options), lr=1e-3)
    for own, fresh in zip(after.param_groups, expected.param_groups):
        assert {key: own.get(key) for key in ("lr", "weight_decay", "lr_scale")} == {
            key: fresh.get(key) for key in ("lr", "weight_decay", "lr_scale")
        }


@pytest.mark.parametrize("opt", ["lamb", "adan", "lookahead_adamw"])
def test_steps_that_an_optimizer_counts_in_its_groups_are_kept(opt: str) -> None:
    model = tiny_vit()
    key = "lookahead_step" if opt.startswith("lookahead") else "step"
    optimizer = reloaded(trained(model, opt=opt), model, opt=opt)
    assert {int(group[key]) for group in optimizer.param_groups} == {2}


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model = tiny_vit()
    optimizer = trained(model)
    freeze(model, ["blocks.0", "patch_embed"])
    with pytest.raises(ValueError, match=r"blocks\.0\..*, patch_embed\.proj\.bias.* are trained in one of them alone"):
        reloaded(optimizer, model)
