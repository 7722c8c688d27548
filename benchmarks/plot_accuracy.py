"""Draw accuracy over training time from the results of a study and its step times.

    python benchmarks/plot_accuracy.py benchmarks/results/boards_detail.json benchmarks/results/boards_step_times.json \
        --arms "linvit local 256" "full attention local 256" -o docs/accuracy.png

A point is an epoch: the mean over seeds of the better of the two validation accuracies, of the weights and of their
moving average, at epochs × images × seconds of a step. The band is the range over seeds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from linvit.output.plots import save_figure, series_style


def curves(results: dict[str, Any], arm: str) -> np.ndarray:
    """Accuracy by seed and epoch, in per cent."""
    runs = [row["curve"] for row in results["runs"] if row["arm"] == arm]
    if not runs:
        raise SystemExit(f"the results have no runs of {arm!r}")
    return np.array([[max(epoch["eval_top1"], epoch["eval_ema_top1"]) for epoch in run] for run in runs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("times", type=Path)
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--num-images", type=int, default=3248, help="training images per epoch")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    results, times = (json.loads(path.read_text()) for path in (options.results, options.times))
    seconds = {row["arm"]: row["seconds_per_image"] for row in times["rows"]}
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, arm in enumerate(options.arms):
        found = curves(results, arm)
        minutes = (1 + np.arange(found.shape[1])) * options.num_images * seconds[arm] / 60
        style = series_style(index)
        axes.plot(minutes, found.mean(0), label=f"{arm} (n = {len(found)})", markersize=4, **style)
        if len(found) > 1:
            axes.fill_between(minutes, found.min(0), found.max(0), color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="training time, minutes on two cores", ylabel="top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(options.output, figure)


if __name__ == "__main__":
    main()
