"""Train an image classifier on folders of images, with timm's names and parts.

    python train_imagenet.py DATA --config configs/NAME.yaml [--any-flag value ...]
    torchrun --nproc-per-node 8 train_imagenet.py DATA --config configs/NAME.yaml

`train` is the whole run; each epoch calls `train_one_epoch` and `validate`. linvit/training/setup.py builds the parts,
linvit/runs/folder.py describes the folder that a run writes.

torch is imported inside functions, so that --help and wrong usage are answered at once.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if __name__ == "__main__":
    import linvit_command  # noqa: F401  `import linvit` then leaves torch to `train`

from linvit.settings.process import run
from linvit.training.config import TrainConfig, parse

if TYPE_CHECKING:
    from linvit.data.loader import Loader
    from linvit.evaluation.metrics import Metrics
    from linvit.training.recorder import Recorder
    from linvit.training.state import Progress
    from linvit.training.step import TrainStep
    from linvit.training.summary import EpochResult


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns 0 if done, 1 if failed, 2 for wrong usage, 130 or 143 if stopped by Ctrl-C or SIGTERM."""

    def work() -> int:
        config = parse(sys.argv[1:] if argv is None else argv)
        from linvit.distributed import record_errors

        return record_errors(train)(config)

    return run(work)


def train(config: TrainConfig) -> int:
    """Train, evaluate after each epoch, keep the best and the last weights; returns the exit status.

    Raises ValueError if options, data and weights do not fit together or the loss is not finite, OSError if the run's
    folder cannot be written.
    """
    from linvit.data.augment.build import resolve_input
    from linvit.distributed import joined_ranks, stop_on_signals
    from linvit.report.gather import report_training
    from linvit.training import setup
    from linvit.training.batch_size import resolve_batch_size
    from linvit.training.dry_run import show_plan
    from linvit.training.input_range import resolve_input_range
    from linvit.training.log import lasting_output
    from linvit.training.recorder import check_resume, recording
    from linvit.training.resume import check_output

    with joined_ranks(config.device) as ranks, stop_on_signals() as stop, lasting_output():
        setup.prepare_process(config)
        if ranks.is_primary:
            check_output(config)

        train_set = setup.open_train_set(config)
        val_set = setup.open_val_set(config, class_names=train_set.class_names)
        model, new_parameters = setup.prepare_model(config, class_names=train_set.class_names, ranks=ranks)
        config = resolve_input_range(config, train_set, ranks)
        spec = resolve_input(model, config)
        config = resolve_batch_size(config, model, train_set, spec=spec, ranks=ranks)
        train_loader = setup.build_train_loader(config, train_set, spec=spec, ranks=ranks)
        val_loader = setup.build_val_loader(config, val_set, spec=spec, ranks=ranks)
        if config.dry_run and ranks.is_primary:
            show_plan(config, model, train_loader, spec)

        step = setup.build_step(config, model, train_set, spec=spec, ranks=ranks, stop=stop)
        num_epochs = setup.set_schedule(step, config, num_batches=len(train_loader))
        if config.dry_run:
            check_resume(config, step, train_set, val_set, num_batches=len(train_loader))
            return 0
        # From here on the run has a folder, and `progress` stands at its start or where it resumes.
        with recording(
            config,
            step,
            train_set,
            val_set,
            train_loader=train_loader,
            val_loader=val_loader,
            spec=spec,
            new_parameters=new_parameters,
        ) as (recorder, progress):
            for epoch in range(progress.epoch, num_epochs):
                if progress.is_out_of_patience(config.early_stop_patience):
                    break
                result = train_one_epoch(step, train_loader, epoch, progress, recorder, num_epochs=num_epochs)
                if result is None:
                    return recorder.stop(step, progress)

                best = None
                if (epoch + 1) % config.val_interval == 0 or epoch + 1 == num_epochs:
                    result.metrics = validate(step, val_loader)
                    best = progress.judge(result.metrics, config.eval_metric)
                recorder.end_epoch(result, step, progress, best=best)

            recorder.end(progress)
        if config.report and ranks.is_primary:
            report_training(recorder.run.path, config, train_set, val_set, device=ranks.device)
        return 0


def train_one_epoch(
    step: "TrainStep",
    loader: "Loader",
    epoch: int,
    progress: "Progress",
    recorder: "Recorder",
    *,
    num_epochs: int,
) -> "EpochResult | None":
    """Train on the remaining batches of an epoch; returns None if a signal requested a stop."""
    from linvit.distributed import stop_requested
    from linvit.measure.memory import peak_bytes
    from linvit.training.log import EpochLog
    from linvit.training.optim import current_lr
    from linvit.training.setup import seed_step
    from linvit.training.summary import EpochResult

    config, ranks, num_batches = step.config, step.ranks, len(loader)
    if stop_requested(step.stop, ranks.device):
        return None
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
            # All random numbers from here to the update depend only on these four.
            seed_step(config.seed, epoch=epoch, batch=progress.batch, rank=ranks.rank)
            # An update takes a group of batches; the last group of an epoch may be shorter.
            group_start = progress.batch - progress.batch % config.grad_accum_steps
            group_size = min(config.grad_accum_steps, num_batches - group_start)
            progress.batch += 1
            closes_group = progress.batch == group_start + group_size

            recorder.add_batch(batch)
            step.backward(batch.images, batch.labels, group_size=group_size, closes_group=closes_group)
            if not closes_group:
                log.show_accumulated(batch=progress.batch)
                continue
            update = step.update()
            recorder.check_update(update, step, progress, group_start=group_start)
            if update.has_loss:
                progress.add_loss(update.loss)
                log.update(batch=progress.batch, loss=update.loss, lr=current_lr(step.optimizer))
            if update.stop:
                return None
            recorder.end_update(step, progress)

    recorder.check_epoch(step, progress)
    lr = current_lr(step.optimizer)
    step.end_epoch(epoch)
    return EpochResult(
        epoch=epoch,
        train_loss=progress.end_epoch(),
        lr=lr,
        num_skipped=step.num_skipped,
        num_bad=progress.num_bad,
        timing=log.timing(),
        peak_memory=peak_bytes(ranks.device),
    )


def validate(step: "TrainStep", loader: "Loader") -> "dict[str, Metrics]":
    """Metrics of the raw weights and, if the run keeps one, of their moving average ("raw", "ema")."""
    from linvit.evaluation.collect import evaluate

    ranks = step.ranks
    return {
        name: evaluate(
            step.to_evaluate(name), loader, device=ranks.device, amp_dtype=step.amp_dtype, is_shown=ranks.is_primary
        )
        for name in step.weights
    }


if __name__ == "__main__":
    sys.exit(main())
