"""Which settings a run may change when it goes on from a checkpoint, and which would make that meaningless."""

from collections.abc import Mapping
from typing import Any

# Of the run's place or end, not of its course.
_IRRELEVANT = {"resume", "no_resume_opt", "output", "experiment", "stop_epoch", "dry_run"}
_KEPT = ("model", "k", "projection", "share", "gp", "model_kwargs", "eval_metric")
_KEPT_WITH_OPTIMIZER = ("opt", "opt_kwargs", "freeze")
# What the order of an epoch's images is a function of, beside their number and the total batch.
_KEPT_WITHIN_EPOCH = ("seed", "sampler", "aug_repeats")


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a resumed run does otherwise, as "name: before → now"."""
    return [
        f"{name}: {before.get(name)} → {value}"
        for name, value in now.items()
        if name not in _IRRELEVANT and before.get(name) != value
    ]


def check_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], *, within_epoch: bool, with_optimizer: bool
) -> None:
    """Raise ValueError for the first change of settings with which going on would mean nothing.

    Args:
        before, now: settings of the checkpoint's run and of this one; one that `before` does not know is new.
        within_epoch: whether the checkpoint stands inside an epoch.
        with_optimizer: whether the optimizer's state is taken over, too.
    """
    kept = [
        (_KEPT, "a run keeps its model and its measure; resume with its own args.yaml"),
        (_KEPT_WITH_OPTIMIZER if with_optimizer else (), "keep it, or begin with a fresh optimizer by --no-resume-opt"),
        (
            _KEPT_WITHIN_EPOCH if within_epoch else (),
            "that changes the order of the images in the middle of an epoch; keep it, or resume from the end of an "
            "epoch (state-*-000000)",
        ),
    ]
    for names, mend in kept:
        for name in names:
            if name in before and before[name] != now[name]:
                raise ValueError(f"--resume: {name} was {before[name]} and is {now[name]} now: {mend}")
