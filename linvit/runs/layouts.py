"""Names of parameters in other layouts than timm's, renamed to timm's.

| layout                          | recognised by                                                            |
|---------------------------------|--------------------------------------------------------------------------|
| a model within another module   | `model.`, `backbone.`, `teacher.` … before every name of the model       |
| Hugging Face ViT, DeiT, DINOv2  | `embeddings.patch_embeddings.projection.weight`                          |
| torchvision `vit_b_16` …        | `conv_proj.weight` and `class_token`                                     |
| DINOv2                          | `mask_token`, `register_tokens`, `mlp.w12`, blocks in chunks             |
| MAE                             | `decoder_pred.weight`                                                    |

Renaming is exact: outputs stay the same. What is not part of the encoder (decoders, projection heads, mask tokens) is
left out.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

# Modules that hold a model, as Lightning, DINO, MoCo and others call them.
_WRAPPERS = {
    *("module", "_orig_mod", "model", "net", "network", "backbone", "encoder", "vit", "deit", "dinov2"),
    *("dinov2_with_registers", "teacher", "student", "ema", "ema_model", "model_ema", "base_encoder"),
    *("momentum_encoder", "online_encoder", "target_encoder", "feature_extractor", "base_model"),
}
_AVERAGED = {"ema", "ema_model", "model_ema"}
# The first layer of a Vision Transformer in each layout.
_PATCH_EMBEDDING = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight", "conv_proj.weight")
# Linear classifiers beside the model, in the module that holds it, and their names in timm.
_CLASSIFIERS = {
    **dict.fromkeys(("head", "fc", "classifier", "cls_classifier"), "head"),
    "distillation_classifier": "head_dist",
}

Rules = Sequence[tuple[str, str]]

_HUGGING_FACE: Rules = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_in\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_out\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.layer\.(\d+)\.(norm[12]|mlp\.fc[12])\.(\w+)", r"blocks.\1.\2.\3"),
    (r"layernorm\.(\w+)", r"norm.\1"),
    # The pooler of a model without classifier.
    (r"pooler\.dense\.\w+", ""),
)
_TORCHVISION: Rules = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.ln\.(\w+)", r"norm.\1"),
    (r"heads\.head\.(\w+)", r"head.\1"),
)
_DINOV2: Rules = (
    (r"mask_token", ""),
    # Blocks in chunks, as for FSDP.
    (r"blocks\.\d+\.(\d+\..+)", r"blocks.\1"),
)
_SWIGLU: Rules = ((r"(blocks\.\d+\.mlp\.)w12\.(\w+)", r"\1fc1.\2"), (r"(blocks\.\d+\.mlp\.)w3\.(\w+)", r"\1fc2.\2"))
_MAE: Rules = ((r"decoder_.+", ""), (r"mask_token", ""))


def to_timm(state_dict: Mapping[str, Tensor], *, path: Path, use_ema: bool = False) -> dict[str, Tensor]:
    """The same weights under timm's names; those of an unknown layout keep their names.

    Of a model and its moving average in one module, `use_ema` selects the average; of a student and a teacher, the
    teacher is taken.

    Raises ValueError, naming `path` and the choices, if it holds several models.
    """
    weights = _without_wrapper(state_dict, path, use_ema=use_ema)
    if _PATCH_EMBEDDING[1] in weights:
        weights = _join_queries_keys_values(_rename(weights, _HUGGING_FACE))
    elif _PATCH_EMBEDDING[2] in weights and "class_token" in weights:
        weights = _rename(weights, _TORCHVISION)
    if "decoder_pred.weight" in weights:
        weights = _rename(weights, _MAE)
    if "mask_token" in weights or "register_tokens" in weights:
        weights = _place_registers(_rename(_rename(weights, _DINOV2), _SWIGLU))
    return weights


def wrap_like(names: Collection[str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under timm's names, in the wrapper that a few models of timm have themselves, such as qwen3_vit.

    `names` are those of the model's parameters. Weights in the wrapper keep their names.
    """
    wrapper = _common_wrapper(names)
    return {name if name.startswith(wrapper) else wrapper + name: tensor for name, tensor in weights.items()}


def _rename(weights: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Weights renamed by the first rule that matches the whole name; an empty new name leaves them out."""
    renamed = {}
    for name, tensor in weights.items():
        matches = ((re.fullmatch(pattern, name), new) for pattern, new in rules)
        name = next((match.expand(new) for match, new in matches if match), name)
        if name:
            renamed[name] = tensor
    return renamed


def _without_wrapper(state_dict: Mapping[str, Tensor], path: Path, *, use_ema: bool) -> dict[str, Tensor]:
    """The weights of the model inside other modules, and of a linear classifier beside it."""
    prefixes = {name.removesuffix(last) for name in state_dict for last in _PATCH_EMBEDDING if _ends_with(name, last)}
    prefixes = {prefix for prefix in prefixes if _WRAPPERS.issuperset(prefix.split(".")[:-1])}
    if not prefixes:
        prefixes = {_common_wrapper(state_dict)}
    if len(prefixes) > 1:
        averaged = {prefix for prefix in prefixes if not _AVERAGED.isdisjoint(prefix.split("."))}
        prefixes = (averaged if use_ema and averaged else prefixes - averaged) or prefixes
        # In self-distillation the teacher is the model to use.
        prefixes = {prefix for prefix in prefixes if not prefix or "teacher" in prefix.split(".")} or prefixes
    if len(prefixes) > 1:
        raise ValueError(
            f"{path} holds several models ({', '.join(sorted(prefixes))}): save the weights of one of them alone"
        )
    (prefix,) = prefixes
    inner = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    if not prefix:
        return inner
    outer = prefix.rpartition(".")[0].rpartition(".")[0]
    beside = {name.removeprefix(f"{outer}." if outer else ""): tensor for name, tensor in state_dict.items()}
    widths = {inner[last].shape[0] for last in _PATCH_EMBEDDING if last in inner}
    for name, own in _CLASSIFIERS.items():
        weight, bias = beside.get(f"{name}.weight"), beside.get(f"{name}.bias")
        if weight is not None and bias is not None and weight.ndim == 2 and weight.shape[1] in widths:
            inner = {f"{own}.weight": weight, f"{own}.bias": bias} | inner
    return inner


def _common_wrapper(names: Collection[str]) -> str:
    """The wrappers that all names begin with, such as "model."."""
    prefix = ""
    while True:
        first, *others = {name.removeprefix(prefix).partition(".")[0] for name in names}
        longer = f"{prefix}{first}."
        if others or first not in _WRAPPERS or not all(name.startswith(longer) for name in names):
            return prefix
        prefix = longer


def _ends_with(name: str, last: str) -> bool:
    return name == last or name.endswith(f".{last}")


def _join_queries_keys_values(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with `attn.query`, `attn.key` and `attn.value` joined to timm's `attn.qkv`."""
    joined = dict(weights)
    for name in weights:
        if ".attn.query." in name:
            parts = [name.replace(".attn.query.", f".attn.{part}.") for part in ("query", "key", "value")]
            if all(part in joined for part in parts):
                joined[name.replace(".attn.query.", ".attn.qkv.")] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _place_registers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of DINOv2 with registers as timm has them: no prefix token has a position of its own."""
    if not {"register_tokens", "cls_token", "pos_embed"} <= weights.keys():
        return weights
    positions = weights["pos_embed"]
    placed = {"cls_token": weights["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    registers = {"reg_token": weights["register_tokens"]}
    return {name: tensor for name, tensor in weights.items() if name != "register_tokens"} | placed | registers
