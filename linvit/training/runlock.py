"""One process at a time writes into a run's folder."""

import os
from pathlib import Path
from typing import IO

LOCK = ".lock"


def lock_run(folder: Path) -> IO[bytes] | None:
    """Claim a run's folder until the file returned is closed or the process ends, however it ends.

    None where the system has no such locks. Raises ValueError where another process has it.
    """
    if os.name != "posix":
        return None
    import fcntl

    file = (folder / LOCK).open("ab")
    try:
        # Not `flock`: workers that outlive a killed process for a while would go on holding it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"{folder}: another process is training in it; wait for it or stop it, or choose another --experiment"
        ) from None
    except OSError:
        # A file system without locks.
        file.close()
        return None
    return file
