"""Processes that read images end together, whether one dies or the user presses Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus import encoded, random_image, write

from linvit.check.pool import Pool
from linvit.check.reader import FolderSource, Reader


def end_process(reader: Reader, task: int) -> None:
    os._exit(task)


def test_a_killed_process_is_reported(tmp_path: Path) -> None:
    reader = Reader(FolderSource(tmp_path), max_pixels=1)
    with Pool(1, reader) as pool, pytest.raises(OSError, match="lower --workers"):
        list(pool.map(end_process, [1]))


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_all_processes(tmp_path: Path) -> None:
    image = encoded(random_image(0, height=600, width=800), "PNG")
    for number in range(2000):
        write(tmp_path / f"data/a/{number}.png", image)
    arguments = ["check", str(tmp_path / "data"), "-j", "2", "--json", str(tmp_path / "check.json")]
    program = f"import sys; sys.argv[0] = 'linvit'; from linvit.cli import main; sys.exit(main({arguments}))"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, start_new_session=True) as process:
        children: list[str] = []
        while len(children) < 2 and process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        # A fork in progress cannot be interrupted.
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=60)[1].decode().splitlines()[-1] == "interrupted"
    assert process.returncode == 130
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not (tmp_path / "check.json").exists()
