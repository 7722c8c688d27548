"""Where are projected keys rotated best? The error of each layer of a trained rotary model, for three ways.

    python benchmarks/rotary_keys.py RUN DATA --json benchmarks/results/rotary_keys.json

RUN is a run of a rotary linvit model with --projection identity. On images of DATA's validation split, each layer gets
the tokens of the trained model and averages over k cells as E. The error is the relative root mean square difference of
the layer's output from full attention's, over patches, and the mean over layers.

    keys      rotate, then project
    rows      project, then rotate by the mean rotation of the row, which shrinks fast turns
    centre    project, then rotate by the place of the cell's centre
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linvit.data.sources.loose import load_batches, sample_paths
from linvit.evaluation.inference import input_spec
from linvit.measure.provenance import provenance, script_command
from linvit.model.eva import rotary_of_layers
from linvit.model.projections import build_projection
from linvit.model.rotary import RotaryAttention
from linvit.output.files import write_json
from linvit.output.terminal import page, table
from linvit.runs.folder import load_classifier

WAYS = ("keys", "rows", "centre")


def unit_rows(row_table: Tensor) -> Tensor:
    """The mean rotations of rows, with each turn at its full length: the rotation by the centre of a symmetric cell."""
    sin, cos = row_table.chunk(2, dim=-1)
    length = (sin.square() + cos.square()).sqrt().clamp(min=1e-6)
    return torch.cat([sin / length, cos / length], dim=-1)


def layer_errors(model: Any, images: Tensor, k: int) -> dict[str, list[float]]:
    """The error of each layer by way."""
    errors: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens, _ = model._pos_embed(model.patch_embed(images))
    tokens, prefix = model.norm_pre(tokens), model.num_prefix_tokens
    for block, rope in zip(model.blocks, rotary_of_layers(model)):
        attention, x = block.attn, block.norm1(tokens)
        assert isinstance(attention, RotaryAttention)
        expected = attention(x, rope=rope)[:, prefix:]
        attention.set_projections(build_projection("avgpool", k=k, grid_size=model.patch_embed.grid_size))
        mean_rows = attention._row_table
        for way in WAYS:
            attention.rotate = "keys" if way == "keys" else "rows"
            if way == "centre":
                attention._row_table = lambda *args, rows=mean_rows: unit_rows(rows(*args))  # type: ignore[method-assign]
            found = attention(x, rope=rope)[:, prefix:]
            errors[way].append(float((found - expected).norm() / expected.norm()))
        del attention._row_table
        attention.set_projections(None)
        tokens = block(tokens, rope=rope)
    return errors


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("data", type=Path, help="folder of images")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    classifier = load_classifier(options.run)
    model: Any = classifier.model.eval()
    paths = sample_paths(options.data, count=options.num_images, seed=0)
    images = torch.cat(list(load_batches(paths, input_spec(classifier), batch_size=64)))
    rows = [{"k": k, "errors": layer_errors(model, images, k)} for k in options.k]
    shown = table(("k", *WAYS))
    for row in rows:
        shown.add_row(str(row["k"]), *(f"{sum(row['errors'][way]) / len(model.blocks):.3f}" for way in WAYS))
    page().print(shown)
    origin = provenance(script_command(), seed=0, n=len(images))
    write_json(options.json, {**origin, "patches": model.patch_embed.num_patches, "rows": rows})


if __name__ == "__main__":
    main()
