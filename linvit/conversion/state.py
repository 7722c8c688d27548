"""An earlier conversion of the same model, at another size, for the fit to go on from.

What of a conversion is done already, on disk, so that one that was stopped goes on where it was.

.NAME.convert/           beside the folder NAME that comes out
    settings.json        what the conversion was begun with
    plan.json            projected lengths, where they were planned
    layer-003.json       errors of a layer that is fitted
    layer-003.safetensors  its block's weights; written before the other
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from timm.models import VisionTransformer

from linvit.conversion.convert import use_ordinary_attention, without_counterpart
from linvit.conversion.fit import LayerFit
from linvit.model.vit import LinformerViT
from linvit.output.files import write_file, write_text
from linvit.runs.folder import Classifier, load_classifier
from linvit.runs.weights import compact
from linvit.settings.fields import listed


def load_earlier(folder: Path, original: VisionTransformer) -> Classifier:
    """The converted model in `folder`, at the size that the original has; E and F cover larger or smaller cells there.

    Raises ValueError where it is none, or of another model, or its projections would not shorten the sequence.
    """
    earlier = load_classifier(str(folder), img_size=original.patch_embed.img_size)
    model = earlier.model
    if not isinstance(model, LinformerViT):
        raise ValueError(f"--start-from {folder} is no converted model: give the folder that a conversion wrote")
    if differing := without_counterpart(original, model):
        raise ValueError(f"--start-from {folder} is of another model: its {compact(differing)} differ from this one's")
    return earlier


class FitState:
    """The state of the conversion that ends in `output`; nothing is written before there is something to keep.

    Raises ValueError, naming what differs, where layers were fitted with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.folder = output.with_name(f".{output.name}.convert")
        # As they will be read: tuples become lists.
        self.settings = json.loads(json.dumps(settings))
        file = self.folder / "settings.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else self.settings
        differing = [name for name in self.settings if self.settings[name] != before.get(name)]
        if differing and self._path(0, "json").is_file():
            raise ValueError(
                f"{output} was begun with another {listed(differing)}: go on with the same, or delete {self.folder} "
                "to begin anew"
            )
        if differing:
            self.remove()

    def plan(self, make: Callable[[], list[int | None]]) -> list[int | None]:
        """The plan that was made before, or else a new one, which is kept."""
        file = self.folder / "plan.json"
        if not file.is_file():
            self._begin()
            write_text(file, json.dumps(make()) + "\n")
        lengths: list[int | None] = json.loads(file.read_text(encoding="utf-8"))
        return lengths

    def save(self, fit: LayerFit, converted: LinformerViT) -> None:
        """Keep a layer that is fitted."""
        self._begin()
        weights = {name: value.contiguous() for name, value in converted.blocks[fit.layer].state_dict().items()}
        write_file(self._path(fit.layer, "safetensors"), lambda file: file.write(save(weights)))
        write_text(self._path(fit.layer, "json"), json.dumps(asdict(fit)) + "\n")

    def load(self, converted: LinformerViT) -> list[LayerFit]:
        """Put the layers that are done into the model; returns what is known of them."""
        fits: list[LayerFit] = []
        while (path := self._path(len(fits), "json")).is_file():
            fit = LayerFit(**json.loads(path.read_text(encoding="utf-8")))
            if fit.k is None:
                use_ordinary_attention(converted, [fit.layer])
            converted.blocks[fit.layer].load_state_dict(load_file(self._path(fit.layer, "safetensors")))
            fits.append(fit)
        return fits

    def remove(self) -> None:
        """All is done: forget it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "settings.json", json.dumps(self.settings, indent=2) + "\n")

    def _path(self, layer: int, suffix: str) -> Path:
        return self.folder / f"layer-{layer:03d}.{suffix}"
