"""A timm Vision Transformer as a LinformerViT, all its weights kept: `linvit.convert_vit`."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
from timm.layers import get_device_dtype
from timm.models import VisionTransformer
from timm.models._input import update_model_args
from torch import Tensor, nn

from linvit.conversion.compatibility import read_layout
from linvit.model import registry
from linvit.model.attention import LinformerAttention
from linvit.model.vit import LinformerViT, ProjectedLength, Share, plain_lengths
from linvit.runs.weights import compact

# What a pretrained configuration says of images and classes, and goes along with the weights.
_KEPT_CFG = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "license", "label_names", "label_descriptions")
# Largest difference of the outputs with ordinary attention, as a share of the largest output.
EXACTNESS = 1e-5


def convert_vit(
    model: nn.Module, *, k: ProjectedLength = 64, projection: str = "separable", share: Share = "kv"
) -> LinformerViT:
    """The same Vision Transformer with Linformer attention: weights, settings, device, dtype and mode are kept.

    E and F start at the averages over the cells of the grid; fitting them to images is what `linvit convert` does. That
    a layout is understood is not taken on trust: with ordinary attention in place of the projections the new model must
    give the old one's outputs on random images.

    Args:
        model: a timm `VisionTransformer`; it is left as it is.
        k: projected length, as in `LinformerViT`: an int, one per layer (None: ordinary attention), or per head.
        projection: kind of E and F; `"identity"` gives the model's own outputs.
        share: who shares E and F.

    Returns a registered model, the nearest in patch and width, with all else as its arguments: `save_for_hf` writes a
    folder from which `timm.create_model("local-dir:…", pretrained=True)` makes it again.

    Raises ValueError, naming layout and reason, for a model that cannot be converted (rotary embedding, windows,
    parallel blocks, …), and where k, projection and share do not go together.
    """
    converted = convert_unchecked(model, k=k, projection=projection, share=share)
    assert isinstance(model, VisionTransformer)
    _check_identity(model, converted)
    return converted


def convert_unchecked(model: nn.Module, *, k: ProjectedLength, projection: str, share: Share) -> LinformerViT:
    """`convert_vit` without the comparison of outputs."""
    layout = read_layout(model)
    assert isinstance(model, VisionTransformer)
    cfg = getattr(model, "pretrained_cfg", {})
    # What is drawn at random here is overwritten, but for a random projection.
    with torch.random.fork_rng():
        converted: LinformerViT = timm.create_model(
            nearest_name(layout),
            pretrained_cfg_overlay={key: cfg[key] for key in _KEPT_CFG if key in cfg},
            # Written to config.json, which has no NumPy numbers.
            k=plain_lengths(k),
            projection=projection,
            share=share,
            # The noise that tells rows apart in training would undo weights that are trained already.
            projection_init="average",
            **layout,
            **get_device_dtype(model),
        )
    _copy_weights(model, converted)
    converted.train(model.training)
    converted.set_grad_checkpointing(model.grad_checkpointing)
    return converted


def use_ordinary_attention(model: LinformerViT, layers: Sequence[int]) -> None:
    """Take the projections out of these layers, for good: `k`, by which the model is built again, says None there."""
    for layer in layers:
        model.blocks[layer].attn.set_projections(None)
    update_model_args(model, k=projected_lengths(model))


def projected_lengths(model: LinformerViT) -> list[int | list[int] | None]:
    """`k` of each layer as `LinformerViT` takes it; None where attention is ordinary."""
    lengths: list[int | list[int] | None] = []
    for attention in attentions(model):
        pair = attention.projections()
        own = None if pair is None else pair[0].lengths
        lengths.append(own if own is None or len(set(own)) > 1 else own[0])
    return lengths


def attentions(model: LinformerViT) -> list[LinformerAttention]:
    """The attention of each layer."""
    return [block.attn for block in model.blocks]


def nearest_name(layout: dict[str, Any]) -> str:
    """The registered model whose patch, then width, then image is nearest by ratio."""

    def side(size: int | list[int]) -> float:
        return float(size) if isinstance(size, int) else math.sqrt(size[0] * size[1])

    def distance(name: str) -> list[float]:
        _, variant, sizes = name.split("_", 2)
        patch, image = (int(part) for part in sizes.removeprefix("patch").split("_"))
        width = getattr(registry, variant.upper())["embed_dim"]
        pairs = ((patch, side(layout["patch_size"])), (width, layout["embed_dim"]), (image, side(layout["img_size"])))
        return [abs(math.log(own / wanted)) for own, wanted in pairs]

    return min((name.partition(".")[0] for name in registry.default_cfgs), key=distance)


def without_counterpart(model: VisionTransformer, converted: LinformerViT) -> set[str]:
    """Weights and buffers, but for E and F, that only one of the two has, or in another shape."""
    own, theirs = converted.state_dict(), model.state_dict()
    extra = {name for name in own if name not in theirs}
    foreign = {name for name in extra if "key_projection." not in name and "value_projection." not in name}
    missing = {name for name, value in theirs.items() if name not in own or own[name].shape != value.shape}
    return foreign | missing


def _copy_weights(model: VisionTransformer, converted: LinformerViT) -> None:
    """All weights and buffers, and which of them are trained; ValueError where any but E and F would be left over."""
    if differing := without_counterpart(model, converted):
        raise ValueError(f"this VisionTransformer cannot be converted: its {compact(differing)} have no counterpart")
    converted.load_state_dict({**converted.state_dict(), **model.state_dict()})
    is_trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in converted.named_parameters():
        parameter.requires_grad_(is_trained.get(name, True))


@torch.no_grad()
def _check_identity(model: VisionTransformer, converted: LinformerViT) -> None:
    """Raise ValueError unless both give the same outputs when all attention is ordinary."""
    weight = model.patch_embed.proj.weight
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size, generator=generator).to(weight)
    with _evaluating(model), _evaluating(converted), _ordinary_attention(converted):
        expected, found = _outputs(model, images), _outputs(converted, images)
    bound = max(EXACTNESS, 4 * torch.finfo(weight.dtype).eps)
    for name, output in expected.items():
        difference = (found[name] - output).abs().max() / output.abs().max().clamp(min=1e-30)
        if not difference <= bound:
            raise ValueError(
                f"this VisionTransformer cannot be converted: its {name} differ by {difference:.1e} of the largest, "
                "even with ordinary attention, so it has a setting or a layer that is not known here"
            )


def _outputs(model: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
    features = model.forward_features(images)
    return {"features": features.float(), "outputs": model.forward_head(features).float()}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _ordinary_attention(model: LinformerViT) -> Iterator[None]:
    kept = [(attention, attention.key_projection, attention.value_projection) for attention in attentions(model)]
    for attention, _, _ in kept:
        attention.set_projections(None)
    try:
        yield
    finally:
        for attention, key, value in kept:
            attention.set_projections(key, value)
