"""Kill training at random times, also while it saves, resume it, and compare the results bit by bit.

    python benchmarks/kill_test.py --kills 200 --seed 0 --json benchmarks/results/kill_test.json

A tiny run finishes undisturbed once. Then runs with the same settings are killed by SIGKILL, resumed by `--resume auto`
and killed again until they end; a third of the kills wait for a save to start. After every kill all checkpoints must be
intact, and at the end weights, moving average, optimizer and summary.csv must equal those of the undisturbed run. Each
process is forked from one that has imported everything, and runs on one thread.
"""

import argparse
import csv
import hashlib
import importlib
import json
import os
import pkgutil
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

import linvit
from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json
from linvit.runs.checkpoint import list_checkpoints, read_checkpoint, verify_checkpoint
from linvit.settings.process import run
from linvit.training.config import TrainConfig

# train_imagenet.py is next to the package, not in it.
sys.path.insert(0, str(Path(__file__).parents[1]))

from train_imagenet import train

SETTINGS: dict[str, Any] = {
    "model": "linvit_mini_patch4_64",
    "model_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "k": 4,
    "share": "layerwise",
    "img_size": [32, 32],
    "batch_size": 4,
    "grad_accum_steps": 2,
    "epochs": 3,
    "lr": 1e-3,
    "warmup_epochs": 1,
    "sched_on_updates": True,
    "clip_grad": 1.0,
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop": 0.1,
    "drop_path": 0.2,
    "reprob": 0.3,
    "aa": "rand-m9-mstd0.5-inc1",
    "model_ema": True,
    "model_ema_decay": 0.9,
    "amp": True,
    "device": "cpu",
    "report": False,
    "checkpoint_interval": 1,
    "checkpoint_hist": 2,
}
# Columns of summary.csv that depend on the clock.
TIMING = {"images_per_second", "data_wait", "seconds", "peak_memory"}
# Worker processes must make no difference either.
WORKERS = (0, 0, 0, 2)


def make_images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for channel, name in enumerate(("blue", "green", "red")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = rng.integers(0, 100, (36, 40, 3), dtype=np.uint8)
                image[..., channel] += 60
                assert cv2.imwrite(str(folder / split / name / f"{number}.png"), image)
    return folder


def start(config: TrainConfig, log: Path) -> int:
    """Train in a process, and a process group, of its own; returns its ID."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = run(lambda: train(config))
    finally:
        os._exit(status)


def has_ended(pid: int, until: float) -> bool:
    """Whether the process ends by itself before `until`; raises RuntimeError if it fails."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"training ended with exit status {os.waitstatus_to_exitcode(status)}")
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.0005)


def kill(pid: int) -> None:
    """Kill a process with its workers, which may not exist yet, as a power failure would."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def leftovers(folder: Path) -> set[str]:
    """Kinds of half written or half deleted files: state, best, last, file."""
    found = [path.name for path in folder.glob(".*")] + [path.name for path in folder.glob("checkpoints/.*")]
    kinds = ("state", "best", "last")
    return {next((kind for kind in kinds if name.startswith(f".{kind}")), "file") for name in found}


def is_killed_at_random(pid: int, duration: float, rng: random.Random) -> bool:
    """Kill at a random time within the duration of a full run; False if the run ends before."""
    if has_ended(pid, time.monotonic() + rng.uniform(0.0, duration)):
        return False
    kill(pid)
    return True


def is_killed_in_save(pid: int, folder: Path, rng: random.Random) -> bool:
    """Kill shortly after one of the next saves has started; False if the run ends before."""
    num_skipped = rng.randrange(8)
    was_saving = False
    while not has_ended(pid, 0.0):
        is_saving = bool(leftovers(folder))
        num_skipped -= is_saving and not was_saving
        was_saving = is_saving
        if num_skipped < 0:
            time.sleep(rng.uniform(0.0, 0.01))
            kill(pid)
            return True
    return False


def fingerprint(folder: Path) -> dict[str, str]:
    """Digests of everything that must not depend on how often a run was killed."""
    state = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    with (folder / "summary.csv").open(newline="") as file:
        rows = [{name: value for name, value in row.items() if name not in TIMING} for row in csv.DictReader(file)]
    parts = {
        "weights": state["state_dict"],
        "average": state["state_dict_ema"],
        "optimizer": state["optimizer"],
        "summary": rows,
        **{name: (folder / name / "model.safetensors").read_bytes() for name in ("best", "last")},
    }
    return {name: hashlib.sha256(b"".join(bytes_of(part))).hexdigest() for name, part in parts.items()}


def bytes_of(value: Any) -> list[bytes]:
    if isinstance(value, dict):
        return [part for key in sorted(value, key=str) for part in (str(key).encode(), *bytes_of(value[key]))]
    if isinstance(value, list | tuple):
        return [part for item in value for part in bytes_of(item)]
    if isinstance(value, Tensor):
        return [str(value.dtype).encode(), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()]
    return [value if isinstance(value, bytes) else repr(value).encode()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for module in pkgutil.walk_packages(linvit.__path__, "linvit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with tempfile.TemporaryDirectory() as scratch:
        found = torment(Path(scratch), kills=args.kills, rng=random.Random(args.seed))
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {**provenance(script_command(), seed=args.seed, n=args.kills), "settings": SETTINGS, **found}
        write_json(args.json, result)
    return 1 if found["mismatches"] or found["damaged"] else 0


def torment(scratch: Path, *, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill `kills` times and return what happened."""
    log = scratch / "log.txt"
    common = SETTINGS | {"data_dir": make_images(scratch / "data"), "output": scratch}
    began = time.monotonic()
    assert has_ended(start(TrainConfig(**common, experiment="reference", workers=0), log), float("inf"))
    duration = time.monotonic() - began
    expected = fingerprint(scratch / "reference")
    counts: Counter[str] = Counter()
    mismatches: list[str] = []
    damaged: list[str] = []
    while counts["kills"] < kills:
        name = f"run-{counts['runs_finished']}"
        folder = scratch / name
        while True:
            pid = start(TrainConfig(**common, experiment=name, workers=rng.choice(WORKERS), resume="auto"), log)
            is_over = counts["kills"] >= kills
            in_save = rng.random() < 1 / 3
            if is_over:
                assert has_ended(pid, float("inf"))
                break
            if not (is_killed_in_save(pid, folder, rng) if in_save else is_killed_at_random(pid, duration, rng)):
                break
            counts["kills"] += 1
            for kind in leftovers(folder):
                counts[f"kills_inside_{kind}"] += 1
            counts["kills_inside_saves"] += bool(leftovers(folder))
            counts["kills_before_the_first_checkpoint"] += not list_checkpoints(folder / "checkpoints")
            for path in list_checkpoints(folder / "checkpoints"):
                counts["checkpoints_verified"] += 1
                try:
                    verify_checkpoint(path)
                except ValueError as error:
                    damaged.append(str(error))
            if counts["kills"] % 20 == 0:
                print(dict(counts), file=sys.stderr, flush=True)
        counts["runs_finished"] += 1
        mismatches += [f"{name}: {part}" for part, digest in fingerprint(folder).items() if digest != expected[part]]
    return {
        **counts,
        "mismatches": mismatches,
        "damaged": damaged,
        "seconds_of_a_whole_run": round(duration, 2),
        "seconds": round(time.monotonic() - began),
    }


if __name__ == "__main__":
    sys.exit(main())
