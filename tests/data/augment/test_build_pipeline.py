"""A file and its decoded image give the same result; a user's own pipeline is checked and brought to the input size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import yaml
from jpegs import KINDS, encode, photo

from linvit.data.augment.build import InputSpec, Pipeline, build_eval_pipeline, build_train_pipeline, load_pipeline
from linvit.data.decode import UnreadableImage, decode_image
from linvit.data.options import AugmentOptions
from linvit.data.sampler import sample_generators

SPEC = InputSpec((24, 24), (0.5,) * 3, (0.2,) * 3, "bicubic", 0.9, "center")
PLAIN = AugmentOptions(color_jitter=None)

Reductions = Callable[[], list[int]]


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> Reductions:
    """Reductions with which images were decoded since the last call."""
    seen: list[int] = []

    def spied(data: bytes, **settings: Any) -> np.ndarray:
        seen.append(settings.get("reduction", 1))
        return decode_image(data, **settings)

    monkeypatch.setattr("linvit.data.augment.build.decode_image", spied)

    def since() -> list[int]:
        found = seen.copy()
        seen.clear()
        return found

    return since


def both(pipeline: Pipeline, data: bytes, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The result for the file, and for its fully decoded image."""
    pipeline.set_random_state(*sample_generators(0, 0, index))
    read = pipeline.read(data, name="image")
    pipeline.set_random_state(*sample_generators(0, 0, index))
    return read, pipeline(image=decode_image(data, name="image"))["image"]


@pytest.mark.parametrize("kind", KINDS)
def test_small_images_give_the_same_pixels(kind: str, reductions: Reductions) -> None:
    options = AugmentOptions(aa="rand-m9-mstd0.5-inc1", reprob=0.5, gaussian_blur_prob=0.3)
    data = encode(photo(70, 90), kind, orientation=6)
    for pipeline in (build_eval_pipeline(SPEC), build_train_pipeline(options, SPEC)):
        for index in range(6):
            read, called = both(pipeline, data, index)
            assert np.array_equal(read, called)
    assert set(reductions()) == {1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "orientation"), [((432, 600), None), ((432, 600), 6), ((240, 248), 3)])
def test_large_images_are_reduced_and_give_nearly_the_same_pixels(
    kind: str, shape: tuple[int, int], orientation: int | None, reductions: Reductions
) -> None:
    data = encode(photo(*shape), kind, orientation=orientation)
    for pipeline in (build_eval_pipeline(SPEC), build_train_pipeline(PLAIN, SPEC)):
        for index in range(3):
            read, called = both(pipeline, data, index)
            difference = np.abs(read.astype(int) - called)
            # If chroma is halved in one direction only, the decoder averages different pixels.
            assert difference.mean() < (2.5 if kind == "4:2:2" else 1)
            assert np.percentile(difference, 99) <= (9 if kind == "4:2:2" else 4)
    assert max(reductions()) > 1


@pytest.mark.parametrize("orientation", [None, 3, 6])
def test_images_of_an_odd_size_are_not_shifted_by_half_a_pixel(orientation: int | None, reductions: Reductions) -> None:
    # The stripe is as wide as a resized pixel; a shift by half a pixel would move half of its brightness.
    pixels = np.zeros((433, 439, 3), np.uint8)
    pixels[208:226] = pixels[:, 208:226] = 255
    read, called = both(build_eval_pipeline(SPEC), encode(pixels, orientation=orientation), 0)
    assert np.abs(read.astype(int) - called).max() < 64
    assert reductions()[0] == (8 if orientation is None else 1)


def test_windows_are_not_decoded_smaller_than_they_need(reductions: Reductions) -> None:
    data = encode(photo(400, 400))
    scales = {(1.0, 1.0): {8}, (0.3, 0.3): {4}, (0.08, 0.08): {2}, (0.01, 0.01): {1}}
    for scale, expected in scales.items():
        options = AugmentOptions(color_jitter=None, scale=scale, ratio=(1.0, 1.0))
        pipeline = build_train_pipeline(options, SPEC)
        for index in range(4):
            pipeline.set_random_state(*sample_generators(0, 0, index))
            pipeline.read(data, name="image")
        assert set(reductions()) == expected


