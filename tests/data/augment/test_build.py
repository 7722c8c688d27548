"""Pipelines have the transforms of the options, and draw only from the generators of the sample."""

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import functional

from linvit.data.augment.build import InputSpec, Pipeline, build_eval_pipeline, build_train_pipeline, resolve_input
from linvit.data.augment.erasing import RandomErasing
from linvit.data.augment.randaugment import PolicyAugment
from linvit.data.geometry import EvalCrop, RandomKeepRatioCrop, RandomResizedCrop
from linvit.data.options import AugmentOptions, InputOptions
from linvit.data.sampler import sample_generators

SPEC = InputSpec(
    size=(32, 32),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop_pct=0.875,
    crop_mode="center",
)
EVERYTHING = AugmentOptions(
    vflip=0.5,
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    color_jitter_prob=0.8,
    grayscale_prob=0.3,
    gaussian_blur_prob=0.5,
    aa="rand-m9-mstd0.5-inc1-n3",
    reprob=0.6,
    recount=3,
)


def kinds(options: AugmentOptions) -> list[type]:
    return [type(transform) for transform in build_train_pipeline(options, SPEC).transforms]


def augmented(
    pipeline: Pipeline | A.Compose, image: np.ndarray, index: int, *, seed: int = 0, epoch: int = 0
) -> np.ndarray:
    pipeline.set_random_state(*sample_generators(seed, epoch, index))
    return pipeline(image=image)["image"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [RandomResizedCrop, A.HorizontalFlip, A.ColorJitter]),
        ({"hflip": 0.0, "color_jitter": 0.0}, [RandomResizedCrop]),
        ({"hflip": 0.0, "color_jitter": None}, [RandomResizedCrop]),
        # timm's rule: an automatic policy other than 3-Augment disables colour jitter.
        ({"aa": "rand-m9-mstd0.5-inc1"}, [RandomResizedCrop, A.HorizontalFlip, PolicyAugment]),
        ({"aa": "3a"}, [RandomResizedCrop, A.HorizontalFlip, PolicyAugment, A.ColorJitter]),
        ({"aa": "ta_wide", "vflip": 0.1}, [RandomResizedCrop, A.HorizontalFlip, A.VerticalFlip, PolicyAugment]),
        (
            {"transpose": 0.5, "aa": "3a", "color_jitter": None},
            [RandomResizedCrop, A.HorizontalFlip, A.Transpose, PolicyAugment],
        ),
        (
            {"grayscale_prob": 0.2, "gaussian_blur_prob": 0.1, "reprob": 0.25},
            [RandomResizedCrop, A.HorizontalFlip, A.ColorJitter, A.ToGray, A.GaussianBlur, RandomErasing],
        ),
        ({"train_crop_mode": "rkrc"}, [RandomKeepRatioCrop, A.HorizontalFlip, A.ColorJitter]),
        ({"train_crop_mode": "rkrr"}, [RandomKeepRatioCrop, A.HorizontalFlip, A.ColorJitter]),
        ({"no_aug": True, "aa": "3a", "reprob": 0.5}, [EvalCrop]),
    ],
)
def test_options_become_transforms_in_timms_order(options: dict[str, Any], expected: list[type]) -> None:
    assert kinds(AugmentOptions(**options)) == expected


def test_options_reach_the_transforms() -> None:
    crop, hflip, policy, jitter, erasing = build_train_pipeline(
        AugmentOptions(
            scale=(0.3, 0.9),
            ratio=(0.8, 1.2),
            train_interpolation="bilinear",
            hflip=0.3,
            aa="3a",
            color_jitter=(0.1, 0.2, 0.3, 0.05),
            color_jitter_prob=0.7,
            reprob=0.25,
            remode="rand",
            recount=2,
        ),
        SPEC,
    ).transforms
    assert (crop.size, crop.scale, crop.ratio, crop.interpolation) == ((32, 32), (0.3, 0.9), (0.8, 1.2), "bilinear")
    assert hflip.p == 0.3
    assert (policy.policy, policy.interpolation, policy.fill) == ("3a", "bilinear", (124, 116, 104))
    assert jitter.brightness == pytest.approx((0.9, 1.1))
    assert jitter.contrast == pytest.approx((0.8, 1.2))
    assert jitter.saturation == pytest.approx((0.7, 1.3))
    assert jitter.hue == pytest.approx((-0.05, 0.05))
    assert jitter.p == 0.7
    assert (erasing.p, erasing.mode, erasing.max_count, erasing.mean) == (0.25, "rand", 2, SPEC.mean)


def test_one_jitter_strength_does_not_change_hue() -> None:
    (jitter,) = [
        transform
        for transform in build_train_pipeline(AugmentOptions(color_jitter=0.4), SPEC).transforms
        if isinstance(transform, A.ColorJitter)
    ]
    assert jitter.brightness == jitter.contrast == jitter.saturation == pytest.approx((0.6, 1.4))
    assert jitter.hue == (0.0, 0.0)
    assert jitter.p == 1.0


