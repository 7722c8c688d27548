"""The figure of the README: speed over image size, and accuracy over training time.

`make_tables.py` draws it when its results change. A point of the right panel is an epoch: the mean over seeds of the
better of the two validation accuracies, of the weights and of their moving average, at epochs × images × seconds of a
training step, measured by `step_times.py` on a machine with nothing else running. The band is the range over seeds.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from linvit.output.plots import BLUE, GREY, RED

Json = dict[str, Any]
FAST = "linvit_small_patch16_224:k=64,projection=separable,share=kv"
# The arms of boards_detail.yaml with their names and colours in the figure.
ARMS = {
    "linvit local 256": ("linvit, k = 25", BLUE),
    "full attention local 256": ("full attention", GREY),
}
NUM_IMAGES = 3248  # training images of the circuit boards


def draw(bench: Json, accuracy: Json, times: Json) -> Figure:
    """Both panels, from the results of `linvit bench`, `accuracy_study.py` and `step_times.py`."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    speed, top1 = figure.subplots(1, 2)
    _draw_speed(speed, bench)
    _draw_accuracy(top1, accuracy, times)
    return figure


def _draw_speed(axes: Axes, bench: Json) -> None:
    sizes: list[int] = []
    for mode, label, color, marker in (("train", "training", RED, "s"), ("forward", "prediction", BLUE, "o")):
        rows = [row for row in bench["rows"] if (row["model"], row["mode"]) == (FAST, mode)]
        sizes = [row["image_size"] for row in rows]
        ratios = [row["ratio"] for row in rows]
        axes.plot(sizes, ratios, label=label, color=color, marker=marker)
        for size, ratio in zip(sizes, ratios):
            offset = (-4, 7) if mode == "train" else (4, -13)
            axes.annotate(
                f"{ratio:.1f} ×",
                (size, ratio),
                xytext=offset,
                textcoords="offset points",
                color=color,
                ha="right" if mode == "train" else "left",
            )
    axes.axhline(1, color=GREY, linestyle="--")
    axes.annotate("fused attention", (sizes[-1], 1), xytext=(0, 4), textcoords="offset points", ha="right")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, [f"{size} px" for size in sizes])
    axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
    axes.set_ylim(0.8, 22)
    axes.set(title="Times as fast as timm's ViT-S/16, k = 64, two CPU cores", xlabel="image size")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left")


def _draw_accuracy(axes: Axes, accuracy: Json, times: Json) -> None:
    seconds = {row["arm"]: row["seconds_per_image"] for row in times["rows"]}
    for arm, (label, color) in ARMS.items():
        found = _curves(accuracy, arm)
        minutes = (1 + np.arange(found.shape[1])) * NUM_IMAGES * seconds[arm] / 60
        axes.plot(minutes, found.mean(0), label=f"{label} (n = {len(found)})", color=color, marker="o", markersize=4)
        if len(found) > 1:
            axes.fill_between(minutes, found.min(0), found.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set(title="Top-1 on circuit boards, 256 px, 1,024 patches, %", xlabel="minutes of training on one CPU core")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")


def _curves(accuracy: Json, arm: str) -> np.ndarray:
    """Accuracy by seed and epoch, in per cent."""
    runs = [row["curve"] for row in accuracy["runs"] if row["arm"] == arm]
    return np.array([[max(epoch["eval_top1"], epoch["eval_ema_top1"]) for epoch in run] for run in runs])
