"""Fit the output layer of attention together with the convolution beside it, in closed form.

The layer adds γ (W h + b + v ∗ x̂) to the tokens, with the heads' outputs h, LayerScale γ, and the depth-wise kernel v
over the normalised patches x̂. Channel c of what the tokens still lack is regressed on h, which all channels share, and
on the S² neighbours n_c of the token in that channel:

    minimise  ‖r_c − h Δ_c − n_c u_c‖² + λ ‖Δ_c‖² + λ' ‖u_c‖²        Δ: change of γ[W b],  u: change of γv

Eliminating Δ_c leaves one S² × S² system per channel (a Schur complement), so this costs S² times the moments of W
alone. Prefix tokens have no neighbours, nor do patches beyond the border.

D width, S side of the kernel, n images, T tokens, t tokens of a sample, N patches, P prefix tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.conversion.solvers import MIN_LAYER_SCALE, PENALTIES, Moments, with_ones
from linvit.model.local import LocalConv


@dataclass
class LocalMoments(Moments):
    """`Moments` with the sums over neighbours."""

    crossed: Tensor  # (D + 1, S², D): inputs with neighbours
    neighbours: Tensor  # (D, S², S²)
    neighbour_products: Tensor  # (D, S²)

    @classmethod
    def of(cls, layer: nn.Linear, local: LocalConv) -> "LocalMoments":
        """Sums over no tokens, for an output layer and the convolution beside it."""
        base = Moments.empty(layer.in_features, layer.out_features, layer.weight.device)
        width, area, zeros = layer.out_features, local.size**2, base.inputs.new_zeros
        return cls(
            base.inputs,
            base.products,
            crossed=zeros(layer.in_features + 1, area, width),
            neighbours=zeros(width, area, area),
            neighbour_products=zeros(width, area),
        )

    def add_local(self, h: Tensor, n: Tensor, residual: Tensor, weights: Tensor) -> None:
        """Add tokens: inputs h (…, D), neighbours n (…, S², D), residual (…, D), weights (…)."""
        self.add(h, residual, weights)
        rows, n = with_ones(h.flatten(0, -2).to(residual.dtype)), n.flatten(0, -3).to(residual.dtype)
        weighted = n * weights.flatten()[:, None, None]
        with torch.autocast(h.device.type, enabled=False):
            self.crossed += (rows.mT @ weighted.flatten(1)).view_as(self.crossed).double()
            by_channel = n.permute(2, 0, 1)  # (D, t, S²)
            weighted_by_channel = weighted.permute(2, 1, 0)  # (D, S², t)
            self.neighbours += (weighted_by_channel @ by_channel).double()
            self.neighbour_products += (
                (weighted_by_channel @ residual.flatten(0, -2).mT[:, :, None]).squeeze(2).double()
            )

    def gain_of(self, change: Tensor, kernel: Tensor) -> float:
        """Decrease of the weighted sum of squared residuals by changes (D + 1, D) of γ[W b] and (D, S²) of γv."""
        linear = 2 * (kernel * self.neighbour_products).sum()
        mixed = 2 * torch.einsum("ic,isc,cs->", change, self.crossed, kernel)
        square = torch.einsum("cs,csu,cu->", kernel, self.neighbours, kernel)
        return self.gain(change) + float(linear - mixed - square)


def best_changes(fitted: LocalMoments, held_out: LocalMoments, *, has_bias: bool) -> tuple[Tensor, Tensor]:
    """The ridge solution, (D + 1, D) and (D, S²), that gains most on the held-out images; zeros if none gains."""
    best = torch.zeros_like(fitted.products), torch.zeros_like(fitted.neighbour_products)
    most = 0.0
    for penalty in PENALTIES:
        changes = _solution(fitted, penalty, has_bias=has_bias)
        if changes is None:  # singular: smaller penalties would fail too
            break
        if (gain := held_out.gain_of(*changes)) > most:
            best, most = changes, gain
    return best


def _solution(moments: LocalMoments, penalty: float, *, has_bias: bool) -> tuple[Tensor, Tensor] | None:
    width = moments.inputs.shape[0] - 1
    size = width + has_bias
    gram, products, crossed = moments.inputs[:size, :size], moments.products[:size], moments.crossed[:size]
    tiny = torch.finfo(gram.dtype).tiny
    scale = gram.diagonal()[:width].mean().clamp(min=tiny)
    own_scale = moments.neighbours.diagonal(dim1=1, dim2=2).mean().clamp(min=tiny)
    # The bias is not penalised.
    penalties = torch.cat([(penalty * scale).expand(width), gram.new_zeros(size - width)])
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(penalties))
    if failed:
        return None
    alone = torch.cholesky_solve(products, factor)  # (D + 1, D)
    solved = torch.cholesky_solve(crossed.flatten(1), factor).view_as(crossed)
    ridge = penalty * own_scale * torch.eye(crossed.shape[1], dtype=gram.dtype, device=gram.device)
    schur = moments.neighbours + ridge - torch.einsum("isc,iuc->csu", crossed, solved)
    right = moments.neighbour_products - torch.einsum("isc,ic->cs", crossed, alone)
    kernel, failed = torch.linalg.solve_ex(schur, right)
    if failed.any():
        return None
    change = alone - torch.einsum("isc,cs->ic", solved, kernel)
    return F.pad(change, (0, 0, 0, width + 1 - size)), kernel


def neighbourhoods(normed: Tensor, local: LocalConv, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """The neighbours (n, t, S², D) of the tokens with the indices `tokens` (t), in the order of the kernel.

    `normed` are all normalised tokens (n, T, D); prefix tokens have zeros.
    """
    (height, width), half = local.grid_size, local.size // 2
    image = normed[:, num_prefix_tokens:].unflatten(1, (height, width))
    padded = F.pad(image, (0, 0, half, half, half, half)).flatten(1, 2)
    patches = (tokens - num_prefix_tokens).clamp(min=0)
    first = patches // width * (width + 2 * half) + patches % width
    steps = torch.arange(local.size)
    offsets = (steps[:, None] * (width + 2 * half) + steps).flatten()
    index = (first[:, None] + offsets).to(normed.device)
    found = padded[:, index]  # (n, t, S², D)
    is_patch = (tokens >= num_prefix_tokens).to(normed.device)
    return found * is_patch[:, None, None]


@torch.no_grad()
def add_kernel_change(local: LocalConv, scale: Tensor | None, kernel: Tensor) -> None:
    """Add a change (D, S²) of γv to the convolution; `scale` is the γ (D) after it, if any."""
    if scale is not None:
        gamma = scale.double()[:, None]
        kernel = torch.where(gamma.abs() > MIN_LAYER_SCALE, kernel / gamma, 0.0)
    local.weight.add_(kernel.unflatten(1, (1, local.size, local.size)).to(local.weight.dtype))
