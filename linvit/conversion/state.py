"""What is already done: the layers of an interrupted conversion, and the earlier one that --start-from names.

.NAME.convert/             beside the output folder NAME
    settings.json          the options that the fit depends on
    plan.json              planned lengths, if --k is 'plan'
    layer-003.json         errors of a fitted layer
    layer-003.safetensors  weights of its block, written before the errors
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from linvit.conversion.blocks import Vit
from linvit.conversion.convert import unmatched_weights, use_ordinary_attention
from linvit.conversion.fit import LayerFit
from linvit.model.transformer import LinformerTransformer
from linvit.output.files import parse_json, reason, write_file, write_json
from linvit.runs.folder import Classifier, load_classifier
from linvit.runs.weights import compact
from linvit.settings.fields import listed


def load_converted(folder: Path, original: Vit) -> Classifier:
    """Load the converted model in `folder` at the original's image size; E and F move to that grid.

    Raises ValueError if it is not a converted model, belongs to another model, or its projections would not shorten the
    sequence.
    """
    classifier = load_classifier(str(folder), img_size=original.patch_embed.img_size)
    model = classifier.model
    if not isinstance(model, LinformerTransformer):
        raise ValueError(f"--start-from {folder} is not a converted model: give the output folder of a conversion")
    if unmatched := unmatched_weights(original, model):
        raise ValueError(f"--start-from {folder} belongs to another model: its {compact(unmatched)} differ")
    return classifier


class FitState:
    """The progress of the conversion that writes `output`; no file is written before there is progress to keep.

    Raises ValueError, naming the settings that differ, if layers were fitted with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.folder = output.with_name(f".{output.name}.convert")
        # As JSON reads them back: tuples become lists.
        self.settings = json.loads(json.dumps(settings))
        file = self.folder / "settings.json"
        with self._reading():
            saved = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else self.settings
            differing = [name for name in self.settings if self.settings[name] != saved.get(name)]
        if differing and self._path(0, "json").is_file():
            raise ValueError(
                f"{output} was started with different settings ({listed(differing)}): repeat the earlier command to "
                f"resume it, or delete {self.folder} to start over"
            )
        if differing:
            self.remove()

    def plan(self, make: Callable[[], list[int | None]]) -> list[int | None]:
        """The saved plan; if there is none, call `make` and save its result."""
        file = self.folder / "plan.json"
        if not file.is_file():
            lengths = make()
            self._begin()
            write_json(file, lengths, indent=None)
        with self._reading():
            lengths = parse_json(file.read_text(encoding="utf-8"))
            if not isinstance(lengths, list) or not all(
                length is None or isinstance(length, int) for length in lengths
            ):
                raise ValueError("plan.json holds no lengths")
        return lengths

    @property
    def restored(self) -> list[int]:
        """The layers that got ordinary attention back, in this order."""
        file = self.folder / "restored.json"
        if not file.is_file():
            return []
        with self._reading():
            layers = parse_json(file.read_text(encoding="utf-8"))
            if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
                raise ValueError("restored.json holds no layers")
        return layers

    def restore(self, layer: int) -> None:
        """Record that a layer gets ordinary attention back: it and the layers after it are fitted again."""
        layers = [*self.restored, layer]
        # In this order, an interruption in between only repeats these fits.
        for path in sorted(self.folder.glob("layer-*"), reverse=True):
            if path.stem >= self._path(layer, "json").stem:
                path.unlink()
        write_json(self.folder / "restored.json", layers, indent=None)

    def save(self, fit: LayerFit, converted: LinformerTransformer) -> None:
        """Save a fitted layer; raises OSError if it cannot be written."""
        self._begin()
        weights = {name: value.contiguous() for name, value in converted.blocks[fit.layer].state_dict().items()}
        write_file(self._path(fit.layer, "safetensors"), lambda file: file.write(save(weights)))
        write_json(self._path(fit.layer, "json"), asdict(fit), indent=None)

    def load(self, converted: LinformerTransformer) -> list[LayerFit]:
        """Copy the saved layers into the model; returns their fits."""
        fits: list[LayerFit] = []
        while (path := self._path(len(fits), "json")).is_file():
            with self._reading():
                values: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
                # A number that is not finite was saved as null; only k may be None.
                values = {name: math.nan if v is None and name != "k" else v for name, v in values.items()}
                fit = LayerFit(**values)
                if fit.k is None:
                    use_ordinary_attention(converted, [fit.layer])
                converted.blocks[fit.layer].load_state_dict(load_file(self._path(fit.layer, "safetensors")))
            fits.append(fit)
        return fits

    def remove(self) -> None:
        """Delete the saved progress."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise ValueError, naming the folder, if what is read from it is damaged."""
        try:
            yield
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{self.folder} is damaged ({reason(error)}): delete it to start over") from error

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "settings.json", self.settings)

    def _path(self, layer: int, extension: str) -> Path:
        return self.folder / f"layer-{layer:03d}.{extension}"
