"""Images/s of `linvit predict` with one process and with several on this machine, one core each.

    python benchmarks/predict_scaling.py --json benchmarks/results/predict_scaling.json

A ViT-S with random weights predicts JPEG files of noise in parts, under torchrun; numbers of processes take turns in
each round. Images/s count from the first part of each process to the last part of all; what the command takes beyond
them is the time to start. `ratio` is to one process, round by round.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import timm
import torch

import linvit  # noqa: F401  registers the models
from linvit.data.augment.build import InputSpec
from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json
from linvit.runs.folder import save_classifier

MODEL = "linvit_small_patch16_224"
HEIGHT, WIDTH = 375, 500


def prepare(folder: Path, num_images: int) -> None:
    """Write the model and the images."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=10).eval()
    spec = InputSpec((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
    save_classifier(folder / "model", model, class_names=list("abcdefghij"), spec=spec, about={})
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(num_images):
        # Smooth, so that the size of the file is that of a photograph.
        small = rng.integers(0, 256, (HEIGHT // 5, WIDTH // 5, 3), np.uint8)
        image = cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / "images" / f"{number}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])


def measure(folder: Path, processes: int, *, part_size: int, num_images: int) -> tuple[float, float]:
    """Images/s while predicting, and the seconds that the command takes to start and to end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "linvit", "predict", str(folder / "model"), str(folder / "images"), "-j", "0", "--device", "cpu"]
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command += ["-o", f"{output}/parts", "-b", str(part_size), "--part-size", str(part_size)]
        started = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        total = time.perf_counter() - started
        ends = sorted(part.stat().st_mtime for part in Path(output).glob("parts/part-*"))
    rate = (num_images - processes * part_size) / (ends[-1] - ends[processes - 1])
    return rate, total - num_images / rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="a multiple of --part-size (default 256)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (default 1 2)")
    parser.add_argument("--part-size", type=int, default=8, help="images per part and per batch (default 8)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Processes of other programs that compete for the cores.
    load = os.getloadavg()[0]
    rates: dict[int, list[float]] = {processes: [] for processes in options.processes}
    starts: dict[int, list[float]] = {processes: [] for processes in options.processes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.images)
        kilobytes = statistics.fmean(image.stat().st_size for image in (folder / "images").iterdir()) / 1000
        for _ in range(options.rounds):
            for processes in options.processes:
                rate, start = measure(folder, processes, part_size=options.part_size, num_images=options.images)
                rates[processes].append(rate)
                starts[processes].append(start)
                print(f"{processes} processes: {rate:.2f} images/s, {start:.1f} s to start", flush=True)
    first = rates[options.processes[0]]
    rows = []
    for processes, found in rates.items():
        ratios = [rate / base for rate, base in zip(found, first)]
        rows.append(
            {
                "processes": processes,
                "images_per_second": statistics.median(found),
                "range": [min(found), max(found)],
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "start_seconds": statistics.median(starts[processes]),
            }
        )
    about = {"model": MODEL, "image": f"{WIDTH}×{HEIGHT} JPEG", "file_kb": round(kilobytes), "images": options.images}
    if options.json:
        found_at = provenance(script_command(), seed=0, n=options.rounds)
        write_json(options.json, {**found_at, **about, "threads": 1, "load_before": round(load, 1), "rows": rows})


if __name__ == "__main__":
    main()
