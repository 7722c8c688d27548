"""Sizes divide the epochs evenly, and the model keeps its parameters whatever the size."""

import pytest
import torch

from linvit.model.build import create_model
from linvit.training.model import check_sizes, epoch_sizes, size_in
from linvit.training.options import ScheduleOptions


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(3, [16, 24, 32]), (6, [16, 16, 24, 24, 32, 32]), (7, [16, 16, 16, 24, 24, 32, 32]), (4, [16, 16, 24, 32])],
)
def test_the_epochs_are_divided_evenly(epochs: int, expected: list[int]) -> None:
    options = ScheduleOptions(epochs=epochs, train_img_sizes=(16, 24, 32))
    assert [size for size, _ in epoch_sizes(options)] == expected
    # Epochs after the schedule, as in a cool-down, keep the last size.
    assert size_in(epochs + 5, options) == 32


def test_without_sizes_nothing_changes() -> None:
    assert epoch_sizes(ScheduleOptions()) == []
    assert size_in(3, ScheduleOptions()) is None


@pytest.mark.parametrize("projection", ["linear", "separable", "conv", "avgpool", "dct"])
def test_checking_sizes_leaves_the_model_alone(projection: str) -> None:
    model = create_model(
        "linvit_mini_patch4_64", img_size=(32, 32), patch_size=4, k=4, projection=projection, dynamic_img_size=True
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_sizes(model, [16, 24, 32])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model(torch.zeros(1, 3, 16, 16)).shape == model(torch.zeros(1, 3, 32, 32)).shape


def test_a_finer_picture_of_the_same_patches_gives_the_same_keys() -> None:
    # What remapping by overlap area promises: trained at 16 px, each key weighs the same region at 32 px.
    torch.manual_seed(0)
    model = create_model(
        "linvit_mini_patch4_64", img_size=(32, 32), patch_size=4, k=4, projection="linear", dynamic_img_size=True
    ).eval()
    attention = model.blocks[0].attn
    coarse = torch.randn(1, 1, 16, 8)
    fine = coarse.view(1, 1, 4, 4, 8).repeat_interleave(2, 2).repeat_interleave(2, 3).reshape(1, 1, 64, 8)
    key, _ = attention.projections()
    torch.testing.assert_close(key(coarse, (4, 4)), key(fine, (8, 8)))
