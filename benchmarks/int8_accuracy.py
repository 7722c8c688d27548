"""Top-1 of a model in float32 and quantised to int8 by ONNX Runtime and OpenVINO, on the same images.

    python benchmarks/int8_accuracy.py RUN DATA --files DIR --json benchmarks/results/int8_imagenette.json

`linvit export --int8` calibrates on images of DATA/train, and `linvit eval --compare` evaluates all three on DATA/val:
`difference` is that of top-1 in points, with a paired bootstrap interval at 95 %.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from linvit.cli import main as linvit
from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json

FORMATS = {"onnx": "int8.onnx", "openvino": "int8_openvino"}


def run(*arguments: object) -> None:
    if linvit([str(each) for each in arguments]):
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("data", type=Path)
    parser.add_argument("--files", type=Path, required=True, help="folder of the exported models")
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--recipe", help="how the model was trained, for the results")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.files.mkdir(parents=True, exist_ok=True)
    exports: dict[str, Any] = {}
    for kind, name in FORMATS.items():
        report = options.files / f"{kind}.json"
        calibration = ["--int8", "--data-dir", options.data, "--calibration-images", options.calibration_images]
        # A larger loss is a result here, not an error.
        limits = ["--max-drop", 100, "-j", 2, "--device", "cpu"]
        run(
            "export", options.run, "-o", options.files / name, "--format", kind, *calibration, *limits, "--json", report
        )
        exports[kind] = json.loads(report.read_text())
    report = options.files / "eval.json"
    files = [options.files / name for name in FORMATS.values()]
    run("eval", options.run, options.data, "--compare", *files, "-j", 2, "--device", "cpu", "--json", report)
    original, *others = json.loads(report.read_text())
    rows: list[dict[str, Any]] = [{"format": "float32", "top1": original["top1"], "loss": original["loss"]}]
    for kind, each in zip(FORMATS, others, strict=True):
        agreement = [
            {key: found[key] for key in ("images", "num_images", "top1")} for found in exports[kind]["agreement"]
        ]
        scores = {"top1": each["top1"], "loss": each["loss"], "difference": each["against_first"]}
        rows.append({"format": f"{kind} int8", **scores, "bytes": exports[kind]["bytes"], "agreement": agreement})
    for row in rows:
        print(row)
    if options.json:
        results = {
            "recipe": options.recipe,
            "model": original["model"],
            "img_size": original["img_size"],
            "calibration_images": options.calibration_images,
            "rows": rows,
        }
        write_json(options.json, {**provenance(script_command(), seed=0, n=original["num_images"]), **results})


if __name__ == "__main__":
    main()
