"""Formats are recognised, and truncated files are distinguished from damaged ones."""

import cv2
import numpy as np
import pytest
from corpus import encoded, random_image
from PIL import Image

from linvit.check.header import format_named, format_of, is_truncated

FORMATS = {"JPEG": "JPEG", "PNG": "PNG", "BMP": "BMP", "PPM": "PNM", "TIFF": "TIFF", "WEBP": "WEBP"}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kept", [12, 0.3, 0.7, 0.97, -1])
def test_a_truncated_file_is_recognised_wherever_it_ends(form: str, kept: float) -> None:
    data = encoded(random_image(0), form)
    assert not is_truncated(data, FORMATS[form])
    assert is_truncated(data[: kept if isinstance(kept, int) else int(kept * len(data))], FORMATS[form])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_changed_byte_is_not_truncation(form: str) -> None:
    data = bytearray(encoded(random_image(0), form))
    data[len(data) // 2] ^= 0xFF
    assert not is_truncated(bytes(data), form)


def test_grey_and_16_bit_files_can_be_truncated() -> None:
    for image in (random_image(0).convert("L"), Image.new("I;16", (40, 30))):
        for form, name in (("PPM", "PNM"), ("TIFF", "TIFF")):
            data = encoded(image, form)
            assert not is_truncated(data, name)
            assert is_truncated(data[:-9], name)


@pytest.mark.parametrize("kept", [16, 0.3, 0.97, -1])
def test_a_tiff_with_its_directory_at_the_end_can_be_truncated(kept: float) -> None:
    data = cv2.imencode(".tiff", np.asarray(random_image(0)))[1].tobytes()
    assert int.from_bytes(data[4:8], "little") > len(data) / 2
    assert not is_truncated(data, "TIFF")
    assert is_truncated(data[: kept if isinstance(kept, int) else int(kept * len(data))], "TIFF")


def test_a_tiff_with_damaged_strips_is_not_truncated() -> None:
    data = cv2.imencode(".tiff", np.asarray(random_image(0)))[1].tobytes()
    assert not is_truncated(data[:20] + b"\xff" * 2000 + data[2020:], "TIFF")


@pytest.mark.parametrize("form", [*FORMATS, "GIF", "AVIF"])
def test_formats_are_recognised_by_their_first_bytes(form: str) -> None:
    assert format_of(encoded(random_image(0), form)[:32]) == FORMATS.get(form, form)


def test_extensions_name_formats() -> None:
    assert [format_named(name) for name in ("a/b.JPG", "b.tif", "c.heic", "png")] == ["JPEG", "TIFF", None, None]
