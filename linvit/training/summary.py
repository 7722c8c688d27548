"""The result of an epoch, and the two summaries of a run: summary.csv and README.md, a short model card."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from linvit.evaluation.metrics import Metrics
from linvit.output.cells import CsvWriter, markdown_cell
from linvit.output.files import write_text
from linvit.output.terminal import format_duration, printable
from linvit.training.config import TrainConfig
from linvit.version import __version__

# Columns of the raw weights and of their moving average.
_PREFIXES = {"raw": "eval", "ema": "eval_ema"}
# The model card lists at most this many class names.
_MAX_CLASSES = 50


@dataclass
class EpochResult:
    """The result of a finished epoch."""

    epoch: int
    train_loss: float
    # Learning rate of the last update.
    lr: float
    # Updates that the loss scaler skipped, since the run began.
    num_skipped: int
    # Updates refused because loss or gradients were not finite, since the run began.
    num_bad: int
    # images_per_second, data_wait (share of the time) and seconds.
    timing: Mapping[str, float]
    # Peak memory since the process began, in bytes, of the GPU or else of the process; None if unknown.
    peak_memory: int | None = None
    # Metrics of the evaluated weights, "raw" and "ema"; empty in an epoch without evaluation.
    metrics: Mapping[str, Metrics] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The epoch's row of summary.csv."""
        row: dict[str, Any] = {"epoch": self.epoch, "train_loss": self.train_loss}
        for weights, metrics in self.metrics.items():
            prefix = _PREFIXES[weights]
            row |= {f"{prefix}_loss": metrics.loss, f"{prefix}_top1": metrics.top1, f"{prefix}_top5": metrics.top5}
        counts = {"skipped_updates": self.num_skipped, "bad_updates": self.num_bad}
        memory = {} if self.peak_memory is None else {"peak_memory": self.peak_memory}
        return row | {"lr": self.lr} | counts | dict(self.timing) | memory

    def describe(self) -> str:
        """One line of progress output."""
        parts = [f"epoch {self.epoch}", f"train loss {self.train_loss:.4f}"]
        for weights, metrics in self.metrics.items():
            parts.append(f"{weights} top1 {metrics.top1:.2f} top5 {metrics.top5:.2f} loss {metrics.loss:.4f}")
        if self.num_bad:
            parts.append(f"{self.num_bad} bad updates")
        parts.append(f"{self.timing['images_per_second']:.1f} img/s")
        parts.append(f"data {self.timing['data_wait']:.0%}")
        parts.append(format_duration(self.timing["seconds"]))
        return "  ".join(parts)


def write_summary(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write summary.csv from scratch: one header with all columns, and a row per epoch.

    Missing values stay empty. A resumed run starts with its checkpoint's rows, so it neither repeats nor loses one.
    """
    # The longest row has the columns in order.
    columns = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    text = io.StringIO(newline="")
    writer = CsvWriter(text)
    writer.writerow(columns)
    writer.writerows([row.get(name, "") for name in columns] for row in rows)
    write_text(path, text.getvalue())


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
    """Write the model card: what the run's best weights are, how they were trained and how to load them.

    Args:
        epoch: the epoch of the best weights.
        weights: which weights these are, "raw" or "ema".
        metrics: their metrics.
    """
    assert config.data_dir is not None
    data = printable(config.data_dir.resolve().name)
    shown = ", ".join(map(markdown_cell, class_names[:_MAX_CLASSES]))
    more = f" and {len(class_names) - _MAX_CLASSES} more" if len(class_names) > _MAX_CLASSES else ""
    averaged = " (moving average)" if weights == "ema" else ""
    text = f"""\
---
library_name: timm
pipeline_tag: image-classification
---
# {config.model}, trained on {markdown_cell(data)}

| | |
|---|---|
| top-1 | {metrics.top1:.2f} % |
| top-5 | {metrics.top5:.2f} % |
| loss | {metrics.loss:.4f} |
| evaluated on | {metrics.num_images:,} images of `{config.val_split}` |
| weights | epoch {epoch}{averaged}, the best by {config.eval_metric} |

These figures are optimistic, because the weights were chosen on the same images.

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
{config.epochs} epochs planned with {config.opt}, batches of {config.batch_size}. `args.yaml` holds all \
options; this command repeats the run:

    python train_imagenet.py --config args.yaml

linvit {__version__}, timm {timm.__version__}, torch {torch.__version__}
"""
    write_text(path, text)
