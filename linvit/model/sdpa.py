"""Fused attention of many queries to few keys, with enough work for a GPU's backward pass.

The fused kernels compute the gradients of keys and values block of keys by block of keys, each over all queries. A few
dozen keys are one block, and one block a head and image leaves most of a GPU idle. Chunks of queries as further images
give each multiprocessor its own; autograd adds up what the chunks give to the keys and values they share.

B batch, H heads, T queries, K keys, d head width, S chunks of c queries.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linvit.model.eager import HALF_PRECISIONS

# Keys that one block of the kernels' backward passes takes.
KEYS_PER_BLOCK = 128
# Blocks wanted: about two for each multiprocessor of an A100 (108) or H100 (132).
BLOCKS_WANTED = 256
# cuDNN's kernels, which torch takes from Hopper on, keep an H100 busy with fewer: at 48 blocks splitting made forward
# and backward pass slower by an eighth, at 36 blocks faster by a third, at 6 by three quarters.
CUDNN_BLOCKS_WANTED = 48
# A chunk of fewer queries costs more in the forward pass than it gives.
QUERIES_PER_CHUNK = 512


def query_chunks(*, batch: int, heads: int, queries: int, keys: int, cudnn: bool = False) -> int:
    """Into how many chunks the queries of each image are split: 1 where there is work enough without."""
    blocks = batch * heads * -(-keys // KEYS_PER_BLOCK)
    if blocks >= (CUDNN_BLOCKS_WANTED if cudnn else BLOCKS_WANTED):
        return 1
    return max(1, min(-(-BLOCKS_WANTED // blocks), queries // QUERIES_PER_CHUNK))


@torch.compiler.assume_constant_result
def _prefers_cudnn() -> bool:
    """Whether torch's fused attention in half precision is cuDNN's on this GPU."""
    return torch.cuda.get_device_capability() >= (9, 0) and torch.backends.cuda.cudnn_sdp_enabled()


def split_attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, dropout: float, chunks: int | None = None
) -> Tensor:
    """`scaled_dot_product_attention` of q (B, H, T, d), k and v (B, H, K, d): (B, H, T, d).

    `bias` (B or 1, H or 1, 1, K) is added to the scores.
    `chunks` (default: by size, on a GPU where a gradient is wanted) is the number of chunks that queries go in.
    """
    B, H, T, _ = q.shape
    if chunks is None:
        wanted = q.is_cuda and torch.is_grad_enabled() and q.requires_grad
        cudnn = wanted and q.dtype in HALF_PRECISIONS and _prefers_cudnn()
        chunks = query_chunks(batch=B, heads=H, queries=T, keys=k.shape[2], cudnn=cudnn) if wanted else 1
    if chunks == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    # Tokens before heads, as the queries lie in memory: splitting them copies nothing unless they have to be padded.
    by_token = q.transpose(1, 2)
    if T % chunks:
        by_token = F.pad(by_token, (0, 0, 0, 0, 0, -T % chunks))
    q = by_token.unflatten(1, (chunks, -1)).flatten(0, 1).transpose(1, 2)  # (B·S, H, c, d)
    k, v = (each[:, None].expand(-1, chunks, -1, -1, -1).flatten(0, 1) for each in (k, v))
    if bias is not None and bias.shape[0] > 1:
        bias = bias.repeat_interleave(chunks, dim=0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return out.transpose(1, 2).unflatten(0, (B, chunks)).flatten(1, 2)[:, :T].transpose(1, 2)
