"""Results record the command, commit and machine that produced them."""

import sys

import pytest
import torch

from linvit.measure import provenance as measured
from linvit.measure.provenance import provenance, script_command


def test_results_record_their_origin():
    found = provenance("linvit bench", seed=3, n=[1, 2])
    assert list(found) == ["command", "commit", "versions", "hardware", "threads", "seed", "n"]
    assert (found["command"], found["seed"], found["n"]) == ("linvit bench", 3, [1, 2])
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]


def test_an_installed_package_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    assert provenance("x", seed=0, n=1)["commit"] == "unknown"


@pytest.mark.parametrize("path", ["benchmarks/x.py", "./x.py", "/clone/benchmarks/x.py"])
def test_a_script_is_named_by_its_folder(path, monkeypatch, tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    monkeypatch.chdir(folder if path.startswith("./") else tmp_path)
    monkeypatch.setattr(sys, "argv", [path, "--rounds", "7", "--json", str(tmp_path / "out.json"), "data/x"])
    assert script_command() == "python benchmarks/x.py --rounds 7 --json out.json data/x"
