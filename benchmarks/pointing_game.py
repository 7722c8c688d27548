"""Do heat maps point at the defect? The pointing game (Zhang et al. 2016, arXiv 1608.00507) on images with boxes.

    python benchmarks/pointing_game.py RUN DATA/test --boxes DATA/boxes.csv --json benchmarks/results/pointing_game.json

DATA/test has a folder of images for each class. The CSV file has the columns split, class, file, left, top, right and
bottom, in pixels; `split` is the name of the folder. A map hits if its largest value lies in a box of the image, grown
by --margin pixels. Only images with a box and a correct prediction count. "random" is the share of the image that the
grown boxes cover. Intervals are Wilson's, at 95 %. On the first --num-curves of these images it also measures the areas
under the deletion and insertion curves, see linvit.explanation.deletion.
"""

import argparse
import csv
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from linvit.data.decode import decode_image
from linvit.explanation.deletion import Curves, measure_curves, random_map
from linvit.explanation.explain import Explainer
from linvit.explanation.maps import METHODS, Method
from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json
from linvit.runs.folder import load_classifier

Box = tuple[int, int, int, int]


def read_boxes(path: Path, split: str) -> dict[tuple[str, str], list[Box]]:
    """The boxes (left, top, right, bottom) of each image of a split, by class and file name."""
    boxes: dict[tuple[str, str], list[Box]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == split:
                left, top, right, bottom = (int(row[side]) for side in ("left", "top", "right", "bottom"))
                boxes[row["class"], row["file"]].append((left, top, right, bottom))
    return boxes


def target_mask(shape: tuple[int, int], boxes: list[Box], margin: int) -> np.ndarray:
    """Which pixels (H, W) lie in a box grown by `margin` pixels."""
    mask = np.zeros(shape, bool)
    for left, top, right, bottom in boxes:
        mask[max(top - margin, 0) : bottom + margin, max(left - margin, 0) : right + margin] = True
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("images", type=Path, help="folder of class folders")
    parser.add_argument("--boxes", type=Path, required=True)
    parser.add_argument("--margin", type=int, default=8)
    parser.add_argument("--num-images", type=int, default=300, help="images with a box, drawn at random")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all that the model has, except keys")
    parser.add_argument("--num-curves", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipe", help="how the model was trained, for the results")
    options = parser.parse_args()

    explainer = Explainer(load_classifier(options.run))
    boxes = read_boxes(options.boxes, options.images.name)
    chosen = random.Random(options.seed).sample(sorted(boxes), min(options.num_images, len(boxes)))
    possible = [method for method in explainer.possible(METHODS) if method != "keys"]
    methods: list[Method] = options.methods or possible
    hits: dict[str, list[bool]] = {method: [] for method in methods}
    areas: dict[str, list[Curves]] = {method: [] for method in (*methods, "random")}
    chances, labels = [], []
    for label, name in chosen:
        path = options.images / label / name
        image = decode_image(path.read_bytes(), name=path)
        target = explainer.class_names.index(label)
        pixels, _ = explainer.prepare(image)
        if int(explainer.probabilities(pixels).argmax()) != target:
            continue
        mask = target_mask(image.shape[:2], boxes[label, name], options.margin)
        labels.append(label)
        chances.append(float(mask.mean()))
        for method in methods:
            found = explainer.explain(image, method=method, target=target)
            hits[method].append(bool(mask.flat[np.nanargmax(found.heat)]))
        if len(labels) <= options.num_curves:
            maps = {method: torch.from_numpy(explainer.patch_map(pixels, method, target)) for method in methods}
            orders = {**maps, "random": random_map(tuple(maps[methods[0]].shape), seed=len(labels))}
            for method, order in orders.items():
                areas[method].append(measure_curves(explainer.probabilities, pixels, order, target=target))
    count = len(labels)
    rows: dict[str, Any] = {"random": {"accuracy": 100 * float(np.mean(chances))}}
    for method, hit in hits.items():
        interval = binomtest(sum(hit), count).proportion_ci(method="wilson")
        by_class = {
            each: 100 * float(np.mean([one for one, label in zip(hit, labels) if label == each]))
            for each in sorted(set(labels))
        }
        rows[method] = {
            "accuracy": 100 * sum(hit) / count,
            "interval": [100 * interval.low, 100 * interval.high],
            "per_class": by_class,
        }
    for method, curves in areas.items():
        if not curves:
            continue
        rows[method] |= {
            "deletion": float(np.mean([each.deletion_area for each in curves])),
            "insertion": float(np.mean([each.insertion_area for each in curves])),
        }
    print(f"{count} of {len(chosen)} images are predicted correctly")
    print("method     points at the defect   deletion  insertion")
    for name, row in rows.items():
        curve = f"   {row['deletion']:8.3f}  {row['insertion']:9.3f}" if "deletion" in row else ""
        print(f"{name:<10} {row['accuracy']:18.1f} %{curve}")
    if options.json:
        results = {
            "recipe": options.recipe,
            "margin": options.margin,
            "num_images": len(chosen),
            "num_right": count,
            "num_curves": min(count, options.num_curves),
            "methods": rows,
        }
        write_json(options.json, {**provenance(script_command(), seed=options.seed, n=count), **results})


if __name__ == "__main__":
    main()
