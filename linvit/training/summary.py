"""The result of an epoch, and summary.csv: a row per epoch, written whole each time.

Going on from a state writes the rows that belong to it, so that a resumed run neither repeats nor loses one.

README.md of a run: a short model card.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import timm
import torch

from linvit.evaluation.metrics import Metrics
from linvit.output.files import write_text
from linvit.training.config import TrainConfig
from linvit.version import __version__

# Columns of the raw and of the averaged weights.
_PREFIXES = {"raw": "eval", "ema": "eval_ema"}


@dataclass(frozen=True)
class EpochResult:
    """An epoch that is over."""

    epoch: int
    train_loss: float
    # Of the epoch's last update.
    lr: float
    # Updates that the fp16 loss scaler has left out since the run began.
    num_skipped: int
    # Updates refused since the run began, because loss or gradients were not finite.
    num_bad: int
    # images_per_second, data_wait (share of the time) and seconds.
    timing: Mapping[str, float]
    # Of the weights evaluated, "raw" and "ema"; empty in an epoch without evaluation.
    metrics: Mapping[str, Metrics]

    def row(self) -> dict[str, Any]:
        """Its row of summary.csv."""
        row: dict[str, Any] = {"epoch": self.epoch, "train_loss": self.train_loss}
        for weights, metrics in self.metrics.items():
            prefix = _PREFIXES[weights]
            row |= {f"{prefix}_loss": metrics.loss, f"{prefix}_top1": metrics.top1, f"{prefix}_top5": metrics.top5}
        counts = {"skipped_updates": self.num_skipped, "bad_updates": self.num_bad}
        return row | {"lr": self.lr} | counts | dict(self.timing)

    def describe(self) -> str:
        """One line for people."""
        parts = [f"epoch {self.epoch}", f"train loss {self.train_loss:.4f}"]
        for weights, metrics in self.metrics.items():
            parts.append(f"{weights} top1 {metrics.top1:.2f} top5 {metrics.top5:.2f} loss {metrics.loss:.4f}")
        if self.num_bad:
            parts.append(f"{self.num_bad} bad updates")
        parts.append(f"{self.timing['images_per_second']:.1f} img/s")
        parts.append(f"data {self.timing['data_wait']:.0%}")
        parts.append(str(timedelta(seconds=round(self.timing["seconds"]))))
        return "  ".join(parts)


def write_summary(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows under one header of all their columns; what a row lacks stays empty."""
    # The fullest row has the columns in their order.
    columns = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


_MOST_CLASSES = 50


def write_card(
    path: Path,
    *,
    config: TrainConfig,
    class_names: Sequence[str],
    img_size: tuple[int, int],
    epoch: int,
    weights: str,
    metrics: Metrics,
) -> None:
    """Say what the run's best weights are, how they were made and how to load them.

    `epoch` and `weights` ("raw" or "ema") are those of the best, `metrics` what they reached.
    """
    assert config.data_dir is not None
    data = config.data_dir.resolve().name
    shown = ", ".join(class_names[:_MOST_CLASSES])
    more = f" and {len(class_names) - _MOST_CLASSES} more" if len(class_names) > _MOST_CLASSES else ""
    averaged = " (moving average)" if weights == "ema" else ""
    text = f"""\
---
library_name: timm
pipeline_tag: image-classification
---
# {config.model}, trained on {data}

| | |
|---|---|
| top-1 | {metrics.top1:.2f} % |
| top-5 | {metrics.top5:.2f} % |
| loss | {metrics.loss:.4f} |
| evaluated on | {metrics.num_images:,} images of `{config.val_split}` |
| weights | epoch {epoch}{averaged}, the best by {config.eval_metric} |

The weights were chosen on the same images that they are evaluated on here.

## Use

```python
import linvit, timm

model = timm.create_model("local-dir:{path.parent.name}/best", pretrained=True).eval()
class_names = model.pretrained_cfg["label_names"]
```

    linvit eval {path.parent.name} DATA

## Classes

{len(class_names)}: {shown}{more}

## Training

Images of `{data}/{config.train_split}` at {img_size[0]}×{img_size[1]} px, seed {config.seed}; \
{config.epochs} epochs planned with {config.opt}, batches of {config.batch_size}. `args.yaml` holds every \
option; training from it alone repeats the run:

    python train_imagenet.py --config args.yaml

linvit {__version__}, timm {timm.__version__}, torch {torch.__version__}
"""
    write_text(path, text)
