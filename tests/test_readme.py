"""What the README says is so: its numbers, its commands, its files."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import timm

from linvit import models
from linvit.commandline import UsageError
from linvit.training.config import TrainConfig, parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results():
    tables = load_script("make_tables")
    assert re.findall(r"<!-- begin (\w+) -->", README) == list(tables.TABLES)
    assert tables.fill(README) == README


def test_it_is_short():
    assert len(README.splitlines()) < 150


def test_training_commands_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"train_imagenet\.py (data .*)", README)
    assert len(commands) >= 2
    for command in commands:
        config = parse(shlex.split(command))
        assert isinstance(config, TrainConfig)
        assert timm.is_model(config.model)
    with pytest.raises(UsageError):
        parse(["data", "--no-such-flag"])


def test_files_exist():
    block = README[README.index("## Files") :]
    paths = re.findall(r"^ {4}(\S+)", block, flags=re.MULTILINE)
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_model_names_are_registered():
    for name in set(re.findall(r"linvit_(?:tiny|small|base|large|mini)_patch\d+_\d+", README)):
        assert name in models.default_cfgs
