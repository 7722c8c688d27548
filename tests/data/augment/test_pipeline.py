"""A file and its decoded image come to the same; what is decoded at a reduced size, to nearly the same."""

from collections.abc import Callable
from typing import Any

import albumentations as A
import numpy as np
import pytest
from jpegs import KINDS, encode, photo

from linvit.data.augment.build import InputSpec, Pipeline, build_eval_pipeline, build_train_pipeline
from linvit.data.decode import UnreadableImage, decode_image
from linvit.data.options import AugmentOptions
from linvit.data.sampler import sample_generators

SPEC = InputSpec((24, 24), (0.5,) * 3, (0.2,) * 3, "bicubic", 0.9, "center")
PLAIN = AugmentOptions(color_jitter=None)

Reductions = Callable[[], list[int]]


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> Reductions:
    """By how much images were reduced since the last call."""
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
    """The result from the file, and from its whole image."""
    pipeline.set_random_state(*sample_generators(0, 0, index))
    read = pipeline.read(data, name="image")
    pipeline.set_random_state(*sample_generators(0, 0, index))
    return read, pipeline(image=decode_image(data, name="image"))["image"]


@pytest.mark.parametrize("kind", KINDS)
def test_small_images_are_read_to_the_same_pixels(kind: str, reductions: Reductions) -> None:
    options = AugmentOptions(aa="rand-m9-mstd0.5-inc1", reprob=0.5, gaussian_blur_prob=0.3)
    data = encode(photo(70, 90), kind, orientation=6)
    for pipeline in (build_eval_pipeline(SPEC), build_train_pipeline(options, SPEC)):
        for index in range(6):
            read, called = both(pipeline, data, index)
            assert np.array_equal(read, called)
    assert set(reductions()) == {1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "orientation"), [((432, 600), None), ((432, 600), 6), ((240, 248), 3)])
def test_large_images_are_reduced_to_nearly_the_same_pixels(
    kind: str, shape: tuple[int, int], orientation: int | None, reductions: Reductions
) -> None:
    data = encode(photo(*shape), kind, orientation=orientation)
    for pipeline in (build_eval_pipeline(SPEC), build_train_pipeline(PLAIN, SPEC)):
        for index in range(3):
            read, called = both(pipeline, data, index)
            difference = np.abs(read.astype(int) - called)
            # Of chroma that is halved in one direction alone, the decoder averages other pixels.
            assert difference.mean() < (2.5 if kind == "4:2:2" else 1)
            assert np.percentile(difference, 99) <= (9 if kind == "4:2:2" else 4)
    assert max(reductions()) > 1


@pytest.mark.parametrize("orientation", [None, 3, 6])
def test_images_of_an_odd_size_are_not_moved_by_half_a_pixel(orientation: int | None, reductions: Reductions) -> None:
    # A stripe a resized pixel wide: were it elsewhere by half of one, half of its brightness would be.
    pixels = np.zeros((433, 439, 3), np.uint8)
    pixels[208:226] = pixels[:, 208:226] = 255
    read, called = both(build_eval_pipeline(SPEC), encode(pixels, orientation=orientation), 0)
    assert np.abs(read.astype(int) - called).max() < 64
    assert reductions()[0] == (8 if orientation is None else 1)


def test_windows_are_decoded_no_smaller_than_they_need(reductions: Reductions) -> None:
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
    cuts = [2, 20, 300, 700, len(data) // 3, len(data) // 2, len(data) - 500, len(data) - 2, len(data) - 1]
    for cut in cuts:
        for reduction in (1, 2, 4, 8):
            with pytest.raises(UnreadableImage, match=r"^name: is truncated"):
                decode_image(data[:cut], name="name", reduction=reduction)  # type: ignore[arg-type]
        with pytest.raises(UnreadableImage, match=r"^name: is truncated"):
            build_eval_pipeline(SPEC).read(data[:cut], name="name")


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


def test_the_decoders_size_counts_where_a_header_says_another(
    reductions: Reductions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linvit.data.augment.build.reducible_size", lambda data: (900, 300))
    data = encode(photo(300, 900))
    for index in range(4):
        pipeline = build_train_pipeline(PLAIN, SPEC)
        read, called = both(pipeline, data, index)
        assert np.array_equal(read, called)
        assert reductions()[-1] == 1


def test_a_users_pipeline_sees_whole_images(reductions: Reductions) -> None:
    shapes = []

    def note(image: np.ndarray, **params: Any) -> np.ndarray:
        shapes.append(image.shape)
        return image[:24, :24]

    pipeline = Pipeline(None, A.Compose([A.Lambda(image=note, name="note")]))
    pipeline.read(encode(photo(400, 500)), name="image")
    assert shapes == [(400, 500, 3)]
    assert reductions() == [1]


def test_the_image_given_is_left_as_it_is() -> None:
    def scratch(image: np.ndarray, **params: Any) -> np.ndarray:
        image[:] = 0
        return image

    blank = A.Compose([A.Lambda(image=scratch, name="scratch")])
    image = photo(24, 24)
    before = image.copy()
    for crop in (None, build_eval_pipeline(InputSpec((24, 24), (0.5,) * 3, (0.2,) * 3, "bicubic", 1.0, "center")).crop):
        assert not Pipeline(crop, blank)(image=image)["image"].any()
        assert np.array_equal(image, before)
