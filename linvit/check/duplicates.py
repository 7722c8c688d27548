"""How much two images agree in their fine details, which tells a copy from a picture of the same kind of thing.

The same picture in other bytes: recompressed, resized, brightened or in grey.

Files with the same bytes, and how groups of images that are one are told.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from linvit.check.faults import Finding
from linvit.check.listing import ImageEntry
from linvit.check.perceptual import FARTHEST, close_pairs, distance
from linvit.check.run import Measurements, Pool, Reader, Stage
from linvit.data.decode import UnreadableImage, decode_image

# Sides in pixels that images are compared at, at most.
_LARGEST = 256
_CHUNK = 64


class Pair(NamedTuple):
    """Two images of the listing, by index and path."""

    a: int
    b: int
    path_a: str
    path_b: str


def likeness_of_pairs(pool: Pool[Reader], pairs: Sequence[Pair], on_pairs: Callable[[int], None]) -> np.ndarray:
    """The `likeness` (P,) of every pair; `on_pairs` is told how many more are done."""
    # Sorted, so that an image is mostly decoded once for all its pairs.
    order = sorted(range(len(pairs)), key=lambda place: pairs[place])
    chunks = [[pairs[place] for place in order[first : first + _CHUNK]] for first in range(0, len(order), _CHUNK)]
    found: list[float] = []
    for values in pool.map(_compare, chunks):
        found += values
        on_pairs(len(values))
    likeness = np.empty(len(pairs))
    likeness[order] = found
    return likeness


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation, -1 to 1, of the details of two images (H, W, 3) uint8, brought to the smaller size."""
    height, width = (min(*sides, _LARGEST) for sides in zip(a.shape[:2], b.shape[:2]))
    return float(details(a, height, width) @ details(b, height, width))


