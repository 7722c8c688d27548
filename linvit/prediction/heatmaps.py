"""Heat maps of predicted images: `linvit predict --heatmap`."""

from dataclasses import replace
from pathlib import Path

import torch

from linvit.data.decode import UnreadableImage
from linvit.data.sources.loose import LooseImages
from linvit.data.tiling import Tiling
from linvit.explanation.explain import Explainer
from linvit.explanation.maps import OF_A_CLASS, Method
from linvit.explanation.naming import FileNames
from linvit.explanation.overlay import LARGEST, save_overlay, title_of
from linvit.output.terminal import note
from linvit.prediction.predictor import Prediction
from linvit.runs.folder import Classifier


class HeatMaps:
    """Writes a map of each predicted image into a folder, as a PNG. Memory holds one image at a time.

    Args:
        folder: must exist.
        classifier: the model that predicts, on its device, with its class names.
        img_size: (height, width) of the model's input; by default the model's own.

    Raises ValueError if the model cannot be explained by the method.
    """

    def __init__(
        self,
        folder: Path,
        method: Method,
        classifier: Classifier,
        *,
        img_size: tuple[int, int] | None,
        tiling: Tiling | None,
    ) -> None:
        self._folder = folder
        self._method = method
        self._explainer = Explainer(classifier, img_size=img_size, tiling=tiling)
        self._explainer.check(method)
        self._names = FileNames()
        self._notes: set[str] = set()
        self.num_written = 0

    def write(self, images: LooseImages, index: int, prediction: Prediction) -> tuple[str | None, Prediction]:
        """Write the map of an image; returns its path, or None and the prediction with the reason as its error.

        Raises ValueError if the model's attention is not one matrix per layer and head, and OSError if the file cannot
        be written.
        """
        name = self._names.name(images.path(index))
        if prediction.error is not None:
            return None, prediction
        try:
            path = self._folder / f"{name}.png"
            self._write(path, images, index, prediction)
        except UnreadableImage as error:
            reason = str(error).removeprefix(f"{images.path(index)}: ")
            return None, replace(prediction, error=f"no heat map: {reason}")
        except torch.OutOfMemoryError:
            return None, replace(prediction, error="no heat map: memory ran out; use a smaller --img-size or --amp")
        self.num_written += 1
        return str(path), prediction

    def _write(self, path: Path, images: LooseImages, index: int, prediction: Prediction) -> None:
        image = images.read(index, input_range=self._explainer.spec.input_range)
        label = prediction.labels[0]
        # Two classes may have one description, such as the cranes of ImageNet; the predicted one is then explained.
        named = [index for index, name in enumerate(self._explainer.class_names) if name == label]
        target = named[0] if len(named) == 1 else None
        found = self._explainer.explain(image, method=self._method, target=target, longest_side=LARGEST)
        explained = label if self._method in OF_A_CLASS else None
        title = title_of(label, prediction.probabilities[0], method=self._method, explained=explained)
        save_overlay(path, image, found.heat, title=title)
        for sentence in found.approximations:
            if sentence not in self._notes:
                note(f"heat maps are approximate: {sentence}")
            self._notes.add(sentence)
