"""Optimizer, parameter groups, learning rate schedule, weight average, and loading the state of an optimizer."""

from typing import Any

import pytest
import timm
import torch
from timm.models import group_modules, group_parameters

from linvit.training.config import TrainConfig
from linvit.training.model import freeze
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


def test_an_unknown_optimizer_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"'adamq' is not an optimizer of timm; did you mean 'adam"):
        OptimizerOptions(opt="adamq")


def test_an_unknown_argument_of_the_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--opt adamw does not accept these options: .*sharpness"):
        create_optimizer(tiny_vit(), OptimizerOptions(opt="adamw", opt_kwargs={"sharpness": 1}), lr=1e-3)


def test_second_derivatives_are_refused() -> None:
    with pytest.raises(ValueError, match="adahessian needs second derivatives"):
        OptimizerOptions(opt="adahessian")


def test_biases_are_not_decayed_and_frozen_weights_are_not_optimized() -> None:
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


def test_the_schedule_advances_by_updates_or_epochs() -> None:
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


def test_the_average_starts_from_the_weights() -> None:
    model = tiny_vit()
    assert create_ema(model, EmaOptions()) is None
    ema = create_ema(model, EmaOptions(model_ema=True))
    assert all(torch.equal(a, b) for a, b in zip(ema.module.parameters(), model.parameters()))
    assert not ema.module.training


def trained(model: Any, **options: Any) -> torch.optim.Optimizer:
    """An optimizer after two steps."""
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
def test_the_state_of_an_optimizer_moves_to_other_groups_by_parameter_name(options: dict[str, Any]) -> None:
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
def test_step_counts_in_parameter_groups_are_kept(opt: str) -> None:
    model = tiny_vit()
    key = "lookahead_step" if opt.startswith("lookahead") else "step"
    optimizer = reloaded(trained(model, opt=opt), model, opt=opt)
    assert {int(group[key]) for group in optimizer.param_groups} == {2}


def test_the_state_of_other_parameters_is_refused() -> None:
    model = tiny_vit()
    optimizer = trained(model)
    freeze(model, ["blocks.0", "patch_embed"])
    with pytest.raises(ValueError, match=r"blocks\.0\..*, patch_embed\.proj\.bias.* are trained in only one of them"):
        reloaded(optimizer, model)


def linformer(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 4, "k": 4}
    return timm.create_model("linvit_mini_patch4_64", **{**sizes, **kwargs})


def is_in_projection(name: str) -> bool:
    return "_projection." in name


@pytest.mark.parametrize("share", ["none", "headwise", "kv", "layerwise"])
@pytest.mark.parametrize("projection", ["linear", "separable", "conv"])
def test_projections_train_at_the_rate_of_the_head(share: str, projection: str) -> None:
    model = linformer(share=share, projection=projection)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = create_optimizer(model, OptimizerOptions(layer_decay=0.7), lr=1e-3)
    scales = {names[id(each)]: group["lr_scale"] for group in optimizer.param_groups for each in group["params"]}
    assert scales.keys() == set(names.values())
    assert any(map(is_in_projection, scales))
    for name, scale in scales.items():
        if is_in_projection(name) or name.startswith("head."):
            depth = 5
        elif name.startswith("blocks."):
            depth = 1 + int(name.split(".")[1])
        else:
            depth = 4 if name.startswith("norm.") else 0
        assert scale == pytest.approx(0.7 ** (5 - depth)), name


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_equal_timms_except_for_the_projections(coarse: bool) -> None:
    ours = linformer(share="none", depth=12, k=[[4, 6, 4, 4]] * 12, projection="linear")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=32, num_heads=4, depth=12)
    for group in (group_parameters, group_modules):
        own, timms = (group(model, model.group_matcher(coarse), reverse=True) for model in (ours, theirs))
        last = max(timms.values())
        assert {name: depth for name, depth in own.items() if "_projection" not in name} == timms
        assert {depth for name, depth in own.items() if "_projection" in name} == {last}


MUONS = {"muon": "adamw", "nmuon": "nadamw", "adamuon": "adamw", "nadamuon": "nadamw"}


def three_steps(model: Any, **options: Any) -> torch.optim.Optimizer:
    """Three steps with a learning rate of 2e-2 and gradients that do not depend on the weights."""
    optimizer = create_optimizer(model, OptimizerOptions(**options), lr=2e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("opt", "fallback"), MUONS.items())
@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("projection", ["separable", "conv"])
def test_muon_leaves_parameters_without_weight_decay_to_its_fallback(
    opt: str, fallback: str, layer_decay: float | None, projection: str
) -> None:
    settings = {"weight_decay": 0.05, "layer_decay": layer_decay}
    model = linformer(share="none", projection=projection, class_token=False, global_pool="map")
    optimizer = three_steps(model, opt=opt, **settings)
    other = linformer(share="none", projection=projection, class_token=False, global_pool="map")
    three_steps(other, opt=fallback, opt_betas=(0.9, 0.95), opt_eps=1e-7, **settings)
    counterparts = dict(other.named_parameters())
    matrices = set()
    for name, parameter in model.named_parameters():
        is_left = name in model.no_weight_decay() or parameter.ndim < 2 or len(parameter) == 1
        assert optimizer.state[parameter]["use_muon"] == (not is_left), name
        if is_left:
            torch.testing.assert_close(parameter, counterparts[name], rtol=0, atol=1e-6)
        else:
            matrices.add(name.split(".")[-2])
    assert matrices == {"proj", "qkv", "fc1", "fc2", "q", "kv", "head"}


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_muon_keeps_its_fallback_when_resumed(layer_decay: float | None) -> None:
    model = linformer(share="none")
    # Without a gradient so far, Muon chooses how to update the parameter in the first step after resuming.
    late = model.blocks[0].attn.key_projection.weight_h
    late.requires_grad_(False)
    optimizer = create_optimizer(model, OptimizerOptions(opt="nmuon", layer_decay=layer_decay), lr=1e-3)
    optimizer.add_param_group({"params": [late]})
    for parameter in model.parameters():
        parameter.grad = None if parameter is late else torch.ones_like(parameter)
    optimizer.step()
    late.requires_grad_(True)
    after = reloaded(optimizer, model, opt="nmuon", layer_decay=layer_decay)
    late.grad = torch.ones_like(late)
    after.step()
    for name, parameter in model.named_parameters():
        if is_in_projection(name):
            assert after.state[parameter]["use_muon"] is False


def test_parameters_that_move_from_muon_to_its_fallback_are_refused() -> None:
    model = linformer(share="none")
    optimizer = three_steps(model, opt="nmuon", opt_kwargs={"fallback_no_weight_decay": False})
    with pytest.raises(ValueError, match=r"^Muon updated blocks\.0-3\.attn\.key_projection\.weight_h, .* fallback"):
        reloaded(optimizer, model, opt="nmuon")


def test_a_muon_run_without_the_fallback_option_resumes_if_its_choices_were_the_same() -> None:
    model = linformer(share="kv")
    before = three_steps(model, opt="nmuon", opt_kwargs={"fallback_no_weight_decay": False})
    after = reloaded(before, model, opt="nmuon")
    for parameter in model.parameters():
        assert after.state[parameter]["use_muon"] == before.state[parameter]["use_muon"]
