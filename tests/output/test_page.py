"""Pages: everything is escaped, nothing is loaded, and the content security policy allows only the page's script."""

import base64
import hashlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from linvit.output import page
from linvit.output.page import embed_json, image_uri, render
from linvit.output.plots import DARK_PALETTE, PALETTE

HOSTILE = "</script><img src=x onerror=alert(1)><!--\x07\udc80 \u2028&"
HEAD = re.compile(r'<script type="application/json" id="data-x">(.*)</script>')


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package with templates, named tiny_pages."""
    folder = tmp_path / "tiny_pages"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_pages", raising=False)
    return folder


def test_data_in_a_page_cannot_leave_its_element_and_returns_unchanged():
    value = {"name": "</script><!-- &", HOSTILE: [1.5, float("nan"), None, "\u2028"]}
    text = embed_json("x", value)
    assert isinstance(text, Markup)
    match = HEAD.fullmatch(text)
    assert match is not None
    assert not set("<>&") & set(match[1])
    printable = "</script><img src=x onerror=alert(1)><!--�� �&"
    assert json.loads(match[1]) == {"name": "</script><!-- &", printable: [1.5, None, None, "�"]}
    assert 'id="data-&#34;&gt;"' in embed_json('">', 1)


def test_a_page_escapes_text_and_keeps_macros(templates: Path):
    (templates / "page.html.j2").write_text(
        '{% extends "base.html.j2" %}{% macro bold(x) %}<b>{{ x }}</b>{% endmacro %}'
        '{% block content %}{{ bold(name) }}<a title="{{ name }}"></a>{% endblock %}'
    )
    text = render("tiny_pages", "page.html.j2", title=HOSTILE, name=HOSTILE)
    shown = "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;&lt;!--�� �&amp;"
    assert f"<b>{shown}</b>" in text
    assert f'<a title="{shown}"></a>' in text
    assert f"<title>{shown}</title>" in text
    assert "<img" not in text


def test_only_the_script_of_the_page_may_run_and_nothing_is_loaded(templates: Path):
    (templates / "own.js").write_text('const own = "ü";')
    (templates / "page.html.j2").write_text('{% extends "base.html.j2" %}')
    text = render("tiny_pages", "page.html.j2", scripts=["chart.js", "own.js"], title="t")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script.endswith('const own = "ü";')
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)
    assert policy == (f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'")
    assert "http" not in text.replace("http-equiv", "")
    assert all(colour in text for colour in PALETTE + DARK_PALETTE)


def test_pictures_keep_their_colours_and_shrink():
    image = np.zeros((40, 100, 3), np.uint8)
    image[..., 0] = 200
    uri = image_uri(image, side=50)
    assert uri.startswith("data:image/jpeg;base64,")
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert decoded.shape == (20, 50, 3)
    assert np.abs(decoded.astype(int) - [200, 0, 0]).max() <= 3
    exact = image_uri(image, side=None, kind="png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(exact.split(",")[1])))), image)
    assert page.THUMBNAIL_SIDE == 180


@pytest.mark.parametrize(("palette", "background"), [(PALETTE, "#ffffff"), (DARK_PALETTE, "#15171b")])
def test_lines_stand_out_from_the_background(palette: tuple[str, ...], background: str):
    # Orange and sky blue, which are too light for white, draw the seventh and eighth of several runs.
    assert all(contrast(palette[index], background) >= 2.9 for index in (0, 1, 3, 4, 5, 7))


def contrast(a: str, b: str) -> float:
    """The contrast ratio of two colours, after WCAG 2."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
