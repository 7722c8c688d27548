"""YAML and JSON that are nested too deeply, or stand for too much, are refused in one sentence."""

from pathlib import Path

import pytest
import yaml

from linvit import cli
from linvit.output.files import parse_json
from linvit.runs.checkpoint import MANIFEST, verify_checkpoint
from linvit.runs.weights import read_weights
from linvit.settings.yaml import parse_yaml, read_settings
from linvit.training.loss import read_class_weights

LAUGHS = "a: &a [1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize("text", ["[" * 500, "- " * 10**4, "a: " * 10**4, "? " * 10**4])
def test_deep_yaml_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"deep\.yaml:.* not valid YAML"):
        read_settings(tmp_path / "deep.yaml")


@pytest.mark.parametrize("text", [LAUGHS, "a: &a [*a]", "a: &a {b: *a}"])
def test_aliases_that_stand_for_too_much_are_an_error(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="stands for more than 100,000 values, or contains itself"):
        parse_yaml(text)


def test_aliases_are_allowed() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


def test_deep_json_is_an_error(tmp_path: Path) -> None:
    deep = "[" * 10**5
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(deep)
    (tmp_path / "config.json").write_text(deep)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON \(is nested too deeply\)"):
        read_weights(tmp_path)
    (tmp_path / "weights.json").write_text("[" * 500)
    with pytest.raises(ValueError, match=r"weights\.json: is not valid YAML or JSON"):
        read_class_weights(str(tmp_path / "weights.json"), class_names=["a"], labels=[0])
    (tmp_path / MANIFEST).write_text(deep)
    with pytest.raises(ValueError, match=f"{MANIFEST} is damaged"):
        verify_checkpoint(tmp_path)


def test_a_deep_file_on_the_command_line_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep.yaml").write_text("- " * 10**4)
    assert cli.main(["train", str(tmp_path), "--config", str(tmp_path / "deep.yaml")]) == 2
    assert "deep.yaml: not valid YAML: it is nested too deeply" in capsys.readouterr().err
