"""Measure the extra memory of one update with `--grad-accum-steps`, in sets of gradients.

    python benchmarks/grad_accum_memory.py --json benchmarks/results/grad_accum_memory.json

Each measurement runs in a process of its own. After a first update, which allocates what stays allocated, it measures
the forward and backward passes of a second one. The model is large and a batch is one small image, so that gradients
take most of the extra memory; with large batches activations do. SGD without momentum keeps no state.

`--before COMMIT` measures an older commit too. It takes linvit and this script from git and runs both as they were, so
COMMIT must have this script.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 2, 4)


def measure_here(model_name: str, img_size: int, batch_size: int, num_batches: int) -> dict[str, int]:
    """Extra memory of the passes of one update, and size of the model's gradients, in bytes."""
    import timm
    import torch

    import linvit  # noqa: F401
    from linvit.distributed import Ranks, StopRequest
    from linvit.measure.memory import cpu_step_memory
    from linvit.training.config import TrainConfig
    from linvit.training.loss import create_loss
    from linvit.training.optim import create_optimizer
    from linvit.training.step import TrainStep

    settings = {"data_dir": "data", "model": model_name, "opt": "momentum", "momentum": 0.0, "lr": 1e-4}
    config = TrainConfig.model_validate(settings | {"batch_size": batch_size, "grad_accum_steps": num_batches})
    torch.manual_seed(0)
    model = timm.create_model(model_name, img_size=img_size, k=4, num_classes=10)
    step = TrainStep(
        model,
        model,
        optimizer=create_optimizer(model, config, lr=1e-4),
        scheduler=None,
        ema=None,
        mixup=None,
        loss_fn=create_loss(config),
        config=config,
        ranks=Ranks(torch.device("cpu")),
        stop=StopRequest(),
    )
    step.start_epoch(0)
    images, labels = torch.randn(batch_size, 3, img_size, img_size), torch.zeros(batch_size, dtype=torch.int64)

    def passes() -> None:
        for number in range(num_batches):
            step.backward(images, labels, group_size=num_batches, closes_group=number == num_batches - 1)

    passes()
    step.update()
    added = cpu_step_memory(passes).step_bytes
    return {"added_bytes": added, "gradient_bytes": sum(4 * each.grad.numel() for each in step.parameters)}


def measure(code: Path, model: str, img_size: int, batch_size: int, *, repeats: int) -> list[dict[str, Any]]:
    """A row per number of batches, by linvit and this script in the folder `code`."""
    rows = []
    for num_batches in BATCHES:
        call = f"measure_here({model!r}, {img_size}, {batch_size}, {num_batches})"
        script = f"import sys; sys.path.append({str(code / 'benchmarks')!r}); import json; "
        script += f"from grad_accum_memory import measure_here; print(json.dumps({call}))"
        environment = {**os.environ, "PYTHONPATH": str(code)}
        command = [sys.executable, "-c", script]
        runs = [
            json.loads(subprocess.run(command, env=environment, cwd=code, stdout=subprocess.PIPE, check=True).stdout)
            for _ in range(repeats)
        ]
        gradients = runs[0]["gradient_bytes"]
        added = [run["added_bytes"] for run in runs]
        rows.append(
            {
                "grad_accum_steps": num_batches,
                "gradient_mb": round(gradients / 1e6, 1),
                "added_mb": round(statistics.median(added) / 1e6, 1),
                "added_mb_range": [round(min(added) / 1e6, 1), round(max(added) / 1e6, 1)],
                "sets_of_gradients": round(statistics.median(added) / gradients, 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="older commit to compare with; it must have this script")
    parser.add_argument("--model", default="linvit_base_patch16_224")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = (args.model, args.img_size, args.batch_size)
    result: dict[str, Any] = {"model": args.model, "img_size": args.img_size, "batch_size": args.batch_size}
    if args.before:
        with tempfile.TemporaryDirectory() as folder:
            paths = ["linvit", "benchmarks/grad_accum_memory.py"]
            archive = subprocess.run(
                ["git", "archive", args.before, *paths], cwd=ROOT, capture_output=True, check=False
            )
            if archive.returncode != 0:
                parser.error(f"--before {args.before}: {archive.stderr.decode().strip()}")
            subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
            result["before"] = measure(Path(folder), *settings, repeats=args.repeats)
    result["now"] = measure(ROOT, *settings, repeats=args.repeats)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, {**provenance(script_command(), seed=0, n=args.repeats), **result})


if __name__ == "__main__":
    main()
