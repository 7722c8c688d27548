import csv
from pathlib import Path

from linvit.evaluation.metrics import Metrics
from linvit.training.summary import EpochResult, write_summary

TIMING = {"images_per_second": 10.0, "data_wait": 0.25, "seconds": 65.0}


def result(epoch: int, *weights: str, num_bad: int = 0) -> EpochResult:
    metrics = Metrics(loss=0.5, top1=80.0, top5=99.0, num_images=5, per_class={}, images_per_class={})
    return EpochResult(
        epoch=epoch,
        train_loss=1.5,
        lr=0.1,
        num_skipped=2,
        num_bad=num_bad,
        timing=TIMING,
        metrics=dict.fromkeys(weights, metrics),
    )


def test_summary_has_a_row_per_epoch_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "summary.csv"
    rows = [result(0).row()]
    write_summary(path, rows)
    rows.append(result(1, "raw", "ema").row())
    write_summary(path, rows)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [
        *("epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5"),
        *("eval_ema_loss", "eval_ema_top1", "eval_ema_top5"),
        *("lr", "skipped_updates", "bad_updates", "images_per_second", "data_wait", "seconds"),
    ]
    assert [row["epoch"] for row in read] == ["0", "1"]
    assert [row["eval_ema_top1"] for row in read] == ["", "80.0"]


def test_an_epoch_is_described_in_one_line() -> None:
    assert result(3, "raw", "ema").describe() == (
        "epoch 3  train loss 1.5000  raw top1 80.00 top5 99.00 loss 0.5000  ema top1 80.00 top5 99.00 loss 0.5000  "
        "10.0 img/s  data 25%  0:01:05"
    )
    assert "  3 bad updates  10.0 img/s" in result(3, "raw", num_bad=3).describe()
