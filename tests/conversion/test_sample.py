"""The images that a conversion draws, and those that it leaves out."""

import pytest
import torch
from tiny_runs import make_images

from linvit.conversion.sample import Sample
from linvit.data.augment.build import InputSpec

SPEC = InputSpec((16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
CPU = torch.device("cpu")


def draw(folder, count=16, seed=0):
    return Sample(folder, SPEC, CPU, num_images=count, batch_size=8, seed=seed)


def test_distillation_sees_every_image_once_a_round_but_those_that_measure(tmp_path):
    make_images(tmp_path, train=6, val=1)
    sample = draw(tmp_path)
    batches = sample.endless(4)
    first, second = ([next(batches) for _ in range(5)] for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 3]
    rounds = [{image.numpy().tobytes() for batch in each for image in batch} for each in (first, second)]
    unseen = {image.numpy().tobytes() for image in sample.unseen()}
    assert len(unseen) == sample.num_held_out == 2
    assert rounds[0] == rounds[1]
    assert len(rounds[0]) == 19
    assert not rounds[0] & unseen
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(("count", "fitted"), [(16, 16), (20, 19), (21, 19), (512, 19)])
def test_some_images_only_measure_also_where_all_are_drawn(tmp_path, count, fitted):
    make_images(tmp_path, train=6, val=1)
    sample = draw(tmp_path, count)
    assert len(sample.paths) == fitted
    assert len(sample.unseen_paths) == 2
    everything = [*sample.seen_paths, *sample.unseen_paths]
    assert len(set(everything)) == len(everything) == 21
    assert len(torch.cat(list(sample.batches()))) == len(sample.paths)
    assert draw(tmp_path, count).paths == sample.paths != draw(tmp_path, count, seed=1).paths


def test_too_few_images_are_refused(tmp_path):
    make_images(tmp_path, train=2, val=0)
    with pytest.raises(ValueError, match=r"holds 6 images: a fit needs at least 8"):
        draw(tmp_path)
