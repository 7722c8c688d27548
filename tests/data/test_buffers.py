"""Memory is used again once it was set free, and never before."""

import pytest
import torch

from linvit.data.worker import Buffers, RawBatch

SHAPE = (2, 3, 4, 3)


def test_memory_is_used_again_once_it_is_free() -> None:
    buffers = Buffers()
    images, mark = buffers.take(SHAPE)
    assert images.shape == SHAPE
    assert images.dtype == torch.uint8
    second, _ = buffers.take(SHAPE)
    assert second.data_ptr() != images.data_ptr()
    mark.zero_()
    third, _ = buffers.take(SHAPE)
    assert third.data_ptr() == images.data_ptr()


def test_memory_in_use_is_never_given_away() -> None:
    buffers = Buffers()
    held = [buffers.take(SHAPE) for _ in range(20)]
    for number, (images, _) in enumerate(held):
        images.fill_(number)
    assert [int(images.float().mean()) for images, _ in held] == list(range(20))
    assert all(mark.item() == 1 for _, mark in held)


def test_a_copy_in_page_locked_memory_sets_its_source_free_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    buffers = Buffers()
    images, mark = buffers.take(SHAPE)
    batch = RawBatch(images, torch.zeros(2), torch.zeros(2), (), mark)
    copied = batch.pin_memory()
    later, _ = buffers.take(SHAPE)
    assert later.data_ptr() == images.data_ptr()
    # The copy has arrived on the device; what the memory holds by now has not.
    copied.release()
    assert buffers.take(SHAPE)[0].data_ptr() != later.data_ptr()


def test_other_shapes_take_other_memory() -> None:
    buffers = Buffers()
    images, mark = buffers.take(SHAPE)
    mark.zero_()
    other, _ = buffers.take((2, 5, 4, 3))
    assert other.shape == (2, 5, 4, 3)
    assert other.data_ptr() != images.data_ptr()
    # The same number of bytes will do.
    assert buffers.take((3, 2, 4, 3))[0].data_ptr() == images.data_ptr()
