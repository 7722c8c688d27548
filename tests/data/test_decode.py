"""Valid files become RGB, broken ones raise an error; damaged JPEG headers are harmless; resizing equals Pillow's."""

import io
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from jpegs import KINDS, encode, photo
from PIL import Image

from linvit.data.decode import (
    EXTENSIONS,
    CostlyImage,
    UnreadableImage,
    UnsupportedImage,
    decode_image,
    read_file,
    read_image,
    reducible_size,
    resize,
)
from linvit.data.sources.loose import find_images

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
    # A share of 1 removes only the last two bytes.
    file = tmp_path / "truncated.jpg"
    file.write_bytes(data[: min(int(len(data) * share), len(data) - 2)])
    with pytest.raises(ValueError, match=r"truncated\.jpg: is truncated"):
        read_image(file)


def test_a_jpeg_truncated_after_its_thumbnail_is_an_error(
    tmp_path: Path, smooth_image: Callable[..., np.ndarray]
) -> None:
    # The embedded thumbnail has its own end marker.
    thumbnail = encoded(Image.fromarray(smooth_image(20, 20)), "JPEG")
    data = encoded(Image.fromarray(smooth_image(200, 300)), "JPEG", exif=b"Exif\0\0" + thumbnail)
    file = tmp_path / "truncated.jpg"
    file.write_bytes(data[: data.index(thumbnail) + len(thumbnail)])
    with pytest.raises(ValueError, match=r"truncated\.jpg"):
        read_image(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"not an image at all", "not an image"),
        (b"\0" * 5000, "not an image"),
        # The header of a PNG of 10^12 pixels.
        (
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\x0f\x42\x40\0\x0f\x42\x40\x08\x02\0\0\0\xd9\x17\xcb\xb0",
            "cannot be decoded|not an image",
        ),
    ],
)
def test_a_file_that_is_not_an_image_is_an_error(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.png: .*({words}).*restore or remove"):
        read_image(file)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.png: cannot be read"):
        read_image(tmp_path / "gone.png")


def test_bytes_after_the_end_are_ignored(tmp_path: Path, smooth_image: Callable[..., np.ndarray]) -> None:
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


def greyscale(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert("L")


def transparent(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels).convert("RGBA")
    image.putalpha(Image.fromarray((np.arange(60) * 4).astype(np.uint8)[None].repeat(40, axis=0)))
    return image


@pytest.mark.parametrize(
    ("convert", "suffix"),
    [
        (greyscale, ".png"),
        (greyscale, ".jpg"),
        (transparent, ".png"),
        (lambda pixels: Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE), ".png"),
        (lambda pixels: greyscale(pixels).convert("LA"), ".png"),
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 64), (1, 1), (17, 33)])
def test_the_size_in_the_header_is_that_of_the_decoded_image(kind: str, shape: tuple[int, int]) -> None:
    for orientation in (None, 1, 3, 5, 6, 8):
        data = encode(photo(*shape), kind, orientation=orientation)
        if (orientation or 1) != 1 and shape != (40, 64):
            # The decoder would rotate a last column that covers fewer pixels to the front.
            assert reducible_size(data) is None
            continue
        assert reducible_size(data) == (shape if (orientation or 1) < 5 else shape[::-1])
        assert reducible_size(data) == decode_image(data, name="image").shape[:2]


