"""A user's own pipeline: checked before training, brought to the size, never silently misread."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import yaml

from linvit.data.augment.build import InputSpec, Pipeline, build_train_pipeline, load_pipeline
from linvit.data.options import AugmentOptions
from linvit.data.sampler import sample_generators

SPEC = InputSpec(
    size=(48, 40), mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bicubic", crop_pct=0.9, crop_mode="center"
)


def saved(pipeline: Any, file: Path, data_format: str = "yaml") -> Path:
    A.save(pipeline, file, data_format=data_format)
    return file


def augmented(pipeline: A.Compose | Pipeline, image: np.ndarray, index: int) -> np.ndarray:
    pipeline.set_random_state(*sample_generators(0, 0, index))
    return pipeline(image=image)["image"]


@pytest.mark.parametrize("data_format", ["yaml", "json"])
def test_a_saved_pipeline_gives_the_same_images(
    data_format: str, tmp_path: Path, smooth_image: Callable[..., np.ndarray]
) -> None:
    pipeline = A.Compose(
        [
            A.RandomResizedCrop(size=(48, 40)),
            A.OneOf([A.HorizontalFlip(p=1.0), A.Rotate(limit=30, p=1.0)], p=0.8),
            A.SomeOf([A.CLAHE(p=1.0), A.GaussNoise(p=1.0), A.Sharpen(p=1.0)], n=2),
        ]
    )
    loaded = load_pipeline(saved(pipeline, tmp_path / "own", data_format), size=(48, 40), interpolation="bicubic")
    image = smooth_image(70, 90)
    results = [augmented(loaded, image, index) for index in range(12)]
    assert all(result.shape == (48, 40, 3) and result.dtype == np.uint8 for result in results)
    assert len({result.tobytes() for result in results}) > 10
    for index, result in enumerate(results):
        assert np.array_equal(augmented(loaded, image, index), result)


def test_other_sizes_are_brought_to_the_models(tmp_path: Path, smooth_image: Callable[..., np.ndarray]) -> None:
    own = saved(A.Compose([A.HorizontalFlip(p=0.5)]), tmp_path / "own.yaml")
    pipeline = load_pipeline(own, size=(48, 40), interpolation="bicubic")
    for shape in ((300, 200), (20, 30)):
        assert augmented(pipeline, smooth_image(*shape), 0).shape == (48, 40, 3)


def test_our_own_pipeline_can_be_saved_and_edited(tmp_path: Path, smooth_image: Callable[..., np.ndarray]) -> None:
    options = AugmentOptions(aa="rand-m9-mstd0.5-inc1", reprob=0.5, grayscale_prob=0.2, gaussian_blur_prob=0.2)
    pipeline = build_train_pipeline(options, SPEC)
    own = saved(A.Compose(pipeline.transforms), tmp_path / "own.yaml")
    loaded = build_train_pipeline(AugmentOptions(aug_file=own), SPEC)
    image = smooth_image(70, 90)
    results = [augmented(loaded, image, index) for index in range(8)]
    assert len({result.tobytes() for result in results}) == 8
    # The outer Compose draws once more than the inner, so the images differ though their distribution does not.
    assert [type(transform) for transform in loaded.transforms[0].transforms] == [
        type(transform) for transform in pipeline.transforms
    ]


def document(transform: dict[str, Any]) -> dict[str, Any]:
    flip = {"__class_fullname__": "HorizontalFlip", "p": 0.5}
    return {
        "__version__": "2.0.8",
        "transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": [flip, transform]},
    }


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ({"__class_fullname__": "CoarseDropout", "p": 1.0, "max_holes": 8}, "'max_holes' are not valid"),
        ({"__class_fullname__": "HorizontalFlipp", "p": 1.0}, "has no transform 'HorizontalFlipp'; did you mean Horiz"),
        ({"__class_fullname__": "RandomResizedCrop", "p": 1.0, "height": 8, "width": 8}, "size"),
        ({"__class_fullname__": "GaussianBlur", "p": 7.0}, "less than or equal to 1"),
        ({"__class_fullname__": "Normalize", "p": 1.0}, "gives float32 .* such as Normalize"),
        ({"__class_fullname__": "ToTensorV2", "p": 1.0}, "gives torch.uint8 .* such as Normalize"),
        ({"__class_fullname__": "ToGray", "p": 1.0, "num_output_channels": 1}, r"gives uint8 \(1024, 1024\)"),
        ({"__class_fullname__": "MaskDropout", "p": 1.0}, "fails on a 1024 x 1024 image"),
        (
            {"__class_fullname__": "OneOf", "p": 1.0, "transforms": [{"__class_fullname__": "Flip"}]},
            "no transform 'Flip'",
        ),
        ({"p": 1.0}, "has no transform 'None'"),
    ],
)
def test_faulty_pipelines_are_refused(transform: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(document(transform)))
    with pytest.raises(ValueError, match=words) as caught:
        load_pipeline(file, size=(48, 40), interpolation="bicubic")
    assert "own.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "own.yaml"),
        ("pipeline: {}\n", "holds no 'transform'"),
        ("transform: HorizontalFlip\n", "holds no 'transform'"),
        ("transform: {__class_fullname__: HorizontalFlip, p: 0.5}\n", "holds HorizontalFlip; save an .*Compose"),
        ("transform: [", "own.yaml"),
    ],
)
def test_what_is_no_pipeline_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_pipeline(file, size=(48, 40), interpolation="bicubic")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml"):
        load_pipeline(tmp_path / "none.yaml", size=(48, 40), interpolation="bicubic")


def test_interpolation_flags_survive(tmp_path: Path) -> None:
    own = saved(A.Compose([A.Rotate(interpolation=cv2.INTER_CUBIC)]), tmp_path / "own.yaml")
    loaded = load_pipeline(own, size=(48, 40), interpolation="bicubic")
    assert loaded.transforms[0].transforms[0].interpolation == cv2.INTER_CUBIC
