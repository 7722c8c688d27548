from linvit.evaluation.metrics import Metrics
from linvit.training.state import Progress


def evaluation(top1: float, loss: float = 1.0) -> Metrics:
    return Metrics(loss=loss, top1=top1, top5=100.0, num_images=1, per_class={}, images_per_class={})


def test_the_best_weights_and_patience() -> None:
    progress = Progress()
    verdicts = []
    for raw, ema in ((50.0, 40.0), (50.0, 45.0), (49.0, 60.0), (60.0, 60.0), (float("nan"), 10.0)):
        verdicts.append(progress.judge({"raw": evaluation(raw), "ema": evaluation(ema)}, "top1"))
    assert verdicts == ["raw", None, "ema", None, None]
    assert progress.best == 60.0
    assert progress.is_out_of_patience(2)
    assert not progress.is_out_of_patience(3)
    assert not progress.is_out_of_patience(None)


def test_end_epoch_returns_the_mean_loss() -> None:
    progress = Progress(epoch=3, batch=8)
    for loss in (1.0, 2.0, 6.0):
        progress.add_loss(loss)
    assert progress.end_epoch() == 3.0
    assert progress == Progress(epoch=4)
