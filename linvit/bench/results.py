"""All that a run found, and the files that it goes to."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from linvit.bench.check import Check
from linvit.bench.options import BenchOptions
from linvit.bench.plot import save_plot
from linvit.bench.provenance import provenance
from linvit.bench.rows import Row, to_csv
from linvit.files import write_text


@dataclass
class Results:
    """What has been measured so far; an interruption leaves what was there."""

    command: str
    # What the numbers are of: the commit is read before the first of them, since files may change meanwhile.
    origin: dict[str, Any] = field(init=False)
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    # Operations a second of plain matrix products, by dtype, as measured around the last group.
    gemm_flops_per_second: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.origin = provenance(self.command, seed=0, n=0)

    def to_dict(self) -> dict[str, Any]:
        rounds = sorted({row.n for row in self.rows if row.status == "ok"})
        return {
            **self.origin,
            "n": rounds[0] if len(rounds) == 1 else rounds,
            "dtype": sorted({row.dtype for row in self.rows}),
            "gemm_flops_per_second": self.gemm_flops_per_second,
            "checks": [check._asdict() for check in self.checks],
            "notes": self.notes,
            "rows": [asdict(row) for row in self.rows],
        }

    def write(self, options: BenchOptions) -> None:
        """Write the files that the options name; the plot carries the SHA-256 of the JSON text."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if options.json_file is not None:
            write_text(options.json_file, text)
        if options.csv_file is not None:
            write_text(options.csv_file, to_csv(self.rows))
        if options.plot_file is not None:
            save_plot(json.loads(text), options.plot_file, digest=hashlib.sha256(text.encode()).hexdigest())
