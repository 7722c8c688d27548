"""Evaluate the best weights of runs that differ only in their seed, and write their metrics and curves.

python benchmarks/collect_runs.py RUN ... --data DIR --recipe configs/NAME.yaml --json benchmarks/results/NAME.json
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json

METRICS = ("top1", "top5", "loss", "num_images", "img_size", "num_tokens", "per_class", "images_per_class")


def evaluate(run: Path, data: Path, *options: str) -> dict[str, Any]:
    """What `linvit eval` measures with these options."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "eval.json"
        subprocess.run(
            [sys.executable, "-m", "linvit", "eval", str(run), str(data), *options, "--json", str(report)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return dict(json.loads(report.read_text()))


def describe(run: Path, data: Path) -> dict[str, Any]:
    """One run: seed, metrics of its best weights, seconds, and the rows of its summary.csv."""
    settings = yaml.safe_load((run / "args.yaml").read_text())
    with (run / "summary.csv").open() as file:
        curve = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    fraction = settings.get("val_fraction")
    found = evaluate(run, data, *([] if fraction is None else ["--val-fraction", str(fraction)]))
    return {
        "seed": settings["seed"],
        **{name: found[name] for name in METRICS},
        "train_minutes": round(sum(row["seconds"] for row in curve) / 60, 1),
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", required=True, help="recipe that trained them, such as configs/NAME.yaml")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    runs = [describe(run, args.data) for run in args.runs]
    top1 = [run["top1"] for run in runs]
    result = {
        "recipe": f"python train_imagenet.py DATA --config {args.recipe}",
        **provenance(script_command(), seed=[run["seed"] for run in runs], n=len(runs)),
        "top1_mean": round(statistics.mean(top1), 2),
        "top1_std": round(statistics.stdev(top1), 2) if len(top1) > 1 else None,
        "runs": runs,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, result)
    print(f"top-1 {result['top1_mean']} ± {result['top1_std']}, n = {len(runs)}: {[round(value, 2) for value in top1]}")


if __name__ == "__main__":
    main()
