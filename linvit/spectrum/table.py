"""What `linvit spectrum` prints, and its CSV table."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from linvit.spectrum.plan import Plan
from linvit.spectrum.result import Spectrum

# Shares of the energy that effective ranks are given for.
ENERGIES = (0.9, 0.95, 0.99)


def heat_map_index(spectrum: Spectrum, index: int | None) -> int:
    """How many singular values the heat map counts: by default a quarter of the tokens, as the paper's 128 of 512."""
    wanted = index or spectrum.num_tokens // 4
    return max(1, min(wanted, spectrum.singular_values.shape[-1]))


def growth_exponent(spectra: Sequence[Spectrum], energy: float) -> float:
    """The exponent α by which the effective rank, mean over heads and layers, grows as tokens^α: the fitted slope.

    1 is growth with the tokens, and 0 none; under the logarithmic growth of the paper's Theorem 1 it tends to 0.
    """
    tokens = np.log([spectrum.num_tokens for spectrum in spectra])
    ranks = np.log([spectrum.rank(energy).mean() for spectrum in spectra])
    return float(np.polyfit(tokens, ranks, 1)[0])


def show_spectrum(console: Console, spectrum: Spectrum, index: int | None) -> None:
    """A line per layer: effective ranks, mean over heads and range, and the share of the first singular values."""
    height, width = spectrum.img_size
    count = heat_map_index(spectrum, index)
    images = f"images averaged: {spectrum.num_images}"
    title = f"{spectrum.model} at {height}×{width} px: {spectrum.num_tokens:,} tokens, {images}"
    headings = [
        "layer",
        *(f"rank at {energy:.0%}" for energy in ENERGIES),
        f"share of first {count}",
        "energy of these",
    ]
    table = _table(title, headings)
    ranks = [spectrum.rank(energy) for energy in ENERGIES]
    for layer in range(spectrum.num_layers):
        table.add_row(
            str(layer),
            *(_ranks(rank[layer], spectrum) for rank in ranks),
            f"{spectrum.cumulative[layer, :, count - 1].mean():.1%}",
            f"{spectrum.cumulative_energy[layer, :, count - 1].mean():.1%}",
        )
    console.print(table)
    if spectrum.method == "randomized":
        console.print(
            f"randomized: {spectrum.singular_values.shape[-1]} singular values found, lower bounds; energy not found: "
            f"{spectrum.missing_energy.mean():.2%} on average, at most {spectrum.missing_energy.max():.2%}; shares of "
            "singular values are lower bounds"
        )


def show_growth(console: Console, spectra: Sequence[Spectrum]) -> None:
    """How effective ranks grow with the number of tokens."""
    ordered = sorted(spectra, key=lambda spectrum: spectrum.num_tokens)
    table = _table("mean rank", ["energy", *(f"{spectrum.num_tokens:,} tokens" for spectrum in ordered), "grows as"])
    for energy in ENERGIES:
        means = (f"{spectrum.rank(energy).mean():.1f}" for spectrum in ordered)
        table.add_row(f"{energy:.0%}", *means, f"tokens^{growth_exponent(ordered, energy):.2f}")
    console.print(table)


def show_plan(console: Console, plan: Plan, keywords: dict[str, Any]) -> None:
    """The plan layer by layer, what it costs and keeps, and how to use it."""
    table = _table("plan", ["layer", "k", "energy kept", "of ordinary attention's operations"])
    for number, layer in enumerate(plan.layers):
        share = layer.flops / layer.ordinary_flops
        table.add_row(
            str(number), "ordinary" if layer.k is None else str(layer.k), f"{layer.energy:.1%}", f"{share:.0%}"
        )
    console.print(table)
    operations = f"{plan.flops / 1e9:.4g} of {plan.ordinary_flops / 1e9:.4g} GFLOPs"
    least = min(layer.energy for layer in plan.layers)
    console.print(f"{plan.speedup:.2f} times fewer operations, {operations}", soft_wrap=True)
    console.print(f"energy kept: {plan.energy:.2%} on average, {least:.1%} where least", soft_wrap=True)
    console.print("--model-kwargs " + " ".join(f'"{name}={value}"' for name, value in keywords.items()), soft_wrap=True)


def to_csv(spectra: Sequence[Spectrum], index: int | None) -> str:
    """A row per size, layer and head: effective ranks; `share` and `energy` of the first `index` singular values."""
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


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _ranks(ranks: np.ndarray, spectrum: Spectrum) -> str:
    """Mean and range over heads; "above" where not as many were found."""
    found = spectrum.singular_values.shape[-1]
    if ranks.max() > found:
        return f"above {found}" if ranks.min() > found else f"{ranks.min()} to above {found}"
    return f"{ranks.mean():.0f} ({ranks.min()}–{ranks.max()})" if ranks.min() < ranks.max() else str(ranks.min())
