"""Move projections between patch grids by overlap area, and divide a grid into k cells.

A row of E is a density, piecewise constant on the H × W patches. On another grid, each new patch receives the part of
every old patch's mass that lies inside it: E' = A_h E A_wᵀ, with the overlap fractions A along one axis. Row sums are
preserved exactly, doubling a grid and halving it again returns the same E, and for an image that is constant on the old
patches a finer grid gives the same projection.
"""

import torch
from torch import Tensor

GridSize = tuple[int, int]


def overlap_matrix(old: int, new: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The fraction of each of `old` equal intervals that lies in each of `new`: (new, old), columns sum to one."""
    return (_overlap_units(new, old, device) / new).to(dtype)


def averaging_matrix(cells: int, size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Averages `size` equal intervals over each of `cells` by length: (cells, size), rows sum to one."""
    return (_overlap_units(cells, size, device) / size).to(dtype)


def _overlap_units(n: int, m: int, device: torch.device) -> Tensor:
    """Overlap of n and of m equal intervals on a line of n·m units: integers, so that nothing is rounded."""
    i = torch.arange(n, device=device, dtype=torch.float64)[:, None]
    j = torch.arange(m, device=device, dtype=torch.float64)[None, :]
    return (torch.minimum((i + 1) * m, (j + 1) * n) - torch.maximum(i * m, j * n)).clamp(min=0)


def remap_axis(weight: Tensor, new: int) -> Tensor:
    """Move densities along the last axis (…, old) to `new` intervals: (…, new)."""
    old = weight.shape[-1]
    if old == new:
        return weight
    # In half precision, rounding would change a row's total mass.
    precise = torch.promote_types(weight.dtype, torch.float32)
    moved = weight.to(precise) @ overlap_matrix(old, new, device=weight.device, dtype=precise).mT
    return moved.to(weight.dtype)


def remap_grid(weight: Tensor, new: GridSize) -> Tensor:
    """Move densities on a patch grid (…, H, W) to another grid: (…, H', W')."""
    rows_moved = remap_axis(weight.mT, new[0]).mT
    return remap_axis(rows_moved, new[1])


def factor_pair(k: int, grid_size: GridSize) -> GridSize:
    """The factors k_h × k_w = k that fit the grid with k_h / k_w nearest to H / W by ratio, for nearly square cells.

    Ties go to the more square pair, then to the one with k_h ≤ k_w. Raises ValueError if no pair fits.
    """
    height, width = grid_size
    best: GridSize | None = None
    for k_h in range(1, min(k, height) + 1):
        k_w = k // k_h
        if k % k_h != 0 or k_w > width:
            continue
        if best is None:
            best = k_h, k_w
            continue
        # Ratios grow with k_h, so the later of two is nearer if their geometric mean lies below H / W.
        mean, shape = best[0] * k_h * width**2, best[1] * k_w * height**2
        if mean < shape or (mean == shape and max(k_h, k_w) < max(best)):
            best = k_h, k_w
    if best is not None:
        return best
    fitting = {a * b for a in range(1, height + 1) for b in range(1, width + 1) if a * b < height * width}
    nearest = sorted(fitting, key=lambda other: abs(other - k))[:3]
    raise ValueError(
        f"k={k} is not a product k_h × k_w that fits a {height}×{width} patch grid: "
        f"choose k={' or '.join(map(str, sorted(nearest)))}"
    )


def check_cells(cells: GridSize, grid_size: GridSize) -> None:
    """Raise ValueError if there are more cells than patches along an axis."""
    if cells[0] > grid_size[0] or cells[1] > grid_size[1]:
        raise ValueError(
            f"k={cells[0] * cells[1]} as {cells[0]}×{cells[1]} cells does not fit a "
            f"{grid_size[0]}×{grid_size[1]} patch grid: build the model at this image size or choose a smaller k"
        )


def tile_rows(k: int, grid_size: GridSize, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """k local averages that tile the grid like bricks, each summing to one: (k, H, W).

    If k has a factor pair close to the grid's shape, the bricks are the cells of average pooling.
    """
    height, width = grid_size
    bands = _num_bands(k, grid_size)
    band_rows = averaging_matrix(bands, height, device=device, dtype=dtype)
    rows = []
    for band in range(bands):
        bricks = k // bands + (1 if band < k % bands else 0)
        columns = averaging_matrix(bricks, width, device=device, dtype=dtype)
        rows.append(band_rows[band][None, :, None] * columns[:, None, :])
    return torch.cat(rows)


def _num_bands(k: int, grid_size: GridSize) -> int:
    height, width = grid_size
    ideal = (k * height / width) ** 0.5
    # Prefer an exact tiling near the ideal shape to bands with different numbers of bricks.
    candidates = sorted(range(1, min(k, height) + 1), key=lambda bands: abs(bands - ideal))
    exact = [bands for bands in candidates[:3] if k % bands == 0]
    return (exact or candidates)[0]