def details(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """What a blur of 2 pixels takes away from the grey image of that size, as a vector of length 1, or 0 without any.

    Clipped at twice their median size: else a few strong edges, such as a common frame, would outweigh all the rest.
    """
    grey = cv2.cvtColor(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    values = grey.astype(np.float32)
    values -= cv2.GaussianBlur(values, (0, 0), 2)
    most = 2 * float(np.median(np.abs(values)))
    values = values.clip(-most, most).ravel()
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-9)


def _compare(reader: Reader, pairs: list[Pair]) -> list[float]:
    @lru_cache(maxsize=2 * _CHUNK)
    def read(index: int, path: str) -> np.ndarray:
        image = decode_image(reader.source.read(index, path), name=path)
        height, width = (min(side, _LARGEST) for side in image.shape[:2])
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    @lru_cache(maxsize=2 * _CHUNK)
    def details_of(index: int, path: str, height: int, width: int) -> np.ndarray:
        return details(read(index, path), height, width)

    found = []
    for a, b, path_a, path_b in pairs:
        try:
            height, width = (min(sides) for sides in zip(read(a, path_a).shape[:2], read(b, path_b).shape[:2]))
            found.append(float(details_of(a, path_a, height, width) @ details_of(b, path_b, height, width)))
        except UnreadableImage:
            # Gone since it was inspected.
            found.append(-1.0)
    return found


# Grey levels by which a thumbnail's pixels deviate at least: flat images all look alike.
_FLATTEST = 4.0
# Correlation of thumbnails from which on it is worth reading two images again.
_COARSE = 0.9
# Likeness from which on two images are one picture, where a set holds few look-alikes, and at the most.
_ALIKE, _MOST_ALIKE = 0.6, 0.95
# How alike a set's images are that are no copies is seen from pairs a little farther apart than `FARTHEST`, and from
# those of images that have so many others near them, as hardly any picture is copied so often.
_BEYOND, _CROWD = 10, 8
# From how many such pairs, if so large a share of the images is in one.
_FEWEST_REFERENCES, _MOST_REFERENCES, _SHARE_OF_IMAGES = 20, 200, 0.1
# In a set of look-alikes no more pairs than images are read again, and in a small set so many.
_FEW_PAIRS = 5_000


@dataclass(frozen=True)
class NearCopies:
    """Groups of images that show one picture in other bytes, and how they were found.

    Of `num_candidates` pairs, those of which hashes and thumbnails said so, the nearest `num_compared` were compared in
    their details; those at least `threshold` alike are one picture.
    """

    groups: list[list[int]] = field(default_factory=list)
    num_candidates: int = 0
    num_compared: int = 0
    threshold: float = _ALIKE

    def describe(self) -> dict[str, float]:
        """For the report."""
        return {
            "candidate_pairs": self.num_candidates,
            "compared_pairs": self.num_compared,
            "threshold": round(self.threshold, 3),
        }


def find_near_copies(
    measurements: Measurements,
    copies: Iterable[Sequence[int]],
    paths: Sequence[str],
    pool: Pool[Reader],
    stage: Callable[[str, int], Stage],
) -> NearCopies:
    """Images that show the same picture in other bytes; of those with the same bytes the first stands in.

    Hashes find candidates, thumbnails drop most of those that are none, and the rest are read again and compared in
    their details. `stage` begins a progress bar.
    """
    is_repeat = np.zeros(len(paths), bool)
    for group in copies:
        is_repeat[list(group[1:])] = True
    spread = measurements.thumbnails.reshape(len(paths), -1).std(axis=1)
    chosen = np.flatnonzero(measurements.decoded & ~is_repeat & (spread >= _FLATTEST))
    hashes = measurements.hashes[chosen]
    pairs = close_pairs(hashes, farthest=_BEYOND)
    far = distance(hashes[pairs[:, 0]], hashes[pairs[:, 1]]) > FARTHEST
    pairs = chosen[pairs]
    alike = _coarsely_alike(measurements.thumbnails, pairs)
    num_candidates = int((~far & alike).sum())
    candidates = pairs[~far & alike][: max(_FEW_PAIRS, len(paths))]
    if not len(candidates):
        return NearCopies()
    references = _choose_references(pairs[far & alike], candidates, num_images=len(chosen))
    asked = [Pair(int(a), int(b), paths[a], paths[b]) for a, b in (*references, *candidates)]
    likeness = likeness_of_pairs(pool, asked, stage("look-alikes", len(asked)).advance)
    threshold = _threshold(likeness[: len(references)])
    groups = _connected(candidates[likeness[len(references) :] >= threshold])
    return NearCopies(groups, num_candidates, len(candidates), threshold)


def _choose_references(beyond: np.ndarray, candidates: np.ndarray, *, num_images: int) -> np.ndarray:
    """Pairs (R, 2) of images that look alike and are hardly ever copies; none where the set has few of them."""
    near_each = np.bincount(candidates.ravel())
    references = np.concatenate([beyond, candidates[near_each[candidates].min(axis=1) >= _CROWD]])
    if len(references) < _FEWEST_REFERENCES or len(np.unique(references)) < _SHARE_OF_IMAGES * num_images:
        return references[:0]
    if len(references) > _MOST_REFERENCES:
        return np.random.default_rng(0).choice(references, _MOST_REFERENCES, replace=False)
    return references


def _threshold(references: np.ndarray) -> float:
    """From which likeness on a pair is one picture, by how alike merely similar images of the set are."""
    if not len(references):
        return _ALIKE
    middle = np.median(references)
    deviation = 1.4826 * np.median(np.abs(references - middle))
    return float(np.clip(middle + 5 * deviation, _ALIKE, _MOST_ALIKE))


def _coarsely_alike(thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    found = [np.empty(0, bool)]
    for first in range(0, len(pairs), 65_536):
        left, right = (_standardised(thumbnails[places]) for places in pairs[first : first + 65_536].T)
        found.append((left * right).mean(axis=1) >= _COARSE)
    return np.concatenate(found)


def _standardised(thumbnails: np.ndarray) -> np.ndarray:
    values = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    return values / values.std(axis=1, keepdims=True)


def _connected(pairs: np.ndarray) -> list[list[int]]:
    """The groups that pairs form when members are shared."""
    parent = {int(place): int(place) for place in pairs.ravel()}

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    for a, b in pairs:
        parent[root(int(a))] = root(int(b))
    groups = defaultdict(list)
    for place in sorted(parent):
        groups[root(place)].append(place)
    return sorted(groups.values())


def find_copies(measurements: Measurements) -> list[list[int]]:
    """Groups of images whose bytes are the same; empty files are none.

    Taken for the same where the length and the 64 bits of the checksum are.
    """
    places = np.flatnonzero(measurements.num_bytes > 0)
    columns = (measurements.checksums, measurements.num_bytes)
    keys = np.stack([column.astype(np.uint64) for column in columns], axis=1)[places]
    _, group_of, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    group_of = group_of.ravel()
    groups = defaultdict(list)
    for row in np.flatnonzero(counts[group_of] > 1):
        groups[int(group_of[row])].append(int(places[row]))
    return sorted(groups.values())


def name_groups(groups: Iterable[Sequence[int]], images: Sequence[ImageEntry], *, prefix: str = "") -> list[Finding]:
    """Findings of groups: across splits, under several labels, or neither."""
    findings = []
    for group in groups:
        members = [images[index] for index in group]
        labels = {member.class_name for member in members} - {None}
        splits = {member.split for member in members}
        paths = [member.path for member in members]
        codes = ["duplicate_two_labels"] * (len(labels) > 1) + ["duplicate_across_splits"] * (len(splits) > 1)
        findings += [Finding(prefix + code, paths[0], "", tuple(paths[1:])) for code in codes or ["duplicate"]]
    return findings
