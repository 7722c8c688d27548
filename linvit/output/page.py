"""Self-contained HTML pages from Jinja2 templates that extend `templates/base.html.j2`.

A page loads nothing: scripts, styles and images are inside it, and its content security policy forbids the rest. Every
string in the context is escaped and on one line, unless a macro or a function here made it HTML.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import cv2
import numpy as np
from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from linvit.output.files import json_text, printable
from linvit.output.plots import DARK_PALETTE, PALETTE
from linvit.output.terminal import format_bytes, format_count, format_duration, format_size
from linvit.version import __version__

# Longest side of a thumbnail in pixels.
THUMBNAIL_SIDE = 180
# Sorting, tabs and tooltips, on every page.
_COMMON_SCRIPTS = ("page.js",)


def render(package: str, template: str, *, scripts: Sequence[str] = (), **context: Any) -> str:
    """The HTML page of a template, which extends "base.html.j2".

    Args:
        package: the package whose folder contains the template and its scripts, such as "linvit.check".
        template: path of the template in that folder.
        scripts: paths of JavaScript files in that folder or in linvit/output/templates, such as "chart.js". They run in
            this order at the end of the page, and read their data from `data(...)` in the template.
        context: the template's variables; using one that is missing raises jinja2.UndefinedError.
    """
    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader("linvit.output", "templates")])
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "count": format_count,
        "duration": format_duration,
        "size": format_size,
        "thousands": "{:,}".format,
    }
    script = _join_scripts(environment, loader, (*_COMMON_SCRIPTS, *scripts))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "data": embed_json,
        # In a page there is no need to escape what a file of the package contains.
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "palette": _palette_css(PALETTE),
        "dark_palette": _palette_css(DARK_PALETTE),
        "version": __version__,
    }
    return environment.get_template(template).render(context)


def embed_json(name: str, value: Any) -> Markup:
    """A script element with the id `data-NAME` that contains `value` as JSON; `page.js` reads it with `data(NAME)`.

    Strings are made printable, numbers that are not finite become null.
    """
    # No text can end the element or begin a comment: `<` and `>` are written as escapes.
    text = json_text(_printable(value), indent=None).strip()
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup('<script type="application/json" id="data-{}">').format(name) + Markup(text + "</script>")


def image_uri(
    image: np.ndarray, *, side: int | None = THUMBNAIL_SIDE, kind: Literal["jpg", "png"] = "jpg", quality: int = 85
) -> str:
    """An image (H, W, 3) uint8 in RGB as a `data:` URI.

    Args:
        side: images are reduced to this longest side in pixels; None keeps their size.
        kind: JPEG for photographs, PNG for drawings.
        quality: of the JPEG, 0 to 100.
    """
    height, width = image.shape[:2]
    scale = 1.0 if side is None else min(1.0, side / max(height, width))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality] if kind == "jpg" else []
    encoded = cv2.imencode(f".{kind}", np.ascontiguousarray(image[..., ::-1]), settings)[1]
    media = {"jpg": "image/jpeg", "png": "image/png"}[kind]
    return f"data:{media};base64,{base64.b64encode(encoded.tobytes()).decode()}"


def _finalize(value: Any) -> Any:
    """A value as a template shows it: text on one line, except HTML that macros made."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(name)): _printable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(each) for each in value]
    return value


def _join_scripts(environment: Environment, loader: BaseLoader, names: Iterable[str]) -> str:
    return "\n" + "\n".join(loader.get_source(environment, name)[0] for name in names)


def _palette_css(colours: Iterable[str]) -> Markup:
    return Markup(" ").join(Markup(f"--series-{index}: {colour};") for index, colour in enumerate(colours))
