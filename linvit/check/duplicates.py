"""Duplicates: files with the same bytes, and files that show the same image in another form.

Near duplicates are recompressed, resized, brightened or grey copies. They are found in three steps, each slower and
stricter than the one before: perceptual hashes, thumbnails, and the fine details of the images.
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
from linvit.check.perceptual import MAX_DISTANCE, close_pairs, distance
from linvit.check.pool import Pool, Stage
from linvit.check.reader import Measurements, Reader
from linvit.data.decode import UnreadableImage, decode_image

# Smallest deviation of a thumbnail's pixels, in grey levels: nearly uniform images all look alike.
_MIN_DEVIATION = 4.0
# Smallest correlation of two thumbnails for which the images are read again.
_THUMBNAIL_CORRELATION = 0.9
# Largest side in pixels at which details are compared.
_MAX_SIDE = 256
# Pairs per task of a process.
_CHUNK = 64
# A set of look-alikes may have more similar pairs than images. It compares as many pairs as images, but at least these.
_MIN_COMPARED = 5_000

# Smallest similarity of near duplicates: the default, and the upper limit in a set of look-alikes.
_THRESHOLD, _MAX_THRESHOLD = 0.6, 0.95
# The threshold of a set of look-alikes follows from reference pairs, which are similar but hardly ever copies: pairs
# whose hashes are a little farther apart than `MAX_DISTANCE`, and pairs of images with many similar images, because
# an image is rarely copied that often.
_REFERENCE_DISTANCE, _MANY_NEIGHBOURS = 10, 8
# Reference pairs needed, reference pairs used, and the share of images that they must include.
_MIN_REFERENCES, _MAX_REFERENCES, _MIN_SHARE = 20, 200, 0.1


class Pair(NamedTuple):
    """Two images of the listing, by index and path."""

    a: int
    b: int
    path_a: str
    path_b: str


@dataclass(frozen=True)
class NearDuplicates:
    """Groups of images that are near duplicates, and how they were found.

    Args:
        groups: indices of the images of each group.
        num_candidates: pairs with similar hashes and thumbnails.
        num_compared: the most similar of these pairs, whose details were compared.
        threshold: similarity of details from which a pair is a near duplicate.
    """

    groups: list[list[int]] = field(default_factory=list)
    num_candidates: int = 0
    num_compared: int = 0
    threshold: float = _THRESHOLD

    def describe(self) -> dict[str, float]:
        """The entry in the report."""
        return {
            "candidate_pairs": self.num_candidates,
            "compared_pairs": self.num_compared,
            "threshold": round(self.threshold, 3),
        }


def find_duplicates(measurements: Measurements) -> list[list[int]]:
    """Groups of images with the same bytes, judged by their length and a 64-bit checksum; empty files are left out."""
    indices = np.flatnonzero(measurements.num_bytes > 0)
    columns = (measurements.checksums, measurements.num_bytes)
    keys = np.stack([column.astype(np.uint64) for column in columns], axis=1)[indices]
    _, group_of = np.unique(keys, axis=0, return_inverse=True)
    return _groups(indices, group_of.ravel())


def find_near_duplicates(
    measurements: Measurements,
    duplicates: Iterable[Sequence[int]],
    paths: Sequence[str],
    pool: Pool[Reader],
    stage: Callable[[str, int], Stage],
) -> NearDuplicates:
    """Images that show the same image in different files.

    Args:
        duplicates: groups of images with the same bytes, of which only the first image is compared.
        stage: adds a progress bar.
    """
    is_repeat = np.zeros(len(paths), bool)
    for group in duplicates:
        is_repeat[list(group[1:])] = True
    deviation = measurements.thumbnails.reshape(len(paths), -1).std(axis=1)
    indices = np.flatnonzero(measurements.decoded & ~is_repeat & (deviation >= _MIN_DEVIATION))
    hashes = measurements.hashes[indices]
    pairs = close_pairs(hashes, max_distance=_REFERENCE_DISTANCE)
    is_far = distance(hashes[pairs[:, 0]], hashes[pairs[:, 1]]) > MAX_DISTANCE
    pairs = indices[pairs]
    is_similar = _have_similar_thumbnails(measurements.thumbnails, pairs)
    num_candidates = int((~is_far & is_similar).sum())
    candidates = pairs[~is_far & is_similar][: max(_MIN_COMPARED, len(paths))]
    if not len(candidates):
        return NearDuplicates()
    references = _choose_references(pairs[is_far & is_similar], candidates, num_images=len(indices))
    compared = [Pair(int(a), int(b), paths[a], paths[b]) for a, b in (*references, *candidates)]
    similarities = similarity_of_pairs(pool, compared, stage("look-alikes", len(compared)).advance)
    threshold = _threshold(similarities[: len(references)])
    groups = _connected(candidates[similarities[len(references) :] >= threshold])
    return NearDuplicates(groups, num_candidates, len(candidates), threshold)


def group_findings(groups: Iterable[Sequence[int]], images: Sequence[ImageEntry], *, prefix: str = "") -> list[Finding]:
    """Findings for groups of duplicates: under several labels, across splits, or neither."""
    findings = []
    for group in groups:
        members = [images[index] for index in group]
        labels = {member.class_name for member in members} - {None}
        splits = {member.split for member in members}
        paths = [member.path for member in members]
        codes = ["duplicate_two_labels"] * (len(labels) > 1) + ["duplicate_across_splits"] * (len(splits) > 1)
        findings += [Finding(prefix + code, paths[0], "", tuple(paths[1:])) for code in codes or ["duplicate"]]
    return findings


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation, -1 to 1, of the details of two images (H, W, 3) uint8, at the smaller of their sizes."""
    height, width = (min(*sides, _MAX_SIDE) for sides in zip(a.shape[:2], b.shape[:2]))
    return float(details(a, height, width) @ details(b, height, width))


