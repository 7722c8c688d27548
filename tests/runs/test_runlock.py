"""Two processes never write into one run's folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import make_images, train

from linvit.runs.folder import lock_run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX file locks")
HOLD = """
import os, sys, time
from pathlib import Path
from linvit.runs.folder import lock_run
lock = lock_run(Path(sys.argv[1]))
# As a data loader's worker does, this one outlives its parent.
if os.fork():
    print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_images(tmp_path / "data", train=4, val=1)


def test_a_second_process_is_refused_until_the_first_is_gone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"epochs": 1, "batch_size": 4}
    assert train(data, tmp_path / "out", **settings) == 0
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out/run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        capsys.readouterr()
        before = sorted((tmp_path / "out/run").rglob("*"))
        assert train(data, tmp_path / "out", resume="auto", **settings | {"epochs": 2}) == 1
        assert "out/run: another process is training in it; wait for it or stop it" in capsys.readouterr().err
        assert sorted((tmp_path / "out/run").rglob("*")) == before
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert train(data, tmp_path / "out", resume="auto", **settings | {"epochs": 2}) == 0
        os.killpg(other.pid, signal.SIGKILL)


def test_a_process_may_take_its_own_folder_again(tmp_path: Path) -> None:
    first = lock_run(tmp_path)
    assert first is not None
    first.close()
    assert lock_run(tmp_path) is not None
