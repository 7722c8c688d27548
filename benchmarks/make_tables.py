"""Write tables from benchmarks/results/*.json into the docs, between `<!-- begin NAME -->` and `<!-- end -->`.

python benchmarks/make_tables.py            # rewrites the tables of README.md and docs/, and the plots in docs/
python benchmarks/make_tables.py --check    # exits with 1 if they would change
"""

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from readme_figure import draw as draw_readme

from linvit.bench.output import DIGEST_KEY
from linvit.bench.output import draw as draw_rows
from linvit.output.plots import save_figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BENCH = RESULTS / "bench_readme_cpu.json"
BOARDS, STEP_TIMES = RESULTS / "boards_detail.json", RESULTS / "boards_step_times.json"
GPU, COMPILED = "bench_h100", "bench_h100_compiled"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("accuracy", "bench", "evaluate", "export", "many_machines")),
)

Row = dict[str, Any]


def read(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def bench() -> str:
    found = read(BENCH.stem)
    return "\n\n".join([_times(found["rows"]), _memory(found["rows"]), _long(found["rows"]) + _conditions(found)])


def _times(rows: list[Row]) -> str:
    """Times faster than the baseline, by model and mode, over image sizes."""
    rows = [row for row in rows if row["baseline"] is not None and "grad_checkpointing" not in row["model"]]
    sizes = sorted({(row["patches"], row["image_size"]) for row in rows})
    lines = [
        "| | | " + " | ".join(f"{patches:,} patches ({size} px)" for patches, size in sizes) + " |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {(row["mode"], row["patches"]): row for row in rows if row["model"] == model}
        modes = [mode for mode in ("forward", "train") if any(mode == key[0] for key in own)]
        for mode in modes:
            cells = [_time(own[mode, patches]) if (mode, patches) in own else "" for patches, _ in sizes]
            name = f"`{model}`" if mode == modes[0] else ""
            lines.append(f"| {name} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _time(row: Row) -> str:
    if row["seconds"] is None:
        return str(row["status"])
    if row["model"] == row["baseline"]:
        return f"{row['seconds']:.3g} s"
    low, high = row["ratio_spread"]
    return f"{row['ratio']:.2f} ×" + (f" ({low:.2f}–{high:.2f})" if row["n"] > 1 else "")


def _memory(rows: list[Row]) -> str:
    """Extra memory of a training step at the largest size measured, and the time that recomputing costs."""
    trained = [row for row in rows if row["mode"] == "train" and row["step_bytes"]]
    trained = [row for row in trained if row["patches"] == max(row["patches"] for row in trained)]
    (base,) = (row for row in trained if row["model"] == row["baseline"])
    lines = [
        f"| a training step at {base['image_size']} px | adds | of timm's | time | process at its peak |",
        "|---|---|---|---|---|",
    ]
    seconds = {row["model"]: row["seconds"] for row in trained}
    for row in trained:
        plain, is_recomputing, _ = row["model"].partition(":grad_checkpointing=")
        share = f" ({row['seconds'] / seconds[plain]:.2f} × without)" if is_recomputing else ""
        cells = [
            f"`{row['model']}`",
            f"{row['step_bytes'] / 2**30:.2f} GiB",
            f"{row['step_bytes'] / base['step_bytes']:.2f} ×",
            f"{row['seconds']:.3g} s{share}",
            f"{row['process_bytes'] / 2**30:.2f} GiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _long(rows: list[Row]) -> str:
    """Seconds per patch of the model that was measured alone, against the same at 1024 px."""
    (alone,) = (row for row in rows if row["baseline"] is None)
    (short,) = (
        row for row in rows if (row["model"], row["mode"], row["image_size"]) == (alone["model"], "forward", 1024)
    )
    share = short["tokens_per_second"] / alone["tokens_per_second"]
    return (
        f"At {alone['image_size']} px, {alone['patches']:,} patches, `{alone['model']}` takes {alone['seconds']:.3g} s "
        f"forward, {share:.2f} × the seconds per patch of 1024 px, in a process of "
        f"{alone['process_bytes'] / 2**30:.1f} GiB. "
    )


def _conditions(found: dict[str, Any]) -> str:
    rounds = found["n"]
    return (
        f"{', '.join(found['dtype'])}, batch 1, {found['hardware']}; times faster are medians (and ranges) of "
        f"{min(rounds)} to {max(rounds)} rounds, memory beyond what was held before the step. "
        f"`{found['command']}`."
    )


def speed() -> str:
    """A sentence on the default model at 1024 px, and one on a GPU."""
    rows = {(row["model"], row["mode"], row["image_size"]): row for row in read(BENCH.stem)["rows"]}
    forward, train = (rows["linvit_small_patch16_1024", mode, 1024] for mode in ("forward", "train"))
    gpu = {(row["model"], row["mode"], row["image_size"]): row for row in read(COMPILED)["rows"]}
    fast = "linvit_small_patch16_224:k=64,projection=separable,share=kv"
    on_gpu = [gpu[fast, mode, 1024]["ratio"] for mode in ("forward", "train")]
    return (
        f"At 1024 px on two CPU cores, `linvit_small_patch16_1024` predicts {forward['ratio']:.1f} × and trains "
        f"{train['ratio']:.1f} × as fast as timm's ViT-S/16 with fused attention, and a training step adds "
        f"{100 * _memory_share():.0f} % of the memory. On an H100, compiled and with `k=64`, it predicts "
        f"{on_gpu[0]:.1f} × and trains {on_gpu[1]:.1f} × as fast ([all figures](docs/bench.md))."
    )


def _memory_share() -> float:
    """Extra memory of a training step of the default model at 1024 px, relative to the baseline's."""
    own, base = (
        row["step_bytes"]
        for name in ("linvit_small_patch16_1024", "vit_small_patch16_224")
        for row in read(BENCH.stem)["rows"]
        if (row["model"], row["mode"], row["image_size"]) == (name, "train", 1024)
    )
    return float(own / base)


def gpu_table() -> str:
    """Times faster than the baseline on a GPU, by model and mode, with compiled models where they were timed."""
    eager, compiled = read(GPU), read(COMPILED)
    columns = [
        (size, is_compiled, {(row["model"], row["mode"]): row for row in found["rows"] if row["image_size"] == size})
        for size in (512, 1024, 2048, 4096)
        for is_compiled, found in ((False, eager), (True, compiled))
    ]
    columns = [column for column in columns if column[2]]
    headings = [
        f"{size} px, batch {next(iter(rows.values()))['batch_size']}" + (", compiled" if is_compiled else "")
        for size, is_compiled, rows in columns
    ]
    lines = ["| | | " + " | ".join(headings) + " |", "|---" * (len(columns) + 2) + "|"]
    for model in dict.fromkeys(row["model"] for row in compiled["rows"]):
        for mode in ("forward", "train"):
            cells = [_time(rows[model, mode]) for *_, rows in columns]
            lines.append(f"| {f'`{model}`' if mode == 'forward' else ''} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def boards() -> str:
    """Accuracy of each arm of the study of circuit boards, and the time of a training step."""
    found, times = read(BOARDS.stem), {row["arm"]: row["seconds_per_image"] for row in read(STEP_TIMES.stem)["rows"]}
    lines = ["| model | patches | n | epochs | val top-1 | test top-1 | ms per training image |", "|---" * 7 + "|"]
    for arm in dict.fromkeys(row["arm"] for row in found["runs"]):
        runs = [row for row in found["runs"] if row["arm"] == arm]
        tested = [row["test"]["top1"] for row in runs if row["test"] is not None]
        cells = [
            arm,
            f"{runs[0]['num_tokens']:,}",
            f"{len(runs)}",
            f"{len(runs[0]['curve'])}",
            _spread([row["top1"] for row in runs]),
            _spread(tested),
            f"{1000 * times[arm]:.0f}" if arm in times else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sizes() -> str:
    """Accuracy of one model at sizes that it was not trained at."""
    rows = read("boards_sizes")["rows"]
    lines = ["| tested at | patches | val top-1 (95 %) |", "|---|---|---|"]
    for row in rows:
        low, high = row["confidence"]
        accuracy = f"{row['top1']:.1f} % ({low:.1f} to {high:.1f})"
        lines.append(f"| {row['img_size']} px | {row['num_tokens']:,} | {accuracy} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f} %{deviation}"


def _mean(result: dict[str, Any]) -> str:
    top1 = [run["top1"] for run in result["runs"]]
    return f"{statistics.mean(top1):.1f} % ± {statistics.stdev(top1):.1f} (n = {len(top1)})"


def conformal() -> str:
    """Coverage and size of conformal sets over random splits, beside the theory."""
    lines = [
        "| | share of errors | coverage | expected, 95 % of splits | in it | mean size | one class |",
        "|---" * 7 + "|",
    ]
    for row in read("conformal_coverage")["rows"]:
        low, high = row["band"]
        cells = [
            f"`{row['method']}`",
            f"{100 * row['alpha']:g} %",
            f"{row['coverage']:.1f} %",
            f"{row['expected']:.1f} % ({low:.1f} to {high:.1f})",
            f"{row['inside']:.0f} %",
            f"{row['mean_size']:.2f}",
            f"{row['one_class']:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def int8() -> str:
    """Top-1 of a model in int8 beside its float32."""
    first, *others = read("int8_imagenette")["rows"]
    lines = [
        "| | top-1 | difference in points (95 %) |",
        "|---|---|---|",
        f"| float32 | {first['top1']:.2f} % | |",
    ]
    for row in others:
        low, high = row["difference"]["confidence"]["top1_difference"]
        cells = [
            row["format"],
            f"{row['top1']:.2f} %",
            f"{row['difference']['top1_difference']:+.2f} ({low:+.2f} to {high:+.2f})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def predict_scaling() -> str:
    """Images/s of `linvit predict` by the number of processes."""
    found = read("predict_scaling")
    lines = ["| processes | images/s | times one process | seconds to start |", "|---|---|---|---|"]
    for row in found["rows"]:
        rate, ratio = (
            f"{row[name]:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
            for name, digits, (low, high) in (
                ("images_per_second", 1, row["range"]),
                ("ratio", 2, row["ratio_range"]),
            )
        )
        lines.append(f"| {row['processes']} | {rate} | {ratio} | {row['start_seconds']:.0f} |")
    load = found["load_before"]
    shared = f", at a load of {load:.1f} by other programs" if load >= 0.5 else ""
    return "\n".join(
        [
            *lines,
            "",
            f"`{found['model']}`, float32, {found['images']} files of {found['image']} ({found['file_kb']} KB), "
            f"{found['hardware']}, one thread per process{shared}; medians (and ranges) of {found['n']} rounds. "
            f"`{found['command']}`",
        ]
    )


def supply() -> str:
    """What feeds a GPU: images/s that a core decodes and that a GPU predicts, and bytes/s of the files."""
    decoded = {row["case"]: row for row in read("loader")["rows"] if row["mode"] == "val"}
    gpu_rows = read(GPU)
    model = "linvit_small_patch16_224:k=64,projection=separable,share=kv"
    (forward,) = (
        row for row in gpu_rows["rows"] if (row["model"], row["mode"], row["image_size"]) == (model, "forward", 1024)
    )
    small, large = decoded["500x375-224"], decoded["2048x1536-1024"]
    rate = forward["batch_size"] / forward["seconds"]
    lines = [
        "| JPEG files | read by one core | file | 1,000 images/s need |",
        "|---|---|---|---|",
    ]
    for case, row in (("500×375, to 224 px", small), ("2048×1536, to 1024 px", large)):
        per_core = row["ours images/s"]
        needed = f"{1000 / per_core:.0f} cores, {row['file KB'] / 1000:.2f} GB/s"
        lines.append(f"| {case} | {per_core:.0f} images/s | {row['file KB']} KB | {needed} |")
    return "\n".join(
        [
            *lines,
            "",
            f"An {gpu_rows['hardware']} predicts {rate:.0f} images/s of 1024 px with `{model}` in bfloat16 "
            f"([docs/bench.md](bench.md#on-a-gpu)): {rate / large['ours images/s']:.0f} cores and "
            f"{rate * large['file KB'] / 1e6:.2f} GB/s keep it busy.",
        ]
    )


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "boards": boards,
    "sizes": sizes,
    "demo": demo,
    "bench": bench,
    "gpu_table": gpu_table,
    "conformal": conformal,
    "int8": int8,
    "predict_scaling": predict_scaling,
    "supply": supply,
}


def fill(text: str) -> str:
    """The text with every marked table rewritten."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- begin (\w+) -->)\n.*?\n?(<!-- end -->)", table, text, flags=re.DOTALL)


def is_plot_of(plot: Path, results: Sequence[Path]) -> bool:
    """Whether a plot carries the digest of these results."""
    if not plot.exists():
        return False
    with Image.open(plot) as image:
        return bool(image.info.get(DIGEST_KEY) == _digest(results))


def draw(plot: Path, results: Sequence[Path], drawing: Callable[..., Figure]) -> None:
    figure = drawing(*(json.loads(path.read_text()) for path in results))
    save_figure(plot, figure, metadata={DIGEST_KEY: _digest(results)})


def draw_bench(results: dict[str, Any]) -> Figure:
    return draw_rows(results["rows"])


def _digest(paths: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


# Each plot with the results that it draws, and how.
PLOTS: dict[Path, tuple[list[Path], Callable[..., Figure]]] = {
    ROOT / "docs" / "bench.png": ([BENCH], draw_bench),
    ROOT / "docs" / "bench_h100.png": ([RESULTS / f"{GPU}.json"], draw_bench),
    ROOT / "docs" / "linvit.png": ([BENCH, BOARDS, STEP_TIMES], draw_readme),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything would change")
    args = parser.parse_args()
    texts = {path: path.read_text() for path in PAGES}
    filled = {path: fill(text) for path, text in texts.items()}
    stale = [plot for plot, (results, _) in PLOTS.items() if not is_plot_of(plot, results)]
    if args.check:
        return int(texts != filled or bool(stale))
    for path, text in filled.items():
        path.write_text(text)
    for plot in stale:
        draw(plot, *PLOTS[plot])
    return 0


if __name__ == "__main__":
    sys.exit(main())
