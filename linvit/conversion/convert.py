"""Convert a timm Vision Transformer to Linformer attention with the same weights: `linvit.convert_vit`."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
from timm.layers import get_device_dtype
from timm.models._input import update_model_args
from timm.models.eva import Eva
from torch import Tensor, nn

from linvit.conversion.blocks import Vit
from linvit.conversion.compatibility import vit_keywords
from linvit.conversion.rotary import rotary_keywords
from linvit.model import registry
from linvit.model.projected import ProjectedAttention
from linvit.model.sharing import ProjectedLength, Share, plain_lengths
from linvit.model.transformer import LinformerTransformer
from linvit.runs.weights import compact

# Entries of timm's pretrained_cfg on preprocessing, licence and classes, which stay true of the converted weights.
_KEPT_CFG = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "license", "label_names", "label_descriptions")
# Largest allowed difference between the outputs with ordinary attention, relative to the largest output.
TOLERANCE = 1e-5


def convert_vit(
    model: nn.Module,
    *,
    k: ProjectedLength = 64,
    projection: str = "separable",
    share: Share = "kv",
    local: int | None = None,
) -> LinformerTransformer:
    """Convert a Vision Transformer to Linformer attention; weights, settings, device, dtype and mode stay the same.

    E and F start as averages over cells of the grid; `linvit convert` also fits them to images. Every conversion is
    checked: with ordinary attention in place of the projections, the new model must give the old model's outputs on
    random images.

    Args:
        model: a timm `VisionTransformer`, or an `Eva` (DINOv3, EVA-02, Perception Encoder); it is not changed.
        k: projected length, as in `LinformerViT`: an int, one per layer (None: ordinary attention), or one per head.
        projection: kind of E and F; `"identity"` gives the model's own outputs.
        share: which heads and layers share E and F.
        local: side of the kernel of a convolution beside attention, which starts at zero; None adds none.

    Returns the registered model that is nearest in patch size and width, with all other settings as its arguments:
    `save_for_hf` writes a folder that `timm.create_model("local-dir:…", pretrained=True)` loads.

    Raises ValueError, naming the class and the reason, for a model that cannot be converted (windows, relative
    positions, parallel blocks, …), and if k, projection and share do not fit together.
    """
    converted = convert_unchecked(model, k=k, projection=projection, share=share, local=local)
    _check_identity(model, converted)
    return converted


def linformer_keywords(model: nn.Module) -> dict[str, Any]:
    """Keywords with which `LinformerViT`, or `LinformerEva` for an `Eva`, builds the same model with other attention.

    Raises ValueError, naming the class and the reason, for a model that cannot be converted.
    """
    return rotary_keywords(model) if type(model) is Eva else vit_keywords(model)


def convert_unchecked(
    model: nn.Module, *, k: ProjectedLength, projection: str, share: Share, local: int | None = None
) -> LinformerTransformer:
    """Do the work of `convert_vit`, but without comparing outputs; raises ValueError likewise."""
    keywords = linformer_keywords(model)
    cfg = getattr(model, "pretrained_cfg", {})
    # These random weights are overwritten, except for a random projection.
    with torch.random.fork_rng():
        converted: LinformerTransformer = timm.create_model(
            nearest_name(keywords),
            pretrained_cfg_overlay={key: cfg[key] for key in _KEPT_CFG if key in cfg},
            # config.json holds plain numbers, not NumPy's.
            k=plain_lengths(k),
            projection=projection,
            share=share,
            local=local,
            # The noise that distinguishes rows in training from scratch would harm pretrained weights.
            projection_init="average",
            **keywords,
            **get_device_dtype(model),
        )
    _copy_weights(model, converted)
    converted.train(model.training)
    converted.set_grad_checkpointing(model.grad_checkpointing)
    return converted


def use_ordinary_attention(model: LinformerTransformer, layers: Sequence[int]) -> None:
    """Remove the projections of these layers, also from the `k` with which the model is saved and built again."""
    for layer in layers:
        model.blocks[layer].attn.set_projections(None)
    update_model_args(model, k=projected_lengths(model))


def restore_attention(original: Vit, converted: LinformerTransformer, layers: Sequence[int]) -> None:
    """Give these layers the original's attention, without a convolution beside it (which stays, with zeros)."""
    use_ordinary_attention(converted, layers)
    for layer in layers:
        attention = converted.blocks[layer].attn
        if attention.local is not None:
            attention.local.reset_parameters()
        attention.load_state_dict({**attention.state_dict(), **original.blocks[layer].attn.state_dict()})


