"""The base classes of all projections, and the registry of their kinds.

A projection reduces the N = H·W patches of a grid to k. It knows its grid and its k, but not which heads and layers
share it: the model decides that. Most kinds are matrices E, which can be applied to tokens as well as to keys and
values. The others reduce the tokens, before Wk and Wv.

B batch, M maps (1, or one per head), N patches, K projected length, C channels.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from linvit.model.projections.grid import GridSize
from linvit.settings.fields import unknown_choice

ProjectionInit = Literal["pool", "average", "jl"]
# Relative to the entries of a plain average. It makes rows differ that are trained from scratch.
POOL_NOISE = 0.1


class Projection(nn.Module):
    """Reduces tokens (B, 1, N, C) to (B, M, K, C), before Wk and Wv.

    Args:
        k: projected length.
        grid_size: (H, W) of the patch grid, N = H·W.
        num_maps: number of independent maps; 1 when all heads share one, else the number of heads.
        dim: width C of the tokens, for kinds that have parameters per channel.
        init: `"pool"` starts at 2-D local averages plus a little noise, so that EX has the scale of X at every N.
            `"average"` omits the noise, for a model whose other weights are trained already. `"jl"` draws from the
            paper's N(0, 1/k) (Theorem 2). Kinds without parameters ignore it.

    A kind defines `forward`, and `row_mass` for masks. If it has parameters or buffers, it also defines
    `create_parameters` and `reset_parameters`, `remap_weight` if they lie on the grid, and `adopt` if those of a
    checkpoint may have other shapes. `build_projection` builds one and checks that it fits.
    """

    kind: str
    # The value of masked and dropped patches, for a projection that is not a matrix.
    absent: float = 0.0

    def __init__(
        self,
        *,
        k: int,
        grid_size: GridSize,
        num_maps: int = 1,
        dim: int | None = None,
        init: ProjectionInit = "pool",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.k = parse_length(k)
        self.grid_size = grid_size
        self.num_maps = num_maps
        self.dim = dim
        self.init = init
        self.create_parameters(device, dtype)
        # On the meta device there are no values to set, and setting them takes seconds per model.
        if not any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers())):
            self.reset_parameters()

    def create_parameters(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Register the kind's parameters and buffers, uninitialised."""

    def forward(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        """Reduce patches of `grid_size` (default: the projection's own): (B, 1, N, C) → (B, M, K, C)."""
        raise NotImplementedError

    def row_mass(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        """The mass of patches x (B, 1, N, 1) ≥ 0 that each row covers, for masks: (B, M or 1, K, 1).

        This is |E|x for a matrix, else the mean of x over each cell. The default covers all patches equally.
        """
        return x.mean(2, keepdim=True).expand(-1, self.num_maps, self.k, -1)

    def reset_parameters(self) -> None:
        """Draw fresh weights."""

    def init_weights(self) -> None:
        self.reset_parameters()

    @property
    def pool_noise(self) -> float:
        """Standard deviation of the noise on fresh averages, as a share of their entries."""
        return 0.0 if self.init == "average" else POOL_NOISE

    @property
    def lengths(self) -> list[int]:
        """Projected length of each map."""
        return [self.k] * self.num_maps

    def check_grid_size(self, grid_size: GridSize) -> None:
        """Raise ValueError if this projection cannot work on the grid, or would not shorten the sequence."""
        check_shortens(self.k, grid_size)

    def remap_weight(self, name: str, weight: Tensor, grid_size: GridSize) -> Tensor:
        """The weight or buffer `name`, from whatever grid it lies on, moved to `grid_size`."""
        return weight

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Take over the shapes of a checkpoint's weights and buffers `state`. Raises ValueError if they do not fit."""

    def set_grid_size(self, grid_size: GridSize) -> None:
        """Move to another patch grid; parameters are replaced and keep `requires_grad`. Raises ValueError if k ≥ N."""
        self.check_grid_size(grid_size)
        for name, weight in list(self.named_parameters(recurse=False)):
            moved = self.remap_weight(name, weight.detach(), grid_size)
            setattr(self, name, nn.Parameter(moved.clone(), requires_grad=weight.requires_grad))
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, self.remap_weight(name, buffer, grid_size))
        self.grid_size = grid_size

    def extra_repr(self) -> str:
        return f"k={self.k}, grid_size={self.grid_size}, num_maps={self.num_maps}"


class MatrixProjection(Projection):
    """A projection that is a matrix E on the patches, so that E(XW) = (EX)W.

    `forward` also accepts one x per map: (B, M, N, C) → (B, M, K, C).
    """

    def matrix(self) -> Tensor:
        """E as one dense tensor (M, K, N), differentiable in the projection's parameters."""
        raise NotImplementedError

    def row_sums(self, like: Tensor, grid_size: GridSize | None = None) -> Tensor:
        """E1 (1, M, K, 1) on a grid (default: the projection's own), with the dtype and device of `like`."""
        height, width = grid_size or self.grid_size
        sums: Tensor = self(like.new_ones(1, 1, height * width, 1), grid_size)
        return sums

    def row_mass(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        # This makes E dense, from N² numbers. The kinds in this package override it.
        E: Tensor = self(torch.eye(x.shape[2], dtype=x.dtype, device=x.device)[None, None], grid_size)
        return E.abs() @ x


def parse_length(k: object) -> int:
    """A projected length as an int, from any integer type, such as NumPy's. Raises ValueError for everything else."""
    try:
        if isinstance(k, bool) or getattr(k, "dtype", None) is torch.bool:
            raise TypeError
        return operator.index(k)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"k={k!r}: a projected length is a whole number, such as k=16") from None


def is_list_of_lengths(k: object) -> TypeGuard[Sequence[Any]]:
    """Whether `k` is a sequence or an array of lengths, rather than one length."""
    return (isinstance(k, Sequence) and not isinstance(k, str | bytes | bytearray)) or getattr(k, "ndim", 0) > 0


def check_shortens(k: int, grid_size: GridSize) -> None:
    """Raise ValueError, naming both numbers, unless 1 ≤ k < N."""
    num_patches = grid_size[0] * grid_size[1]
    if k < 1:
        raise ValueError(f"k={k}: the projected length must be at least 1")
    if k >= num_patches:
        raise ValueError(
            f"k={k} does not shorten a sequence of {num_patches} patches ({grid_size[0]}×{grid_size[1]}): choose "
            f"k below {num_patches}, a larger image or a smaller patch, or ordinary attention (projection='identity')"
        )


PROJECTIONS: dict[str, type[Projection]] = {}
"""The class of each kind of projection, by its name."""

ProjectionType = TypeVar("ProjectionType", bound=type[Projection])


def register_projection(kind: str) -> Callable[[ProjectionType], ProjectionType]:
    """Class decorator that registers a projection under the name `kind`. Raises ValueError for a name in use."""

    def register(cls: ProjectionType) -> ProjectionType:
        if kind in PROJECTIONS:
            raise ValueError(f"projection kind {kind!r} is already registered by {PROJECTIONS[kind].__name__}")
        cls.kind = kind
        PROJECTIONS[kind] = cls
        return cls

    return register


def projection_class(kind: str) -> type[Projection]:
    """The class registered under `kind`. Raises ValueError, listing the kinds, for an unknown one."""
    if isinstance(kind, str) and kind in PROJECTIONS:
        return PROJECTIONS[kind]
    raise ValueError(unknown_choice("projection", kind, sorted(PROJECTIONS)))


class PerHeadProjection(Projection):
    """A projection per head, each with a length of its own: the paper's non-uniform projected dimension (section 4).

    Shorter results are padded with zero rows to the longest, K; attention must mask the rows past `lengths`.
    """

    def __init__(self, heads: Sequence[Projection]) -> None:
        super().__init__(
            k=max(head.k for head in heads),
            grid_size=heads[0].grid_size,
            num_maps=len(heads),
            dim=heads[0].dim,
            init=heads[0].init,
        )
        self.kind = heads[0].kind
        self.absent = heads[0].absent
        self.heads = nn.ModuleList(heads)

    def each_head(self) -> list[Projection]:
        return [head for head in self.heads if isinstance(head, Projection)]

    @property
    def lengths(self) -> list[int]:
        return [head.k for head in self.each_head()]

    def forward(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        reduced = []
        for index, head in enumerate(self.each_head()):
            own = x if x.shape[1] == 1 else x[:, index : index + 1]
            y = head(own, grid_size)
            reduced.append(pad(y, (0, 0, 0, self.k - y.shape[2])))
        return torch.cat(reduced, dim=1)

    def row_mass(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        masses = []
        for index, head in enumerate(self.each_head()):
            own = x if x.shape[1] == 1 else x[:, index : index + 1]
            masses.append(head.row_mass(own, grid_size))
        return torch.cat([pad(mass, (0, 0, 0, self.k - mass.shape[2])) for mass in masses], dim=1)

    def check_grid_size(self, grid_size: GridSize) -> None:
        for head in self.each_head():
            head.check_grid_size(grid_size)

    def set_grid_size(self, grid_size: GridSize) -> None:
        self.check_grid_size(grid_size)
        for head in self.each_head():
            head.set_grid_size(grid_size)
        self.grid_size = grid_size


class PerHeadMatrixProjection(PerHeadProjection, MatrixProjection):
    """`PerHeadProjection` for kinds that are matrices."""

    def matrix(self) -> Tensor:
        matrices = [head.matrix() for head in self.heads if isinstance(head, MatrixProjection)]
        return torch.cat([pad(E, (0, 0, 0, self.k - E.shape[1])) for E in matrices])
