"""What is cut off is told from what is broken otherwise."""

import pytest
from corpus import encoded, picture
from PIL import Image

from linvit.check.cut import is_cut_off
from linvit.check.inspect import format_named, format_of

FORMATS = {"JPEG": "JPEG", "PNG": "PNG", "BMP": "BMP", "PPM": "PNM", "TIFF": "TIFF", "WEBP": "WEBP"}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kept", [12, 0.3, 0.7, 0.97, -1])
def test_a_cut_is_found_wherever_it_is(form: str, kept: float) -> None:
    data = encoded(picture(0), form)
    assert not is_cut_off(data, FORMATS[form])
    assert is_cut_off(data[: kept if isinstance(kept, int) else int(kept * len(data))], FORMATS[form])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_change_in_the_middle_is_no_cut(form: str) -> None:
    data = bytearray(encoded(picture(0), form))
    data[len(data) // 2] ^= 0xFF
    assert not is_cut_off(bytes(data), form)


def test_grey_and_deep_files_have_their_lengths() -> None:
    for image in (picture(0).convert("L"), Image.new("I;16", (40, 30))):
        for form, name in (("PPM", "PNM"), ("TIFF", "TIFF")):
            data = encoded(image, form)
            assert not is_cut_off(data, name)
            assert is_cut_off(data[:-9], name)


@pytest.mark.parametrize("form", [*FORMATS, "GIF", "AVIF"])
def test_formats_are_known_by_their_beginning(form: str) -> None:
    assert format_of(encoded(picture(0), form)[:32]) == FORMATS.get(form, form)


def test_names_stand_for_formats() -> None:
    assert [format_named(name) for name in ("a/b.JPG", "b.tif", "c.gif", "png")] == ["JPEG", "TIFF", None, None]
