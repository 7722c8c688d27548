"""Predictions on a Ray cluster: Ray Data reads files and writes Parquet; each actor holds a model, on a GPU of its own.

    pip install 'linvit[examples]'
    python examples/ray_predict.py output/RUN scans/ predictions/
    python examples/ray_predict.py output/RUN list.parquet predictions/               # paths in its column `path`
    python examples/ray_predict.py output/RUN s3://bucket/scans s3://bucket/predictions

All machines must see the model under the same path, and local files as well. Rows are in no particular order.
"""

import argparse
import os
from typing import Any

import pyarrow
import pyarrow.parquet
import ray
import ray.data

import linvit
from linvit.data.decode import EXTENSIONS

ROWS = pyarrow.schema(
    [
        ("path", pyarrow.string()),
        ("labels", pyarrow.list_(pyarrow.string())),
        ("probabilities", pyarrow.list_(pyarrow.float32())),
        ("error", pyarrow.string()),
    ]
)
# CPUs of each task and actor: an actor leaves half a CPU to the tasks that read and write.
HALF = {"num_cpus": 0.5}


class Classify:
    """An actor of Ray, with the arguments of `linvit.Predictor`: it loads the model once, and maps files to rows."""

    def __init__(self, model: str, **options: Any) -> None:
        self.predictor = linvit.Predictor(model, **options)

    def __call__(self, files: pyarrow.Table) -> pyarrow.Table:
        predictions = self.predictor(files["bytes"].to_pylist())
        rows = [
            {"path": path, "labels": each.labels, "probabilities": each.probabilities, "error": each.error}
            for path, each in zip(files["path"].to_pylist(), predictions)
        ]
        return pyarrow.Table.from_pylist(rows, ROWS)


def read_images(images: str) -> ray.data.Dataset:
    """Columns `bytes` and `path` of the image files below a folder or URL, or of those in a Parquet list."""
    if images.endswith(".parquet"):
        paths = pyarrow.parquet.read_table(images, columns=["path"])["path"].to_pylist()
        return ray.data.read_binary_files(paths, include_paths=True, **HALF)
    # Workers have other current folders.
    root = images if "://" in images else os.path.abspath(images)
    extensions = [extension.removeprefix(".") for extension in EXTENSIONS]
    return ray.data.read_binary_files(root, include_paths=True, file_extensions=extensions, **HALF)


def predict(model: str, images: str, output: str, *, actors: int, batch_size: int, topk: int) -> None:
    """Write Parquet files with a row for every image to a folder or URL."""
    ray.init(ignore_reinit_error=True)
    num_cpus, num_gpus = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
    actors = actors or num_gpus or num_cpus
    if actors > (num_gpus or num_cpus):
        raise SystemExit(f"error: {actors} actors, but the cluster has {num_cpus} CPUs and {num_gpus} GPUs")
    rows = read_images(images).map_batches(
        Classify,
        fn_constructor_args=(os.path.abspath(model) if os.path.exists(model) else model,),
        fn_constructor_kwargs={"topk": topk},
        batch_format="pyarrow",
        batch_size=batch_size,
        num_gpus=1 if num_gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=actors),
        **HALF,
    )
    rows.write_parquet(output if "://" in output else os.path.abspath(output), ray_remote_args=HALF)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="predict the classes of images on a Ray cluster")
    parser.add_argument("model", help="run folder, checkpoint, exported model or timm name, as for linvit predict")
    parser.add_argument("images", help="folder, URL, or Parquet file with a column `path`")
    parser.add_argument("output", help="folder or URL for Parquet files")
    parser.add_argument("--actors", type=int, default=0, help="models (default: one per GPU, else one per CPU)")
    parser.add_argument("--batch-size", type=int, default=256, help="images per call of an actor (default 256)")
    parser.add_argument("--topk", type=int, default=5, help="classes per image (default 5)")
    options = parser.parse_args()
    predict(
        options.model,
        options.images,
        options.output,
        actors=options.actors,
        batch_size=options.batch_size,
        topk=options.topk,
    )
