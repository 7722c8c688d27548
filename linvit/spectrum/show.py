"""Present spectra and plans: tables on the terminal, CSV, and a plot of six panels."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console

from linvit.model.sharing import Share
from linvit.output.cells import CsvWriter
from linvit.output.plots import BLUE, GREY, ORANGE, RED, save_figure
from linvit.output.terminal import show_line, table
from linvit.spectrum.plan import Plan, make_plan, uniform_plans
from linvit.spectrum.result import Spectrum, growth_exponent

# Shares of the energy for which effective ranks are given.
ENERGIES = (0.9, 0.95, 0.99)
# For each of ENERGIES, in plots.
ENERGY_COLOURS = (BLUE, ORANGE, RED)
# From first layer to last; without the lightest colours, which are invisible on white.
LAYER_COLOURS = ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 256)))
# Number of budgets planned for the last panel.
NUM_BUDGETS = 25


def heat_map_index(spectrum: Spectrum, index: int | None) -> int:
    """Number of singular values that the heat map sums, by default a quarter of the tokens (the paper's 128 of 512)."""
    wanted = index or spectrum.num_tokens // 4
    return max(1, min(wanted, spectrum.singular_values.shape[-1]))


def show_spectrum(console: Console, spectrum: Spectrum, index: int | None) -> None:
    """Print a line per layer: effective ranks (mean over heads, and range), and shares of the first singular values."""
    height, width = spectrum.img_size
    count = heat_map_index(spectrum, index)
    images = f"images averaged: {spectrum.num_images}"
    title = f"{spectrum.model} at {height}×{width} px: {spectrum.num_tokens:,} tokens, {images}"
    headings = [
        "layer",
        *(f"rank at {energy:.0%}" for energy in ENERGIES),
        f"share of first {count}",
        "their energy",
    ]
    layers = table(headings, title=title)
    ranks = [spectrum.rank(energy) for energy in ENERGIES]
    for layer in range(spectrum.num_layers):
        layers.add_row(
            str(layer),
            *(_rank_cells(rank[layer], spectrum) for rank in ranks),
            f"{spectrum.cumulative[layer, :, count - 1].mean():.1%}",
            f"{spectrum.cumulative_energy[layer, :, count - 1].mean():.1%}",
        )
    console.print(layers)
    if spectrum.method == "randomized":
        console.print(
            f"randomized: found {spectrum.singular_values.shape[-1]} singular values; these and their shares are lower "
            f"bounds; missing energy: {spectrum.missing_energy.mean():.2%} on average, at most "
            f"{spectrum.missing_energy.max():.2%}"
        )


def show_growth(console: Console, spectra: Sequence[Spectrum]) -> None:
    """Print how effective ranks grow with the number of tokens."""
    ordered = sorted(spectra, key=lambda spectrum: spectrum.num_tokens)
    headings = ["energy", *(f"{spectrum.num_tokens:,}" for spectrum in ordered), "grows as"]
    growth = table(headings, title="mean rank by number of tokens")
    for energy in ENERGIES:
        means = (f"{spectrum.rank(energy).mean():.1f}" for spectrum in ordered)
        growth.add_row(f"{energy:.0%}", *means, f"tokens^{growth_exponent(ordered, energy):.2f}")
    console.print(growth)


def show_plan(console: Console, plan: Plan, keywords: dict[str, Any]) -> None:
    """Print the plan layer by layer, its operations and energy, and the option that applies it."""
    layers = table(["layer", "k", "energy kept", "of ordinary attention's operations"], title="plan")
    for number, layer in enumerate(plan.layers):
        share = layer.flops / layer.ordinary_flops
        length = "ordinary" if layer.k is None else str(layer.k)
        layers.add_row(str(number), length, f"{layer.energy:.1%}", f"{share:.0%}")
    console.print(layers)
    operations = f"{plan.flops / 1e9:.4g} of {plan.ordinary_flops / 1e9:.4g} GFLOPs"
    least = min(layer.energy for layer in plan.layers)
    show_line(console, f"{plan.speedup:.2f} times fewer operations, {operations}")
    show_line(
        console,
        f"energy kept: {plan.energy:.2%} on average, {least:.1%} in the layer that keeps least",
    )
    show_line(console, "--model-kwargs " + " ".join(f'"{name}={value}"' for name, value in keywords.items()))


def to_csv(spectra: Sequence[Spectrum], index: int | None) -> str:
    """CSV with a row per size, layer and head: effective ranks, and shares of the first `index` singular values."""
    out = io.StringIO()
    columns = [f"rank_{energy:.0%}".removesuffix("%") for energy in ENERGIES]
    writer = CsvWriter(out)
    writer.writerow(
        ["model", "height", "width", "tokens", "layer", "head", *columns, "index", "share", "energy", "missing_energy"]
    )
    for spectrum in spectra:
        ranks = [spectrum.rank(energy) for energy in ENERGIES]
        count = heat_map_index(spectrum, index)
        for layer, head in np.ndindex(spectrum.num_layers, spectrum.num_heads):
            shares = (
                spectrum.cumulative[layer, head, count - 1],
                spectrum.cumulative_energy[layer, head, count - 1],
                spectrum.missing_energy[layer, head],
            )
            where = (spectrum.model, *spectrum.img_size, spectrum.num_tokens, layer, head)
            writer.writerow(
                [*where, *(rank[layer, head] for rank in ranks), count, *(f"{share:.6f}" for share in shares)]
            )
    return out.getvalue()


def _rank_cells(ranks: np.ndarray, spectrum: Spectrum) -> str:
    """Mean and range over heads; "above N" if more than the N values found would be needed."""
    found = spectrum.singular_values.shape[-1]
    if ranks.max() > found:
        return f"above {found}" if ranks.min() > found else f"{ranks.min()} to above {found}"
    return f"{ranks.mean():.0f} ({ranks.min()}–{ranks.max()})" if ranks.min() < ranks.max() else str(ranks.min())


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
    _draw_curves(curves, largest, largest.cumulative, "of the sum of singular values (paper's Figure 1, left)")
    energies.set_xscale("log")
    _draw_curves(energies, largest, largest.cumulative_energy, "of the energy (sum of squares)")
    _draw_colour_bar(figure, curves, largest)
    _draw_heat_map(figure, heat_map, largest, heat_map_index(largest, index))
    _draw_ranks(ranks, largest, plan)
    _draw_growth(growth, ordered)
    _draw_frontier(frontier, largest, plan, projection=projection, share=share, min_k=min_k)
    height, width = largest.img_size
    method = "all singular values" if largest.method == "exact" else "randomized, lower bounds"
    figure.suptitle(
        f"{largest.model} at {height}×{width} px: {largest.num_tokens:,} tokens, "
        f"images averaged: {largest.num_images}, {method}"
    )
    return figure


def _draw_curves(axes: Axes, spectrum: Spectrum, shares: np.ndarray, what: str) -> None:
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


def _draw_colour_bar(figure: Figure, axes: Axes, spectrum: Spectrum) -> None:
    colours = ScalarMappable(Normalize(0, max(spectrum.num_layers - 1, 1)), LAYER_COLOURS)
    figure.colorbar(colours, ax=axes, label="layer", location="left", shrink=0.9)


def _draw_heat_map(figure: Figure, axes: Axes, spectrum: Spectrum, count: int) -> None:
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


def _draw_ranks(axes: Axes, spectrum: Spectrum, plan: Plan | None) -> None:
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


def _draw_growth(axes: Axes, spectra: Sequence[Spectrum]) -> None:
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


def _draw_frontier(
    axes: Axes, spectrum: Spectrum, plan: Plan | None, *, projection: str, share: Share, min_k: int
) -> None:
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
