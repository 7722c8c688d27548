"""What every results file of these scripts says about how it came to be."""

import sys
from pathlib import Path
from typing import Any

from linvit.bench import provenance as shared


def provenance(*, seed: int | list[int], n: int) -> dict[str, Any]:
    """The command, commit, versions and hardware of this process; `n` is how often each number was measured."""
    script = Path(sys.argv[0]).resolve()
    command = " ".join(["python", str(script.relative_to(script.parents[1])), *sys.argv[1:]])
    return shared.provenance(command, seed=seed, n=n)
