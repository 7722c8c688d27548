"""Train an image classifier on folders of images, with timm's names and parts.

    python train_imagenet.py DATA --config configs/NAME.yaml [--any-flag value ...]
    torchrun --nproc-per-node 8 train_imagenet.py DATA --config configs/NAME.yaml

`main` reads the options; `train` is the whole run from top to bottom. What it leaves behind is in `linvit/runs/folder.py`.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from linvit.settings.flags import run
from linvit.training.config import TrainConfig, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by Ctrl-C or SIGTERM."""

    def work() -> int:
        config = parse(sys.argv[1:] if argv is None else argv)
        # Loaded only now, so that --help and mistakes on the command line are answered at once.
        from linvit.distributed import recorded

        return recorded(train)(config)

    return run(work)


def train(config: TrainConfig) -> int:
    """Train, evaluate after each epoch, keep the best and the last weights; returns the exit status.

    Raises ValueError where options, data and weights do not fit together or the loss is not finite, OSError where the
    run's folder cannot be written.
    """
    from linvit.data.augment.build import resolve_input
    from linvit.data.loader import create_eval_loader, create_train_loader
    from linvit.data.sources.classes import read_class_map
    from linvit.data.sources.open import open_images
    from linvit.distributed import asked_anywhere, joined_ranks, on_primary, stop_on_signals, usable_workers
    from linvit.evaluation.command import evaluate
    from linvit.evaluation.metrics import Metrics
    from linvit.model.build import check_model_name
    from linvit.runs.checkpoint import read_checkpoint
    from linvit.training.batch_size import settle_batch_size
    from linvit.training.distill import create_distillation
    from linvit.training.dry_run import show_plan
    from linvit.training.faults import BadImages, BadSteps
    from linvit.training.fsdp import shard
    from linvit.training.log import EpochLog, say
    from linvit.training.loss import create_loss, create_mixup, read_class_weights
    from linvit.training.model import build_model, epoch_sizes, freeze, place_model, wrap_model
    from linvit.training.optim import create_ema, create_optimizer, create_schedule, current_lr, learning_rate
    from linvit.training.randomness import seed_run, seed_step, use_deterministic_algorithms
    from linvit.training.recorder import Recorder
    from linvit.training.saver import Saver
    from linvit.training.state import Progress, choose_start, restore_state
    from linvit.training.step import TrainStep
    from linvit.training.summary import EpochResult

    assert config.data_dir is not None
    with joined_ranks(config.device) as ranks, stop_on_signals() as stop, Saver() as saver:
        check_model_name(config.model)
        if config.deterministic:
            use_deterministic_algorithms()
        seed_run(config.seed)

        # Data: the training images, or a list, name the classes; both splits use their labels.
        listed = read_class_map(config.class_map) if config.class_map is not None else None
        train_set = open_images(config.data_dir, split=config.train_split, class_names=listed)
        class_names = train_set.class_names
        val_set = open_images(config.data_dir, split=config.val_split, class_names=class_names)

        # Model: built by name, started from other weights, partly frozen.
        model, new_parameters = build_model(config, class_names=class_names)
        for note in freeze(model, config.freeze):
            if ranks.is_primary:
                say(note)
        place_model(model, config, ranks)
        spec = resolve_input(model, config)

        config = settle_batch_size(config, model, spec=spec, num_images=len(train_set), ranks=ranks)

        # Batches: the same whatever the number of workers and wherever the run is resumed.
        loading: dict[str, Any] = {
            "workers": usable_workers(config.workers),
            "device": ranks.device,
            "rank": ranks.rank,
            "world_size": ranks.world_size,
            "pin_memory": config.pin_mem,
            "channels_last": config.channels_last,
            "on_bad_image": config.on_bad_image,
            # A dry run writes nothing but its picture.
            "caching": None if config.dry_run else config,
        }
        train_loader = create_train_loader(
            train_set,
            config,
            spec,
            batch_size=config.images_per_batch,
            seed=config.seed,
            sampling=config.sampler,
            repeats=max(config.aug_repeats, 1.0),
            epoch_sizes=epoch_sizes(config),
            **loading,
        )
        val_loader = create_eval_loader(
            val_set, spec, batch_size=config.validation_batch_size or config.images_per_batch, **loading
        )
        if config.dry_run:
            if ranks.is_primary:
                show_plan(config, model, train_loader, spec)
            return 0
        num_batches = len(train_loader)
        num_updates = -(-num_batches // config.grad_accum_steps)

        # Optimization.
        class_weights = read_class_weights(config.class_weights, class_names=class_names, labels=train_set.labels)
        distillation = create_distillation(model, config, spec=spec, class_names=class_names, device=ranks.device)
        ema = create_ema(model, config)
        trained = model if distillation is None else distillation.trained
        if config.fsdp:
            shard(trained, model, ema=ema, options=config, ranks=ranks)
        optimizer = create_optimizer(
            model,
            config,
            lr=learning_rate(config, world_size=ranks.world_size),
            besides=distillation.parameters() if distillation is not None else (),
        )
        scheduler, num_epochs = create_schedule(optimizer, config, updates_per_epoch=num_updates)
        num_epochs = min(num_epochs, config.stop_epoch or num_epochs)
        step = TrainStep(
            wrap_model(trained, config, ranks),
            model,
            optimizer=optimizer,
            scheduler=scheduler,
            ema=ema,
            mixup=create_mixup(config, num_classes=len(class_names)),
            loss_fn=create_loss(config, class_weights=class_weights),
            config=config,
            ranks=ranks,
            stop=stop,
            distillation=distillation,
        )

        # The run's folder, new or gone on with.
        start = on_primary(lambda: choose_start(config, img_size=spec.size))
        recorder = Recorder(
            start.folder,
            config=config,
            loader=train_loader,
            spec=spec,
            num_images=(len(train_set), len(val_set)),
            rank=ranks.rank,
            saver=saver,
        )
        for cache in (train_loader.cache, val_loader.cache):
            if cache is not None:
                recorder.say(cache.describe())
        bad_steps = BadSteps(config.max_bad_steps, path_of=train_set.path, say=recorder.say)
        bad_images = BadImages(recorder.run.bad_images, is_primary=ranks.is_primary, say=recorder.say)
        progress = Progress()
        state = read_checkpoint(start.state) if start.state is not None else None
        if state is not None:
            progress = restore_state(
                state,
                step,
                settings=config.model_dump(mode="json"),
                class_names=class_names,
                num_images=len(train_set),
                num_batches=num_batches,
                with_optimizer=not config.no_resume_opt,
            )
        recorder.begin(step, progress, state=state, new_parameters=new_parameters)
        for note in filter(None, dict.fromkeys((train_set.note, val_set.note))):
            recorder.say(note)

        while progress.epoch < num_epochs and not progress.is_out_of_patience(config.early_stop_patience):
            epoch = progress.epoch
            if asked_anywhere(stop, ranks.device):
                return recorder.stop(stop, step, progress)
            train_loader.set_epoch(epoch)
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
                for batch in log.timed(train_loader.iter_from(progress.batch)):
                    # All that is random from here to the update is a function of these four.
                    seed_step(config.seed, epoch=epoch, batch=progress.batch, rank=ranks.rank)
                    group_start = progress.batch - progress.batch % config.grad_accum_steps
                    group_size = min(config.grad_accum_steps, num_batches - group_start)
                    progress.batch += 1
                    closes_group = progress.batch == group_start + group_size
                    bad_steps.add_batch(batch.indices)
                    bad_images.add(map(train_set.path, batch.unreadable))
                    step.backward(batch.images, batch.labels, group_size=group_size, closes_group=closes_group)
                    if not closes_group:
                        continue
                    update = step.update()
                    bad_steps.check(update, progress, group_start=group_start, save=partial(recorder.save_state, step))
                    if update.has_loss:
                        progress.add_loss(update.loss)
                        log.update(batch=progress.batch, loss=update.loss, lr=current_lr(optimizer))
                    if update.stop:
                        return recorder.stop(stop, step, progress)
                    recorder.end_update(step, progress)
            lr = current_lr(optimizer)
            train_loss = progress.end_epoch()
            step.end_epoch(epoch)

            # Evaluation of the raw and the averaged weights; the best of all epochs are kept.
            metrics: dict[str, Metrics] = {}
            best = None
            if progress.epoch % config.val_interval == 0 or progress.epoch == num_epochs:
                for name in step.weights:
                    weights = step.to_evaluate(name)
                    metrics[name] = evaluate(weights, val_loader, device=ranks.device, amp_dtype=step.amp_dtype)
                best = progress.judge(metrics, config.eval_metric)
                bad_images.add(map(val_set.path, metrics["raw"].unreadable))
            bad_images.end_epoch()
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


if __name__ == "__main__":
    sys.exit(main())
