"""A classifier keeps its run's settings, batches that do not fit in memory are halved, views are averaged."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from linvit.evaluation.inference import (
    BatchForward,
    amp_precision,
    input_spec,
    mean_log_probability,
    override_settings,
    run_batch_size,
    scaled_size,
    source_digest,
)
from linvit.evaluation.options import EvalOptions
from linvit.model.build import create_model
from linvit.runs.folder import Classifier

CPU = torch.device("cpu")


class Crowded(nn.Module):
    """Runs out of memory with more than `room` images at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.room = room
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append(len(images))
        return images.mean((2, 3)) @ self.weight


def test_a_batch_that_does_not_fit_is_halved_for_good_and_reported() -> None:
    model, messages = Crowded(room=3), []
    forward = BatchForward(model, device=CPU, amp_dtype=None, log=messages.append)
    images = torch.randn(11, 3, 4, 4)
    expected = images.mean((2, 3)) @ model.weight
    torch.testing.assert_close(forward(images), expected)
    torch.testing.assert_close(forward(images[:4]), expected[:4])
    assert model.seen == [3, 3, 3, 2, 3, 1]
    assert messages == [
        "out of memory with 11 images at once; continuing with 6",
        "out of memory with 6 images at once; continuing with 3",
    ]


def test_a_single_image_that_does_not_fit_is_an_error() -> None:
    forward = BatchForward(Crowded(room=0), device=CPU, amp_dtype=None, log=lambda text: None)
    with pytest.raises(ValueError, match="a single image of 4×6 px does not fit in the memory of cpu; use a smaller"):
        forward(torch.randn(2, 3, 4, 6))


def test_logits_are_float32_and_carry_no_gradient() -> None:
    model = Crowded(room=9)
    logits = BatchForward(model, device=CPU, amp_dtype=torch.bfloat16, log=print)(torch.randn(2, 3, 4, 4))
    assert (logits.dtype, logits.requires_grad) == (torch.float32, False)
    assert not torch.equal(logits, BatchForward(model, device=CPU, amp_dtype=None, log=print)(torch.randn(2, 3, 4, 4)))


def test_input_and_precision_follow_the_settings() -> None:
    model = timm.create_model("linvit_mini_patch4_64", num_classes=2)
    plain = Classifier(model, None, weights="", settings={})
    assert (input_spec(plain).size, input_spec(plain).crop_pct) == ((64, 64), model.pretrained_cfg["crop_pct"])
    assert amp_precision(plain) is None
    # The size is the model's own: it may have been resized since.
    settings = {"crop_pct": 0.5, "std": [0.5], "img_size": [32, 32], "amp": True, "amp_dtype": "float16", "lr": 1.0}
    run = Classifier(model, None, weights="", settings=settings)
    assert (input_spec(run).size, input_spec(run).crop_pct, input_spec(run).std) == ((64, 64), 0.5, (0.5, 0.5, 0.5))
    assert input_spec(run, img_size=(96, 64)).size == (96, 64)
    assert amp_precision(run) == torch.float16
    nothing = Classifier(model, None, weights="", settings=dict.fromkeys([*settings, "batch_size", "amp_dtype"]))
    assert (input_spec(nothing), amp_precision(nothing)) == (input_spec(plain), None)


def test_options_override_settings_only_if_given() -> None:
    model = timm.create_model("linvit_mini_patch4_64", num_classes=2)
    run = Classifier(model, None, weights="", settings={"crop_pct": 0.5, "amp": True, "amp_dtype": "float16"})
    options = EvalOptions(source="a", data_dir="b", std=(0.25,), seed=3)
    overridden = override_settings(run, options)
    assert overridden.settings == {**run.settings, "std": (0.25, 0.25, 0.25)}
    assert amp_precision(overridden) == torch.float16
    off = override_settings(run, EvalOptions(source="a", data_dir="b", amp=False))
    assert amp_precision(off) is None


def test_probabilities_of_views_are_averaged() -> None:
    views = [torch.randn(4, 3), 5 * torch.randn(4, 3), torch.randn(4, 3)]
    expected = torch.stack([view.double().softmax(1) for view in views]).mean(0)
    assert torch.allclose(mean_log_probability(views).exp().double(), expected, atol=1e-6)


def test_scaled_sizes_are_whole_patches() -> None:
    assert scaled_size((224, 224), 0.875, multiple=16) == (192, 192)
    assert scaled_size((224, 224), 1.0, multiple=16) == (224, 224)
    assert scaled_size((518, 280), 1.125, multiple=14) == (588, 308)
    assert scaled_size((32, 32), 0.1, multiple=16) == (16, 16)


def test_an_invalid_setting_is_one_sentence() -> None:
    model = timm.create_model("linvit_mini_patch4_64", num_classes=2)
    with pytest.raises(ValueError, match=r": mean takes one number or three \(R G B\), not 2") as refused:
        input_spec(Classifier(model, None, weights="", settings={"mean": (0.5, 0.4)}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "use"),
    [
        ("batch_size", "x", run_batch_size),
        ("batch_size", 0, run_batch_size),
        ("validation_batch_size", -3, run_batch_size),
        ("amp", "maybe", amp_precision),
        ("amp_dtype", "int8", amp_precision),
        ("mean", {"a": 1}, input_spec),
        ("crop_pct", [], input_spec),
    ],
)
def test_wrong_values_in_a_runs_settings_are_named(
    name: str, value: object, use: Callable[[Classifier], object]
) -> None:
    classifier = Classifier(timm.create_model("test_vit"), None, weights="run/best", settings={name: value})
    with pytest.raises(ValueError, match=rf"^settings of the run that saved run/best: {name} takes ") as caught:
        use(classifier)
    assert "\n" not in str(caught.value)


def test_the_batch_size_of_a_run() -> None:
    for settings, size in (
        ({}, None),
        ({"batch_size": 8}, 8),
        ({"batch_size": "auto"}, None),
        ({"batch_size": 8, "validation_batch_size": 4}, 4),
    ):
        assert run_batch_size(Classifier(nn.Identity(), None, weights="", settings=settings)) == size


def test_a_digest_is_of_weights_and_arguments():
    def digest(**arguments):
        torch.manual_seed(0)
        model = create_model("linvit_mini_patch4_64", num_classes=3, class_token=False, **arguments)
        return source_digest(model)

    assert digest(global_pool="avg", fc_norm=False) == digest(global_pool="avg", fc_norm=False)
    assert digest(global_pool="avg", fc_norm=False) != digest(global_pool="max", fc_norm=False)
