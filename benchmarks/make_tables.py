"""Write the README's numbers from benchmarks/results/*.json, between its `<!-- begin NAME -->` and `<!-- end -->`.

python benchmarks/make_tables.py            # rewrites README.md
python benchmarks/make_tables.py --check    # exit 1 where it would change
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def step_time() -> str:
    found = read("step_time_cpu")
    rows = found["rows"]
    models = [row["model"] for row in rows if row["mode"] == "train" and row["image_size"] == rows[0]["image_size"]]
    columns = sorted({(row["image_size"], row["patches"], row["mode"]) for row in rows})
    lines = [
        "| | " + " | ".join(f"{size} px, {patches:,} patches, {mode}" for size, patches, mode in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for model in models:
        cells = [
            _ratio(row)
            for column in columns
            for row in rows
            if row["model"] == model and (row["image_size"], row["patches"], row["mode"]) == column
        ]
        name = "timm `vit_small_patch16`" if model == "timm ViT" else f"`linvit_small_patch16`, {model}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append(
        f"\nTimes faster, median (and range) of {found['n']} rounds, {found['dtype']}, batch {found['batch']}, "
        f"{found['hardware']}: [step_time.py](benchmarks/step_time.py)."
    )
    return "\n".join(lines)


def _ratio(row: dict[str, Any]) -> str:
    low, high = row["spread"]
    return f"{row['times_faster']:.2f} ×" + (f" ({low:.2f}–{high:.2f})" if low < high else "")


def demo() -> str:
    large, small = read("demo_elpv_288"), read("demo_elpv_64")
    counts = large["runs"][0]
    functional = [images for name, images in counts["images_per_class"].items() if name.endswith("_functional")]
    always_functional = 100 * sum(functional) / counts["num_images"]
    return "\n".join(
        [
            f"| | top-1 on {counts['num_images']} held-out cells |",
            "|---|---|",
            f"| 288 px, {counts['num_tokens']:,} patches | {_mean(large)} |",
            f"| the same recipe at 64 px, {small['runs'][0]['num_tokens']} patches | {_mean(small)} |",
            f'| always answering "functional", with the right cell type | {always_functional:.1f} % |',
        ]
    )


def _mean(result: dict[str, Any]) -> str:
    return f"{result['top1_mean']:.1f} % ± {result['top1_std']:.1f} (n = {result['n']})"


TABLES: dict[str, Callable[[], str]] = {"step_time": step_time, "demo": demo}


def fill(text: str) -> str:
    """The text with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- begin (\w+) -->)\n.*?\n?(<!-- end -->)", table, text, flags=re.DOTALL)


def main() -> int:
    path = ROOT / "README.md"
    before = path.read_text()
    after = fill(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
