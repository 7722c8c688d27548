"""The measured spectrum of a model's attention at one image size: ranks, energies, and its JSON form.

L layers, H heads, R singular values, T tokens (prefix tokens and patches).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from linvit.output.files import parse_json

# A file lists this many singular values singly. The rest are means over runs.
LISTED_SINGLY = 64
# Length of a run, as a share of the number of values before it.
RUN_GROWTH = 0.03
# Significant digits in a file.
DIGITS = 5
_ARRAYS = ("singular_values", "energies", "total_energies")
NO_SPECTRUM = "holds no spectrum of attention: give what `linvit spectrum --json` wrote"


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of every layer's and head's softmax attention matrix (T × T), averaged over images.

    Energy is a term of signal processing: the sum of squares of a matrix's singular values, or of its entries.

    Attributes:
        model: the model's name.
        img_size: (height, width) in pixels.
        grid_size: patches, in rows and columns.
        num_prefix_tokens: class and register tokens, in front of the patches.
        num_images: number of images averaged over.
        method: "exact" if all singular values were found (R = T), "randomized" if the R largest were found by random
            projection; the values are then lower bounds.
        embed_dim: width of the tokens.
        flops_besides_attention: operations of a forward pass of one image outside the attention layers.
        singular_values: (L, H, R), descending, means over images.
        energies: (L, H, R), means of their squares over images.
        total_energies: (L, H), means over images of the energy of the whole matrix; exact for both methods.
        rotary: whether keys are rotated by their place, which needs Wk on all patches.
    """

    model: str
    img_size: tuple[int, int]
    grid_size: tuple[int, int]
    num_prefix_tokens: int
    num_images: int
    method: Literal["exact", "randomized"]
    embed_dim: int
    flops_besides_attention: int
    singular_values: np.ndarray
    energies: np.ndarray
    total_energies: np.ndarray
    rotary: bool = False

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def num_layers(self) -> int:
        return int(self.singular_values.shape[0])

    @property
    def num_heads(self) -> int:
        return int(self.singular_values.shape[1])

    @cached_property
    def cumulative(self) -> np.ndarray:
        """Share of the sum of all singular values that the r largest have: (L, H, R), the paper's Figure 1, left.

        A lower bound if randomized: the sum of the missing values is taken as large as their known energy allows.
        """
        sums = self.singular_values.cumsum(-1)
        # Values of a given energy have the largest sum if they are equal.
        count = self.num_tokens - self.singular_values.shape[-1]
        max_missing_sum = np.sqrt(count * self.missing_energy * self.total_energies)
        return sums / (sums[..., -1:] + max_missing_sum[..., None])

    @cached_property
    def cumulative_energy(self) -> np.ndarray:
        """Share of the energy that the r largest singular values have: (L, H, R); a lower bound if randomized."""
        return self.energies.cumsum(-1) / self.total_energies[..., None]

    @property
    def missing_energy(self) -> np.ndarray:
        """Share of the energy that the values do not account for: (L, H); zero, up to rounding, if exact."""
        return np.clip(1 - self.cumulative_energy[..., -1], 0, None)

    def rank(self, energy: float) -> np.ndarray:
        """Effective rank: the number of largest singular values that hold this share of the energy, (L, H) integers.

        T, an upper bound, where the values found do not reach it.
        """
        # The last share of an exact spectrum is 1 up to rounding.
        reached = self.cumulative_energy >= energy - 1e-9
        return np.where(reached.any(-1), reached.argmax(-1) + 1, self.num_tokens)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON.

        The first 64 singular values are listed singly, the rest as means over runs, so that cumulative sums are right
        at the end of every run, to five digits.
        """
        lengths = _run_lengths(self.singular_values.shape[-1])
        runs = {name: _means(getattr(self, name), lengths) for name in ("singular_values", "energies")}
        simple = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _ARRAYS}
        totals = _rounded(self.total_energies)
        return {**simple, "run_lengths": lengths.tolist(), **runs, "total_energies": totals}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Spectrum":
        """The spectrum that `to_dict` wrote; raises ValueError for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or found.keys() | {"rotary"} != names | {"run_lengths"}:
            raise ValueError(NO_SPECTRUM)
        arrays = {name: np.asarray(found[name], dtype=np.float64) for name in _ARRAYS}
        for name in ("singular_values", "energies"):
            arrays[name] = np.repeat(arrays[name], found["run_lengths"], axis=-1)
        sizes = {name: tuple(found[name]) for name in ("img_size", "grid_size")}
        simple = {name: value for name, value in found.items() if name in names}
        return cls(**{**simple, **sizes, **arrays})

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "Spectrum":
        """The spectrum that `to_json` wrote; raises ValueError for anything else."""
        return cls.from_dict(parse_json(text))


def read_spectra(path: Path) -> list[Spectrum]:
    """The spectra in a file that `linvit spectrum --json` wrote, in the order in which they were measured.

    Raises ValueError, naming the file, if it cannot be read or holds something else.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        return [Spectrum.from_dict(spectrum) for spectrum in found["spectra"]]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: {NO_SPECTRUM}") from None


def growth_exponent(spectra: Sequence[Spectrum], energy: float) -> float:
    """The exponent α with which the effective rank, mean over layers and heads, grows as tokens^α: a fitted slope.

    1 means growth in proportion to the tokens, 0 no growth. With the logarithmic growth of the paper's Theorem 1, α
    tends to 0.
    """
    tokens = np.log([spectrum.num_tokens for spectrum in spectra])
    ranks = np.log([spectrum.rank(energy).mean() for spectrum in spectra])
    return float(np.polyfit(tokens, ranks, 1)[0])


def _run_lengths(count: int) -> np.ndarray:
    lengths = [1] * min(count, LISTED_SINGLY)
    while (done := sum(lengths)) < count:
        lengths.append(min(1 + int(RUN_GROWTH * done), count - done))
    return np.array(lengths)


def _means(values: np.ndarray, lengths: np.ndarray) -> list[Any]:
    starts = np.cumsum(lengths) - lengths
    return _rounded(np.add.reduceat(values, starts, axis=-1) / lengths)


def _rounded(values: np.ndarray) -> list[Any]:
    """Nested lists of the values, rounded to DIGITS significant digits."""
    with np.errstate(divide="ignore"):
        magnitude = np.where(values == 0, 0.0, np.floor(np.log10(np.abs(values))))
    return np.vectorize(round, otypes=[float])(values, DIGITS - 1 - magnitude.astype(int)).tolist()
