"""Fused attention of many queries to few keys, split so that a GPU's backward pass has enough parallel work.

The fused kernels compute the gradients of keys and values one block of keys at a time, each over all queries. A few
dozen keys are one block, and one block per head and image leaves most of a GPU idle. Chunks of queries, passed as
additional images, give every multiprocessor its own block. Autograd sums the chunks' gradients of the keys and values
that they share.

B batch, H heads, T queries, K keys, d head width, S chunks of c queries.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linvit.model.eager import HALF_PRECISIONS

# Keys in one block of the kernels' backward passes.
KEYS_PER_BLOCK = 128
# Blocks wanted: about two per multiprocessor of an A100 (108) or H100 (132).
BLOCKS_WANTED = 256
# torch uses cuDNN's kernels from Hopper on, and fewer blocks keep an H100 busy with them. Splitting made forward plus
# backward an eighth slower at 48 blocks, a third faster at 36 and three quarters faster at 6.
CUDNN_BLOCKS_WANTED = 48
# A chunk of fewer queries costs more in the forward pass than it saves in the backward pass.
QUERIES_PER_CHUNK = 512


def split_attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, dropout: float, chunks: int | None = None
) -> Tensor:
    """`scaled_dot_product_attention` of q (B, H, T, d) to k and v (B, H, K, d): (B, H, T, d).

    `bias` (B or 1, H or 1, 1, K) is added to the scores. `chunks` is the number of chunks of queries; by default it
    follows from the size on a GPU if a gradient is needed, and is 1 otherwise.
    """
    B, H, T, _ = q.shape
    if chunks is None:
        wanted = q.is_cuda and torch.is_grad_enabled() and q.requires_grad
        cudnn = wanted and q.dtype in HALF_PRECISIONS and _prefers_cudnn()
        chunks = query_chunks(batch=B, heads=H, queries=T, keys=k.shape[2], cudnn=cudnn) if wanted else 1
    if chunks == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    # Tokens before heads, as the queries lie in memory: splitting copies nothing unless the tokens need padding.
    by_token = q.transpose(1, 2)
    if T % chunks:
        by_token = F.pad(by_token, (0, 0, 0, 0, 0, -T % chunks))
    q = by_token.unflatten(1, (chunks, -1)).flatten(0, 1).transpose(1, 2)  # (B·S, H, c, d)
    k, v = (each[:, None].expand(-1, chunks, -1, -1, -1).flatten(0, 1) for each in (k, v))
    if bias is not None and bias.shape[0] > 1:
        bias = bias.repeat_interleave(chunks, dim=0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return out.transpose(1, 2).unflatten(0, (B, chunks)).flatten(1, 2)[:, :T].transpose(1, 2)


def query_chunks(*, batch: int, heads: int, queries: int, keys: int, cudnn: bool = False) -> int:
    """The number of chunks to split each image's queries into; 1 if there is enough work without splitting."""
    blocks = batch * heads * -(-keys // KEYS_PER_BLOCK)
    if blocks >= (CUDNN_BLOCKS_WANTED if cudnn else BLOCKS_WANTED):
        return 1
    return max(1, min(-(-BLOCKS_WANTED // blocks), queries // QUERIES_PER_CHUNK))


@torch.compiler.assume_constant_result
def _prefers_cudnn() -> bool:
    """Whether torch's fused attention in half precision is cuDNN's on this GPU."""
    return torch.cuda.get_device_capability() >= (9, 0) and torch.backends.cuda.cudnn_sdp_enabled()
