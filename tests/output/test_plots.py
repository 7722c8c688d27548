"""Plots show text as it is written, also on logarithmic axes, and names in a font that has their characters."""

import warnings
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from linvit.output.plots import MARKERS, PALETTE, drawable, save_figure, series_style


def tick_labels(axes: Axes) -> list[str]:
    return [label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels(which="both")]


def test_logarithmic_axes_have_plain_numbers(tmp_path: Path) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.loglog([1e-7, 1.0], [1.0, 1e9])
    save_figure(tmp_path / "a.png", figure)
    labels = tick_labels(axes)
    assert {"1e-07", "0.001", "1e+06"} <= set(labels)
    assert not [label for label in labels if "$" in label]


def test_dollar_signs_are_not_formulas(tmp_path: Path) -> None:
    pictures = []
    for name in (r"$\frac{$", "plain"):
        figure = Figure()
        axes = figure.subplots()
        axes.set_title(name)
        axes.set_xticks([0, 1], [name, "b"])
        save_figure(tmp_path / "a.png", figure)
        assert not [text for text in figure.findobj(Text) if text.get_parse_math()]
        pictures.append(imread(tmp_path / "a.png"))
    assert not np.array_equal(*pictures)


def test_names_that_the_font_lacks_become_numbers(tmp_path: Path) -> None:
    names = drawable(["crack", "裂纹", "fissure é", "a\nb"])
    assert names == ["crack", "#1", "fissure é", "#3"]
    figure = Figure()
    figure.subplots().set_title(" ".join(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(tmp_path / "a.png", figure)


def test_lines_differ_in_colour_or_marker() -> None:
    styles = [tuple(series_style(index).values()) for index in range(64)]
    assert len(set(styles)) == 64
    assert styles[0] == (PALETTE[0], MARKERS[0])
