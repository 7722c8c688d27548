"""Latency of exported models beside eager PyTorch, and of linvit's ViT-S beside timm's in the same runtime.

    python benchmarks/export_speed.py --files DIR --json benchmarks/results/export_speed_cpu.json

The models have random weights and a class token, ten classes, batch 1, float32. All of one size take turns in each
round; `ratio` is timm's median time over linvit's in the same runtime, `of_eager` a runtime's time over eager's for the
same model. Files that DIR has already are not exported again.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from linvit.cli import main as linvit
from linvit.data.augment.build import InputSpec
from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json
from linvit.runs.folder import save_classifier
from linvit.runtimes.model import open_exported

FORMATS = {"onnx": "model.onnx", "openvino": "openvino"}
LINVIT = {224: "linvit_small_patch16_224", 512: "linvit_small_patch16_512", 1024: "linvit_small_patch16_1024"}


def prepare(name: str, size: int, folder: Path) -> torch.nn.Module:
    """The model with random weights; it is saved and exported to the folder."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, img_size=size).eval()
    if not folder.exists():
        folder.mkdir(parents=True)
        spec = InputSpec((size, size), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
        save_classifier(folder / "model", model, class_names=list("abcdefghij"), spec=spec, about={})
        for kind, file in FORMATS.items():
            arguments = ["--format", kind, "-j", "0"]
            if linvit(["export", str(folder / "model"), "-o", str(folder / file), *arguments]):
                raise SystemExit(1)
    return model


def seconds(run: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor) -> float:
    started = time.perf_counter()
    with torch.inference_mode():
        run(image)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, required=True, help="folder of the exported models")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prepare-only", action="store_true", help="export, and time nothing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        runs: dict[tuple[str, str], Callable[[torch.Tensor], torch.Tensor]] = {}
        for name in (LINVIT[size], "vit_small_patch16_224"):
            folder = options.files / f"{name}-{size}"
            runs[name, "eager"] = prepare(name, size, folder)
            for kind, file in FORMATS.items():
                runs[name, kind] = open_exported(str(folder / file), device="cpu").model
        if options.prepare_only:
            continue
        image = torch.randn(1, 3, size, size)
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for number in range(options.rounds + 1):
            for key, run in runs.items():
                taken = seconds(run, image)
                if number:
                    times[key].append(taken)
        medians = {key: statistics.median(found) for key, found in times.items()}
        for (name, kind), found in times.items():
            row = {
                "size": size,
                "model": name,
                "runtime": kind,
                "seconds": medians[name, kind],
                "range": [min(found), max(found)],
                "of_eager": medians[name, kind] / medians[name, "eager"],
                "ratio": medians["vit_small_patch16_224", kind] / medians[name, kind],
            }
            rows.append(row)
            print(
                f"{size:5} {name:28} {kind:9} {1000 * row['seconds']:8.1f} ms  "
                f"{row['of_eager']:.2f} of eager  {row['ratio']:.2f} × timm"
            )
    if options.json:
        write_json(options.json, {**provenance(script_command(), seed=0, n=options.rounds), "rows": rows})


if __name__ == "__main__":
    main()
