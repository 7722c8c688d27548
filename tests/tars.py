"""Tars of given files, for tests."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path


def write_tar(path: Path, files: Mapping[str, bytes], **settings: int) -> Path:
    """Writes files in the order given; names may appear as "NAME#2" to be written as NAME once more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **settings) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name.partition("#")[0])
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