def exif(order: str, *, tag: int = 0x0112, value: int = 6) -> bytes:
    """An EXIF segment with one entry."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    tiff = mark + struct.pack(f"{order}IHHHIHHI", 8, 1, tag, 3, 1, value, 0, 0)
    payload = b"Exif\0\0" + tiff
    return b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("value", "is_rotated"), [(0, False), (4, False), (5, True), (8, True), (9, False), (500, False)]
)
def test_exif_is_read_in_both_byte_orders(order: str, value: int, is_rotated: bool) -> None:
    plain = encode(photo(40, 64))
    data = plain[:2] + exif(order, value=value) + plain[2:]
    assert reducible_size(data) == ((64, 40) if is_rotated else (40, 64)) == decode_image(data, name="image").shape[:2]


@pytest.mark.parametrize("length", range(14, 36, 3))
def test_a_damaged_exif_directory_is_ignored(length: int) -> None:
    plain = encode(photo(40, 64))
    segment = exif("<")
    short = segment[:2] + struct.pack(">H", length - 2) + segment[4:length]
    assert reducible_size(plain[:2] + short + plain[2:]) in ((40, 64), (64, 40))


def test_other_files_have_no_size() -> None:
    data = encode(photo(40, 64))
    assert reducible_size(b"") is None
    assert reducible_size(b"\x89PNG\r\n\x1a\n" + data) is None
    assert reducible_size(data[:2]) is None
    # Fill bytes before a marker are allowed.
    assert reducible_size(data[:2] + b"\xff\xff" + data[2:]) == (40, 64)
    # A height of 0 means that the height follows at the end of the data.
    start = data.index(b"\xff\xc0")
    assert reducible_size(data[: start + 5] + b"\0\0" + data[start + 7 :]) is None


def test_damaged_headers_raise_no_error() -> None:
    rng = np.random.default_rng(0)
    data = encode(photo(40, 64), orientation=6)
    for _ in range(2000):
        damaged = bytearray(data[: rng.integers(len(data))])
        for place in rng.integers(0, max(len(damaged), 1), 3) if damaged else ():
            damaged[place] = rng.integers(256)
        size = reducible_size(bytes(damaged))
        assert size is None or min(size) > 0


RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("interpolation", RESAMPLING)
@pytest.mark.parametrize("target", [(32, 32), (23, 71), (97, 131), (200, 150)])
def test_resizing_noise_equals_pillow(interpolation: str, target: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize(target[::-1], RESAMPLING[interpolation]))
    resized = resize(image, *target, interpolation)
    assert resized.dtype == np.uint8
    assert resized.flags.c_contiguous
    assert np.abs(resized.astype(int) - expected).max() <= 2


def test_fine_stripes_shrink_to_grey() -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    for interpolation in RESAMPLING:
        # The two columns at each border cover fewer stripes.
        assert np.abs(resize(stripes, 48, 48, interpolation)[:, 2:-2].astype(int) - 127).max() < 25


def test_a_window_of_an_image_is_resized_like_its_copy() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    window = image[7:50, 11:70]
    assert np.array_equal(resize(window, 32, 32, "bicubic"), resize(window.copy(), 32, 32, "bicubic"))


def test_nearest_copies_pixels_unchanged() -> None:
    image = np.random.default_rng(0).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    assert np.array_equal(resize(image, 20, 20, "nearest"), image.repeat(2, axis=0).repeat(2, axis=1))


def test_the_same_size_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    assert np.array_equal(resize(image, 10, 12, "bicubic"), image)


def with_scans(num_scans: int) -> bytes:
    """A progressive JPEG of 2000 x 2000 pixels whose last scan, of a few bytes, is repeated."""
    data = encoded(Image.new("L", (2000, 2000), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * num_scans + data[-2:]


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once() -> None:
    with pytest.raises(CostlyImage, match=r"bomb\.jpg: is a JPEG of 3,005 scans, which takes too long"):
        decode_image(with_scans(3000), name="bomb.jpg")
    assert decode_image(with_scans(10), name="a.jpg").shape == (2000, 2000, 3)


def test_a_sequential_jpeg_with_a_scan_per_channel_counts_its_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photo(40, 60), "grey")
    # With a second channel in the header, the first scan is not the only one.
    monkeypatch.setattr("linvit.data.decode._MAX_SCANNED_PIXELS", 1)
    frame = data.index(b"\xff\xc0")
    channels = data[:frame] + data[frame:].replace(b"\0\x28\0\x3c\x01", b"\0\x28\0\x3c\x02", 1)
    first = channels.index(b"\xff\xda")
    with pytest.raises(CostlyImage, match="31 scans"):
        decode_image(channels[:first] + channels[first:-2] * 31, name="a.jpg")


@pytest.mark.parametrize(
    "filler", [b"\xff" * 30_000_000, b"\xff\xe1\0\x02" * 5_000_000], ids=["fill bytes", "segments"]
)
def test_a_jpeg_header_without_end_is_given_up(filler: bytes) -> None:
    assert reducible_size(b"\xff\xd8" + filler) is None


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
    kinds = {"pipe.jpg": "a pipe", "folder.jpg": "a folder", "device.png": "a device", "socket.jpg": "a socket"}
    for name, kind in kinds.items():
        with pytest.raises(UnreadableImage, match=f"{name}: is {kind}, not an image file"):
            read_file(tmp_path / name)


def test_a_path_that_cannot_exist_is_unreadable() -> None:
    with pytest.raises(UnreadableImage, match="embedded null byte"):
        read_file("a\0.jpg")
    with pytest.raises(UnreadableImage, match="cannot be read"):
        read_file("a" * 5000)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(50 * 2**30)
    with pytest.raises(UnreadableImage, match=r"large\.jpg: has 53,687,091,200 bytes"):
        read_file(tmp_path / "large.jpg")


@pytest.mark.parametrize(
    "data",
    [
        b"P6\n" + b"9" * 5000 + b" 5 255\n" + bytes(100),
        b"P5\n5 5\n" + b"9" * 5000 + b"\n" + bytes(100),
        b"P6\n2147483647 2147483647 255\n",
        b"P4\n-5 5\n" + bytes(100),
    ],
)
def test_a_ppm_with_absurd_numbers_is_unreadable(data: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode_image(data, name="a.ppm")


@pytest.mark.parametrize(
    ("extension", "form"), [("gif", "GIF"), ("avif", "AVIF"), ("jp2", "JPEG2000"), ("jfif", "JPEG")]
)
def test_further_formats_are_found_and_read_as_pillow_reads_them(
    extension: str, form: str, tmp_path: Path, smooth_image: Callable[..., np.ndarray]
) -> None:
    image = Image.fromarray(smooth_image(40, 60))
    (tmp_path / f"a.{extension}").write_bytes(encoded(image, form))
    (path,) = find_images([tmp_path]).paths
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(read_image(path) - expected).mean() < 1.5
    truncated = path.read_bytes()[:-200]
    with pytest.raises(UnreadableImage, match="is truncated"):
        decode_image(truncated, name=path)


def test_the_first_frame_of_a_gif_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    image = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), name="a.gif")
    assert image.shape == (8, 8, 3)
    assert (image == (255, 0, 0)).all()


def test_an_intact_file_of_floats_is_unsupported_rather_than_damaged() -> None:
    floats = Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40))
    with pytest.raises(UnsupportedImage, match=r"a\.tif: is an image of float32 values, which is not"):
        decode_image(encoded(floats, "TIFF"), name="a.tif")
    with pytest.raises(UnsupportedImage, match=r"a\.png: is a PCX image of mode RGB, which is not supported"):
        decode_image(encoded(Image.new("RGB", (40, 30)), "PCX"), name="a.png")
    with pytest.raises(UnsupportedImage, match="float32"):
        decode_image(b"Pf\n4 5\n-1.0\n" + bytes(80), name="a.ppm")
    colours = cv2.imencode(".tiff", np.ones((30, 40, 3), np.float32))[1].tobytes()
    with pytest.raises(UnsupportedImage, match=r"a\.tif: is an image of float32 values, which is not supported"):
        decode_image(colours, name="a.tif")
    with pytest.raises(UnreadableImage, match="is truncated, damaged") as caught:
        decode_image(encoded(floats, "TIFF")[:-100], name="a.tif")
    assert not isinstance(caught.value, UnsupportedImage)
