"""The models, files and sizes in the docs exist and fit: test_commands.py runs tiny ones in their place."""

import re
from pathlib import Path

import pytest
import timm
from doc_blocks import PAGES, ROOT, blocks_of, linvit_arguments, pipelines_of

from linvit.settings.flags import UsageError
from linvit.training.config import parse
from linvit.training.model import check_options

_MODEL = re.compile(r"\b(?:linvit|vit|deit3?)_[a-z]\w*_patch\d+_\w+(?:\.\w+)?")
_FILE = re.compile(r"\b(?:benchmarks|configs|examples|linvit|tests)/[\w./-]+\.(?:json|py|yaml)\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_models_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    models = _MODEL.findall(text)
    tagged = timm.list_pretrained() if any("." in name for name in models) else []
    for name in models:
        assert name in tagged if "." in name else timm.is_model(name), f"{page.name}: {name}"
    for name in _FILE.findall(text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def check_training(words: list[str]) -> None:
    """Raise UsageError unless the model of a training command takes its size, lengths and other options."""
    arguments = linvit_arguments(words) or [""]
    # Runs, recipes and libraries of extras are not there.
    if arguments[0] == "train" and not {"--config", "--pretrained-path", "--lora", "--help"} & set(arguments):
        config = parse(arguments[1:])
        if config.model.startswith("linvit_"):
            check_options(config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_models_take_the_sizes(page: Path) -> None:
    for block in blocks_of(page):
        for pipeline in pipelines_of(block.text) if block.language == "bash" else ():
            for words in pipeline:
                try:
                    check_training(words)
                except UsageError as error:
                    raise AssertionError(f"{page.name}, block at line {block.line}: {error}") from error


@pytest.mark.parametrize("option", ["--img-size 1080 1920", "--k 67", "--k 1024", "--model linvit_smal_patch16_512"])
def test_a_wrong_value_is_noticed(option: str) -> None:
    with pytest.raises(UsageError):
        check_training(f"linvit train data --model linvit_small_patch16_512 {option}".split())