def projected_lengths(model: LinformerTransformer) -> list[int | list[int] | None]:
    """The projected length `k` of each layer, as models take it; None for ordinary attention."""
    lengths: list[int | list[int] | None] = []
    for attention in attentions(model):
        pair = attention.projections()
        by_head = None if pair is None else pair[0].lengths
        lengths.append(by_head if by_head is None or len(set(by_head)) > 1 else by_head[0])
    return lengths


def attentions(model: LinformerTransformer) -> list[ProjectedAttention]:
    """The attention of each layer."""
    return [block.attn for block in model.blocks]


def nearest_name(keywords: dict[str, Any]) -> str:
    """The registered model with the nearest patch size, then width, then image size, compared by ratio."""

    def side(size: int | list[int]) -> float:
        return float(size) if isinstance(size, int) else math.sqrt(size[0] * size[1])

    def distance(name: str) -> list[float]:
        _, variant, *_, image = name.split("_")
        patch = name.partition("_patch")[2].partition("_")[0]
        width = getattr(registry, variant.upper())["embed_dim"]
        pairs = (
            (int(patch), side(keywords["patch_size"])),
            (width, keywords["embed_dim"]),
            (int(image), side(keywords["img_size"])),
        )
        return [abs(math.log(registered / wanted)) for registered, wanted in pairs]

    # Only an `Eva` has this keyword.
    is_rotary = "use_rot_pos_emb" in keywords
    names = {name.partition(".")[0] for name in registry.default_cfgs}
    return min((name for name in sorted(names) if ("_rope_" in name) == is_rotary), key=distance)


def unmatched_weights(model: Vit, converted: LinformerTransformer) -> set[str]:
    """Weights and buffers, except E, F and `local`, that only one of the models has or whose shapes differ."""
    old, new = model.state_dict(), converted.state_dict()
    added = {name for name in new if name not in old}
    own = (".key_projection.", ".value_projection.", ".attn.local.")
    unexpected = {name for name in added if not any(part in name for part in own)}
    missing = {name for name, value in old.items() if name not in new or new[name].shape != value.shape}
    return unexpected | missing


def _copy_weights(model: Vit, converted: LinformerTransformer) -> None:
    """Copy weights, buffers and `requires_grad`; raises ValueError if a weight except E, F, `local` has no match."""
    if unmatched := unmatched_weights(model, converted):
        raise ValueError(f"this Vision Transformer cannot be converted: its {compact(unmatched)} have no counterpart")
    converted.load_state_dict({**converted.state_dict(), **model.state_dict()})
    is_trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in converted.named_parameters():
        parameter.requires_grad_(is_trained.get(name, True))


@torch.no_grad()
def _check_identity(model: Vit, converted: LinformerTransformer) -> None:
    """Raise ValueError unless both models give the same outputs with ordinary attention."""
    weight = model.patch_embed.proj.weight
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size, generator=generator).to(weight)
    with _evaluating(model), _evaluating(converted), _ordinary_attention(converted):
        expected, outputs = _outputs(model, images), _outputs(converted, images)
    bound = max(TOLERANCE, 4 * torch.finfo(weight.dtype).eps)
    for name, output in expected.items():
        difference = (outputs[name] - output).abs().max() / output.abs().max().clamp(min=1e-30)
        if not difference <= bound:
            raise ValueError(
                f"this Vision Transformer cannot be converted: its {name} differ by {difference:.1e} of the largest, "
                "even with ordinary attention, so it has a setting or a layer that linvit does not support"
            )


def _outputs(model: Vit, images: Tensor) -> dict[str, Tensor]:
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
def _ordinary_attention(model: LinformerTransformer) -> Iterator[None]:
    kept = [(attention, attention.key_projection, attention.value_projection) for attention in attentions(model)]
    for attention, _, _ in kept:
        attention.set_projections(None)
    try:
        yield
    finally:
        for attention, key, value in kept:
            attention.set_projections(key, value)
