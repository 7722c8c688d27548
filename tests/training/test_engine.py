import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from linvit.training.config import TrainConfig
from linvit.training.distributed import Ranks
from linvit.training.engine import NonFiniteLossError, TrainStep
from linvit.training.loss import create_loss, create_mixup
from linvit.training.optim import create_ema, create_optimizer, create_schedule
from linvit.training.signals import StopRequest

CLASSES = 3


def build_step(*, updates_per_epoch: int = 4, **settings: Any) -> TrainStep:
    config = TrainConfig.model_validate(
        {"data_dir": "data", "lr": 1e-2, "opt": "momentum", "momentum": 0.0, "weight_decay": 0.0, "smoothing": 0.0}
        | {"epochs": 2, "warmup_epochs": 0, "batch_size": 4}
        | settings
    )
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_classes=CLASSES,
    )
    optimizer = create_optimizer(model, config, lr=1e-2)
    scheduler, _ = create_schedule(optimizer, config, updates_per_epoch=updates_per_epoch)
    step = TrainStep(
        model,
        model,
        optimizer=optimizer,
        scheduler=scheduler,
        ema=create_ema(model, config),
        mixup=create_mixup(config, num_classes=CLASSES),
        loss_fn=create_loss(config),
        config=config,
        ranks=Ranks(torch.device("cpu")),
        stop=StopRequest(),
    )
    step.start_epoch(0)
    return step


def random_batch(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 16, 16), torch.randint(0, CLASSES, (size,))


def weights_of(step: TrainStep) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in step.plain_model.state_dict().items()}


def single_update(step: TrainStep) -> float:
    step.backward(*random_batch(), group_size=1, closes_group=True)
    return step.update().loss


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_a_group_of_batches_updates_as_one_large_batch(group_size: int) -> None:
    accumulated, at_once = build_step(), build_step()
    images, labels = random_batch(4 * group_size)
    for number, (some_images, some_labels) in enumerate(zip(images.split(4), labels.split(4))):
        closes = number == group_size - 1
        accumulated.backward(some_images, some_labels, group_size=group_size, closes_group=closes)
    at_once.backward(images, labels, group_size=1, closes_group=True)
    assert accumulated.update().loss == pytest.approx(at_once.update().loss, rel=1e-5)
    for name, weight in at_once.plain_model.state_dict().items():
        torch.testing.assert_close(accumulated.plain_model.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_anything_changes(poison: float) -> None:
    step = build_step(opt="adamw", model_ema=True)
    single_update(step)
    before, average = weights_of(step), copy.deepcopy(step.ema.module.state_dict())
    moments = copy.deepcopy(step.optimizer.state_dict())
    images, labels = random_batch()
    images[0, 0, 0, 0] = poison
    step.backward(images, labels, group_size=1, closes_group=True)
    with pytest.raises(NonFiniteLossError, match=r"the loss became nan at update 2; .* lower --lr"):
        step.update()
    assert all(torch.equal(before[name], weight) for name, weight in step.plain_model.state_dict().items())
    assert all(torch.equal(average[name], weight) for name, weight in step.ema.module.state_dict().items())
    for index, state in step.optimizer.state_dict()["state"].items():
        assert all(torch.equal(moments["state"][index][name], value) for name, value in state.items())
    assert step.num_updates == 1


def test_nan_in_any_batch_of_a_group_is_found() -> None:
    step = build_step()
    images, labels = random_batch()
    step.backward(images * math.nan, labels, group_size=2, closes_group=False)
    step.backward(images, labels, group_size=2, closes_group=True)
    with pytest.raises(NonFiniteLossError):
        step.update()


def test_a_step_that_the_scaler_skips_moves_nothing() -> None:
    step = build_step(amp=True, amp_dtype="float16", model_ema=True, sched_on_updates=True)
    single_update(step)
    assert (step.num_updates, step.num_skipped) == (1, 0)
    before, lr = weights_of(step), step.optimizer.param_groups[0]["lr"]
    scale = step.scaler.get_scale()
    step.backward(*random_batch(), group_size=1, closes_group=True)
    next(step.plain_model.parameters()).grad.fill_(math.inf)
    assert math.isfinite(step.update().loss)
    assert (step.num_updates, step.num_skipped) == (1, 1)
    assert step.scaler.get_scale() == scale / 2
    assert step.optimizer.param_groups[0]["lr"] == lr
    assert all(torch.equal(before[name], weight) for name, weight in step.plain_model.state_dict().items())
    single_update(step)
    assert step.num_updates == 2
    assert step.optimizer.param_groups[0]["lr"] < lr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_follows_full_precision(dtype: str) -> None:
    torch.manual_seed(1)
    batch = random_batch()
    losses = {}
    for amp in (False, True):
        step = build_step(amp=amp, amp_dtype=dtype)
        seen: list[torch.dtype] = []
        step.plain_model.blocks[0].mlp.fc1.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out.dtype)
        )
        step.backward(*batch, group_size=1, closes_group=True)
        losses[amp] = step.update().loss
        assert seen == [getattr(torch, dtype) if amp else torch.float32]
        assert all(parameter.dtype == torch.float32 for parameter in step.plain_model.parameters())
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


