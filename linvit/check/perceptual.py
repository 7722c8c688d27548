"""Perceptual hashes: 64 bits of an image's coarse pattern, which recompressing, resizing and brightening hardly change.

Hashes of similar images differ in few bits. To find such pairs among millions of hashes, the bits are split into 9
bands of 7. Two hashes that differ in at most 6 bits agree in at least 3 bands, so each of the 84 choices of 3 bands
gives a table in which they are neighbours. Norouzi et al. 2012 (multi-index hashing) use the same idea.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from linvit.check.inspect import THUMBNAIL

# Largest number of differing bits between near duplicates. The number of differing bits is always even.
MAX_DISTANCE = 6
_BANDS, _BAND_BITS, _BANDS_PER_TABLE = 9, 7, 3
# Limits for sets in which very many hashes share a table's bits: neighbours that each hash is compared with, and pairs
# kept per hash (in small sets, pairs kept in total).
_NEIGHBOURS = 32
_PAIRS_PER_HASH, _MIN_PAIRS = 20, 1_000_000

_FREQUENCIES = 8
_positions = np.arange(THUMBNAIL)
_COSINES = np.cos(np.pi * (2 * _positions + 1) * np.arange(_FREQUENCIES)[:, None] / (2 * THUMBNAIL)).astype(np.float32)
_BIT_COUNTS = np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)


def hash_thumbnails(thumbnails: np.ndarray) -> np.ndarray:
    """Hashes (N,) uint64 of thumbnails (N, 32, 32): which of their 63 lowest cosine modes exceed the median mode."""
    modes = _COSINES @ thumbnails.astype(np.float32) @ _COSINES.T  # (N, 8, 8)
    modes = modes.reshape(len(thumbnails), -1)[:, 1:]
    middle = modes.shape[1] // 2
    bits = modes > np.partition(modes, middle, axis=1)[:, middle, None]
    return np.packbits(np.pad(bits, ((0, 0), (0, 1))), axis=1).view(np.uint64).ravel()


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of bits in which hashes `a` and `b`, each (N,) uint64, differ."""
    return _BIT_COUNTS[(a ^ b)[:, None].view(np.uint16)].sum(axis=1)


def close_pairs(hashes: np.ndarray, *, max_distance: int = MAX_DISTANCE) -> np.ndarray:
    """Pairs (P, 2) of indices into `hashes` (N,) uint64 that differ in at most `max_distance` bits, the closest first.

    Up to a distance of `MAX_DISTANCE` all pairs are found, unless very many hashes agree in a third of their bits.
    Beyond it, only some are.
    """
    found = [np.empty((0, 2), np.int64)]
    limit = max(_MIN_PAIRS, _PAIRS_PER_HASH * len(hashes))
    for keys in _tables(hashes):
        if sum(map(len, found)) > limit:
            found = [np.unique(np.concatenate(found), axis=0)]
            if len(found[0]) > limit:
                break
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for step in range(1, _NEIGHBOURS + 1):
            same = np.flatnonzero(ordered[step:] == ordered[:-step])
            if not len(same):
                break
            left, right = order[same], order[same + step]
            close = distance(hashes[left], hashes[right]) <= max_distance
            found.append(np.sort(np.stack([left[close], right[close]], axis=1), axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[np.argsort(distance(hashes[pairs[:, 0]], hashes[pairs[:, 1]]), kind="stable")]


def _tables(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """For each choice of bands, the bits of those bands as one number per hash."""
    # The last of the 64 bits is always 0.
    values = hashes.byteswap() >> np.uint64(1)
    mask = np.uint64((1 << _BAND_BITS) - 1)
    bands = [(values >> np.uint64(_BAND_BITS * number)) & mask for number in range(_BANDS)]
    for first, second, third in combinations(bands, _BANDS_PER_TABLE):
        yield ((first << np.uint64(2 * _BAND_BITS)) | (second << np.uint64(_BAND_BITS)) | third).astype(np.uint32)
