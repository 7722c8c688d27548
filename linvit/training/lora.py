"""Low-rank adapters (LoRA, Hu et al. 2021) by PEFT: y = W x + B A x, where W stays as it is and A and B are trained.

B starts at zero, so the model starts as it was given. Besides the adapters, the classifier and the parameters that a
converted model does not have from pretraining (E, F, `local`) are trained. A run's checkpoints keep A and B apart;
`linvit.runs.lora` merges them into W for `best/` and `last/`, so nothing but training needs PEFT.
"""

import copy
import importlib.util
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from timm.models import get_model_input_config
from torch import nn

from linvit.model.build import TimmModel
from linvit.model.local import LocalConv
from linvit.model.projections import MatrixProjection, Projection
from linvit.runs.weights import classifier_parameters, compact
from linvit.settings.fields import one_of, unknown
from linvit.training.lora_options import DEFAULT_TARGETS, LoraOptions


def check_adapters(model: TimmModel, options: LoraOptions) -> None:
    """Raise ValueError if PEFT is missing or the model cannot have the adapters; nothing is imported or changed."""
    if options.lora is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise ValueError("--lora needs the package peft: pip install 'linvit[lora]', or remove the flag")
    layers = adapted_layers(model, options.lora_targets)
    for name, module in model.named_modules():
        layer = name.partition(".key_projection")[0]
        is_read = isinstance(module, Projection) and not isinstance(module, MatrixProjection)
        if is_read and f"{layer}.qkv" in layers:
            assert isinstance(module, Projection)
            raise ValueError(
                f"--lora-targets: projection {module.kind!r} reduces tokens before Wk and Wv, so qkv cannot have "
                "adapters: set --lora-targets proj fc1 fc2, or use another kind of projection"
            )


def add_adapters(model: TimmModel, options: LoraOptions) -> list[str]:
    """Freeze the model but for its new parameters, and give its linear layers adapters, in place.

    `freeze` may then freeze some of the rest.

    Returns notes for the log. Raises ValueError as `check_adapters` does.
    """
    if options.lora is None:
        return []
    check_adapters(model, options)
    import peft

    layers = adapted_layers(model, options.lora_targets)
    new = set(classifier_parameters(model))
    kept = [parameter for name, parameter in model.named_parameters(remove_duplicate=False) if name in new]
    kept += [
        parameter
        for module in model.modules()
        if isinstance(module, Projection | LocalConv)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    model.requires_grad_(False)
    # `linvit.runs.lora` merges with a scale of 1: alpha equals the rank.
    config = peft.LoraConfig(r=options.lora, lora_alpha=options.lora, target_modules=layers, lora_dropout=0.0)
    with warnings.catch_warnings():
        # PEFT knows language models, and warns about others.
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, model)
    for parameter in kept:
        parameter.requires_grad_(True)
    _check_calls(model, layers)
    return [f"--lora {options.lora}: adapters beside {compact(layers)}"]


def adapted_layers(model: TimmModel, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers outside the classifier that the targets name.

    Raises ValueError for a target that names none; of the default targets, one that names some is enough.
    """
    classifier = {name.rpartition(".")[0] for name in classifier_parameters(model)}
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear and name not in classifier]
    if not linear:
        raise ValueError(f"--lora: {_architecture(model)} has no linear layers besides its classifier")
    found = {target: [name for name in linear if _matches(name, target)] for target in targets}
    last_parts = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    missing = [target for target, names in found.items() if not names]
    if len(missing) == len(targets) or (missing and tuple(targets) != DEFAULT_TARGETS):
        raise ValueError(
            f"--lora-targets: {unknown('linear layer', missing[0], last_parts)}; choose {one_of(last_parts)}"
        )
    chosen = {name for names in found.values() for name in names}
    return [name for name in linear if name in chosen]


def _check_calls(model: TimmModel, layers: Sequence[str]) -> None:
    """Raise ValueError for layers whose weight the model reads itself: their adapters would have no effect."""
    # On the meta device a forward pass costs nothing.
    shadow = copy.deepcopy(model).to("meta").eval()
    called: set[str] = set()
    for name in layers:
        shadow.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
    try:
        shadow(torch.empty(1, *get_model_input_config(model)["input_size"], device="meta"))
    except RuntimeError:
        # A few models cannot run without computing.
        return
    uncalled = [name for name in layers if name not in called]
    if uncalled:
        others = {name.rpartition(".")[2] for name in layers} - {name.rpartition(".")[2] for name in uncalled}
        raise ValueError(
            f"--lora-targets: {_architecture(model)} reads the weights of {compact(uncalled)} without calling these "
            f"layers, so adapters would have no effect: set --lora-targets {' '.join(sorted(others))}"
        )


def _architecture(model: TimmModel) -> str:
    return str(model.pretrained_cfg["architecture"])


def _matches(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")