def test_clipping_by_norm_comes_after_unscaling() -> None:
    for amp in ({}, {"amp": True, "amp_dtype": "float16"}):
        step = build_step(clip_grad=1e-3, **amp)
        before = weights_of(step)
        single_update(step)
        moved = sum((value - before[name]).square().sum() for name, value in step.plain_model.state_dict().items())
        assert moved.sqrt().item() == pytest.approx(1e-3 * 1e-2, rel=1e-2)


def test_clipping_by_value_bounds_every_step() -> None:
    step = build_step(clip_grad=1e-2, clip_mode="value")
    before = weights_of(step)
    single_update(step)
    moved = max((value - before[name]).abs().max() for name, value in step.plain_model.state_dict().items())
    assert moved.item() == pytest.approx(1e-2 * 1e-2, rel=1e-2)


def test_adaptive_clipping_spares_the_classifier() -> None:
    images, labels = random_batch()
    moves = {}
    for clip in (None, 1e-3):
        step = build_step(**({} if clip is None else {"clip_grad": clip, "clip_mode": "agc"}))
        before = weights_of(step)
        step.backward(images, labels, group_size=1, closes_group=True)
        step.update()
        moves[clip] = {name: value - before[name] for name, value in step.plain_model.state_dict().items()}
    assert torch.equal(moves[None]["head.weight"], moves[1e-3]["head.weight"])
    name = "blocks.0.mlp.fc1.weight"
    assert moves[1e-3][name].norm() < 0.9 * moves[None][name].norm()


def test_the_average_follows_its_warm_up() -> None:
    step = build_step(model_ema=True, model_ema_warmup=True, model_ema_decay=0.9)
    expected = weights_of(step)["head.weight"]
    for update in range(1, 5):
        single_update(step)
        # timm: decay 0 at the first update, then 1 - (1 + t) ** (-2/3) up to the limit.
        decay = min(0.9, 1 - (1 + update - 1) ** (-2 / 3)) if update > 1 else 0.0
        expected = decay * expected + (1 - decay) * step.plain_model.state_dict()["head.weight"]
        torch.testing.assert_close(step.ema.module.state_dict()["head.weight"], expected)


def test_mixing_stops_at_its_epoch() -> None:
    step = build_step(mixup=1.0, mixup_off_epoch=2)
    step.start_epoch(1)
    assert step.mixup.mixup_enabled
    step.start_epoch(2)
    assert not step.mixup.mixup_enabled


def test_a_wish_to_stop_comes_with_the_update() -> None:
    step = build_step()
    step.backward(*random_batch(), group_size=1, closes_group=True)
    assert not step.update().stop
    step.stop.signal_number = 15
    step.backward(*random_batch(), group_size=1, closes_group=True)
    assert step.update().stop


def test_gradients_do_not_leak_into_the_next_update() -> None:
    step = build_step()
    single_update(step)
    assert all(parameter.grad is None for parameter in step.plain_model.parameters())
