"""A classifier is used as its run was set up, and batches that memory does not hold are halved."""

import pytest
import timm
import torch
from torch import Tensor, nn

from linvit.evaluation.inference import BatchForward, amp_precision, input_spec
from linvit.runs.folder import Classifier

CPU = torch.device("cpu")


class Crowded(nn.Module):
    """Fits `room` images at once into memory."""

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


def test_a_batch_that_does_not_fit_is_halved_for_good_and_said_so() -> None:
    model, said = Crowded(room=3), []
    forward = BatchForward(model, device=CPU, amp_dtype=None, say=said.append)
    images = torch.randn(11, 3, 4, 4)
    expected = images.mean((2, 3)) @ model.weight
    torch.testing.assert_close(forward(images), expected)
    torch.testing.assert_close(forward(images[:4]), expected[:4])
    assert model.seen == [3, 3, 3, 2, 3, 1]
    assert said == [
        "out of memory with 11 images at once: going on with 6",
        "out of memory with 6 images at once: going on with 3",
    ]


def test_an_image_that_does_not_fit_alone_is_one_sentence() -> None:
    forward = BatchForward(Crowded(room=0), device=CPU, amp_dtype=None, say=lambda text: None)
    with pytest.raises(ValueError, match="a single image of 4×6 px does not fit in the memory of cpu: set a smaller"):
        forward(torch.randn(2, 3, 4, 6))


def test_logits_are_float32_and_carry_no_gradient() -> None:
    model = Crowded(room=9)
    logits = BatchForward(model, device=CPU, amp_dtype=torch.bfloat16, say=print)(torch.randn(2, 3, 4, 4))
    assert (logits.dtype, logits.requires_grad) == (torch.float32, False)
    assert not torch.equal(logits, BatchForward(model, device=CPU, amp_dtype=None, say=print)(torch.randn(2, 3, 4, 4)))


def test_input_and_precision_are_those_of_the_settings() -> None:
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


def test_a_setting_that_is_none_is_one_sentence() -> None:
    model = timm.create_model("linvit_mini_patch4_64", num_classes=2)
    with pytest.raises(ValueError, match=r"^mean takes one number or three \(R G B\), not 2") as refused:
        input_spec(Classifier(model, None, weights="", settings={"mean": (0.5, 0.4)}))
    assert "\n" not in str(refused.value)
