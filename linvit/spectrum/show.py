"""Print spectra and plans as tables, and write spectra as CSV."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from linvit.output.terminal import table
from linvit.spectrum.plan import Plan
from linvit.spectrum.result import Spectrum, growth_exponent

# Shares of the energy for which effective ranks are given.
ENERGIES = (0.9, 0.95, 0.99)


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
    console.print(f"{plan.speedup:.2f} times fewer operations, {operations}", soft_wrap=True)
    console.print(
        f"energy kept: {plan.energy:.2%} on average, {least:.1%} in the layer that keeps least", soft_wrap=True
    )
    console.print("--model-kwargs " + " ".join(f'"{name}={value}"' for name, value in keywords.items()), soft_wrap=True)


def to_csv(spectra: Sequence[Spectrum], index: int | None) -> str:
    """CSV with a row per size, layer and head: effective ranks, and shares of the first `index` singular values."""
    out = io.StringIO()
    columns = [f"rank_{energy:.0%}".removesuffix("%") for energy in ENERGIES]
    writer = csv.writer(out, lineterminator="\n")
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
