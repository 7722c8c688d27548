"""Folders in memory are shared while a process uses them, and gone when none does."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from linvit.data import memoryfolder

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")

# Joins the folder, says so, and stays until it is told to go.
USER = """
import sys
from pathlib import Path
from linvit.data import memoryfolder
memoryfolder._MEMORY = Path(sys.argv[1])
folder = memoryfolder.share_memory_folder(sys.argv[2])
(folder / "data").write_text("pixels")
print(folder, flush=True)
sys.stdin.read()
"""


class User:
    """Another process that uses a folder."""

    def __init__(self, memory: Path, name: str) -> None:
        # With `--help` in sight the package itself imports no models.
        command = [sys.executable, "-c", USER, str(memory), name, "--help"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())

    def leave(self) -> None:
        self.process.communicate(timeout=20)
        assert self.process.returncode == 0

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=20)


@pytest.fixture
def users(tmp_path: Path) -> Iterator[list[User]]:
    users: list[User] = []
    yield users
    for user in users:
        if user.process.poll() is None:
            user.kill()


def test_the_last_process_deletes_the_folder(tmp_path: Path, users: list[User]) -> None:
    users += [User(tmp_path, "val"), User(tmp_path, "val")]
    first, second = users
    assert first.folder == second.folder == tmp_path / f"linvit-{os.getuid()}" / "val"
    first.leave()
    assert (second.folder / "data").read_text() == "pixels"
    second.leave()
    assert not second.folder.exists()


def test_what_a_killed_process_left_is_deleted_by_the_next(tmp_path: Path, users: list[User]) -> None:
    users += [User(tmp_path, "dead"), User(tmp_path, "alive")]
    dead, alive = users
    dead.kill()
    assert dead.folder.exists()
    users.append(User(tmp_path, "new"))
    assert not dead.folder.exists()
    assert alive.folder.exists()


def test_a_system_without_such_folders_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memoryfolder, "_MEMORY", tmp_path / "none")
    with pytest.raises(ValueError, match=r"cache memory needs /dev/shm.*set cache disk and a cache_dir"):
        memoryfolder.share_memory_folder("val")