def test_evaluation_reduces_to_twice_the_resized_image(reductions: Reductions) -> None:
    # The shorter side is resized to 26.
    for shorter, expected in ((103, 1), (104, 2), (207, 2), (208, 4), (415, 4), (416, 8)):
        build_eval_pipeline(SPEC).read(encode(photo(shorter, shorter + 20)), name="image")
        assert reductions() == [expected]


@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "restarts", "grey"])
def test_truncated_files_are_refused_at_every_size(kind: str) -> None:
    data = encode(photo(430, 430), kind)
    lengths = [2, 20, 300, 700, len(data) // 3, len(data) // 2, len(data) - 500, len(data) - 2, len(data) - 1]
    for length in lengths:
        for reduction in (1, 2, 4, 8):
            with pytest.raises(UnreadableImage, match=r"^name: is truncated"):
                decode_image(data[:length], name="name", reduction=reduction)  # type: ignore[arg-type]
        with pytest.raises(UnreadableImage, match=r"^name: is truncated"):
            build_eval_pipeline(SPEC).read(data[:length], name="name")


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_reduced_images_are_rounded_up(reduction: int) -> None:
    for kind in KINDS:
        image = decode_image(encode(photo(61, 83), kind), name="image", reduction=reduction)  # type: ignore[arg-type]
        assert image.shape == (-(-61 // reduction), -(-83 // reduction), 3)


def test_red_stays_red(reductions: Reductions) -> None:
    red = np.zeros((400, 400, 3), np.uint8)
    red[..., 0] = 250
    result = build_eval_pipeline(SPEC).read(encode(red), name="image")
    assert reductions() == [4]
    assert np.abs(result.astype(int) - (250, 0, 0)).max() <= 3


def test_the_decoders_size_counts_if_the_header_differs(
    reductions: Reductions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linvit.data.augment.build.reducible_size", lambda data: (900, 300))
    data = encode(photo(300, 900))
    for index in range(4):
        pipeline = build_train_pipeline(PLAIN, SPEC)
        read, called = both(pipeline, data, index)
        assert np.array_equal(read, called)
        assert reductions()[-1] == 1


def test_a_users_pipeline_sees_full_images(reductions: Reductions) -> None:
    shapes = []

    def record_shape(image: np.ndarray, **params: Any) -> np.ndarray:
        shapes.append(image.shape)
        return image[:24, :24]

    pipeline = Pipeline(None, A.Compose([A.Lambda(image=record_shape, name="record_shape")]))
    pipeline.read(encode(photo(400, 500)), name="image")
    assert shapes == [(400, 500, 3)]
    assert reductions() == [1]


def test_the_input_image_is_not_modified() -> None:
    def blacken(image: np.ndarray, **params: Any) -> np.ndarray:
        image[:] = 0
        return image

    black = A.Compose([A.Lambda(image=blacken, name="blacken")])
    image = photo(24, 24)
    before = image.copy()
    for crop in (None, build_eval_pipeline(InputSpec((24, 24), (0.5,) * 3, (0.2,) * 3, "bicubic", 1.0, "center")).crop):
        assert not Pipeline(crop, black)(image=image)["image"].any()
        assert np.array_equal(image, before)


OWN_SPEC = InputSpec(
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


def test_other_sizes_are_brought_to_the_input_size(tmp_path: Path, smooth_image: Callable[..., np.ndarray]) -> None:
    own = saved(A.Compose([A.HorizontalFlip(p=0.5)]), tmp_path / "own.yaml")
    pipeline = load_pipeline(own, size=(48, 40), interpolation="bicubic")
    for shape in ((300, 200), (20, 30)):
        assert augmented(pipeline, smooth_image(*shape), 0).shape == (48, 40, 3)


def test_a_built_pipeline_can_be_saved_and_loaded(tmp_path: Path, smooth_image: Callable[..., np.ndarray]) -> None:
    options = AugmentOptions(aa="rand-m9-mstd0.5-inc1", reprob=0.5, grayscale_prob=0.2, gaussian_blur_prob=0.2)
    pipeline = build_train_pipeline(options, OWN_SPEC)
    own = saved(A.Compose(pipeline.transforms), tmp_path / "own.yaml")
    loaded = build_train_pipeline(AugmentOptions(aug_file=own), OWN_SPEC)
    image = smooth_image(70, 90)
    results = [augmented(loaded, image, index) for index in range(8)]
    assert len({result.tobytes() for result in results}) == 8
    # The outer Compose draws one more number than the inner, so the images differ but not their distribution.
    assert [type(transform) for transform in loaded.transforms[0].transforms] == [
        type(transform) for transform in pipeline.transforms
    ]


def test_pipelines_saved_before_the_classes_moved_still_load(tmp_path: Path) -> None:
    options = AugmentOptions(aa="rand-m9-mstd0.5-inc1", reprob=0.5)
    own = saved(A.Compose(build_train_pipeline(options, OWN_SPEC).transforms), tmp_path / "own.yaml")
    own.write_text(own.read_text().replace("linvit.data.augment.", "linvit.data."))
    loaded = load_pipeline(own, size=(48, 40), interpolation="bicubic")
    names = [type(transform).__name__ for transform in loaded.transforms[0].transforms]
    assert names == ["RandomResizedCrop", "HorizontalFlip", "PolicyAugment", "RandomErasing"]


def document(transform: Any) -> dict[str, Any]:
    flip = {"__class_fullname__": "HorizontalFlip", "p": 0.5}
    return {
        "__version__": "2.0.8",
        "transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": [flip, transform]},
    }


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ({"__class_fullname__": "CoarseDropout", "p": 1.0, "max_holes": 8}, "'max_holes' are not valid"),
        (
            {"__class_fullname__": "HorizontalFlipp", "p": 1.0},
            "has no transform 'HorizontalFlipp'; did you mean 'Horiz",
        ),
        ({"__class_fullname__": "RandomResizedCrop", "p": 1.0, "height": 8, "width": 8}, "size"),
        ({"__class_fullname__": "GaussianBlur", "p": 7.0}, "less than or equal to 1"),
        ({"__class_fullname__": "Normalize", "p": 1.0}, "returns float32 .* such as Normalize"),
        ({"__class_fullname__": "ToTensorV2", "p": 1.0}, "returns torch.uint8 .* such as Normalize"),
        ({"__class_fullname__": "ToGray", "p": 1.0, "num_output_channels": 1}, r"returns uint8 \(1024, 1024\)"),
        ({"__class_fullname__": "MaskDropout", "p": 1.0}, "fails on a 1024 x 1024 image"),
        (
            {"__class_fullname__": "OneOf", "p": 1.0, "transforms": [{"__class_fullname__": "Flip"}]},
            "no transform 'Flip'",
        ),
        ({"p": 1.0}, "has no transform 'None'"),
        (1, "'1' is not a transform"),
        ("HorizontalFlip", "'HorizontalFlip' is not a transform"),
        ({"__class_fullname__": "OneOf", "p": 1.0, "transforms": {"a": "b"}}, "is not a transform"),
        ({"__class_fullname__": "OneOf", "p": 1.0, "transforms": 7}, "is not a transform"),
        ({"__class_fullname__": "OneOf", "p": 1.0}, "own.yaml"),
        ({"__class_fullname__": "HorizontalFlip", "p": [1]}, "own.yaml"),
    ],
)
def test_faulty_pipelines_are_refused(transform: Any, words: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(document(transform)))
    with pytest.raises(ValueError, match=words) as caught:
        load_pipeline(file, size=(48, 40), interpolation="bicubic")
    assert "own.yaml" in str(caught.value)
    assert not any(part in str(caught.value) for part in ("\n", "validation error", "errors.pydantic.dev"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "own.yaml"),
        ("pipeline: {}\n", "has no 'transform'"),
        ("transform: HorizontalFlip\n", "has no 'transform'"),
        ("transform: {__class_fullname__: HorizontalFlip, p: 0.5}\n", "contains HorizontalFlip; save an .*Compose"),
        ("transform: [", "own.yaml"),
    ],
)
def test_other_files_are_refused(text: str, words: str, tmp_path: Path) -> None:
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
