"""Plot five views of attention's spectra and, for the largest size, the energy that a budget buys."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from linvit.model.sharing import Share
from linvit.output.plots import BLUE, GREY, ORANGE, RED, save_figure
from linvit.spectrum.plan import Plan, make_plan, uniform_plans
from linvit.spectrum.result import Spectrum, growth_exponent
from linvit.spectrum.show import ENERGIES, heat_map_index

# For each of ENERGIES.
ENERGY_COLOURS = (BLUE, ORANGE, RED)
# From first layer to last; without the lightest colours, which are invisible on white.
LAYER_COLOURS = ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 256)))
# Number of budgets planned for the last panel.
NUM_BUDGETS = 25


def save_plot(
    spectra: Sequence[Spectrum],
    path: Path,
    *,
    index: int | None,
    plan: Plan | None,
    projection: str,
    share: Share,
    min_k: int,
) -> None:
    """Draw the spectra, one per image size, and write a PNG; curves and heat map show the largest size.

    Raises OSError, naming the file, if it cannot be written.
    """
    figure = draw(spectra, index=index, plan=plan, projection=projection, share=share, min_k=min_k)
    save_figure(path, figure, dpi=130)


def draw(
    spectra: Sequence[Spectrum], *, index: int | None, plan: Plan | None, projection: str, share: Share, min_k: int
) -> Figure:
    """Six panels: curves of singular values and energy, heat map, effective ranks, their growth, and planned energy."""
    ordered = sorted(spectra, key=lambda spectrum: spectrum.num_tokens)
    largest = ordered[-1]
    figure = Figure(figsize=(16.5, 9.2), layout="constrained")
    (curves, energies, heat_map), (ranks, growth, frontier) = figure.subplots(2, 3)
    _curves(curves, largest, largest.cumulative, "of the sum of singular values (paper's Figure 1, left)")
    energies.set_xscale("log")
    _curves(energies, largest, largest.cumulative_energy, "of the energy (sum of squares)")
    _layer_colours(figure, curves, largest)
    _heat_map(figure, heat_map, largest, heat_map_index(largest, index))
    _ranks(ranks, largest, plan)
    _growth(growth, ordered)
    _frontier(frontier, largest, plan, projection=projection, share=share, min_k=min_k)
    height, width = largest.img_size
    method = "all singular values" if largest.method == "exact" else "randomized, lower bounds"
    figure.suptitle(
        f"{largest.model} at {height}×{width} px: {largest.num_tokens:,} tokens, "
        f"images averaged: {largest.num_images}, {method}"
    )
    return figure


def _curves(axes: Axes, spectrum: Spectrum, shares: np.ndarray, what: str) -> None:
    """A line per layer, mean over heads."""
    counts = np.arange(1, shares.shape[-1] + 1)
    for layer, heads in enumerate(shares):
        axes.plot(counts, heads.mean(0), color=_layer_colour(layer, spectrum), linewidth=1.4)
    axes.set_title(f"share {what}", fontsize=11)
    axes.set_xlabel("singular values, largest first")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(1 if axes.get_xscale() == "log" else 0, shares.shape[-1])
    axes.grid(alpha=0.3)


def _layer_colour(layer: int, spectrum: Spectrum) -> tuple[float, float, float, float]:
    return LAYER_COLOURS(layer / max(spectrum.num_layers - 1, 1))


def _layer_colours(figure: Figure, axes: Axes, spectrum: Spectrum) -> None:
    colours = ScalarMappable(Normalize(0, max(spectrum.num_layers - 1, 1)), LAYER_COLOURS)
    figure.colorbar(colours, ax=axes, label="layer", location="left", shrink=0.9)


def _heat_map(figure: Figure, axes: Axes, spectrum: Spectrum, count: int) -> None:
    shares = spectrum.cumulative[..., count - 1]
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmax=1.0)
    axes.set_title(f"share of the {count} largest of {spectrum.num_tokens:,} (paper's Figure 1, right)", fontsize=11)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(spectrum.num_heads))
    axes.set_yticks(range(spectrum.num_layers))
    if shares.size <= 200:
        middle = (shares.min() + 1) / 2
        for (layer, head), share in np.ndenumerate(shares):
            colour = "black" if share > middle else "white"
            axes.text(head, layer, f"{share:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axes, label="share of the sum of singular values")


def _ranks(axes: Axes, spectrum: Spectrum, plan: Plan | None) -> None:
    """Effective ranks by layer, mean and range over heads, and the plan's lengths."""
    layers = np.arange(spectrum.num_layers)
    first = spectrum.rank(ENERGIES[0])
    axes.fill_between(layers, first.min(1), first.max(1), color=ENERGY_COLOURS[0], alpha=0.12, linewidth=0)
    for energy, colour in zip(ENERGIES, ENERGY_COLOURS):
        ranks = spectrum.rank(energy)
        axes.plot(layers, ranks.mean(1), "o-", color=colour, markersize=4, label=f"{energy:.0%} of the energy")
    if plan is not None:
        lengths = [spectrum.num_patches if k is None else k for k in plan.k]
        axes.plot(layers, lengths, "kD", markersize=5, fillstyle="none", label="planned k (N: ordinary attention)")
    axes.axhline(spectrum.num_tokens, color=GREY, linewidth=0.8, linestyle=":", label="all tokens")
    axes.set_yscale("log")
    axes.set_title(f"effective rank: mean over heads, and range at {ENERGIES[0]:.0%}", fontsize=11)
    axes.set_xlabel("layer")
    axes.set_ylabel("singular values")
    axes.set_xticks(layers)
    axes.grid(alpha=0.3)
    _legend_below(axes)


