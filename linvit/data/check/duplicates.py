"""Files with the same bytes, and how groups of images that are one are told."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from linvit.data.check.faults import Finding
from linvit.data.check.reading import Measurements
from linvit.data.check.tree import ImageEntry


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
