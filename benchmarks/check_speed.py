"""Compare the speed of `linvit check` with decoding the same images alone, in the same number of processes.

    python benchmarks/check_speed.py --json benchmarks/results/check_speed.json

In each round both process the same JPEG files. Decoding alone is cv2.imdecode of bytes that are already in memory in
every process. The check does everything: it lists and reads files, and checks headers, digests, statistics, both kinds
of duplicates and whether training would start. `share` is the check's images/s divided by those of decoding alone.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from linvit.check.command import CheckOptions, check
from linvit.check.listing import open_source
from linvit.check.pool import Pool, usable_cores
from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json

# Images of each size: enough for the start of processes not to matter.
SIZES = {"224x224": 8000, "500x375": 5000, "2048x1536": 200}
CHUNK = 32


def make_images(folder: Path, *, width: int, height: int, count: int) -> list[Path]:
    """JPEGs of quality 90 with detail at all scales, each different, in two classes and two splits."""
    rng = np.random.default_rng(0)
    grain = rng.normal(128, 6, (height, width, 3)).astype(np.float32)
    paths = []
    for index in range(count):
        image = np.roll(grain, int(rng.integers(width)), axis=1)
        for side, strength in ((4, 50), (16, 30), (64, 18)):
            noise = rng.normal(0, strength, (side, side, 3)).astype(np.float32)
            image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        path = folder / ("train", "val")[index % 4 == 3] / "ab"[index // 4 % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.clip(image, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
        paths.append(path)
    return paths


def decode_all(data: list[bytes], chunk: range) -> int:
    for index in chunk:
        cv2.imdecode(np.frombuffer(data[index], np.uint8), cv2.IMREAD_COLOR_RGB)
    return len(chunk)


def time_decoding(data: list[bytes], workers: int) -> float:
    """Seconds to decode all; the processes are started before, as forks that share the bytes."""
    with Pool(workers, contextlib.nullcontext(data)) as pool:
        started = time.perf_counter()
        chunks = [range(first, min(first + CHUNK, len(data))) for first in range(0, len(data), CHUNK)]
        assert sum(pool.map(decode_all, chunks)) == len(data)
        return time.perf_counter() - started


def time_check(folder: Path, workers: int) -> float:
    options = CheckOptions(data_dir=folder, workers=workers)
    started = time.perf_counter()
    report = check(options, *open_source(folder))
    seconds = time.perf_counter() - started
    assert not report["findings"], list(report["findings"])
    return seconds


def measure(size: str, *, count: int, workers: int, rounds: int) -> dict[str, Any]:
    width, height = map(int, size.split("x"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = [path.read_bytes() for path in make_images(folder, width=width, height=height, count=count)]
        # An untimed run imports everything and brings the files into the cache.
        time_check(folder, workers)
        times = [(time_decoding(data, workers), time_check(folder, workers)) for _ in range(rounds)]
    shares = [decoding / checking for decoding, checking in times]
    row = {
        "size": size,
        "images": count,
        "kilobytes_per_image": round(sum(map(len, data)) / count / 1000, 1),
        "workers": workers,
        "decoded_per_second": round(count / statistics.median(decoding for decoding, _ in times), 1),
        "checked_per_second": round(count / statistics.median(checking for _, checking in times), 1),
        "share": round(statistics.median(shares), 3),
        "range": [round(min(shares), 3), round(max(shares), 3)],
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="width x height")
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images to use, for a quick look")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [
        measure(size, count=max(8, int(args.scale * SIZES[size])), workers=args.workers, rounds=args.rounds)
        for size in args.sizes
    ]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, {**provenance(script_command(), seed=0, n=args.rounds), "rows": rows})


if __name__ == "__main__":
    main()
