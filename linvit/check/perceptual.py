"""Perceptual hashes: 64 bits of an image's coarse pattern that recompressing, resizing and brightening hardly change.

Hashes of images that look alike differ in few bits. To find such pairs among millions, the bits are cut into 9 bands of
7: two hashes that differ in at most 6 bits agree in at least 3 bands, so that each of the 84 choices of 3 bands is a
table in which pairs lie next to each other. Norouzi et al. 2012 (multi-index hashing) is the same idea.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from linvit.check.inspect import THUMBNAIL

# Hashes that differ in so many bits are looked at. They always differ in an even number of bits.
FARTHEST = 6
_BANDS, _BAND_BITS, _AGREEING = 9, 7, 3
# Where very many hashes share a table's bits, each is compared with so many of its neighbours alone, and in all so many
# pairs are kept for every hash, and in a small set.
_NEIGHBOURS = 32
_PAIRS_PER_HASH, _FEW_PAIRS = 20, 1_000_000

_FREQUENCIES = 8
_positions = np.arange(THUMBNAIL)
_COSINES = np.cos(np.pi * (2 * _positions + 1) * np.arange(_FREQUENCIES)[:, None] / (2 * THUMBNAIL)).astype(np.float32)
_ONES_IN = np.array([bin(number).count("1") for number in range(1 << 16)], dtype=np.uint8)


def hash_thumbnails(thumbnails: np.ndarray) -> np.ndarray:
    """Hashes (N,) uint64 of thumbnails (N, 32, 32): which of their 63 lowest cosine modes are above the median one."""
    modes = _COSINES @ thumbnails.astype(np.float32) @ _COSINES.T  # (N, 8, 8)
    modes = modes.reshape(len(thumbnails), -1)[:, 1:]
    middle = modes.shape[1] // 2
    bits = modes > np.partition(modes, middle, axis=1)[:, middle, None]
    return np.packbits(np.pad(bits, ((0, 0), (0, 1))), axis=1).view(np.uint64).ravel()


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In how many bits hashes differ."""
    return _ONES_IN[(a ^ b)[:, None].view(np.uint16)].sum(axis=1)


def close_pairs(hashes: np.ndarray, *, farthest: int = FARTHEST) -> np.ndarray:
    """Pairs (P, 2) of places in `hashes` (N,) uint64 that differ in at most `farthest` bits, the closest first.

    All of them up to `FARTHEST` bits, unless very many hashes agree in a third of their bits; beyond that, some.
    """
    found = [np.empty((0, 2), np.int64)]
    most = max(_FEW_PAIRS, _PAIRS_PER_HASH * len(hashes))
    for keys in _tables(hashes):
        if sum(map(len, found)) > most:
            found = [np.unique(np.concatenate(found), axis=0)]
            if len(found[0]) > most:
                break
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for step in range(1, _NEIGHBOURS + 1):
            same = np.flatnonzero(ordered[step:] == ordered[:-step])
            if not len(same):
                break
            left, right = order[same], order[same + step]
            close = distance(hashes[left], hashes[right]) <= farthest
            found.append(np.sort(np.stack([left[close], right[close]], axis=1), axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[np.argsort(distance(hashes[pairs[:, 0]], hashes[pairs[:, 1]]), kind="stable")]


def _tables(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """For every choice of bands, their bits as one number per hash."""
    # The last of the 64 bits is always 0.
    values = hashes.byteswap() >> np.uint64(1)
    mask = np.uint64((1 << _BAND_BITS) - 1)
    bands = [(values >> np.uint64(_BAND_BITS * number)) & mask for number in range(_BANDS)]
    for first, second, third in combinations(bands, _AGREEING):
        yield ((first << np.uint64(2 * _BAND_BITS)) | (second << np.uint64(_BAND_BITS)) | third).astype(np.uint32)