def details(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fine details: the resized grey image minus its blur by 2 pixels, as a vector of length 1 (0 for a flat image).

    Values are clipped at twice their median size. Otherwise a few strong edges, such as a common frame, would outweigh
    everything else.
    """
    grey = cv2.cvtColor(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    values = grey.astype(np.float32)
    values -= cv2.GaussianBlur(values, (0, 0), 2)
    limit = 2 * float(np.median(np.abs(values)))
    values = values.clip(-limit, limit).ravel()
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-9)


def similarity_of_pairs(pool: Pool[Reader], pairs: Sequence[Pair], on_pairs: Callable[[int], None]) -> np.ndarray:
    """The `similarity` (P,) of each pair; `on_pairs` is called with the number of pairs done since the last call."""
    # Sorted, so that most images are decoded only once for all their pairs.
    order = sorted(range(len(pairs)), key=lambda index: pairs[index])
    chunks = [[pairs[index] for index in order[first : first + _CHUNK]] for first in range(0, len(order), _CHUNK)]
    found: list[float] = []
    for values in pool.map(_compare, chunks):
        found += values
        on_pairs(len(values))
    similarities = np.empty(len(pairs))
    similarities[order] = found
    return similarities


def _compare(reader: Reader, pairs: list[Pair]) -> list[float]:
    @lru_cache(maxsize=2 * _CHUNK)
    def read(index: int, path: str) -> np.ndarray:
        image = decode_image(reader.source.read(index, path), name=path)
        height, width = (min(side, _MAX_SIDE) for side in image.shape[:2])
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    @lru_cache(maxsize=2 * _CHUNK)
    def details_of(index: int, path: str, height: int, width: int) -> np.ndarray:
        return details(read(index, path), height, width)

    similarities = []
    for a, b, path_a, path_b in pairs:
        try:
            height, width = (min(sides) for sides in zip(read(a, path_a).shape[:2], read(b, path_b).shape[:2]))
            similarities.append(float(details_of(a, path_a, height, width) @ details_of(b, path_b, height, width)))
        except UnreadableImage:
            # The file was removed after it was inspected.
            similarities.append(-1.0)
    return similarities


def _have_similar_thumbnails(thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    found = [np.empty(0, bool)]
    for first in range(0, len(pairs), 65_536):
        left, right = (_standardize(thumbnails[indices]) for indices in pairs[first : first + 65_536].T)
        found.append((left * right).mean(axis=1) >= _THUMBNAIL_CORRELATION)
    return np.concatenate(found)


def _standardize(thumbnails: np.ndarray) -> np.ndarray:
    values = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    return values / values.std(axis=1, keepdims=True)


def _choose_references(far: np.ndarray, candidates: np.ndarray, *, num_images: int) -> np.ndarray:
    """Reference pairs (R, 2); none if the set has few look-alikes."""
    num_neighbours = np.bincount(candidates.ravel())
    crowded = num_neighbours[candidates].min(axis=1) >= _MANY_NEIGHBOURS
    references = np.concatenate([far, candidates[crowded]])
    if len(references) < _MIN_REFERENCES or len(np.unique(references)) < _MIN_SHARE * num_images:
        return references[:0]
    if len(references) > _MAX_REFERENCES:
        return np.random.default_rng(0).choice(references, _MAX_REFERENCES, replace=False)
    return references


def _threshold(similarities: np.ndarray) -> float:
    """The smallest similarity of near duplicates, from the similarities of the reference pairs."""
    if not len(similarities):
        return _THRESHOLD
    median = np.median(similarities)
    deviation = 1.4826 * np.median(np.abs(similarities - median))
    return float(np.clip(median + 5 * deviation, _THRESHOLD, _MAX_THRESHOLD))


def _connected(pairs: np.ndarray) -> list[list[int]]:
    """The groups of images that are connected by pairs (P, 2)."""
    if not len(pairs):
        return []
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    indices, edges = np.unique(pairs, return_inverse=True)
    edges = edges.reshape(pairs.shape)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(indices), len(indices)))
    _, group_of = connected_components(graph, directed=False)
    return _groups(indices, group_of)


def _groups(indices: np.ndarray, group_of: np.ndarray) -> list[list[int]]:
    """The `indices` (N,) of each group of at least two; `group_of` (N,) numbers the group of each."""
    groups = defaultdict(list)
    for row in np.flatnonzero(np.bincount(group_of)[group_of] > 1):
        groups[int(group_of[row])].append(int(indices[row]))
    return sorted(groups.values())
