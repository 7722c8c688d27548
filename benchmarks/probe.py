"""How much of a backbone's knowledge its features hold: k-nearest-neighbour and linear-probe accuracy.

    python benchmarks/probe.py DATA NAME=WEIGHTS local-dir:FOLDER ... --img-size 518 --json FILE

Features are what the model gives without its classifier. Neighbours: k = 20, votes weighted by exp(cosine / 0.07) as in
Caron et al. 2021, section 4.1. Linear probe: multinomial logistic regression on standardised features, L2 of 1e-3.
Every model sees the same images, as many of each class as of any other.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from provenance import provenance
from torch import Tensor
from torch.nn import functional as F

import linvit  # noqa: F401
from linvit.data.imageset import ImageSet
from linvit.data.loader import normalize
from linvit.data.options import InputOptions
from linvit.data.sources import open_images
from linvit.data.transforms import InputSpec, build_eval_pipeline, resolve_input
from linvit.files import sha256_of
from linvit.weights import weights_file

NUM_NEIGHBOURS = 20
NEIGHBOUR_TEMPERATURE = 0.07
PROBE_L2 = 1e-3


def draw(images: ImageSet, count: int, seed: int) -> list[int]:
    """Indices of `count` images, as many of each class as of any other."""
    order = np.random.default_rng(seed).permutation(len(images))
    labels = np.asarray(images.labels)[order]
    per_class = count // len(images.class_names)
    return [int(index) for label in range(len(images.class_names)) for index in order[labels == label][:per_class]]


@torch.inference_mode()
def features_of(
    model: torch.nn.Module, images: ImageSet, indices: Sequence[int], spec: InputSpec, *, amp: bool
) -> Tensor:
    """(N, D) float32; with `amp` the model computes in bfloat16."""
    pipeline = build_eval_pipeline(spec)
    rows = []
    for index in indices:
        pixels = torch.from_numpy(pipeline(image=images.read(index))["image"])[None]
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            rows.append(model(normalize(pixels, spec)).float())
    return torch.cat(rows)


def kept(path: Path | None) -> Tensor | None:
    """Features of an earlier call."""
    if path is None or not path.exists():
        return None
    features: Tensor = torch.load(path, weights_only=True)
    return features


def knn_hits(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> Tensor:
    """Whether each test image is classified rightly, (N,) bool."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    best, neighbours = similarity.topk(min(NUM_NEIGHBOURS, len(train)), dim=1)
    votes = torch.zeros(len(test), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[neighbours], (best / NEIGHBOUR_TEMPERATURE).exp())
    return votes.argmax(1) == test_labels


def probe_hits(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> Tensor:
    """Whether each test image is classified rightly, (N,) bool."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(int(labels.max()) + 1, train.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight.T + bias, labels) + PROBE_L2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (test @ weight.T + bias).argmax(1) == test_labels


def create(source: str, size: int | None) -> torch.nn.Module:
    name, _, weights = source.partition("=")
    arguments = {"img_size": size} if size else {}
    if weights:
        overlay = {"file": weights, "num_classes": 0}
        model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **arguments)
    else:
        model = timm.create_model(name, pretrained=True, num_classes=0, **arguments)
    return model.eval()


def weights_of(source: str) -> str:
    """A digest of a model's weights, so that features of others under the same name are not taken for its own."""
    _, _, path = source.partition("=")
    file = Path(path) if path else weights_file(Path(source.removeprefix("local-dir:")))
    return sha256_of(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+", help="the first is what the others are compared with")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--train", type=int, default=500)
    parser.add_argument("--val", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", action="store_true", help="all models in bfloat16, which some CPUs have units for")
    parser.add_argument("--cache", type=Path, help="folder that features are kept in, by model, size and images")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    sets = {"train": args.train, "val": args.val}
    images = {split: open_images(args.data, split=split) for split in sets}
    indices = {split: draw(images[split], count, args.seed) for split, count in sets.items()}
    labels = {split: torch.tensor([images[split].label(index) for index in indices[split]]) for split in sets}
    rows, reference = [], None
    for source in args.models:
        model = create(source, args.img_size)
        spec = resolve_input(model, InputOptions(img_size=(args.img_size,) * 2 if args.img_size else None))
        started = time.perf_counter()
        weights = weights_of(source)
        features = {}
        for split in sets:
            key = f"{source} {weights} {spec} {args.amp} {images[split].root} {indices[split]}"
            path = args.cache and args.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
            found = kept(path)
            if found is None:
                found = features_of(model, images[split], indices[split], spec, amp=args.amp)
            features[split] = found
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(features[split], path)
        given = features["train"], labels["train"], features["val"], labels["val"]
        hits = {"knn": knn_hits(*given), "linear": probe_hits(*given)}
        reference = reference or (features["val"], hits)
        row = {
            "model": source,
            **{name: 100 * each.float().mean().item() for name, each in hits.items()},
            **{
                f"{name}_less": 100 * (reference[1][name].float() - each.float()).mean().item()
                for name, each in hits.items()
            },
            # Of the paired differences: both models see the same images.
            **{
                f"{name}_less_stderr": 100 * (reference[1][name].float() - each.float()).std().item() / len(each) ** 0.5
                for name, each in hits.items()
            },
            "cosine": F.cosine_similarity(features["val"], reference[0], dim=1).mean().item(),
            "seconds": time.perf_counter() - started,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.json is not None:
        about = provenance(seed=args.seed, n=1) | {"img_size": args.img_size, "num_images": sets, "amp": args.amp}
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
