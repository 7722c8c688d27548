"""The data options have timm's defaults, refuse invalid values, and are imported quickly enough for `--help`."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from linvit.data.options import AugmentOptions, DataOptions, InputOptions, LoaderOptions

ALL = (AugmentOptions, DataOptions, InputOptions, LoaderOptions)


@pytest.mark.parametrize("model", ALL)
def test_every_field_is_described_and_has_a_default(model: type[BaseModel]) -> None:
    model()
    assert all(field.description for field in model.model_fields.values())


def test_defaults_are_those_of_timm() -> None:
    augment = AugmentOptions()
    assert (augment.scale, augment.ratio, augment.hflip, augment.vflip) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5, 0.0)
    assert (augment.color_jitter, augment.aa, augment.train_interpolation) == ((0.4,), None, "random")
    assert (augment.reprob, augment.remode, augment.recount) == (0.0, "pixel", 1)
    assert (DataOptions().train_split, DataOptions().val_split) == ("train", "validation")
    assert (LoaderOptions().batch_size, LoaderOptions().workers) == (128, 4)


def test_one_number_or_several() -> None:
    assert InputOptions(img_size=224).img_size == (224, 224)
    assert InputOptions(img_size=(768, 512)).img_size == (768, 512)
    assert InputOptions(mean=0.5, std=(0.1, 0.2, 0.3)).mean == (0.5, 0.5, 0.5)
    assert AugmentOptions(color_jitter=0.3).color_jitter == (0.3,)
    assert AugmentOptions(color_jitter=None).color_jitter is None
    assert AugmentOptions(aa="").aa is None


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (AugmentOptions, {"hflop": 0.5}, "hflop"),
        (AugmentOptions, {"hflip": 1.5}, "less than or equal to 1"),
        (AugmentOptions, {"scale": (1.0, 0.5)}, "two rising numbers"),
        (AugmentOptions, {"ratio": (0.0, 0.5)}, "two rising numbers"),
        (AugmentOptions, {"aa": "rnad-m9"}, "'rnad-m9' is unknown: choose one of"),
        (AugmentOptions, {"color_jitter": (0.4, 0.4)}, "one, three or four"),
        (AugmentOptions, {"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "a hue of at most 0.5"),
        (AugmentOptions, {"train_crop_mode": "src"}, "'rrc', 'rkrc' or 'rkrr'"),
        (AugmentOptions, {"recount": 0}, "greater than or equal to 1"),
        (AugmentOptions, {"aug_file": "a.yaml", "aa": "3a", "vflip": 0.5}, "remove vflip, aa or aug_file"),
        (InputOptions, {"img_size": (1, 2, 3)}, "one number or height and width"),
        (InputOptions, {"img_size": 0}, "greater than 0"),
        (InputOptions, {"in_chans": 1}, "images are read as RGB"),
        (InputOptions, {"mean": (0.1, 0.2)}, "one number or three"),
        (InputOptions, {"std": 0.0}, "above 0"),
        (InputOptions, {"crop_pct": 0.0}, "greater than 0"),
        (InputOptions, {"crop_pct": 87.5}, "less than or equal to 2"),
        (LoaderOptions, {"batch_size": 0}, "greater than or equal to 1"),
        (LoaderOptions, {"cache": "disk"}, "needs a folder: set cache_dir"),
        (LoaderOptions, {"cache": "memory", "cache_dir": "x"}, "cache_dir needs cache disk"),
        (LoaderOptions, {"cache_size": 256}, "cache_size needs a cache"),
    ],
)
def test_impossible_settings_are_refused(model: type[BaseModel], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model(**settings)
    assert words in str(caught.value)


def test_options_survive_a_round_trip() -> None:
    augment = AugmentOptions(aa="rand-m9-mstd0.5-inc1", color_jitter=0.3, scale=(0.2, 1.0))
    assert AugmentOptions(**augment.model_dump(mode="json")) == augment


def test_import_is_light() -> None:
    # As in the console script, where linvit itself does not load its models.
    code = (
        "import sys, linvit_command, linvit.data.options;"
        "heavy = {'torch', 'timm', 'cv2', 'albumentations', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
