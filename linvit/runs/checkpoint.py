"""Training checkpoints on disk: folders that are either complete or absent.

state-EEEE-BBBBBB/     the epoch and batch at which training resumes
    model.safetensors  the weights
    ema.safetensors    their moving average, if the run keeps one
    training.pt        everything else: plain values and tensors
    manifest.json      format, version, epoch, batch; size and SHA-256 of each file

A checkpoint contains no code: `training.pt` is read by torch.load(weights_only=True), which creates only tensors and
plain values.
"""

import io
import pickle
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from linvit.output.files import (
    cannot_write,
    delete_folder,
    json_text,
    parse_json,
    reason,
    scratch_of,
    sha256_of,
    sync_folder,
    write_verified,
)
from linvit.version import __version__

FORMAT = 2
MANIFEST = "manifest.json"
# The keys are those of timm's checkpoints.
_WEIGHTS = {"state_dict": "model.safetensors", "state_dict_ema": "ema.safetensors"}
_REST = "training.pt"
_NAME = re.compile(r"state-(\d+)-(\d+)")


def checkpoint_name(epoch: int, batch: int) -> str:
    return f"state-{epoch:04d}-{batch:06d}"


def is_checkpoint(path: Path) -> bool:
    """Whether a path is the folder of a checkpoint, complete or damaged."""
    return path.is_dir() and (_NAME.fullmatch(path.name) is not None or (path / MANIFEST).is_file())


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or damaged, from oldest to newest."""
    return sorted((path for path in folder.glob("state-*") if _NAME.fullmatch(path.name)), key=_position)


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> Path:
    """Write a training state (see `linvit.training.state`) into a folder of checkpoints; returns the checkpoint's path.

    Every file is flushed to disk, read back and compared, the manifest last; only then does the checkpoint get its
    name. An intact checkpoint of the same epoch and batch is kept; a damaged one is retired. Raises OSError, and leaves
    nothing behind, if the checkpoint cannot be written.
    """
    progress = state["progress"]
    path = folder / checkpoint_name(progress["epoch"], progress["batch"])
    if path.exists():
        try:
            verify_checkpoint(path)
            return path
        except ValueError:
            _retire(path)
    scratch = scratch_of(path)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        _write_files(scratch, state)
        sync_folder(scratch)
        scratch.rename(path)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise cannot_write(path, error) from error
    return path


def _write_files(folder: Path, state: Mapping[str, Any]) -> None:
    digests: dict[str, str] = {}
    for key, name in _WEIGHTS.items():
        if state[key] is not None:
            digests[name] = write_weights(folder / name, state[key])
    rest = io.BytesIO()
    torch.save({key: value for key, value in state.items() if key not in _WEIGHTS}, rest)
    digests[_REST] = write_verified(folder / _REST, rest.getbuffer())
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "epoch": state["progress"]["epoch"],
        "batch": state["progress"]["batch"],
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in digests.items()
        },
    }
    write_verified(folder / MANIFEST, json_text(manifest).encode())


def write_weights(path: Path, state_dict: Mapping[str, Tensor]) -> str:
    """Write weights as safetensors with `write_verified`; returns the SHA-256."""
    # safetensors refuses the strides of channels-last weights.
    weights = {name: tensor.contiguous() for name, tensor in state_dict.items()}
    return write_verified(path, save(weights, metadata={"format": "pt"}))


def verify_checkpoint(path: Path) -> None:
    """Raise ValueError, naming the file, if a checkpoint is incomplete, damaged or of another format."""
    damaged = f"{path} cannot be used as a training checkpoint: "
    try:
        manifest = parse_json((path / MANIFEST).read_bytes())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        found = manifest["format"]
    except OSError as error:
        raise ValueError(f"{damaged}{MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{damaged}{MANIFEST} is damaged") from error
    if found != FORMAT:
        raise ValueError(f"{damaged}its format is {found}, not {FORMAT}; use the version of linvit that wrote it")
    if not {_WEIGHTS["state_dict"], _REST} <= files.keys() <= {*_WEIGHTS.values(), _REST}:
        raise ValueError(f"{damaged}{MANIFEST} is damaged")
    for name, (size, digest) in files.items():
        try:
            actual = (path / name).stat().st_size
            is_same = actual == size and sha256_of(path / name) == digest
        except OSError as error:
            raise ValueError(f"{damaged}{name} cannot be read ({error.strerror})") from error
        if actual != size:
            raise ValueError(f"{damaged}{name} has {actual:,} bytes, not {size:,}")
        if not is_same:
            raise ValueError(f"{damaged}{name} is damaged (its SHA-256 differs from the manifest)")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Verify a checkpoint and read its training state, with tensors on the CPU; raises ValueError if it is unusable."""
    verify_checkpoint(path)
    try:
        state: dict[str, Any] = torch.load(path / _REST, map_location="cpu", weights_only=True)
        for key, name in _WEIGHTS.items():
            state[key] = load_file(path / name) if (path / name).exists() else None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be used as a training checkpoint: {reason(error)}") from error
    return state


def prune_checkpoints(folder: Path, *, keep: int, milestones: Sequence[int]) -> None:
    """Delete all but the newest `keep` checkpoints and those at the end of the epochs in `milestones`."""
    milestone_names = {checkpoint_name(epoch + 1, 0) for epoch in milestones}
    for old in [path for path in list_checkpoints(folder) if path.name not in milestone_names][:-keep]:
        delete_folder(old)


def retire_later(folder: Path, *, epoch: int, batch: int) -> list[Path]:
    """Retire the checkpoints after this epoch and batch by renaming them to `aside-…`; returns their new paths.

    A run that resumes from an earlier checkpoint writes these again, perhaps with other contents. Until then, neither
    `--resume` nor pruning may take the old ones for the newest.
    """
    return [_retire(path) for path in list_checkpoints(folder) if _position(path) > (epoch, batch)]


def _retire(path: Path) -> Path:
    """Rename a checkpoint so that `list_checkpoints` no longer finds it; returns the new path."""
    number = 0
    while (retired := path.with_name(f"aside-{number}-{path.name}")).exists():
        number += 1
    path.rename(retired)
    return retired


def _position(path: Path) -> tuple[int, int]:
    """Epoch and batch of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2])