def _growth(axes: Axes, spectra: Sequence[Spectrum]) -> None:
    """Effective rank over the number of tokens: mean over layers and heads, and each layer's at the first energy."""
    tokens = [spectrum.num_tokens for spectrum in spectra]
    if len(spectra) == 1:
        axes.text(0.5, 0.5, "measured at one size", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set_axis_off()
        return
    for layer in range(spectra[-1].num_layers):
        ranks = [spectrum.rank(ENERGIES[0])[layer].mean() for spectrum in spectra]
        axes.plot(tokens, ranks, color=_layer_colour(layer, spectra[-1]), linewidth=0.9, alpha=0.8)
    for energy, colour in zip(ENERGIES, ENERGY_COLOURS):
        means = [spectrum.rank(energy).mean() for spectrum in spectra]
        label = f"{energy:.0%}: ∝ tokens^{growth_exponent(spectra, energy):.2f}"
        axes.plot(tokens, means, "o-", color=colour, linewidth=2, label=label)
    axes.plot(tokens, tokens, ":", color=GREY, label="full rank")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(f"growth: mean of all layers, and (thin) each layer at {ENERGIES[0]:.0%}", fontsize=11)
    axes.set_xlabel("tokens")
    axes.set_ylabel("effective rank")
    axes.grid(alpha=0.3)
    _legend_below(axes)


def _legend_below(axes: Axes) -> None:
    """Place the legend below the axes, where it covers no points."""
    axes.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, columnspacing=1.0)


def _frontier(axes: Axes, spectrum: Spectrum, plan: Plan | None, *, projection: str, share: Share, min_k: int) -> None:
    """Energy kept over the speed-up: k planned per layer, and the same k in every layer."""
    uniform = uniform_plans(spectrum, projection=projection, share=share, min_k=min_k)
    budgets = np.linspace(1, uniform[0].speedup * (1 - 1e-9), NUM_BUDGETS)
    planned = [
        make_plan(spectrum, {"speedup": float(speedup)}, projection=projection, share=share, min_k=min_k)
        for speedup in budgets
    ]
    for plans, style, label in ((uniform, "s--", "same k in every layer"), (planned, "o-", "k planned per layer")):
        axes.plot([each.speedup for each in plans], [each.energy for each in plans], style, markersize=3, label=label)
    if plan is not None:
        axes.plot(plan.speedup, plan.energy, "kD", markersize=7, fillstyle="none", label="the plan")
    axes.set_title(f"energy kept at most, {projection}, share {share}", fontsize=11)
    axes.set_xlabel("speed-up in operations of the whole model")
    axes.set_ylabel("energy, mean over layers")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