@pytest.mark.parametrize(
    "options", [AugmentOptions(), EVERYTHING, AugmentOptions(no_aug=True), AugmentOptions(aa="3a")]
)
@pytest.mark.parametrize("shape", [(64, 48), (20, 300), (5, 5), (1, 1), (32, 32)])
def test_any_image_is_brought_to_the_input_size(
    options: AugmentOptions, shape: tuple[int, int], smooth_image: Callable[..., np.ndarray]
) -> None:
    spec = InputSpec((32, 24), SPEC.mean, SPEC.std, "bicubic", 0.9, "center")
    for pipeline in (build_train_pipeline(options, spec), build_eval_pipeline(spec)):
        for index in range(5):
            result = augmented(pipeline, smooth_image(*shape), index)
            assert result.shape == (32, 24, 3)
            assert result.dtype == np.uint8


def test_flips_are_independent() -> None:
    options = AugmentOptions(vflip=0.5, scale=(1.0, 1.0), ratio=(1.0, 1.0), color_jitter=None)
    pipeline = build_train_pipeline(options, SPEC)
    image = np.zeros((32, 32, 3), np.uint8)
    image[0, 0] = 255
    corners: Counter[tuple[int, int]] = Counter()
    for index in range(2000):
        row, column = np.argwhere(augmented(pipeline, image, index)[..., 0])[0]
        corners[int(row), int(column)] += 1
    # Each combination has probability 1/4: 500 of 2000, with a standard deviation of 19.
    assert set(corners) == {(0, 0), (0, 31), (31, 0), (31, 31)}
    assert all(400 < count < 600 for count in corners.values()), corners


def test_flips_and_transpose_give_the_eight_symmetries_of_a_square() -> None:
    options = AugmentOptions(vflip=0.5, transpose=0.5, scale=(1.0, 1.0), ratio=(1.0, 1.0), color_jitter=None)
    pipeline = build_train_pipeline(options, SPEC)
    image = np.repeat(np.arange(32 * 32).reshape(32, 32, 1) % 251, 3, axis=2).astype(np.uint8)
    symmetries = [np.rot90(mirrored, turns) for mirrored in (image, image[:, ::-1]) for turns in range(4)]
    counts = [0] * 8
    for index in range(2000):
        result = augmented(pipeline, image, index)
        counts[[np.array_equal(result, symmetry) for symmetry in symmetries].index(True)] += 1
    # Each symmetry has probability 1/8: 250 of 2000, with a standard deviation of 15.
    assert all(190 < count < 310 for count in counts), counts


def test_transpose_needs_a_square_input() -> None:
    spec = InputSpec((32, 24), SPEC.mean, SPEC.std, "bicubic", 0.9, "center")
    with pytest.raises(ValueError, match="transpose needs a square input, and the input size is 32 x 24: remove it"):
        build_train_pipeline(AugmentOptions(transpose=0.5), spec)


def test_transforms_of_the_same_class_draw_different_numbers() -> None:
    # albumentations' own seeding gives every transform the same numbers.
    pipeline = A.Compose(
        [A.OneOf([A.Rotate(limit=90, p=1.0)], p=1.0), A.Sequential([A.Rotate(limit=90, p=1.0)], p=1.0)]
    )
    first, second = pipeline.transforms[0].transforms[0], pipeline.transforms[1].transforms[0]
    angles = []
    for index in range(200):
        augmented(pipeline, np.zeros((8, 8, 3), np.uint8), index)
        angles.append((first.params["matrix"][0, 1], second.params["matrix"][0, 1]))
    assert abs(np.corrcoef(np.array(angles).T)[0, 1]) < 0.25


def test_global_generators_have_no_effect(smooth_image: Callable[..., np.ndarray]) -> None:
    image = smooth_image(48, 64)
    results = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        cv2.setRNGSeed(seed)
        pipeline = build_train_pipeline(EVERYTHING, SPEC)
        results.append([augmented(pipeline, image, index) for index in range(40)])
    assert all(np.array_equal(first, second) for first, second in zip(*results))
    assert len({result.tobytes() for result in results[0]}) == 40


def test_earlier_samples_have_no_effect(smooth_image: Callable[..., np.ndarray]) -> None:
    image = smooth_image(48, 64)
    pipeline = build_train_pipeline(EVERYTHING, SPEC)
    forwards = [augmented(pipeline, image, index) for index in range(12)]
    backwards = [augmented(pipeline, image, index) for index in reversed(range(12))]
    assert all(np.array_equal(first, second) for first, second in zip(forwards, reversed(backwards)))


def test_seed_epoch_and_index_matter(smooth_image: Callable[..., np.ndarray]) -> None:
    image = smooth_image(48, 64)
    pipeline = build_train_pipeline(AugmentOptions(), SPEC)
    variants = [
        augmented(pipeline, image, index, seed=seed, epoch=epoch).tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
        for index in (0, 1)
    ]
    assert len(set(variants)) == 8


