"""Every sound file gives RGB, every broken one an error with its name."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from linvit.data.decode import EXTENSIONS, read_image

FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "BMP": {},
    "PPM": {},
    "TIFF": {"compression": "tiff_lzw"},
    "WEBP": {"quality": 95},
}


def encoded(image: Image.Image, form: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_formats_are_read_as_pillow_reads_them(
    form: str, tmp_path: Path, smooth_image: Callable[..., np.ndarray]
) -> None:
    file = tmp_path / "image.dat"
    file.write_bytes(encoded(Image.fromarray(smooth_image(40, 60)), form, **FORMATS[form]))
    image = read_image(file)
    assert image.dtype == np.uint8
    expected = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert image.shape == (40, 60, 3)
    assert np.abs(image - expected).mean() < 1.5


@pytest.mark.parametrize("form", [*FORMATS, "progressive"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99, 1.0])
def test_a_truncated_file_is_an_error(form: str, share: float, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    if form == "progressive":
        data = encoded(Image.fromarray(pixels), "JPEG", progressive=True, quality=90)
    else:
        data = encoded(Image.fromarray(pixels), form, **FORMATS[form])
    # A share of 1 means: nothing but the last two bytes is missing.
    file = tmp_path / "cut.jpg"
    file.write_bytes(data[: min(int(len(data) * share), len(data) - 2)])
    with pytest.raises(ValueError, match=r"cut\.jpg: is truncated"):
        read_image(file)


def test_a_jpeg_cut_behind_its_thumbnail_is_an_error(tmp_path: Path, smooth_image: Callable[..., np.ndarray]) -> None:
    # The embedded thumbnail has an end marker of its own.
    thumbnail = encoded(Image.fromarray(smooth_image(20, 20)), "JPEG")
    data = encoded(Image.fromarray(smooth_image(200, 300)), "JPEG", exif=b"Exif\0\0" + thumbnail)
    file = tmp_path / "cut.jpg"
    file.write_bytes(data[: data.index(thumbnail) + len(thumbnail)])
    with pytest.raises(ValueError, match=r"cut\.jpg"):
        read_image(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"not an image at all", "no image"),
        (b"\0" * 5000, "no image"),
        # The header of a PNG of 10^12 pixels.
        (
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\x0f\x42\x40\0\x0f\x42\x40\x08\x02\0\0\0\xd9\x17\xcb\xb0",
            "cannot be decoded|no image",
        ),
    ],
)
def test_what_is_no_image_is_an_error(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.png: .*({words}).*restore or remove"):
        read_image(file)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.png: cannot be read"):
        read_image(tmp_path / "gone.png")


def test_bytes_behind_the_end_do_no_harm(tmp_path: Path, smooth_image: Callable[..., np.ndarray]) -> None:
    file = tmp_path / "padded.jpg"
    data = encoded(Image.fromarray(smooth_image(40, 60)), "JPEG", quality=95)
    file.write_bytes(data)
    plain = read_image(file)
    file.write_bytes(data + b"\0" * 100)
    assert np.array_equal(read_image(file), plain)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_the_exif_orientation_is_applied(
    orientation: int, turns: int, tmp_path: Path, smooth_image: Callable[..., np.ndarray]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = smooth_image(40, 60)
    file = tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(file, quality=95, exif=exif)
    expected = np.rot90(pixels, turns).astype(int)
    image = read_image(file)
    assert image.shape == expected.shape
    assert np.abs(image - expected).mean() < 2


def _grey(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert("L")


def _alpha(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels).convert("RGBA")
    image.putalpha(Image.fromarray((np.arange(60) * 4).astype(np.uint8)[None].repeat(40, axis=0)))
    return image


@pytest.mark.parametrize(
    ("convert", "suffix"),
    [
        (_grey, ".png"),
        (_grey, ".jpg"),
        (_alpha, ".png"),
        (lambda pixels: Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE), ".png"),
        (lambda pixels: _grey(pixels).convert("LA"), ".png"),
        (lambda pixels: Image.fromarray(pixels).convert("1"), ".png"),
        (lambda pixels: Image.fromarray(pixels).convert("CMYK"), ".jpg"),
    ],
)
def test_colour_modes_become_rgb_as_with_pillow(
    convert: Callable[[np.ndarray], Image.Image],
    suffix: str,
    tmp_path: Path,
    smooth_image: Callable[..., np.ndarray],
) -> None:
    file = tmp_path / f"image{suffix}"
    convert(smooth_image(40, 60)).save(file)
    expected = np.asarray(Image.open(file).convert("RGB")).astype(int)
    image = read_image(file)
    assert image.shape == (40, 60, 3)
    assert np.abs(image - expected).mean() < 2


def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(8, axis=0)
    file = tmp_path / "deep.png"
    Image.fromarray(ramp).save(file)
    assert np.abs(read_image(file)[0, :, 0].astype(int) - ramp[0] // 256).max() <= 1


def test_extensions_are_lower_case() -> None:
    assert all(extension == extension.lower() and extension.startswith(".") for extension in EXTENSIONS)
