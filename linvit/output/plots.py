"""Plots: one palette, text that is never read as mathematics, files that are never half written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.ticker import LogFormatterMathtext, NullFormatter

from linvit.output.files import write_file

# Okabe and Ito's colours and a wine red: distinguishable under red-green blindness. Markers tell lines apart in grey.
PALETTE = ("#000000", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
# The same hues for a dark background.
DARK_PALETTE = ("#e8eaed", "#58a6e0", "#f0b429", "#2fc99b", "#e29bc4", "#f08040", "#8accf5", "#d0729a")
BLACK, BLUE, ORANGE, GREEN, PINK, RED, SKY, WINE = PALETTE
GREY, LIGHT_GREY = "#666666", "#bbbbbb"

_VERBATIM = {"text.parse_math": False}


def series_style(index: int) -> dict[str, Any]:
    """Colour and marker of the line with this index; the pairs repeat after 64 lines."""
    # Each time the colours repeat, the markers move on by one.
    shift = index // len(PALETTE)
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[(index + shift) % len(MARKERS)]}


def save_figure(path: Path, figure: Figure, *, dpi: int = 150, metadata: dict[str, str] | None = None) -> None:
    """Write a figure as a PNG. A `$` in a name is a dollar sign, not the start of a formula.

    Raises OSError, naming the file, where it cannot be written.
    """
    for axis in figure.findobj(Axis):
        # A logarithmic axis labels its ticks with formulas.
        if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        if isinstance(axis.get_minor_formatter(), LogFormatterMathtext):
            axis.set_minor_formatter(NullFormatter())
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    # Tick labels are created while the figure is drawn.
    with matplotlib.rc_context(_VERBATIM):
        write_file(path, lambda file: figure.savefig(file, format="png", dpi=dpi, metadata=metadata))


def drawable(names: Sequence[str]) -> list[str]:
    """Names as plots can show them: `#3` in place of the fourth name where the font lacks one of its characters."""
    known = FT2Font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    return [
        name if all(ord(character) in known for character in name) else f"#{number}"
        for number, name in enumerate(names)
    ]
