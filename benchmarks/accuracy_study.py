"""Train every arm of a study with the same recipe, and tabulate the accuracies.

    python benchmarks/accuracy_study.py benchmarks/studies/boards_detail.yaml DATA --runs RUNS \
        --json benchmarks/results/boards_detail.json

A study is a YAML file with a `question`, a `recipe` (settings of train_imagenet.py that all arms share), `seeds`, and
`arms` (settings of each arm, by its name). The results file is written after each run, and runs that it holds are not
repeated; a run that was interrupted is resumed from its folder under RUNS. All arms are trained with the first seed
before the second.

Recipes and arms are chosen by the validation images. --test evaluates the runs of the named arms on the split `test` as
well, once.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from collect_runs import describe, evaluate

from linvit.measure.provenance import ROOT, provenance, script_command
from linvit.output.files import write_json
from linvit.output.terminal import EMPTY, page, table


def train(study: dict[str, Any], arm: str, seed: int, *, data: Path, runs: Path) -> Path:
    """Train an arm with a seed, or resume it; returns the folder of the run."""
    name = f"{arm.replace(' ', '_')}-s{seed}"
    settings = {**study["recipe"], **study["arms"][arm], "seed": seed, "output": str(runs), "experiment": name}
    runs.mkdir(parents=True, exist_ok=True)
    config = runs / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(ROOT / "train_imagenet.py"), str(data), "--config", str(config), "--resume", "auto"]
    subprocess.run(command, check=True)
    return runs / name


def show(study: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Print the mean and standard deviation of each arm."""
    made = table(("arm", "n", "val top-1, %", "test top-1, %", "minutes"), text=("arm",))
    for arm in study["arms"]:
        found = [row for row in results if row["arm"] == arm]
        if found:
            tested = [row["test"]["top1"] for row in found if row["test"] is not None]
            minutes = statistics.mean(row["train_minutes"] for row in found)
            made.add_row(
                arm, str(len(found)), _spread([row["top1"] for row in found]), _spread(tested), f"{minutes:.0f}"
            )
    page().print(made)


def _spread(values: list[float]) -> str:
    if not values:
        return EMPTY
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--test", nargs="+", default=[], metavar="ARM", help="evaluate these arms on the split 'test'")
    options = parser.parse_args()
    study = yaml.safe_load(options.study.read_text())
    unknown = {*(options.arms or ()), *options.test} - study["arms"].keys()
    if unknown:
        parser.error(f"{options.study} has no arm {sorted(unknown)[0]!r}; it has {', '.join(study['arms'])}")
    results = []
    if options.json.exists():
        found = json.loads(options.json.read_text())
        if found["recipe"] != study["recipe"]:
            parser.error(f"{options.json} holds runs of another recipe than {options.study}: give another --json")
        results = found["runs"]

    def save() -> None:
        seeds = sorted({row["seed"] for row in results})
        origin = provenance(script_command(), seed=seeds, n=len(seeds))
        write_json(options.json, {"question": study["question"], "recipe": study["recipe"], **origin, "runs": results})

    for seed in options.seeds or study["seeds"]:
        for arm in options.arms or study["arms"]:
            if not any((row["arm"], row["seed"]) == (arm, seed) for row in results):
                run = train(study, arm, seed, data=options.data, runs=options.runs)
                found = describe(run, options.data)
                results.append({"arm": arm, "settings": study["arms"][arm], **found, "run": run.name, "test": None})
                save()
    for row in results:
        if row["arm"] in options.test and row["test"] is None:
            row["test"] = evaluate(options.runs / row["run"], options.data, "--split", "test")
            save()
    print(study["question"])
    show(study, results)


if __name__ == "__main__":
    main()
