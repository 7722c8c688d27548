"""What Linformer's authors measured: Wang et al. 2020, arXiv 2006.04768, Table 3, columns k = 256."""

from typing import NamedTuple


class Gain(NamedTuple):
    """How many times less a Linformer takes than the Transformer that the paper compares it with."""

    time: float
    memory: float


# By sequence length: inference on a 16 GB V100, one E for all layers, against attention that is not fused.
PAPER_GAINS = {
    512: Gain(1.3, 1.5),
    1024: Gain(1.6, 2.9),
    2048: Gain(2.4, 5.6),
    4096: Gain(3.2, 13),
    8192: Gain(5.0, 26),
    16384: Gain(7.8, 48),
    32768: Gain(12, 48),
    65536: Gain(18, 52),
}
