"""docs/check.md lists every finding as the table of faults has it."""

import re
from pathlib import Path

from linvit.check.faults import FAULTS, Fault

DOCS = Path(__file__).parents[3] / "docs" / "check.md"


def uses(fault: Fault) -> str:
    """What training does, and what evaluation and prediction do otherwise."""
    parts = [fault.training]
    if fault.evaluation != fault.training:
        parts.append(f"evaluation {fault.evaluation}")
    if fault.prediction not in (fault.training, fault.evaluation):
        parts.append(f"prediction {fault.prediction}")
    return "; ".join(parts)


def table(severity: str) -> str:
    lines = ["| finding | what it is | what training does | the mend |", "|---|---|---|---|"]
    lines += [
        f"| `{code}` | {fault.what} | {uses(fault)} | {fault.mend} |"
        for code, fault in FAULTS.items()
        if fault.severity == severity
    ]
    return "\n".join(lines)


def test_the_tables_are_those_of_the_code() -> None:
    found = re.findall(r"<!-- begin (\w+) -->\n(.*?)\n<!-- end -->", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert dict(found) == {f"{severity}s": table(severity) for severity in ("fault", "note")}
