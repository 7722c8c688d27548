"""Write `.pt2` files: the program of torch.export, or a package compiled by AOTInductor."""

import zipfile
from pathlib import Path

import torch

from linvit.export.graph import quiet, refusal
from linvit.runtimes.metadata import ExportMetadata
from linvit.runtimes.torch_export import RECORD


def write_torch_export(
    program: torch.export.ExportedProgram, path: Path, metadata: ExportMetadata, *, compiled: bool
) -> None:
    """Write the program, or compile it for this machine's processor, with its record as an extra file.

    Raises ValueError, naming the model, if it cannot be written or compiled.
    """
    try:
        with quiet():
            if not compiled:
                torch.export.save(program, path, extra_files={RECORD: metadata.to_json()})
                return
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
            with zipfile.ZipFile(path, "a") as archive:
                root = archive.namelist()[0].partition("/")[0]
                archive.writestr(f"{root}/extra/{RECORD}", metadata.to_json())
    except Exception as error:
        raise refusal("AOTInductor" if compiled else "torch.export", metadata, error) from error
