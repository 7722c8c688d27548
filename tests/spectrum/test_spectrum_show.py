"""The plot shows the measured spectra and the plan."""

import numpy as np
from PIL import Image
from spectra import make_spectrum

from linvit.spectrum.plan import make_plan
from linvit.spectrum.show import draw, save_plot

SETTINGS = {"projection": "separable", "share": "kv", "min_k": 16}
RANKS = [[3.0, 2.0, 4.0], [60.0, 90.0, 150.0], [9.0, 12.0, 20.0]]


def panels(figure):
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def test_every_panel_shows_its_numbers():
    spectra = [make_spectrum(RANKS, grid_size=grid) for grid in ((16, 16), (8, 8))]
    plan = make_plan(spectra[0], {"speedup": 1.2}, **SETTINGS)
    curves, energies, heat_map, ranks, growth, frontier = panels(draw(spectra, index=40, plan=plan, **SETTINGS))
    for layer in range(3):
        np.testing.assert_allclose(curves.lines[layer].get_ydata(), spectra[0].cumulative[layer].mean(0))
        np.testing.assert_allclose(energies.lines[layer].get_ydata(), spectra[0].cumulative_energy[layer].mean(0))
    assert energies.get_xlim() == (1, 257)
    np.testing.assert_allclose(heat_map.images[0].get_array(), spectra[0].cumulative[..., 39])
    assert [text.get_text() for text in heat_map.texts][:1] == [f"{spectra[0].cumulative[0, 0, 39]:.2f}"]
    drawn = {line.get_label(): line for line in ranks.lines}
    np.testing.assert_allclose(drawn["95% of the energy"].get_ydata(), spectra[0].rank(0.95).mean(1))
    planned = drawn["planned k (N: ordinary attention)"].get_ydata()
    assert planned.tolist() == [256 if k is None else k for k in plan.k]
    drawn = {line.get_label().partition(":")[0]: line for line in growth.lines}
    np.testing.assert_allclose(drawn["99%"].get_xdata(), [65, 257])
    np.testing.assert_allclose(drawn["99%"].get_ydata(), [spectrum.rank(0.99).mean() for spectrum in spectra[::-1]])
    uniform, per_layer, chosen = frontier.lines
    assert chosen.get_xydata().tolist() == [[plan.speedup, plan.energy]]
    for speedup, energy in uniform.get_xydata():
        nearest = per_layer.get_xydata()[np.argmin(abs(per_layer.get_xdata() - speedup))]
        assert nearest[1] > energy - 0.02


def test_one_size_and_no_plan(tmp_path):
    path = tmp_path / "spectrum.png"
    save_plot([make_spectrum(RANKS)], path, index=None, plan=None, **SETTINGS)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 900
    growth = panels(draw([make_spectrum(RANKS)], index=None, plan=None, **SETTINGS))[4]
    assert [text.get_text() for text in growth.texts] == ["measured at one size"]


def test_legends_cover_neither_points_nor_one_another():
    spectra = [make_spectrum(RANKS, grid_size=grid) for grid in ((16, 16), (8, 8))]
    figure = draw(spectra, index=None, plan=make_plan(spectra[0], {"speedup": 1.2}, **SETTINGS), **SETTINGS)
    figure.draw_without_rendering()
    below = panels(figure)[3:5]
    boxes = [axes.get_legend().get_window_extent() for axes in below]
    assert not boxes[0].overlaps(boxes[1])
    for axes, box in zip(below, boxes):
        assert not box.overlaps(axes.get_window_extent())
