"""`--dry-run`: what a run would be, before a step is taken: options, model, cost and the picture of one batch."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from timm.models import VisionTransformer
from timm.optim import get_optimizer_info
from torch import Tensor

from linvit.bench.plan import FULL_ATTENTION, describe
from linvit.data.augment.build import InputSpec
from linvit.data.loader import Batch, Loader
from linvit.device import autocast, autocast_dtype
from linvit.measure.flops import count_flops
from linvit.model.attention import LinformerAttention
from linvit.model.build import TimmModel
from linvit.output.files import write_file
from linvit.training.config import TrainConfig
from linvit.training.log import say

MOST_IMAGES = 24
COLUMNS = 6
# Images of the trial step whose activations are counted.
TRIAL_IMAGES = 2


def show_plan(config: TrainConfig, model: TimmModel, loader: Loader, spec: InputSpec) -> None:
    """Print the configuration as YAML, the model's table and what a step costs; save one batch to dry-run.png.

    The picture, in `output`, is all that is written; the model is left as it is.
    """
    say(yaml.safe_dump(config.settings(), sort_keys=False, allow_unicode=True).rstrip())
    console = Console()
    if isinstance(model, VisionTransformer):
        console.print(layer_table(model))
    batch = next(iter(loader))
    console.print(cost_table(config, model, batch, num_batches=len(loader)))
    path = config.output / "dry-run.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(path, batch, loader.class_names, spec)
    say(f"one batch: {path}; nothing was trained")


def layer_table(model: VisionTransformer) -> Table:
    """Tokens, projected length, kind and parameters of each layer, those of E and F apart."""
    table = Table("layer", "tokens", "k", "projection", "parameters", "of E and F")
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    seen: set[int] = set()
    for number, block in enumerate(model.blocks):
        pair = block.attn.projections() if isinstance(block.attn, LinformerAttention) else None
        # A projection that layers share counts in the first.
        own = [parameter for each in set(pair or ()) for parameter in each.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        table.add_row(
            str(number),
            f"{tokens:,}",
            "" if pair is None else " ".join(map(str, dict.fromkeys(pair[0].lengths))),
            FULL_ATTENTION if pair is None else pair[0].kind,
            f"{_count(block.parameters()):,}",
            f"{_count(own):,}",
        )
    facts = describe(model)
    table.add_section()
    table.add_row("model", f"{tokens:,}", "", "", f"{facts.num_parameters:,}", f"{facts.num_projection_parameters:,}")
    return table


def cost_table(config: TrainConfig, model: TimmModel, batch: Batch, *, num_batches: int) -> Table:
    """Arithmetic and memory of a step in this process, estimated without taking one."""
    size = len(batch.images)
    shadow = copy.deepcopy(model).to("meta")
    shadow.set_grad_checkpointing(False)
    flops = count_flops(shadow, batch.images.to("meta"), mode="train")
    memory = estimate_memory(config, model, batch.images)
    table = Table("a step of " + f"{size} images", "", title_justify="left")
    table.add_row("batches in an epoch", f"{num_batches:,}")
    table.add_row("operations, forward and backward", f"{flops / 1e9:,.1f} GFLOP")
    for name, count in memory.items():
        table.add_row(name, f"{count / 2**20:,.1f} MiB")
    table.add_row("memory, about", f"{sum(memory.values()) / 2**30:,.2f} GiB")
    return table


def estimate_memory(config: TrainConfig, model: TimmModel, images: Tensor) -> dict[str, int]:
    """Bytes that training keeps, by what they are; workspaces of kernels and fragmentation come on top.

    Activations are those that the backward pass of a few images keeps, times the batch; what gradient checkpointing
    saves of them is not taken off.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    info = get_optimizer_info(config.opt.lower().removeprefix("lookahead_"))
    moments = (info.num_betas if info.has_betas else int(info.has_momentum)) + config.opt.startswith("lookahead_")
    few = images[:TRIAL_IMAGES].clone()
    parts = {
        "weights": weights,
        "gradients": trained,
        "optimizer": moments * trained,
        "activations": saved_bytes(config, model, few) * len(images) // len(few),
    }
    return parts | ({"moving average": weights} if config.model_ema and not config.model_ema_force_cpu else {})


def saved_bytes(config: TrainConfig, model: TimmModel, images: Tensor) -> int:
    """Bytes that a forward pass of the images keeps for the backward pass, besides the weights."""
    model = copy.deepcopy(model).train()
    model.set_grad_checkpointing(False)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    # Held until all are counted, so that no memory is used, and counted, twice.
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    dtype = autocast_dtype(config.amp, config.amp_dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, _as_is), autocast(images.device, dtype):
        outputs: Any = model(images)
    del outputs
    return sum(kept.values())


def save_picture(path: Path, batch: Batch, class_names: list[str], spec: InputSpec) -> None:
    """Draw the first images of a batch as they are trained on, before any mixing, each under its class's name."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    images = (batch.images[:MOST_IMAGES].float().cpu() * std + mean).clamp(0, 1)
    rows = -(-len(images) // COLUMNS)
    figure = Figure(figsize=(1.8 * COLUMNS, 2.05 * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, label in zip(grid.flat, images, batch.labels.tolist()):
        axes.imshow(np.asarray(image.permute(1, 2, 0)), interpolation="nearest")
        axes.set_title(class_names[label][:24], fontsize=9)
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _as_is(tensor: Tensor) -> Tensor:
    return tensor
