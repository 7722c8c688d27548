"""Features of images, computed once and kept in files that later probes reuse.

The name of a file is a hash of everything that its features depend on: the model with its weights, the preparation of
the images, the precision, and the path, size and modification time of every image. Whatever changes, the name changes,
and the features are computed again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from linvit.data.augment.build import InputSpec
from linvit.data.cache import file_fingerprint
from linvit.data.loader import Loader
from linvit.data.sources.base import ImageSet
from linvit.evaluation.inference import BatchForward
from linvit.model.build import TimmModel
from linvit.model.description import model_digest
from linvit.output.files import write_file
from linvit.output.terminal import note
from linvit.version import __version__

# Increase it when features or their format change.
FORMAT = 1

View = Literal["image", "mirrored"]


@dataclass(frozen=True)
class Features:
    """Features of N images: values (N, D) float32, and which of the images could be read, (N,); other rows are 0."""

    values: Tensor
    readable: Tensor


def facts_of(model: TimmModel, spec: InputSpec, amp_dtype: torch.dtype | None) -> dict[str, Any]:
    """What the features of any image depend on; `model` has no classifier."""
    return {
        "format": FORMAT,
        "linvit": __version__,
        "model": model_digest(model),
        "input": asdict(spec),
        "amp": str(amp_dtype),
    }


def image_features(
    model: TimmModel,
    images: ImageSet,
    views: Sequence[View],
    *,
    folder: Path,
    facts: dict[str, Any],
    create_loader: Callable[[], Loader],
    amp_dtype: torch.dtype | None,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[list[Features], bool]:
    """The features of each view of the images, from files in `folder` where they are there, and whether all were.

    Args:
        model: without a classifier, in evaluation mode; its outputs are the features.
        facts: see `facts_of`.
        create_loader: builds a loader of `images`; called only if features are missing.
        advance: called with the number of images after each batch.

    Raises ValueError if the features of an image are NaN or infinite, OSError if a file cannot be written.
    """
    names = sha256()
    for index in range(len(images)):
        names.update(b"%d\n" % file_fingerprint(images.path(index)))
    keys = {
        view: json.dumps({**facts, "view": view, "images": names.hexdigest(), "num_images": len(images)})
        for view in views
    }
    paths = {
        view: folder / f"{images.split}-{view}-{sha256(key.encode()).hexdigest()[:16]}.safetensors"
        for view, key in keys.items()
    }
    found = {view: _read(paths[view], keys[view], num_images=len(images)) for view in views}
    missing = [view for view, features in found.items() if features is None]
    if missing:
        computed = _compute(
            model, create_loader(), missing, num_images=len(images), amp_dtype=amp_dtype, advance=advance
        )
        for view, each in computed.items():
            _check_finite(each, images)
            _write(paths[view], keys[view], each)
        found |= computed
    return [features for view in views if (features := found[view]) is not None], not missing


def _compute(
    model: TimmModel,
    loader: Loader,
    views: Sequence[View],
    *,
    num_images: int,
    amp_dtype: torch.dtype | None,
    advance: Callable[[int], object],
) -> dict[View, Features]:
    forward = BatchForward(model, device=next(model.parameters()).device, amp_dtype=amp_dtype, log=note)
    values: dict[View, Tensor] = {}
    readable = torch.zeros(num_images, dtype=torch.bool)
    for batch in loader:
        advance(len(batch.images) + len(batch.unreadable))
        if not len(batch.images):
            continue
        readable[batch.indices] = True
        for view in views:
            features = forward(batch.images if view == "image" else batch.images.flip(3)).cpu()
            if features.ndim != 2:
                raise ValueError(
                    f"{model.pretrained_cfg['architecture']} without its classifier gives outputs of shape "
                    f"{tuple(features.shape[1:])} per image, not one row of features: use a model with pooling"
                )
            values.setdefault(view, torch.zeros(num_images, features.shape[1]))[batch.indices] = features
    if not readable.any():
        raise ValueError(f"none of the {num_images:,} images can be read; restore them")
    return {view: Features(values[view], readable) for view in views}


def _check_finite(features: Features, images: ImageSet) -> None:
    wrong = (~features.values.isfinite().all(1)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"the model's features are NaN or infinite for {len(wrong):,} of {len(images):,} images, such as "
            f"{images.path(wrong[0])}; use float32 (without --amp), or other weights"
        )


def _read(path: Path, key: str, *, num_images: int) -> Features | None:
    """The features in a file; None if there is no such file, or not with this key."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("linvit") != key:
                raise ValueError("it belongs to another model or other images")
            features = Features(file.get_tensor("features"), file.get_tensor("readable"))
        if features.values.shape[0] != num_images or features.readable.shape != (num_images,):
            raise ValueError("it has features of another number of images")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, SafetensorError) as error:
        note(f"{path} is not used ({error}): its features are computed again")
        return None
    return features


def _write(path: Path, key: str, features: Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save({"features": features.values, "readable": features.readable}, metadata={"linvit": key})
    write_file(path, lambda file: file.write(data))
