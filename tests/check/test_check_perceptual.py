"""Perceptual hashes are robust, and all close pairs of hashes are found."""

import cv2
import numpy as np
from corpus import random_image

from linvit.check.perceptual import MAX_DISTANCE, close_pairs, distance, hash_thumbnails


def test_close_pairs_are_all_pairs_within_six_bits() -> None:
    rng = np.random.default_rng(0)
    count = 1600
    hashes = rng.integers(0, 1 << 63, count, dtype=np.uint64)
    # Every second hash is the one before it, with up to six bits changed.
    for index in range(1, count, 2):
        changed = sum(1 << int(bit) for bit in rng.choice(63, index % 7, replace=False))
        hashes[index] = hashes[index - 1] ^ np.uint64(changed)
    # As hashes are stored: the first bit first, and a last bit of 0.
    hashes = (hashes << np.uint64(1)).byteswap()
    distances = np.stack([distance(hashes, np.full(count, value)) for value in hashes])
    a, b = np.nonzero(np.triu(distances <= MAX_DISTANCE, 1))
    found = close_pairs(hashes)
    assert set(map(tuple, found.tolist())) == set(zip(a.tolist(), b.tolist()))
    assert len(found) >= count // 2
    assert (np.diff(distances[found[:, 0], found[:, 1]].astype(int)) >= 0).all()


def test_distance_counts_bits() -> None:
    a, b = np.array([0, 7], np.uint64), np.array([(1 << 63) + 1, 7], np.uint64)
    assert distance(a, b).tolist() == [2, 0]


def test_hashes_do_not_depend_on_brightness_and_contrast() -> None:
    thumbnails = np.stack([cv2.resize(np.asarray(random_image(n).convert("L")), (32, 32)) for n in range(20)])
    changed = (thumbnails * 0.5 + 60).astype(np.uint8)
    assert distance(hash_thumbnails(thumbnails), hash_thumbnails(changed)).max() <= 4
    assert len(set(hash_thumbnails(thumbnails).tolist())) == 20
