"""The model card of an exported or published model: Markdown with the Hugging Face hub's front matter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linvit.data.augment.build import InputSpec
from linvit.model.description import CONFIG, read_json
from linvit.output.cells import markdown_cell
from linvit.output.terminal import format_size, printable
from linvit.runs.folder import Classifier
from linvit.version import __version__

# The card lists at most this many class names.
_MAX_CLASSES = 50
_METRICS = {"top1": "top-1", "top5": "top-5", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1"}


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
        name: of the model, as a reader loads it, such as `owner/name` on the hub.
        license: SPDX identifier of the weights' licence; None if it is not stated.
        evaluation: what `linvit eval --json` wrote; empty for the metrics that training recorded.
    """

    name: str
    license: str | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)


def recorded(classifier: Classifier) -> dict[str, Any]:
    """What training wrote about the weights in their config.json, such as epoch and metrics; empty if nothing."""
    path = Path(classifier.weights).parent / CONFIG
    about = read_json(path).get("linvit") if path.is_file() else None
    return about if isinstance(about, dict) else {}


def model_card(classifier: Classifier, spec: InputSpec, origin: Origin, *, is_on_hub: bool) -> str:
    """The text of README.md: metrics, classes, input, how to load the model, intended use, limits, training.

    A model without a classifier (`num_classes=0`) is described as a feature extractor.
    """
    num_classes = classifier.model.num_classes
    task = "classification" if num_classes else "feature-extraction"
    license_line = f"license: {origin.license}\n" if origin.license else ""
    architecture = classifier.model.pretrained_cfg["architecture"]
    address = f"hf-hub:{origin.name}" if is_on_hub else f"local-dir:{origin.name}"
    about = (
        f"an image classifier with {num_classes} classes, trained"
        if num_classes
        else f"a feature extractor with {classifier.model.num_features} features per image, made"
    )
    sections = {
        "Metrics": _metrics(classifier, origin) if num_classes else "",
        "Use": _use(classifier, spec, address, address if is_on_hub else origin.name),
        "Input": f"RGB images of {format_size(spec.size)} px, {spec.interpolation} resize, crop {spec.crop_pct:g} "
        f"({spec.crop_mode}), mean {_numbers(spec.mean)}, standard deviation {_numbers(spec.std)}.",
        "Classes": _classes(classifier) if num_classes else "",
        "Intended use and limits": _limits(address if is_on_hub else origin.name) if num_classes else "",
        "Training": _training(classifier),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"""\
---
library_name: timm
pipeline_tag: image-{task}
{license_line}tags:
- image-{task}
- timm
- linvit
---
# {markdown_cell(origin.name)}

`{architecture}`, {about} with linvit.

{body}

Licence: {origin.license or "not stated"}. linvit {__version__}.
"""


def _use(classifier: Classifier, spec: InputSpec, address: str, source: str) -> str:
    """Code that loads the model."""
    if classifier.model.num_classes == 0:
        return f"""\
```python
import linvit, timm

model = timm.create_model("{address}", pretrained=True).eval()
features = model(images)  # normalised images (B, 3, {spec.size[0]}, {spec.size[1]})
```"""
    return f"""\
```python
import linvit, timm

model = timm.create_model("{address}", pretrained=True).eval()
class_names = model.pretrained_cfg["label_names"]
```

```python
import linvit

for prediction in linvit.Predictor("{source}")(["photo.jpg"]):
    print(prediction.labels[0], prediction.probabilities[0])
```

With ONNX Runtime alone, after `linvit export {source} -o model.onnx --with-preprocessing`:

```python
import numpy as np, onnxruntime
from PIL import Image

image = Image.open("photo.jpg").convert("RGB").resize(({spec.size[1]}, {spec.size[0]}))
probabilities = onnxruntime.InferenceSession("model.onnx").run(None, {{"images": np.asarray(image)[None]}})[0]
```"""


def _classes(classifier: Classifier) -> str:
    names = classifier.class_names or []
    shown = ", ".join(markdown_cell(name) for name in names[:_MAX_CLASSES]) or "not recorded"
    more = f" and {len(names) - _MAX_CLASSES} more" if len(names) > _MAX_CLASSES else ""
    return f"{len(names) or classifier.model.num_classes}: {shown}{more}"


def _limits(source: str) -> str:
    return f"""\
Classifies images like those it was trained on into the classes above. Every image gets one of these classes, also an
image of something else. Probabilities may be badly calibrated on images from another camera or place; evaluate the
model on your own labelled images first: `linvit eval {source} DATA`."""


def _metrics(classifier: Classifier, origin: Origin) -> str:
    rows = []
    if origin.evaluation:
        intervals = origin.evaluation.get("confidence") or {}
        for key, label in _METRICS.items():
            if key in origin.evaluation:
                low_high = intervals.get(key)
                interval = f" ({low_high[0]:.2f} to {low_high[1]:.2f})" if low_high else ""
                rows.append(f"| {label} | {origin.evaluation[key]:.2f} %{interval} |")
        data = printable(Path(str(origin.evaluation.get("data", ""))).name)
        note = f"On {origin.evaluation.get('num_images', 'the')} images of `{data}`, with 95 % intervals."
    else:
        found = recorded(classifier).get("metrics") or {}
        rows = [f"| {label} | {found[key]:.2f} % |" for key, label in _METRICS.items() if key in found]
        note = (
            "On the validation images of the training. These figures are optimistic: the weights were chosen by them."
        )
    return "\n".join(["| | |", "|---|---|", *rows, "", note]) if rows else "Not recorded."


def _training(classifier: Classifier) -> str:
    settings = classifier.settings
    if "epochs" not in settings:
        return "Not recorded."
    data = printable(Path(str(settings.get("data_dir"))).name)
    given = {
        name: settings.get(name)
        for name in ("opt", "lr", "sched", "batch_size", "aa", "mixup", "cutmix", "weight_decay")
    }
    recipe = ", ".join(f"{name} {value}" for name, value in given.items() if value not in (None, 0, 0.0))
    return f"Data `{markdown_cell(data)}`, {settings['epochs']} epochs, seed {settings.get('seed')}: {recipe}."


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
