"""`--dry-run`: show the options, the model, the cost of a step and one batch of images, without training."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from rich.table import Table
from timm.models import VisionTransformer
from timm.models.eva import Eva
from timm.optim import get_optimizer_info
from torch import Tensor, nn

from linvit.bench.plan import FULL_ATTENTION, describe
from linvit.data.augment.build import InputSpec
from linvit.data.loader import Batch, Loader
from linvit.device import autocast, autocast_dtype
from linvit.measure.timing import count_flops
from linvit.model.build import TimmModel
from linvit.model.projected import ProjectedAttention
from linvit.output.plots import drawable, save_figure
from linvit.output.terminal import EMPTY, format_bytes, page, table
from linvit.training.config import TrainConfig
from linvit.training.log import print_line

# The image of a batch shows at most this many of its images.
MAX_IMAGES = 24
COLUMNS = 6
# Activation memory is measured on this many images.
TRIAL_IMAGES = 2


def show_plan(config: TrainConfig, model: TimmModel, loader: Loader, spec: InputSpec) -> None:
    """Print the configuration as YAML, the model's layers and the cost of a step; save one batch to dry-run.png.

    The PNG in `output` is the only file that is written. The model does not change.
    """
    for line in yaml.safe_dump(config.settings(), sort_keys=False, allow_unicode=True).splitlines():
        print_line(line)
    console = page()
    if isinstance(model, VisionTransformer | Eva):
        console.print(layer_table(model))
    batch = next((batch for batch in loader if len(batch.images)), None)
    if batch is None:
        raise ValueError(f"{config.data_dir}: no image of an epoch can be read; restore the images")
    console.print(cost_table(config, model, batch, num_batches=len(loader)))
    path = config.output / "dry-run.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {config.output}: cannot create the folder ({error.strerror})") from error
    save_batch(path, batch, loader.class_names, spec)
    print_line(f"one batch: {path}; nothing was trained")


def layer_table(model: VisionTransformer | Eva) -> Table:
    """Tokens, projected length, kind, parameters, and parameters of E and F, of each layer and of the model."""
    made = table(("layer", "tokens", "k", "projection", "parameters", "in E and F"), text=("layer", "projection"))
    tokens = f"{model.patch_embed.num_patches + model.num_prefix_tokens:,}"
    seen: set[int] = set()
    for number, block in enumerate(model.blocks):
        pair = block.attn.projections() if isinstance(block.attn, ProjectedAttention) else None
        # A projection that layers share counts in the first layer.
        own = [parameter for each in set(pair or ()) for parameter in each.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        made.add_row(
            str(number),
            tokens,
            EMPTY if pair is None else " ".join(map(str, dict.fromkeys(pair[0].lengths))),
            FULL_ATTENTION if pair is None else pair[0].kind,
            f"{_count(block.parameters()):,}",
            f"{_count(own):,}",
        )
    facts = describe(model)
    made.add_section()
    made.add_row("model", tokens, "", "", f"{facts.num_parameters:,}", f"{facts.num_projection_parameters:,}")
    return made


def cost_table(config: TrainConfig, model: TimmModel, batch: Batch, *, num_batches: int) -> Table:
    """Computation and memory of a step in this process, estimated without training."""
    meta_model = copy.deepcopy(model).to("meta")
    meta_model.set_grad_checkpointing(False)
    flops = count_flops(meta_model, batch.images.to("meta"), mode="train")
    memory = estimate_memory(config, model, batch.images)
    heading = f"a step of {len(batch.images)} images"
    made = table((heading, ""), text=(heading,))
    made.add_row("batches per epoch", f"{num_batches:,}")
    made.add_row("computation, forward and backward", f"{flops / 1e9:,.1f} GFLOP")
    for name, size in memory.items():
        made.add_row(f"memory of {name}", format_bytes(size))
    made.add_row("memory, about", format_bytes(sum(memory.values())))
    return made


def estimate_memory(config: TrainConfig, model: TimmModel, images: Tensor) -> dict[str, int]:
    """Memory of training in bytes, by use. Workspaces of kernels and fragmentation need more.

    Activations are what a forward pass of a few images keeps for the backward pass, scaled to the batch. Savings by
    gradient checkpointing are not subtracted.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    info = get_optimizer_info(config.opt.lower().removeprefix("lookahead_"))
    moments = (info.num_betas if info.has_betas else int(info.has_momentum)) + config.opt.startswith("lookahead_")
    few = images[:TRIAL_IMAGES].clone()
    memory = {
        "weights": weights,
        "gradients": trained,
        "optimizer": moments * trained,
        "activations": saved_bytes(config, model, few) * len(images) // len(few),
    }
    return memory | ({"moving average": weights} if config.model_ema and not config.model_ema_force_cpu else {})


def saved_bytes(config: TrainConfig, model: TimmModel, images: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the weights."""
    model = copy.deepcopy(model).train()
    model.set_grad_checkpointing(False)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    # Keeps every tensor alive, so that no memory is reused and missed in the count.
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.append(tensor)
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    dtype = autocast_dtype(config.amp, config.amp_dtype)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, autocast(images.device, dtype):
        outputs: Any = model(images)
    del outputs
    return sum(sizes.values())


def save_batch(path: Path, batch: Batch, class_names: list[str], spec: InputSpec) -> None:
    """Save a PNG of a batch's first images, as they are trained on but before mixing, with their class names."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    images = (batch.images[:MAX_IMAGES].float().cpu() * std + mean).clamp(0, 1)
    rows = -(-len(images) // COLUMNS)
    figure = Figure(figsize=(1.8 * COLUMNS, 2.05 * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    titles = drawable(class_names)
    for axes, image, label in zip(grid.flat, images, batch.labels.tolist()):
        axes.imshow(np.asarray(image.permute(1, 2, 0)), interpolation="nearest")
        axes.set_title(titles[label][:24], fontsize=9)
    save_figure(path, figure, dpi=120)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
