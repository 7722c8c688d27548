import copy
import math
from typing import Any

import pytest
import torch
from tiny_runs import assert_same
from tiny_steps import build_step, random_batch, weights_of

from linvit.training.step import TrainStep


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


def everything_of(step: TrainStep) -> dict[str, Any]:
    """Copies of everything that an update changes."""
    return copy.deepcopy(
        {
            "weights": step.plain_model.state_dict(),
            "average": step.ema.module.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "scaler": step.scaler.state_dict(),
            "num_updates": step.num_updates,
            "num_skipped": step.num_skipped,
        }
    )


@pytest.mark.parametrize("amp", [{}, {"amp": True, "amp_dtype": "float16"}], ids=["float32", "float16"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(poison: float, amp: dict[str, Any]) -> None:
    step = build_step(opt="adamw", model_ema=True, sched_on_updates=True, **amp)
    single_update(step)
    before = everything_of(step)
    images, labels = random_batch()
    images[0, 0, 0, 0] = poison
    step.backward(images, labels, group_size=1, closes_group=True)
    update = step.update()
    assert (update.outcome, update.has_loss, update.bad_batches) == ("refused", False, (0,))
    assert math.isnan(update.loss)
    assert_same(everything_of(step), before)
    # It does not affect the next batch.
    single_update(step)
    assert step.num_updates == 2
    assert all(weight.isfinite().all() for weight in weights_of(step).values())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [{}, {"clip_grad": 1.0}, {"clip_grad": 1.0, "clip_mode": "agc"}])
def test_gradients_that_are_not_finite_change_nothing(poison: float, clip: dict[str, Any]) -> None:
    step = build_step(opt="adamw", model_ema=True, sched_on_updates=True, **clip)
    single_update(step)
    before = everything_of(step)
    step.backward(*random_batch(), group_size=1, closes_group=True)
    step.plain_model.head.weight.grad[0, 0] = poison
    update = step.update()
    assert (update.outcome, update.has_loss, update.bad_batches) == ("refused", False, ())
    assert math.isfinite(update.loss)
    assert not math.isfinite(update.gradient_norm)
    assert_same(everything_of(step), before)


def test_the_bad_batch_of_a_group_is_reported() -> None:
    step = build_step()
    images, labels = random_batch()
    step.backward(images, labels, group_size=3, closes_group=False)
    step.backward(images * math.nan, labels, group_size=3, closes_group=False)
    step.backward(images, labels, group_size=3, closes_group=True)
    assert step.update().bad_batches == (1,)


def test_gradients_that_float16_does_not_explain_are_refused() -> None:
    step = build_step(amp=True, amp_dtype="float16")
    outcomes = []
    for _ in range(18):
        step.backward(*random_batch(), group_size=1, closes_group=True)
        step.plain_model.head.weight.grad[0, 0] = math.nan
        outcomes.append(step.update().outcome)
    # The scale starts at 2**16 and is halved each time.
    assert outcomes == ["skipped"] * 16 + ["refused"] * 2


def test_the_reported_norm_is_before_clipping_and_scaling() -> None:
    images, labels = random_batch()
    plain = build_step()
    plain.backward(images, labels, group_size=1, closes_group=True)
    gradients = torch.cat([parameter.grad.flatten() for parameter in plain.plain_model.parameters()])
    for settings in ({}, {"clip_grad": 1e-3}, {"amp": True, "amp_dtype": "float16"}):
        step = build_step(**settings)
        step.backward(images, labels, group_size=1, closes_group=True)
        assert step.update().gradient_norm == pytest.approx(gradients.norm().item(), rel=2e-2 if settings else 1e-5)


def test_every_image_of_a_group_has_the_same_weight_if_batches_lack_images() -> None:
    lacking, full = build_step(), build_step(batch_size=5)
    images, labels = random_batch(5)
    lacking.backward(images[:1], labels[:1], group_size=3, closes_group=False)
    lacking.backward(images[:0], labels[:0], group_size=3, closes_group=False)
    lacking.backward(images[1:], labels[1:], group_size=3, closes_group=True)
    full.backward(images, labels, group_size=1, closes_group=True)
    one, other = lacking.update(), full.update()
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-5)
    for name, weight in weights_of(full).items():
        torch.testing.assert_close(weights_of(lacking)[name], weight, rtol=1e-5, atol=1e-6)


def test_a_group_without_images_changes_nothing() -> None:
    step = build_step(opt="adamw", model_ema=True)
    single_update(step)
    before = everything_of(step)
    images, labels = random_batch(0)
    step.backward(images, labels, group_size=1, closes_group=True)
    update = step.update()
    assert (update.outcome, update.has_loss) == ("empty", False)
    assert_same(everything_of(step), before)


def test_a_step_that_the_scaler_skips_changes_nothing() -> None:
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


def test_clipping_by_norm_follows_unscaling() -> None:
    for amp in ({}, {"amp": True, "amp_dtype": "float16"}):
        step = build_step(clip_grad=1e-3, **amp)
        before = weights_of(step)
        single_update(step)
        moved = sum((value - before[name]).square().sum() for name, value in step.plain_model.state_dict().items())
        assert moved.sqrt().item() == pytest.approx(1e-3 * 1e-2, rel=1e-2)


def test_clipping_by_value_limits_every_step() -> None:
    step = build_step(clip_grad=1e-2, clip_mode="value")
    before = weights_of(step)
    single_update(step)
    moved = max((value - before[name]).abs().max() for name, value in step.plain_model.state_dict().items())
    assert moved.item() == pytest.approx(1e-2 * 1e-2, rel=1e-2)


def test_adaptive_clipping_leaves_out_the_classifier() -> None:
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


def test_the_moving_average_follows_its_warm_up() -> None:
    step = build_step(model_ema=True, model_ema_warmup=True, model_ema_decay=0.9)
    expected = weights_of(step)["head.weight"]
    for update in range(1, 5):
        single_update(step)
        # timm: decay 0 at the first update, then 1 - (1 + t) ** (-2/3) up to the limit.
        decay = min(0.9, 1 - (1 + update - 1) ** (-2 / 3)) if update > 1 else 0.0
        expected = decay * expected + (1 - decay) * step.plain_model.state_dict()["head.weight"]
        torch.testing.assert_close(step.ema.module.state_dict()["head.weight"], expected)


def test_mixing_stops_at_mixup_off_epoch() -> None:
    step = build_step(mixup=1.0, mixup_off_epoch=2)
    step.start_epoch(1)
    assert step.mixup.mixup_enabled
    step.start_epoch(2)
    assert not step.mixup.mixup_enabled


def test_an_update_reports_a_stop_request() -> None:
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