def test_importing_albumentations_does_not_use_the_network() -> None:
    code = (
        "import sys; calls = [];"
        "sys.addaudithook(lambda event, _: calls.append(event) if event.startswith('socket.') else None);"
        "import linvit_command, linvit.data, albumentations; assert not calls, calls"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    # As in the console script, where linvit itself does not load its models.
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_evaluation_draws_nothing(smooth_image: Callable[..., np.ndarray]) -> None:
    pipeline = build_eval_pipeline(SPEC)
    image = smooth_image(48, 64)
    assert np.array_equal(augmented(pipeline, image, 0), augmented(pipeline, image, 1))


def test_colour_jitter_equals_torchvision(smooth_image: Callable[..., np.ndarray]) -> None:
    image = smooth_image(40, 50)
    jitter = A.ColorJitter()
    for factors in ((0.7, 1.3, 0.6, 0.0), (1.4, 0.6, 1.4, 0.0)):
        result = jitter.apply(image, *factors, order=[0, 1, 2, 3])
        expected = Image.fromarray(image)
        for factor, adjust in zip(
            factors, (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
        ):
            expected = adjust(expected, factor)
        assert np.abs(result.astype(int) - np.asarray(expected)).max() <= 4


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_gaussian_blur_equals_torchvision(sigma: float) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    (blur,) = [
        transform
        for transform in build_train_pipeline(AugmentOptions(gaussian_blur_prob=0.3), SPEC).transforms
        if isinstance(transform, A.GaussianBlur)
    ]
    assert blur.sigma_limit == (0.1, 2.0)
    assert blur.p == 0.3
    # timm uses a fixed kernel of 23 pixels; the kernel of albumentations ends where the weights become negligible.
    result = A.GaussianBlur(blur_limit=blur.blur_limit, sigma_limit=(sigma, sigma), p=1.0)(image=image)["image"]
    expected = functional.gaussian_blur(Image.fromarray(image), [23, 23], [sigma, sigma])
    assert np.abs(result.astype(int) - np.asarray(expected)).max() <= 1


class TestResolveInput:
    def test_the_defaults_are_those_of_the_timm_model(self) -> None:
        spec = resolve_input(timm.create_model("vit_tiny_patch16_224"), InputOptions())
        assert spec == InputSpec((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.9, "center")

    def test_the_size_is_that_of_the_built_or_resized_model(self) -> None:
        model = timm.create_model("vit_tiny_patch16_224", img_size=(96, 64))
        assert resolve_input(model, InputOptions()).size == (96, 64)
        model.set_input_size((48, 80))
        assert resolve_input(model, InputOptions()).size == (48, 80)

    def test_options_override_the_model(self) -> None:
        options = InputOptions(
            img_size=(64, 96),
            mean=0.1,
            std=(0.2, 0.3, 0.4),
            interpolation="bilinear",
            crop_pct=1.0,
            crop_mode="squash",
        )
        spec = resolve_input(timm.create_model("resnet18"), options)
        assert spec == InputSpec((64, 96), (0.1, 0.1, 0.1), (0.2, 0.3, 0.4), "bilinear", 1.0, "squash")

    def test_other_channels_are_refused(self) -> None:
        with pytest.raises(ValueError, match="takes 1 channels"):
            resolve_input(timm.create_model("resnet18", in_chans=1), InputOptions())

    def test_unsupported_interpolation_is_refused(self) -> None:
        model = timm.create_model("resnet18", pretrained_cfg_overlay={"interpolation": "lanczos"})
        with pytest.raises(ValueError, match="interpolation 'lanczos' is not supported; set bicubic"):
            resolve_input(model, InputOptions())
        assert resolve_input(model, InputOptions(interpolation="bicubic")).interpolation == "bicubic"

    @pytest.mark.parametrize(
        ("size", "words"),
        [
            ((66, 64), r"image size 66×64 is not a multiple of the patch size 4×4, .* use 64×64 or 68×64"),
            ((3, 64), "use 4×64$"),
        ],
    )
    def test_sizes_whose_edge_would_be_lost_are_refused(self, size: tuple[int, int], words: str) -> None:
        model = timm.create_model("linvit_mini_patch4_64", k=4, depth=1)
        with pytest.raises(ValueError, match=words):
            resolve_input(model, InputOptions(img_size=size))

    def test_padding_models_and_published_sizes_take_any_size(self) -> None:
        padding = {"dynamic_img_size": True, "dynamic_img_pad": True}
        model = timm.create_model("linvit_mini_patch4_64", k=4, depth=1, **padding)
        assert resolve_input(model, InputOptions(img_size=(66, 64))).size == (66, 64)
        with torch.device("meta"):
            model = timm.create_model("vit_so400m_patch14_siglip_384", depth=1)
        assert resolve_input(model, InputOptions(img_size=(384, 384))).size == (384, 384)
