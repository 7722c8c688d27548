"""The images of a conversion, how they are split, and the weights of their tokens."""

import pytest
import torch
from tiny_runs import make_images

from linvit.conversion.calibration import PREFIX_SHARE, CalibrationImages, token_weights
from linvit.data.augment.build import InputSpec

SPEC = InputSpec((16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
CPU = torch.device("cpu")


def draw(folder, count=16, seed=0):
    return CalibrationImages(folder, SPEC, CPU, num_images=count, batch_size=8, seed=seed)


def test_distillation_sees_every_image_but_the_unseen_ones_once_per_pass(tmp_path):
    make_images(tmp_path, train=6, val=1)
    images = draw(tmp_path)
    batches = images.training_batches(4)
    first, second = ([next(batches) for _ in range(5)] for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 3]
    passes = [{image.numpy().tobytes() for batch in each for image in batch} for each in (first, second)]
    unseen = {image.numpy().tobytes() for image in images.unseen_images()}
    assert len(unseen) == images.num_held_out == 2
    assert passes[0] == passes[1]
    assert len(passes[0]) == 19
    assert not passes[0] & unseen
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(("count", "fitted"), [(16, 16), (20, 19), (21, 19), (512, 19)])
def test_some_images_stay_unseen_even_if_all_are_drawn(tmp_path, count, fitted):
    make_images(tmp_path, train=6, val=1)
    images = draw(tmp_path, count)
    assert len(images.fit_paths) == fitted
    assert len(images.unseen_paths) == 2
    everything = [*images.seen_paths, *images.unseen_paths]
    assert len(set(everything)) == len(everything) == 21
    assert len(torch.cat(list(images.fit_batches()))) == len(images.fit_paths)
    assert draw(tmp_path, count).fit_paths == images.fit_paths != draw(tmp_path, count, seed=1).fit_paths


def test_too_few_images_are_refused(tmp_path):
    make_images(tmp_path, train=2, val=0)
    with pytest.raises(ValueError, match=r"holds 6 images: a fit needs at least 8"):
        draw(tmp_path)


def test_token_weights_are_relative_and_give_prefix_tokens_their_share():
    tokens = torch.randn(2, 21, 8) * torch.logspace(0, 3, 21)[:, None]
    shares = token_weights(tokens, 1) * tokens.square().sum(-1)
    assert shares.mean() == pytest.approx(1.0)
    assert shares[:, 0].sum() / shares.sum() == pytest.approx(PREFIX_SHARE)
    torch.testing.assert_close(token_weights(tokens, 0), 1 / tokens.square().sum(-1))
