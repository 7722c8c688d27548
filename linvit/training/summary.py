"""The result of an epoch, and summary.csv: a row per epoch, written whole each time.

Going on from a state writes the rows that belong to it, so that a resumed run neither repeats nor loses one.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from linvit.files import write_text
from linvit.training.metrics import Metrics

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
