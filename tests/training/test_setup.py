"""Every training step draws the same random numbers whenever it is run; classes are numbered by --class-map."""

import random
from pathlib import Path

import numpy as np
import torch
from tiny_runs import make_images

from linvit.training.config import TrainConfig
from linvit.training.setup import open_train_set, open_val_set, seed_run, seed_step


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random()


def draws_at(seed: int = 1, epoch: int = 2, batch: int = 3, rank: int = 4) -> tuple[float, float, float]:
    seed_step(seed, epoch=epoch, batch=batch, rank=rank)
    return draws()


def test_a_step_draws_the_same_numbers_again() -> None:
    first = draws_at()
    draws()
    assert draws_at() == first


def test_other_seeds_epochs_batches_and_ranks_draw_other_numbers() -> None:
    found = [draws_at(), draws_at(seed=0), draws_at(epoch=0), draws_at(batch=0), draws_at(rank=0), draws_at(2, 1)]
    for generator in zip(*found):
        assert len(set(generator)) == len(found)


def test_a_run_is_seeded() -> None:
    found = []
    for seed in (7, 8, 7):
        seed_run(seed)
        found.append(draws())
    assert found[0] == found[2]
    assert not set(found[0]) & set(found[1])


def test_classes_are_numbered_as_by_timm_on_request(tmp_path: Path) -> None:
    make_images(tmp_path, classes=("Zebra", "apple", "apple10", "apple9"), train=2, val=1)
    config = TrainConfig(data_dir=tmp_path, class_map=Path("timm"))
    train_set = open_train_set(config)
    val_set = open_val_set(config, class_names=train_set.class_names)
    assert train_set.class_names == ["apple", "apple9", "apple10", "Zebra"]
    for images in (train_set, val_set):
        assert [images.class_names[label] for label in images.labels] == [path.parent.name for path in images.paths]


def test_a_validation_folder_that_a_fraction_replaces_is_reported(tmp_path: Path) -> None:
    make_images(tmp_path)
    config = TrainConfig(data_dir=tmp_path, val_fraction=0.4)
    val_set = open_val_set(config, class_names=open_train_set(config).class_names)
    assert val_set.note.startswith(f"{tmp_path / 'val'} is not used: --val-fraction takes validation images")
    (tmp_path / "val").rename(tmp_path / "test")
    assert open_val_set(config, class_names=val_set.class_names).note == ""
