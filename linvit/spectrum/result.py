"""What was measured of a model's attention at one image size, and what follows from it.

L layers, H heads, R singular values, T tokens (prefix tokens and patches).
"""

import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

# In a file, singular values beyond this many are kept as means of runs, each this much longer than what is before it.
LISTED_SINGLY = 64
RUN_GROWTH = 0.03
DIGITS = 5
NO_SPECTRUM = "holds no spectrum of attention: give what `linvit spectrum --json` wrote"


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of every layer's and head's softmax attention matrix (T × T), averaged over images.

    `energy` is meant as in signal processing: a matrix's is the sum of the squares of its singular values, or of its
    entries.

    Attributes:
        model: the model's name.
        img_size: (height, width) in pixels.
        grid_size: patches, in rows and columns.
        num_prefix_tokens: class and register tokens, in front of the patches.
        num_images: how many images the averages are of.
        method: whether all singular values were found (R = T), or the R largest by random projection; the values are
            then lower bounds.
        embed_dim: width of the tokens.
        flops_besides_attention: operations of a forward pass of one image outside of the attention layers.
        singular_values: (L, H, R), descending; the mean of each over images.
        energies: (L, H, R), the mean of each one's square over images.
        total_energies: (L, H), the mean over images of the energy of the whole matrix; exact for both methods.
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
        """Share of the sum of all singular values that the r largest have: (L, H, R).

        The paper's Figure 1, left. Of a randomized spectrum a lower bound: the sum of the values that were not found
        is at most what their known energy allows.
        """
        sums = self.singular_values.cumsum(-1)
        return sums / (sums[..., -1:] + self._most_not_found[..., None])

    @cached_property
    def cumulative_energy(self) -> np.ndarray:
        """Share of the energy that the r largest singular values have: (L, H, R); of a randomized one, at least."""
        return self.energies.cumsum(-1) / self.total_energies[..., None]

    @property
    def missing_energy(self) -> np.ndarray:
        """Share of the energy that none of the values found has: (L, H); nothing, but for rounding, where exact."""
        return np.clip(1 - self.cumulative_energy[..., -1], 0, None)

    def rank(self, energy: float) -> np.ndarray:
        """Effective rank: how many of the largest singular values have a share of the energy, (L, H) whole numbers.

        T where the values found do not reach it: an upper bound.
        """
        # Of an exact spectrum the last share is 1 up to rounding.
        reached = self.cumulative_energy >= energy - 1e-9
        return np.where(reached.any(-1), reached.argmax(-1) + 1, self.num_tokens)

    @property
    def _most_not_found(self) -> np.ndarray:
        """Upper bound of the sum of the values that were not found (L, H): equal ones have the largest sum."""
        count = self.num_tokens - self.singular_values.shape[-1]
        return np.sqrt(count * self.missing_energy * self.total_energies)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it. The first 64 singular values singly; then means of runs, so that cumulative sums are right
        at the end of every run, to five digits."""
        lengths = _run_lengths(self.singular_values.shape[-1])
        runs = {name: _means(getattr(self, name), lengths) for name in ("singular_values", "energies")}
        simple = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _ARRAYS}
        totals = _rounded(self.total_energies)
        return {**simple, "run_lengths": lengths.tolist(), **runs, "total_energies": totals}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Spectrum":
        """What `to_dict` gave; ValueError where it is something else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or found.keys() != names | {"run_lengths"}:
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
        """The spectrum in `to_json`'s text; ValueError where there is none."""
        return cls.from_dict(json.loads(text))


def read_spectra(path: Path) -> list[Spectrum]:
    """The spectra in a file that `linvit spectrum --json` wrote, by size as measured.

    Raises ValueError, naming the file, where it cannot be read or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [Spectrum.from_dict(spectrum) for spectrum in found["spectra"]]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: {NO_SPECTRUM}") from None


_ARRAYS = ("singular_values", "energies", "total_energies")


def _run_lengths(count: int) -> np.ndarray:
    lengths = [1] * min(count, LISTED_SINGLY)
    while (done := sum(lengths)) < count:
        lengths.append(min(1 + int(RUN_GROWTH * done), count - done))
    return np.array(lengths)


def _means(values: np.ndarray, lengths: np.ndarray) -> list[Any]:
    starts = np.cumsum(lengths) - lengths
    return _rounded(np.add.reduceat(values, starts, axis=-1) / lengths)


def _rounded(values: np.ndarray) -> list[Any]:
    """Nested lists of numbers of so many digits."""
    with np.errstate(divide="ignore"):
        magnitude = np.where(values == 0, 0.0, np.floor(np.log10(np.abs(values))))
    return np.vectorize(round, otypes=[float])(values, DIGITS - 1 - magnitude.astype(int)).tolist()
