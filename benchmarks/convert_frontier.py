"""Fidelity and probe accuracy of converted models against their speed, by projection and length.

    python benchmarks/convert_frontier.py MODEL WEIGHTS DATA --img-size 518 --work FOLDER --json FILE --plot FILE

Each case is one `linvit convert` on images of DATA/train; then one `probe.py` compares all of them with the original.
Unknown options are passed to `linvit convert`. Folders and features that --work already holds are reused, so an
interrupted run can be resumed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json
from linvit.output.plots import save_figure

# Options of `linvit convert` for each case; a line in the plot joins the cases with the same name.
CASES: list[tuple[str, list[str]]] = [
    *(("planned k", ["--k", "plan", "--speedup", speedup]) for speedup in ("1.25", "1.4", "1.6")),
    *(
        (kind, ["--projection", kind, "--k", k])
        for kind in ("separable", "linear", "avgpool", "dct")
        for k in ("64", "256")
    ),
]
PANELS = {
    "patch_cosine": "patch tokens' cosine to the original's",
    "variance_lost": "share of the features' variance lost",
    "knn": "k-NN accuracy, %",
    "linear": "linear probe, %",
}


def convert(case: list[str], args: argparse.Namespace, output: Path) -> None:
    if output.exists():
        return
    source = [args.model, "--weights", str(args.weights), "--images", str(args.data / "train")]
    fit = ["--img-size", str(args.img_size), "--num-images", str(args.num_images), "--rounds", str(args.rounds)]
    command = [sys.executable, "-m", "linvit", "convert", *source, "-o", str(output), *case, *fit, *amp(args)]
    command += args.options
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def amp(args: argparse.Namespace) -> list[str]:
    return ["--amp"] if args.amp else []


def probe(outputs: list[Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the original, then one per folder."""
    script, found = Path(__file__).with_name("probe.py"), args.work / "probe.json"
    models = [f"{args.model}={args.weights}", *(f"local-dir:{output}" for output in outputs)]
    size = ["--img-size", str(args.img_size), "--cache", str(args.work / "features"), "--json", str(found)]
    counts = ["--num-images", str(args.probe)]
    subprocess.run([sys.executable, str(script), str(args.data), *models, *size, *counts, *amp(args)], check=True)
    rows: list[dict[str, Any]] = json.loads(found.read_text())["rows"]
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(17, 4.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        for kind, marker in zip(dict.fromkeys(row["case"] for row in rows), "*osD^v"):
            # Error bars are the standard error of the difference from the original on the same images.
            points = sorted(
                (row["times_faster"], row[name], row.get(f"{name}_less_stderr", 0.0))
                for row in rows
                if row["case"] == kind
            )
            faster, values, errors = zip(*points)
            style = dict(markersize=11, color="black") if kind == "original" else dict(markersize=6, linewidth=1.5)
            axes.errorbar(faster, values, errors, marker=marker, label=kind, capsize=2, elinewidth=0.7, **style)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("times faster than the original, forward")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("weights", type=Path)
    parser.add_argument("data", type=Path, help="folder with train and val, by class")
    parser.add_argument("--img-size", type=int, default=518)
    parser.add_argument("--num-images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--probe", type=int, default=500, help="number of images to probe features on")
    parser.add_argument("--amp", action="store_true", help="fit, and compute all features, in bfloat16")
    parser.add_argument("--only", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args, args.options = parser.parse_known_args()
    origin = provenance(script_command(), seed=0, n=1)
    args.work.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if not args.only or case[0] in args.only]
    outputs = [args.work / "-".join(option.removeprefix("--") for option in options) for _, options in cases]
    for (_, options), output in zip(cases, outputs):
        convert(options, args, output)
    original, *probed = probe(outputs, args)
    rows = [{"case": "original", "times_faster": 1.0, "patch_cosine": 1.0, **original}]
    for (case, options), output, row in zip(cases, outputs, probed):
        found = json.loads((output / "convert.json").read_text())
        fidelity = list(found["fidelity"].values())[-1]
        speed = {name: found["speed"][0][name] for name in ("times_faster", "spread", "rounds")}
        rows.append({"case": case, "options": options, "k": found["k"], **speed, **fidelity, **row})
    if args.json:
        write_json(args.json, {**origin, "img_size": args.img_size, "rows": rows}, indent=1)
    if args.plot:
        save_figure(args.plot, draw(rows), dpi=130)


if __name__ == "__main__":
    main()
