"""configs/*.yaml: each can be trained, and its header says what it is and whether it was run."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml

import linvit.model.registry  # noqa: F401
from linvit.training.config import TrainConfig, parse

REPOSITORY = Path(__file__).parent.parent
RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))
STUDIES = sorted((REPOSITORY / "benchmarks" / "studies").glob("*.yaml"))
HEADINGS = ["What", "Adapts", "Differs", "Command", "Effective batch", "Hardware", "Hours", "Top-1"]


def read_header(recipe):
    """The entries of the comment that a recipe opens with; a line that is indented goes on with the one before."""
    header, heading = {}, ""
    for line in recipe.read_text().split("\n\n")[0].splitlines():
        if line.startswith("#   "):
            header[heading] += " " + line.removeprefix("#   ")
        else:
            heading, text = line.removeprefix("# ").split(": ", 1)
            header[heading] = text
    return header


def test_the_recipes_are_there():
    names = {recipe.stem for recipe in RECIPES}
    assert names >= {"demo_elpv", "cifar10_mini_patch4_64", "imagenette_tiny_patch16_224"}
    for size, pixels in [("tiny", 224), ("small", 224), ("base", 224), ("small", 384), ("base", 384)]:
        assert any(name.startswith(f"imagenet_{size}_patch16_{pixels}_") for name in names)
    for pixels in (512, 1024):
        assert any(name.startswith(f"imagenet_small_patch16_{pixels}_") for name in names)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_header_says_what_the_recipe_is(recipe):
    header = read_header(recipe)
    config = TrainConfig.load(recipe)
    assert list(header) == HEADINGS
    assert config.experiment == recipe.stem
    assert re.fullmatch(r"not run|[\d.]+ h?.*", header["Hours"])
    assert re.fullmatch(r"not run|[\d.]+ %.*", header["Top-1"])
    assert re.search(r"arXiv \d{4}\.\d{5}|doi:10\.", header["Adapts"])

    command = header["Command"]
    gpus = int(match[1]) if (match := re.search(r"torchrun --nproc-per-node (\d+) ", command)) else 1
    train = shlex.split(command.split("train_imagenet.py ")[1])
    assert Path(train[train.index("--config") + 1]) == recipe.relative_to(REPOSITORY)
    train[train.index("--config") + 1] = str(recipe)
    assert parse(train) == config.model_copy(update={"data_dir": Path("DATA")})

    total, batch, accumulated, processes = map(int, re.findall(r"\d+", header["Effective batch"])[:4])
    assert header["Effective batch"].startswith(f"{total} = {batch} x {accumulated} x {processes}")
    assert (batch, accumulated, processes) == (config.batch_size, config.grad_accum_steps, gpus)
    assert total == batch * accumulated * processes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_model_can_be_built(recipe):
    config = TrainConfig.load(recipe)
    with torch.device("meta"):
        model = timm.create_model(config.model, num_classes=10, **config.model_arguments())
    claimed = re.search(r"([\d,]+) patches(?:, k=(\d+))?", read_header(recipe)["What"])
    assert claimed is None or model.patch_embed.num_patches == int(claimed[1].replace(",", ""))
    if claimed and claimed[2]:
        assert model.blocks[0].attn.projections()[0].k == int(claimed[2])


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.stem)
def test_the_arms_of_a_study_are_settings_of_training(study):
    found = yaml.safe_load(study.read_text())
    assert found["arms"]
    for settings in found["arms"].values():
        TrainConfig(data_dir="data", **found["recipe"] | settings)
