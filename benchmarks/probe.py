"""Measure the quality of a backbone's features: k-nearest-neighbour and linear-probe accuracy.

    python benchmarks/probe.py DATA NAME=WEIGHTS local-dir:FOLDER ... --img-size 518 --json FILE

Features are the model's outputs without its classifier, for images of DATA/val, equally many of each class. Accuracy is
cross-validated in ten folds. Neighbours: k = 20, votes weighted by exp(cosine / 0.07), as in Caron et al. 2021, section
4.1. Linear probe: logistic regression on standardised features; a tenth of its training images chooses the L2 penalty.
A second linear probe also gets the mean of the patch tokens, as in Oquab et al. 2023 (DINOv2), appendix B.3.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

import linvit  # noqa: F401
from linvit.data.augment.build import resolve_input
from linvit.data.options import InputOptions
from linvit.data.sources.base import ImageSet
from linvit.data.sources.loose import load_batches
from linvit.data.sources.open import open_images
from linvit.device import choose_device
from linvit.measure.provenance import provenance, script_command
from linvit.output.files import sha256_of, write_json
from linvit.runs.weights import weights_file

NUM_NEIGHBOURS = 20
NEIGHBOUR_TEMPERATURE = 0.07
FOLDS = 10
L2_TRIED = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def draw(images: ImageSet, count: int, seed: int) -> list[int]:
    """Indices of about `count` images, equally many of each class."""
    order = np.random.default_rng(seed).permutation(len(images))
    labels = np.asarray(images.labels)[order]
    per_class = count // len(images.class_names)
    return [int(index) for label in range(len(images.class_names)) for index in order[labels == label][:per_class]]


@torch.inference_mode()
def features_of(model: VisionTransformer, batches: Iterable[Tensor], *, amp: bool) -> Tensor:
    """The model's features and the mean of its patch tokens, (N, 2, D) float32, for batches (B, 3, H, W) on its device.

    With `amp` the model runs in bfloat16.
    """
    rows = []
    for images in batches:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            tokens = model.forward_features(images)
            features = model.forward_head(tokens)
        rows.append(torch.stack([features.float(), tokens[:, model.num_prefix_tokens :].float().mean(1)], dim=1).cpu())
    return torch.cat(rows)


def cached(path: Path | None) -> Tensor | None:
    """Features from an earlier call, or None."""
    if path is None or not path.exists():
        return None
    features: Tensor = torch.load(path, weights_only=True)
    return features


def knn_hits(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> Tensor:
    """Whether each test image is classified correctly, (N,) bool."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    best, neighbours = similarity.topk(min(NUM_NEIGHBOURS, len(train)), dim=1)
    votes = torch.zeros(len(test), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[neighbours], (best / NEIGHBOUR_TEMPERATURE).exp())
    return votes.argmax(1) == test_labels


def probe_hits(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> Tensor:
    """Whether each test image is classified correctly, (N,) bool."""
    choosing = torch.arange(len(train)) % FOLDS == 0
    inner = train[~choosing], labels[~choosing], train[choosing]
    l2 = max(L2_TRIED, key=lambda each: int((classify(*inner, l2=each) == labels[choosing]).sum()))
    return classify(train, labels, test, l2=l2) == test_labels


def classify(train: Tensor, labels: Tensor, test: Tensor, *, l2: float) -> Tensor:
    """Classes (N,) by logistic regression."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(int(labels.max()) + 1, train.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight.T + bias, labels) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (test @ weight.T + bias).argmax(1)


def by_folds(hits: Callable[..., Tensor], features: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Whether each image is classified correctly by what was learnt from the other folds, (N,) bool."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    found = torch.zeros(len(features), dtype=torch.bool)
    for fold in range(FOLDS):
        test, train = order[fold::FOLDS], order[torch.arange(len(order)) % FOLDS != fold]
        found[test] = hits(features[train], labels[train], features[test], labels[test])
    return found


class Probes:
    """For each kind of probe on features (N, 2, D), whether each image is classified correctly."""

    def __init__(self, features: Tensor, labels: Tensor, seed: int) -> None:
        self.features = features
        outputs, patches = features.unbind(1)
        self.hits = {
            "knn": by_folds(knn_hits, outputs, labels, seed),
            "linear": by_folds(probe_hits, outputs, labels, seed),
            "linear_with_patches": by_folds(probe_hits, torch.cat([outputs, patches], dim=1), labels, seed),
        }

    def against(self, reference: "Probes") -> dict[str, float]:
        """Accuracies in per cent, points lost against the reference, and the similarity of the features."""
        row = {name: 100 * each.float().mean().item() for name, each in self.hits.items()}
        for name, each in self.hits.items():
            # Both models see the same images, so the differences are paired.
            less = reference.hits[name].float() - each.float()
            row[f"{name}_less"] = 100 * less.mean().item()
            row[f"{name}_less_stderr"] = 100 * less.std().item() / len(less) ** 0.5
        own, theirs = self.features[:, 0], reference.features[:, 0]
        row["cosine"] = F.cosine_similarity(own, theirs, dim=1).mean().item()
        # Variance of the difference, in units of the reference's variance per feature.
        row["variance_lost"] = ((own - theirs) / theirs.std(0)).square().mean().item()
        return row


def create(source: str, size: int | None) -> VisionTransformer:
    name, _, weights = source.partition("=")
    arguments = {"img_size": size} if size else {}
    overlay = {"file": weights, "num_classes": 0} if weights else None
    model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **arguments)
    assert isinstance(model, VisionTransformer)
    return model.eval()


def weights_of(source: str) -> str:
    """A digest of a model's weights, so that cached features of other weights are not reused for it."""
    _, _, path = source.partition("=")
    file = Path(path) if path else weights_file(Path(source.removeprefix("local-dir:")))
    return sha256_of(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+", help="models; the others are compared with the first")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", action="store_true", help="run all models in bfloat16")
    parser.add_argument("--device", default="auto", help="device for the features; probes are fitted on the CPU")
    parser.add_argument("--cache", type=Path, help="folder to cache features in, by model, size and images")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    device = torch.device(choose_device(args.device))
    images = open_images(args.data, split="val")
    indices = draw(images, args.num_images, args.seed)
    labels = torch.tensor([images.label(index) for index in indices])
    rows: list[dict[str, Any]] = []
    reference: Probes | None = None
    for source in args.models:
        model = create(source, args.img_size)
        spec = resolve_input(model, InputOptions(img_size=(args.img_size,) * 2 if args.img_size else None))
        started = time.perf_counter()
        key = f"{source} {weights_of(source)} {spec} {args.amp} {device.type} {images.root} {indices}"
        path = args.cache and args.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        features = cached(path)
        if features is None:
            paths = [str(images.path(index)) for index in indices]
            batches = load_batches(paths, spec, batch_size=8 if device.type == "cuda" else 1)
            features = features_of(model.to(device), (batch.to(device) for batch in batches), amp=args.amp)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(features, path)
        probes = Probes(features, labels, args.seed)
        reference = reference or probes
        row = {"model": source, **probes.against(reference), "seconds": time.perf_counter() - started}
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.json is not None:
        about = provenance(script_command(), seed=args.seed, n=1) | {
            "img_size": args.img_size,
            "num_images": len(indices),
            "amp": args.amp,
        }
        write_json(args.json, about | {"rows": rows})


if __name__ == "__main__":
    main()
