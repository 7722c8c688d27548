"""Start test scripts with torchrun, two processes over gloo."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = HERE / "training"


def free_ports(count: int) -> list[str]:
    """Ports that are free now, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


def torchrun(port: str, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of tests/training in two processes, and wait for it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    paths = [str(SCRIPTS), str(HERE), str(HERE.parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command += [str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
