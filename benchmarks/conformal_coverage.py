"""Coverage and size of conformal sets over random splits of one set of predictions.

    python benchmarks/conformal_coverage.py RUN DATA --json benchmarks/results/conformal_coverage.json

The model predicts each image of a split once. Each repeat calibrates on a random half of the images and counts on the
other half. The coverage of all images like these then has the distribution Beta(l, n + 1 - l), with n images to
calibrate on and l = ⌈(n + 1)(1 - α)⌉, whatever the model, for scores without ties (Vovk 2012, arXiv 1209.2673;
Angelopoulos and Bates 2021, arXiv 2107.07511, section 3.2). The number of covered images is beta-binomial: `band` is
its central 95 %, `inside` the share of repeats in it.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import betabinom
from torch import Tensor

from linvit import Predictor
from linvit.data.sources.open import open_images
from linvit.evaluation.conformal import Method, assess, calibrate
from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json


def predict(run: str, data: Path, split: str, *, device: str) -> tuple[Tensor, Tensor, list[str]]:
    """Probabilities (N, C) in double precision and labels (N,) of the images of a split, and the class names."""
    predictor = Predictor(run, topk=10**9, device=device, workers=2)
    names = predictor.class_names
    images = open_images(data, split=split)
    paths = [images.path(index) for index in range(len(images))]
    rows, labels = [], []
    for index, prediction in enumerate(predictor(paths)):
        if prediction.error is not None:
            raise SystemExit(f"{prediction.path}: {prediction.error}")
        by_name = dict(zip(prediction.labels, prediction.probabilities))
        rows.append([by_name[name] for name in names])
        labels.append(names.index(images.class_names[int(images.labels[index])]))
    probabilities = torch.tensor(rows, dtype=torch.float64)
    return probabilities / probabilities.sum(1, keepdim=True), torch.tensor(labels), names


def measure(
    probabilities: Tensor, labels: Tensor, names: list[str], *, alpha: float, method: Method, repeats: int, seed: int
) -> dict[str, Any]:
    """Coverage in percent and sizes over random halves, beside what theory expects."""
    count = len(labels)
    num_calibration = count // 2
    found = []
    for repeat in range(repeats):
        order = torch.from_numpy(np.random.default_rng([seed, repeat]).permutation(count))
        used, held_out = order[:num_calibration], order[num_calibration:]
        rule = calibrate(probabilities[used], labels[used], alpha=alpha, method=method, class_names=names)
        found.append(assess(rule, probabilities[held_out], labels[held_out]))
    rank = math.ceil(round((num_calibration + 1) * (1 - alpha), 9))
    num_counted = count - num_calibration
    expected = betabinom(num_counted, rank, num_calibration + 1 - rank)
    low, high = (100 * float(expected.ppf(quantile)) / num_counted for quantile in (0.025, 0.975))
    coverage = [each["coverage"] for each in found]
    return {
        "method": method,
        "alpha": alpha,
        "num_calibration": num_calibration,
        "num_counted": num_counted,
        "coverage": float(np.mean(coverage)),
        "range": [min(coverage), max(coverage)],
        "expected": 100 * rank / (num_calibration + 1),
        "band": [low, high],
        "inside": 100 * float(np.mean([low - 1e-9 <= each <= high + 1e-9 for each in coverage])),
        **{name: float(np.mean([each[name] for each in found])) for name in ("mean_size", "one_class", "empty")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--recipe", help="how the model was trained, for the results")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    probabilities, labels, names = predict(options.run, options.data, options.split, device=options.device)
    methods: tuple[Method, ...] = ("lac", "raps")
    rows = [
        measure(probabilities, labels, names, alpha=alpha, method=method, repeats=options.repeats, seed=options.seed)
        for method in methods
        for alpha in options.alphas
    ]
    print("method  alpha  coverage (range)         expected (95 %)          inside  size  one class  empty")
    for row in rows:
        (low, high), (least, most) = row["band"], row["range"]
        print(
            f"{row['method']:<6} {row['alpha']:>6}  {row['coverage']:.1f} % ({least:.1f} to {most:.1f})  "
            f"{row['expected']:.1f} % ({low:.1f} to {high:.1f})  {row['inside']:.0f} %  {row['mean_size']:.2f}  "
            f"{row['one_class']:.1f} %  {row['empty']:.1f} %"
        )
    if options.json:
        results = {
            "recipe": options.recipe,
            "num_images": len(labels),
            "num_classes": len(names),
            "top1": 100 * float((probabilities.argmax(1) == labels).double().mean()),
            "rows": rows,
        }
        write_json(options.json, {**provenance(script_command(), seed=options.seed, n=options.repeats), **results})


if __name__ == "__main__":
    main()
