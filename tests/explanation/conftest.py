"""A classifier of images by the colour of a square, which lies anywhere."""

from pathlib import Path

import pytest
import torch
from coloured import CLASSES, COLOURS, coloured_square
from PIL import Image

import linvit  # noqa: F401  registers the models
from linvit.data.augment.build import resolve_input
from linvit.data.options import InputOptions
from linvit.model.build import create_model
from linvit.runs.folder import save_classifier


@pytest.fixture(scope="package")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json and weights made by hand: the first dimensions of a token are its colours."""
    torch.manual_seed(0)
    model = create_model(
        "linvit_mini_patch4_64", num_classes=4, img_size=(32, 32), depth=2, k=16, class_token=False, global_pool="avg"
    )
    with torch.no_grad():
        for parameter in (
            model.pos_embed,
            model.patch_embed.proj.weight,
            model.patch_embed.proj.bias,
            model.head.weight,
        ):
            parameter.zero_()
        for block in model.blocks:
            # Attention keeps its random weights, but adds only a little to a token.
            block.attn.proj.weight.mul_(0.1)
            block.mlp.fc2.weight.zero_()
        for label in range(len(COLOURS)):
            # A colour is a channel less the mean of all three.
            model.patch_embed.proj.weight[label] -= 1 / 48
            model.patch_embed.proj.weight[label, 2 - label] += 1 / 16
            model.head.weight[label, label] = 60
        # Constants, so that the norm before the classifier does not enlarge the noise.
        model.patch_embed.proj.bias[3:5] = torch.tensor([3.0, -3.0])
        model.head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 4.0]))
    folder = tmp_path_factory.mktemp("explained") / "model"
    options = InputOptions(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0)
    save_classifier(
        folder, model.eval(), class_names=CLASSES, spec=resolve_input(model, options), about={"version": "test"}
    )
    return folder


@pytest.fixture(scope="package")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of each class, in folders."""
    folder = tmp_path_factory.mktemp("colours")
    for label, name in enumerate(COLOURS):
        (folder / name).mkdir()
        Image.fromarray(coloured_square(label, seed=5000 + label)[0]).save(folder / name / "a.png")
    return folder
