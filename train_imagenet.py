"""Train an image classifier on folders of images, with timm's names and parts.

    python train_imagenet.py DATA --config configs/NAME.yaml [--any-flag value ...]
    torchrun --nproc-per-node 8 train_imagenet.py DATA --config configs/NAME.yaml

`main` reads the options, `train` is the whole run, `train_one_epoch` and `validate` are its two halves. What they are
given is assembled in linvit/training/setup.py; linvit/runs/folder.py says what a run leaves on disk.

torch is imported inside the functions, so that --help and mistakes on the command line are answered at once.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

if __name__ == "__main__":
    import linvit_command  # noqa: F401  `import linvit` then leaves torch to `train`

from linvit.settings.flags import run
from linvit.training.config import TrainConfig, parse

if TYPE_CHECKING:
    from linvit.data.loader import Loader
    from linvit.data.sources.base import ImageSet
    from linvit.evaluation.metrics import Metrics
    from linvit.training.log import EpochLog
    from linvit.training.recorder import Recorder
    from linvit.training.state import Progress
    from linvit.training.step import TrainStep


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by Ctrl-C or SIGTERM."""

    def work() -> int:
        config = parse(sys.argv[1:] if argv is None else argv)
        from linvit.distributed import recorded

        return recorded(train)(config)

    return run(work)


def train(config: TrainConfig) -> int:
    """Train, evaluate after each epoch, keep the best and the last weights; returns the exit status.

    Raises ValueError where options, data and weights do not fit together or the loss is not finite, OSError where the
    run's folder cannot be written.
    """
    from linvit.data.augment.build import resolve_input
    from linvit.distributed import asked_anywhere, joined_ranks, stop_on_signals
    from linvit.training import setup
    from linvit.training.batch_size import settle_batch_size
    from linvit.training.dry_run import show_plan
    from linvit.training.optim import create_schedule, current_lr
    from linvit.training.recorder import start_recording
    from linvit.training.saver import Saver
    from linvit.training.summary import EpochResult

    with joined_ranks(config.device) as ranks, stop_on_signals() as stop, Saver() as saver:
        setup.prepare_process(config)

        train_set = setup.open_train_set(config)
        val_set = setup.open_val_set(config, class_names=train_set.class_names)
        model, new_parameters = setup.prepare_model(config, class_names=train_set.class_names, ranks=ranks)
        spec = resolve_input(model, config)
        config = settle_batch_size(config, model, train_set, spec=spec, ranks=ranks)
        train_loader = setup.build_train_loader(config, train_set, spec=spec, ranks=ranks)
        val_loader = setup.build_val_loader(config, val_set, spec=spec, ranks=ranks)
        if config.dry_run:
            if ranks.is_primary:
                show_plan(config, model, train_loader, spec)
            return 0

        step = setup.build_step(config, model, train_set, spec=spec, ranks=ranks, stop=stop)
        num_updates = -(-len(train_loader) // config.grad_accum_steps)
        step.scheduler, num_epochs = create_schedule(step.optimizer, config, updates_per_epoch=num_updates)
        num_epochs = min(num_epochs, config.stop_epoch or num_epochs)

        # The run's folder, new or resumed.
        recorder, progress = start_recording(
            config,
            step,
            train_set,
            val_set,
            loaders=(train_loader, val_loader),
            spec=spec,
            new_parameters=new_parameters,
            saver=saver,
        )

        while progress.epoch < num_epochs and not progress.is_out_of_patience(config.early_stop_patience):
            epoch = progress.epoch
            if asked_anywhere(stop, ranks.device):
                return recorder.stop(stop, step, progress)
            log = train_one_epoch(step, train_loader, train_set, progress, recorder, num_epochs=num_epochs)
            if log is None:
                return recorder.stop(stop, step, progress)
            lr = current_lr(step.optimizer)
            train_loss = progress.end_epoch()
            step.end_epoch(epoch)

            metrics: dict[str, Metrics] = {}
            best = None
            if progress.epoch % config.val_interval == 0 or progress.epoch == num_epochs:
                metrics = validate(step, val_loader)
                best = progress.judge(metrics, config.eval_metric)
                recorder.bad_images.add(map(val_set.path, metrics["raw"].unreadable))
            recorder.bad_images.end_epoch()
            result = EpochResult(
                epoch=epoch,
                train_loss=train_loss,
                lr=lr,
                num_skipped=step.num_skipped,
                num_bad=progress.num_bad,
                timing=log.timing(),
                metrics=metrics,
            )
            recorder.end_epoch(result, step, progress, best=best)

        recorder.end(progress)
        return 0


def train_one_epoch(
    step: "TrainStep",
    loader: "Loader",
    images: "ImageSet",
    progress: "Progress",
    recorder: "Recorder",
    *,
    num_epochs: int,
) -> "EpochLog | None":
    """Train on the batches of the epoch from where `progress` stands; None where the run was asked to stop."""
    from linvit.training.log import EpochLog
    from linvit.training.optim import current_lr
    from linvit.training.randomness import seed_step

    config, ranks, epoch, num_batches = step.config, step.ranks, progress.epoch, len(loader)
    loader.set_epoch(epoch)
    recorder.begin_epoch(epoch)
    step.start_epoch(epoch)
    log = EpochLog(
        epoch=epoch,
        num_epochs=num_epochs,
        first_batch=progress.batch,
        num_batches=num_batches,
        images_per_batch=config.images_per_batch * ranks.world_size,
        log_interval=config.log_interval,
        is_shown=ranks.is_primary,
        track=recorder.track,
    )
    with log:
        for batch in log.timed(loader.iter_from(progress.batch)):
            # Everything random from here to the update is a function of these four.
            seed_step(config.seed, epoch=epoch, batch=progress.batch, rank=ranks.rank)
            group_start = progress.batch - progress.batch % config.grad_accum_steps
            group_size = min(config.grad_accum_steps, num_batches - group_start)
            progress.batch += 1
            closes_group = progress.batch == group_start + group_size
            recorder.bad_steps.add_batch(batch.indices)
            recorder.bad_images.add(map(images.path, batch.unreadable))
            step.backward(batch.images, batch.labels, group_size=group_size, closes_group=closes_group)
            if not closes_group:
                continue
            update = step.update()
            recorder.bad_steps.check(update, progress, group_start=group_start, save=partial(recorder.save_state, step))
            if update.has_loss:
                progress.add_loss(update.loss)
                log.update(batch=progress.batch, loss=update.loss, lr=current_lr(step.optimizer))
            if update.stop:
                return None
            recorder.end_update(step, progress)
    return log


def validate(step: "TrainStep", loader: "Loader") -> "dict[str, Metrics]":
    """Metrics of the raw weights and, where there is one, of their moving average ("raw", "ema")."""
    from linvit.evaluation.collect import evaluate

    return {
        name: evaluate(step.to_evaluate(name), loader, device=step.ranks.device, amp_dtype=step.amp_dtype)
        for name in step.weights
    }


if __name__ == "__main__":
    sys.exit(main())
