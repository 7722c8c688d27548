"""A set of images under a model's labels, without those of classes that the model does not know."""

from pathlib import Path

import numpy as np

from linvit.data.imageset import ImageSet
from linvit.evaluation.classes import ClassMatch


class RelabelledImages(ImageSet):
    """The images of another set, in its order, whose labels are those of a model.

    Args:
        images: whose class names were matched.
        match: tells the model's label of each of their classes.

    Attributes:
        kept: index of each image in the other set, ascending, (N,).
    """

    def __init__(self, images: ImageSet, match: ClassMatch) -> None:
        labels = np.array([-1 if label is None else label for label in match.labels])[np.asarray(images.labels)]
        self._images = images
        self.kept = np.flatnonzero(labels >= 0)
        super().__init__(images.root, split=images.split, class_names=match.class_names, labels=labels[self.kept])

    def path(self, index: int) -> Path:
        return self._images.path(int(self.kept[index]))

    def read_bytes(self, index: int) -> bytes:
        return self._images.read_bytes(int(self.kept[index]))
