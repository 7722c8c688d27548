"""A folder in which the commands of the docs run in seconds: tiny models, images and runs, named as in the docs."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
import yaml
from doc_blocks import ROOT
from safetensors.torch import save_file
from timm.models import VisionTransformer, generate_default_cfgs, register_model
from timm.models.vision_transformer import _create_vision_transformer
from tiny_runs import make_images

from linvit import cli
from linvit.model.eva import LinformerEva
from linvit.model.registry import create, create_rotary
from linvit.model.sharing import checkpoint_filter_fn
from linvit.model.vit import LinformerViT
from linvit.settings.flags import flag_of

# As deep as a ViT-S, so that layers have the numbers of the docs; 64 patches.
SHAPE = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 12, "num_heads": 6}

# What a command runs with instead of what it says.
MODELS = (
    (r"linvit_\w+_rope_\d+", "linvit_docs_rope"),
    (r"linvit_\w+_patch\d+_\d+", "linvit_docs"),
    (r"\b(vit|deit|deit3)_\w+_patch\d+_\w+(\.\w+)?", "vit_docs"),
)
SIZES = ("--img-size", "--target-size", "--train-img-sizes", "--tile", "--overlap", "--cache-size")
VALUES = {
    "--epochs": "1",
    "--warmup-epochs": "0",
    "--cooldown-epochs": "0",
    "--batch-size": "4",
    "-b": "4",
    "--workers": "0",
    "-j": "0",
    "--k": "4",
    "--num-images": "16",
    "--num-steps": "12",
    "--rounds": "1",
    "--distill-steps": "1",
    "--bootstrap": "20",
    "--calibration-images": "4",
}
REMOVED = ("--torchcompile", "--fsdp", "--compile", "--memory")
# Options that a command gets if it does not have them.
ADDED = {
    "train": {"--epochs": "1", "--warmup-epochs": "0", "--batch-size": "4", "--workers": "0", "--no-report": None},
    "lr-find": {"--num-steps": "12", "--batch-size": "4", "--workers": "0", "--warmup-epochs": "0"},
    "probe": {"--workers": "0"},
    "eval": {"--workers": "0"},
    "predict": {"--workers": "0"},
    "export": {"--workers": "0"},
    "bench": {"--rounds": "1", "--baseline": "vit_docs"},
}
ALIASES = {"--batch-size": "-b", "--workers": "-j"}

# The classes of the models and the filter of their checkpoints, which are looked up in the module that registers them.
CLASSES, FILTER = (LinformerViT, LinformerEva, VisionTransformer), checkpoint_filter_fn
_INPUT = {"input_size": (3, 64, 64), "fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
default_cfgs = generate_default_cfgs({name: _INPUT for name in ("linvit_docs", "linvit_docs_rope", "vit_docs")})


@register_model
def linvit_docs(pretrained: bool = False, **keywords: Any) -> torch.nn.Module:
    return create("linvit_docs", pretrained, **{**SHAPE, "k": 4, **keywords})


@register_model
def linvit_docs_rope(pretrained: bool = False, **keywords: Any) -> torch.nn.Module:
    return create_rotary("linvit_docs_rope", pretrained, **{**SHAPE, "k": 4, **keywords})


@register_model
def vit_docs(pretrained: bool = False, **keywords: Any) -> torch.nn.Module:
    return _create_vision_transformer("vit_docs", pretrained, **{**SHAPE, **keywords})


def shrink(arguments: Sequence[str]) -> list[str]:
    """The arguments of `linvit` with tiny models, sizes and numbers of steps."""
    command, *words = arguments
    found, flag = [command], ""
    for word in words:
        if re.match(r"--?[a-z]", word):
            flag = word
            if word not in REMOVED:
                found.append(word)
        elif flag not in REMOVED:
            found.append(_shrunk(flag, word))
    for added, value in ADDED.get(command, {}).items():
        if "--help" not in words and not {added, ALIASES.get(added), "--no-" + added[2:]} & set(words):
            found += [added] if value is None else [added, value]
    return found


def _shrunk(flag: str, word: str) -> str:
    if flag in SIZES:
        return "x".join(_shrunk_size(part) for part in word.split("x"))
    if flag in VALUES and re.fullmatch(r"\d+", word):
        return VALUES[flag]
    word = re.sub(r"\bk=\d+", "k=4", word)
    for name, tiny in MODELS:
        word = re.sub(name, tiny, word)
    return word


def _shrunk_size(text: str) -> str:
    """An eighth of a size, in whole patches."""
    return str(min(max(int(text) // 64 * 8, 16), 128)) if text.isdecimal() else text


def shrink_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """`shrink` for the options of a YAML file."""
    found = {}
    for name, value in settings.items():
        if flag_of(name) not in REMOVED:
            values = value if isinstance(value, list) else [value]
            shrunk = [_shrunk_value(flag_of(name), each) for each in values]
            found[name] = shrunk if isinstance(value, list) else shrunk[0]
    return found


def _shrunk_value(flag: str, value: Any) -> Any:
    return yaml.safe_load(_shrunk(flag, str(value))) if type(value) in (int, str) else value


def build(folder: Path) -> Path:
    """Fill a folder with everything that the docs name."""
    make_images(folder / "data", train=6, val=3)
    for path in sorted((folder / "data" / "val").glob("*/*.png")):
        copy = folder / "data" / "test" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        # Upside down and negative, it is not a copy for `linvit check`.
        assert cv2.imwrite(str(copy), 255 - cv2.imread(str(path))[::-1])
    images = np.random.default_rng(1).integers(0, 255, (12, 96, 120, 3), dtype=np.uint8)
    places = ["photo.jpg", *(f"scans/{n}.{end}" for n, end in enumerate(("png", "png", "jpg", "tif")))]
    places += [f"images/{number}.jpg" for number in range(8)]
    for place, image in zip(places, [*images, *images[:1]]):
        (folder / place).parent.mkdir(exist_ok=True)
        assert cv2.imwrite(str(folder / place), image)
    for split in ("train", "val"):
        paths = sorted((folder / "data" / split).glob("*/*.png"))
        rows = [f"{path.relative_to(folder / 'data')},{path.parent.name}" for path in paths]
        (folder / "data" / f"{split}.csv").write_text("\n".join(["path,label", *rows, ""]))
    (folder / "configs").mkdir()
    for path in ROOT.glob("configs/*.yaml"):
        settings = shrink_settings(yaml.safe_load(path.read_text()))
        (folder / "configs" / path.name).write_text(yaml.safe_dump(settings))
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    torch.manual_seed(0)
    save_file(timm.create_model("vit_docs").state_dict(), folder / "dinov2.safetensors")
    for name, seed in (("RUN", "0"), ("RUN2", "1")):
        arguments = ["train", str(folder / "data"), "--model", "linvit_docs", "--experiment", name, "--seed", seed]
        assert cli.main(shrink([*arguments, "--output", str(folder / "output")])) == 0
    return folder
