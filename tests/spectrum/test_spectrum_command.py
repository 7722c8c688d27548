"""`linvit spectrum` from the command line to its files."""

import csv
import json

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tiny_runs import make_images

from linvit import cli
from linvit.data.augment.build import InputSpec
from linvit.data.decode import UnreadableImage
from linvit.data.sources.loose import load_batches, load_images, sample_paths
from linvit.spectrum.command import SpectrumOptions
from linvit.spectrum.result import read_spectra

NAME = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
SPEC = InputSpec((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in data/, next to the weights of a small ViT."""
    folder = tmp_path_factory.mktemp("spectrum")
    make_images(folder / "data")
    save_file(timm.create_model(NAME, img_size=64, **SMALL).state_dict(), folder / "vit.safetensors")
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    """The files of a run at two sizes."""
    files = {flag: folder / f"out.{end}" for flag, end in {"json": "json", "csv": "csv", "plot": "png"}.items()}
    flags = [part for flag, path in files.items() for part in (f"--{flag}", str(path))]
    assert run(folder, "--img-size", "64", "80x64", "--speedup", "1.05", "--min-k", "4", *flags) == 0
    return files


def run(folder, *flags, images=None):
    arguments = [f"{name}={value}" for name, value in SMALL.items()]
    source = [NAME, "--weights", str(folder / "vit.safetensors"), "--model-kwargs", *arguments]
    return cli.main(["spectrum", *source, "--images", str(images or folder / "data"), "--num-images", "2", *flags])


def test_numbers_go_to_the_terminal_and_three_files(folder, measured, capsys):
    found = json.loads(measured["json"].read_text())
    assert found["command"].startswith("linvit spectrum vit_tiny_patch16_224 --weights")
    assert {"commit", "versions", "hardware"} < found.keys()
    assert (found["seed"], found["n"]) == (0, 2)
    spectra = read_spectra(measured["json"])
    assert [(spectrum.img_size, spectrum.num_tokens) for spectrum in spectra] == [((64, 64), 65), ((80, 64), 81)]
    assert found["plan"]["budget"] == {"speedup": 1.05}
    keywords, layers = found["plan"]["model_kwargs"], found["plan"]["layers"]
    assert keywords["img_size"] == [80, 64]
    assert [layer["k"] for layer in layers] == keywords["k"]
    assert found["plan"]["speedup"] >= 1.05
    rows = list(csv.DictReader(measured["csv"].open()))
    assert len(rows) == 2 * 2 * 3
    assert [(row["tokens"], row["layer"], row["head"]) for row in rows][-1] == ("81", "1", "2")
    assert int(rows[4]["rank_90"]) == spectra[0].rank(0.9)[1, 1]
    assert float(rows[4]["share"]) == pytest.approx(spectra[0].cumulative[1, 1, 15], abs=1e-4)
    with Image.open(measured["plot"]) as image:
        assert image.format == "PNG"


def test_a_plan_file_is_keywords_of_the_model(folder, measured, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    argv = ["spectrum", str(measured["json"]), "--speedup", "1.05", "--min-k", "4"]
    assert cli.main([*argv, "--plan", str(plan)]) == 0
    shown = capsys.readouterr().out
    keywords = yaml.safe_load(plan.read_text())
    assert list(keywords) == ["img_size", "k", "projection", "share"]
    model = timm.create_model("linvit_mini_patch4_64", **SMALL, **keywords)
    assert [p and p[0].k for p in (block.attn.projections() for block in model.blocks)] == keywords["k"]
    assert any(k is not None for k in keywords["k"])
    assert f'"k={keywords["k"]}"' in shown
    assert "times fewer operations" in shown
    assert max(map(len, shown.splitlines()[:-2])) <= 100

    as_json = tmp_path / "plan.json"
    assert cli.main([*argv, "--plan", str(as_json)]) == 0
    assert json.loads(as_json.read_text()) == keywords


def test_a_run_takes_a_plan_as_its_config(measured, tmp_path, capsys):
    from linvit.training.config import parse

    plan = tmp_path / "plan.yaml"
    assert cli.main(["spectrum", str(measured["json"]), "--energy", "0.5", "--plan", str(plan)]) == 0
    config = parse(["data", "--config", str(plan)], prog="linvit train")
    assert list(config.k) == yaml.safe_load(plan.read_text())["k"]
    assert (config.projection, config.share, config.img_size) == ("separable", "kv", (80, 64))


def test_a_results_file_is_shown_without_measuring(measured, monkeypatch, capsys):
    monkeypatch.setattr("linvit.spectrum.measure.attention_spectrum", lambda *_, **__: pytest.fail("measured"))
    assert cli.main(["spectrum", str(measured["json"]), "--index", "10"]) == 0
    shown = capsys.readouterr().out
    assert "65 tokens" in shown
    assert "share of first 10" in " ".join(shown.split())
    assert "tokens^" in shown


def test_randomized_prints_the_missing_energy(folder, capsys):
    assert run(folder, "--img-size", "64", "--method", "randomized", "--rank", "8") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "found 8 singular values; these and their shares are lower bounds; missing energy:" in shown


def test_the_same_seed_draws_the_same_images(folder):
    draws = [sample_paths(folder / "data", count=5, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 5
    assert len(sample_paths(folder / "data", count=1000, seed=0)) == 33


def test_batches_read_ahead_are_those_of_the_paths_in_order(folder):
    paths = sample_paths(folder / "data", count=33, seed=0)
    batches = list(load_batches(paths, SPEC, batch_size=2))
    assert [len(batch) for batch in batches] == [2] * 16 + [1]
    assert torch.equal(torch.cat(batches), load_images(paths, SPEC))


def test_an_image_that_cannot_be_read_ahead_is_named_in_its_turn(folder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    paths = [*sample_paths(folder / "data", count=2, seed=0), str(tmp_path / "broken.jpg")]
    batches = load_batches(paths, SPEC, batch_size=2)
    assert len(next(batches)) == 2
    with pytest.raises(UnreadableImage, match=r"broken\.jpg"):
        next(batches)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--images is missing: give a folder of images"),
        (["--images", "d", "--speedup", "2", "--energy", "0.9"], "a plan has one budget: give --speedup or --energy"),
        (["--images", "d", "--plan", "p.yaml"], "--plan needs a budget: give --speedup, --flops or --energy"),
        (["--images", "d", "--speedup", "0.5"], "--speedup takes a number greater than 1, or none, not 0.5"),
        (["--images", "d", "--method", "svd"], "--method takes one of 'auto', 'exact', 'randomized', not 'svd'"),
        (["--images", "d", "--json", "no/such/x.json"], "--json no/such/x.json: folder no/such does not exist"),
        (["--images", "d", "--plot", "."], "--plot . is a folder; give a file name"),
        (["--image", "d"], "unknown option '--image'; did you mean '--images'?"),
    ],
)
def test_wrong_usage_is_one_sentence_and_nothing_is_measured(flags, words, monkeypatch, capsys):
    monkeypatch.setattr("linvit.runs.folder.load_classifier", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main(["spectrum", NAME, *flags]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_a_results_file_excludes_images_and_json():
    for name, flag in (("images", "--images"), ("json_file", "--json")):
        with pytest.raises(ValueError, match=rf"out\.json holds measured spectra: leave out {flag}"):
            SpectrumOptions(source="out.json", **{name: "d"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": "empty"}, "empty: holds no images"),
        ({"images": "nowhere"}, "nowhere: there is no such file or folder"),
        ({"images": "broken"}, "broken/0.png: is truncated, damaged or not an image"),
        ({"weights": "other.safetensors"}, "does not fit vit_tiny_patch16_224"),
        ({"weights": "none.safetensors"}, "--weights none.safetensors: there is no such file"),
        ({"speedup": "50"}, "speedup=50 cannot be reached"),
    ],
)
def test_failed_work_is_one_sentence(change, words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/0.png").write_bytes(b"no image")
    save_file({"weight": timm.create_model(NAME, img_size=64, **SMALL).cls_token}, tmp_path / "other.safetensors")
    flags = [part for name, value in change.items() if name != "images" for part in (f"--{name}", value)]
    assert run(folder, "--img-size", "64", *flags, images=change.get("images")) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_a_plan_that_cannot_be_made_keeps_what_was_measured(folder, tmp_path):
    path = tmp_path / "out.json"
    assert run(folder, "--img-size", "64", "--speedup", "50", "--json", str(path)) == 1
    assert json.loads(path.read_text())["plan"] is None
    assert [spectrum.num_tokens for spectrum in read_spectra(path)] == [65]
