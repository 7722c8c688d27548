"""Time a training step of every arm of a study, in turn, on a machine with nothing else running.

    python benchmarks/step_times.py benchmarks/studies/boards_detail.yaml --arms "linvit 256" "full attention 256" \
        --json benchmarks/results/boards_step_times.json

A step is forward, backward and update, as train_imagenet.py takes it, on a batch of random images that is already in
memory. Runs of a study may share a machine; the time axis of their curves comes from here.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

from linvit.measure.provenance import provenance, script_command
from linvit.model.build import create_model
from linvit.output.files import write_json
from linvit.output.terminal import page, table

# Settings of train_imagenet.py that are arguments of the model.
ARGUMENTS = {"k": "k", "projection": "projection", "local": "local", "stem": "stem", "gp": "global_pool"}
NUM_CLASSES = 7


def make_step(settings: dict[str, Any]) -> Callable[[], None]:
    """A training step of an arm."""
    arguments = {name: settings[key] for key, name in ARGUMENTS.items() if key in settings}
    arguments |= settings.get("model_kwargs", {})
    size = settings["img_size"]
    model: Any = create_model(settings["model"], num_classes=NUM_CLASSES, img_size=(size, size), **arguments)
    model.train()
    optimizer = create_optimizer_v2(model, settings["opt"], lr=settings["lr"], weight_decay=settings["weight_decay"])
    images = torch.randn(settings["batch_size"], 3, size, size)
    labels = torch.randint(0, NUM_CLASSES, (settings["batch_size"],))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_grad"])
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    study = yaml.safe_load(options.study.read_text())
    torch.manual_seed(0)
    steps = {arm: make_step({**study["recipe"], **study["arms"][arm]}) for arm in options.arms or study["arms"]}
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    for number in range(options.rounds + 1):
        for arm, step in steps.items():
            started = time.perf_counter()
            step()
            if number > 0:  # the first round warms up
                seconds[arm].append((time.perf_counter() - started) / study["recipe"]["batch_size"])
    rows = [
        {"arm": arm, "seconds_per_image": statistics.median(own), "spread": [min(own), max(own)], "n": len(own)}
        for arm, own in seconds.items()
    ]
    shown = table(("arm", "ms/image", "range"), text=("arm",))
    for row in rows:
        low, high = (1000 * value for value in row["spread"])
        shown.add_row(row["arm"], f"{1000 * row['seconds_per_image']:.1f}", f"{low:.1f}–{high:.1f}")
    page().print(shown)
    write_json(options.json, {**provenance(script_command(), seed=0, n=options.rounds), "rows": rows})


if __name__ == "__main__":
    main()
