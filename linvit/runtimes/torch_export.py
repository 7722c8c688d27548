"""Open a `.pt2` file of torch.export or AOTInductor.

Such a file can run code. torch.export.load unpickles what the file marks as pickled, evaluates its symbolic expressions
as Python, and calls whatever function of torch the graph names; an AOTInductor package is a compiled library.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linvit.output.files import reason
from linvit.output.terminal import printable
from linvit.runtimes.metadata import ExportMetadata, parse_metadata

RECORD = "linvit.json"
# A record names the classes; this is room for a million of them.
_MOST_BYTES = 2**26


def open_torch_export(
    path: Path, *, device: str, trust_code: bool
) -> tuple[Callable[[Tensor], list[Tensor]], ExportMetadata]:
    """A function from batches to the file's outputs, and its record.

    Raises ValueError if `trust_code` is false, and for a file that is damaged or of another origin.
    """
    if not trust_code:
        raise ValueError(
            f"{path}: a .pt2 file can run code when it is opened; if you trust whoever made it, add --trust-code; "
            "ONNX and OpenVINO files need no trust"
        )
    metadata = parse_metadata(_record(path), source=path)
    try:
        module = _load(path, device)
    except Exception as error:
        raise ValueError(f"{path} cannot be opened by torch.export: {printable(reason(error))}") from error

    def execute(batch: Tensor) -> list[Tensor]:
        found = module(batch.to(device))
        outputs = [found] if isinstance(found, Tensor) else list(found)
        if [list(each.shape[1:]) for each in outputs] != list(metadata.output_shapes.values()):
            raise ValueError(f"{path} has another output than its record says; export it again")
        return outputs

    return execute, metadata


def _record(path: Path) -> bytes | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.rpartition("/")[2] == RECORD]
            if not names or archive.getinfo(names[0]).file_size > _MOST_BYTES:
                return None
            return archive.read(names[0])
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a .pt2 file: it is damaged, or another kind of file") from error


def _is_compiled(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any("/data/aotinductor/" in f"/{name}" for name in archive.namelist())


def _load(path: Path, device: str) -> Callable[[Tensor], Any]:
    if _is_compiled(path):
        compiled: Callable[[Tensor], Any] = torch._inductor.aoti_load_package(str(path))
        return compiled
    program = torch.export.load(path)
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return program.module()
