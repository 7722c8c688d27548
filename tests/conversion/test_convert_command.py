"""`linvit convert`: from a timm name and weights to a folder that timm loads."""

import contextlib
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_runs import make_images
from vits import SMALL, make_vit

import linvit.conversion.run
import linvit.conversion.state
from linvit.cli import main
from linvit.conversion.blocks import embed
from linvit.conversion.options import ConvertOptions
from linvit.conversion.run import _Conversion
from linvit.conversion.state import FitState

NAME = "vit_tiny_patch16_224"
MODEL = [f"{name}={value}" for name, value in SMALL.items() if name not in ("num_classes", "img_size")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), train=6, val=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(make_vit(NAME, num_classes=3).state_dict(), path)
    return path


def convert(data: Path, weights: Path, output: Path, *options: str, k: tuple[str, ...] = ("9",)) -> int:
    """Run the command; an empty `k` leaves out `--k`."""
    return main(
        [
            *("convert", NAME, "--weights", str(weights), "--images", str(data), "-o", str(output)),
            *("--img-size", "64", "--model-kwargs", *MODEL, "--rounds", "0", "--num-images", "16"),
            *("--device", "cpu", *(("--k", *k) if k else ()), *options),
        ]
    )


def test_the_folder_loads_and_fidelity_is_higher_than_with_pooling(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert convert(data, weights, output, "--steps", "8", "--json", str(tmp_path / "results.json")) == 0
    results = json.loads((output / "convert.json").read_text())
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert (results["model"], results["weights"], results["img_size"]) == (NAME, str(weights), [64, 64])
    assert (results["k"], results["num_images"], results["num_held_out"]) == ([9, 9, 9], 16, 2)
    assert [layer["error_after"] < layer["error_before"] for layer in results["layers"]] == [True] * 3
    fidelity = results["fidelity"]
    assert fidelity["fitted"]["patch_cosine"] > fidelity["pooled"]["patch_cosine"]
    model = timm.create_model(f"local-dir:{output}", pretrained=True)
    assert model.num_classes == 3
    original = make_vit(NAME, num_classes=3).state_dict()
    # Only the fitted weights have changed.
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, original.get(name, value))}
    assert {name.split(".", 2)[2] for name in changed} >= {"attn.qkv.weight", "attn.proj.weight", "mlp.fc2.weight"}
    assert not any("norm" in name or "fc1" in name or "head" in name for name in changed)
    shown = capsys.readouterr()
    assert "pooled" in shown.out
    assert f"{output}: timm.create_model" in shown.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "results.json"]


def test_distillation_plan_and_layers(data: Path, weights: Path, tmp_path: Path) -> None:
    assert convert(data, weights, tmp_path / "a", "--distill-steps", "3", "--layers", "1-2") == 0
    results = json.loads((tmp_path / "a/convert.json").read_text())
    assert results["k"] == [None, 9, 9]
    assert list(results["fidelity"]) == ["pooled", "fitted", "distilled"]
    assert convert(data, weights, tmp_path / "b", "--speedup", "1.05", "--plan-by", "flops", k=("plan",)) == 0
    lengths = json.loads((tmp_path / "b/convert.json").read_text())["k"]
    assert any(k is not None for k in lengths)
    assert convert(data, weights, tmp_path / "c", k=("none", "9", "16")) == 0
    assert json.loads((tmp_path / "c/convert.json").read_text())["k"] == [None, 9, 16]


def test_it_starts_from_an_earlier_conversion_at_another_size(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(data, weights, tmp_path / "small", k=("9", "none", "16")) == 0
    small, larger = ("--start-from", str(tmp_path / "small")), ("--img-size", "96")
    assert convert(data, weights, tmp_path / "large", *small, *larger, k=()) == 0
    results = json.loads((tmp_path / "large/convert.json").read_text())
    assert (results["k"], results["img_size"]) == ([9, None, 16], [96, 96])
    before, fitted = (results["fidelity"][name]["patch_cosine"] for name in ("before", "fitted"))
    assert convert(data, weights, tmp_path / "new", *larger, k=("9", "none", "16")) == 0
    pooled = json.loads((tmp_path / "new/convert.json").read_text())["fidelity"]["pooled"]["patch_cosine"]
    assert pooled < before < fitted
    for wrong, words in (
        (("--start-from", str(data)), "is neither a run nor a folder with config.json"),
        (("--start-from", "nowhere"), "--start-from nowhere: there is no such folder"),
        ((*small, "--k", "9"), "--start-from uses the settings of the earlier conversion: leave out --k"),
    ):
        capsys.readouterr()
        assert convert(data, weights, tmp_path / "wrong", *wrong, k=()) > 0
        assert words in capsys.readouterr().err
        assert not (tmp_path / "wrong").exists()


def test_the_fit_sees_the_embedding_of_the_earlier_conversion(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked(self, converted, activations):
        with torch.no_grad():
            own = torch.cat([embed(converted, images) for images in self.images.fit_batches()])
        assert torch.equal(own, activations.converted)
        same.append(torch.equal(own, activations.original))
        return fit(self, converted, activations)

    fit, same = _Conversion._fit, []
    monkeypatch.setattr(_Conversion, "_fit", checked)
    assert convert(data, weights, tmp_path / "large", "--img-size", "96") == 0
    assert convert(data, weights, tmp_path / "small", "--start-from", str(tmp_path / "large"), k=()) == 0
    # The position embedding was resampled from 64 to 96 px, and back.
    assert same == [True, False]


def test_both_models_are_timed(data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linvit.conversion.comparison.can_read_peaks", lambda: False)
    assert convert(data, weights, tmp_path / "out", "--rounds", "2", "--target-size", "64", "96x128") == 0
    speeds = json.loads((tmp_path / "out/convert.json").read_text())["speed"]
    assert [(speed["img_size"], speed["patches"], speed["rounds"]) for speed in speeds] == [
        ([64, 64], 64, 2),
        ([96, 128], 192, 2),
    ]


def test_fidelity_below_the_bound_is_refused_and_the_fit_is_saved(
    data: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, poor = tmp_path / "out", ("--projection", "random")
    assert convert(data, weights, output, *poor, "--min-cosine", "0.99") == 1
    assert "was not written: the lowest cosine of its features to the original's is 0." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".out.convert"]
    assert convert(data, weights, output, *poor, k=("16",)) == 1
    assert (
        "was started with different settings (k): repeat the earlier command to resume it, or delete"
        in capsys.readouterr().err
    )
    fitting = linvit.conversion.run.fit_layers
    done = []
    monkeypatch.setattr(
        "linvit.conversion.run.fit_layers",
        lambda *args, **kwargs: done.extend(kwargs["done"]) or fitting(*args, **kwargs),
    )
    assert convert(data, weights, output, *poor, "--min-cosine", "0.1") == 0
    assert len(done) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("planned", [True, False])
def test_the_size_to_time_at_may_change_unless_it_was_planned_for(
    planned: bool, data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(data, weights, tmp_path / "start") == 0
    how = ("--speedup", "1.05", "--plan-by", "flops") if planned else ("--start-from", str(tmp_path / "start"))
    assert convert(data, weights, tmp_path / "out", *how, "--min-cosine", "0.999999", k=()) == 1
    assert "was not written" in capsys.readouterr().err
    assert convert(data, weights, tmp_path / "out", *how, "--target-size", "96", k=()) == (1 if planned else 0)
    if planned:
        assert (
            "was started with different settings (target_size): repeat the earlier command" in capsys.readouterr().err
        )


def test_fitted_layers_survive_an_interruption(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self, fit, converted):
        save(self, fit, converted)
        if fit.layer == 1:
            raise KeyboardInterrupt

    save = linvit.conversion.state.FitState.save
    with monkeypatch.context() as patch:
        patch.setattr("linvit.conversion.state.FitState.save", interrupt)
        assert convert(data, weights, tmp_path / "out") == 130
    assert len(list((tmp_path / ".out.convert").glob("layer-*.json"))) == 2
    assert convert(data, weights, tmp_path / "out") == 0
    assert convert(data, weights, tmp_path / "uninterrupted") == 0
    resumed, expected = (
        timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).state_dict()
        for name in ("out", "uninterrupted")
    )
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--projection", "seperable"], 1, "unknown projection 'seperable': choose one of 'avgpool', 'conv', "),
        (["--layers", "7"], 1, "--layers names layer 7, but the model has 3 layers: 0 to 2"),
        (["--layers", "x"], 2, "--layers 'x' is not a layer or a range of layers, such as 3 or 6-11"),
        (["--speedup", "2"], 2, "--speedup needs planned lengths: leave out --k, or give --k plan"),
        (["--plan-by", "flops"], 2, "--plan-by needs planned lengths: leave out --k, or give --k plan"),
        (
            ["--distill-steps", "3", "--distill-minutes", "1"],
            2,
            "--distill-steps and --distill-minutes exclude each other",
        ),
        (["--target-size", "24"], 1, "--target-size 24x24: k=9 does not shorten a sequence of 9 patches"),
        (["--target-size", "100"], 1, "--target-size 100x100: image size 100×100 is not a multiple of the patch size"),
        (["--images", "nowhere"], 1, "nowhere"),
        (["--weights", "nowhere"], 2, "--weights nowhere: there is no such file"),
        (["--json", "nowhere/r.json"], 2, "--json nowhere/r.json: folder nowhere does not exist; create it first"),
        (["--k", "plan", "--target-size", "48"], 2, "--target-size starts with a size below 64x64"),
        (["--num-images", "3"], 2, "--num-images takes a whole number of at least 8, not 3"),
    ],
)
def test_errors_are_one_sentence(
    options: list[str],
    status: int,
    words: str,
    data: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert(data, weights, tmp_path / "out", *options) == status
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_other_models_are_refused_before_their_weights_are_loaded(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--images", str(data), "-o", str(tmp_path / "out")]
    assert main(["convert", "beit_base_patch16_224", "--weights", "none.pth", *arguments]) == 1
    assert "Beit cannot be converted: its attention adds a bias for every pair of positions" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert main(["convert", NAME, *arguments]) == 2
    assert "exists already: choose another folder" in capsys.readouterr().err


def test_layers_are_read_as_numbers_and_ranges() -> None:
    options = ConvertOptions(source="a", images="b", output="c", k=9, layers=("6-8", "3", "7"))
    assert options.converted_layers == [3, 6, 7, 8]
    assert ConvertOptions(source="a", images="b", output="c").converted_layers is None


def test_full_layers_get_ordinary_attention_back_and_an_interruption_changes_nothing(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert convert(data, weights, whole, "--full-layers", "1") == 0
    lengths = json.loads((whole / "config.json").read_text())["model_args"]["k"]
    assert lengths.count(None) == 1

    fits = []
    honest = FitState.save

    def save(self, fit, converted):
        honest(self, fit, converted)
        fits.append(fit.layer)
        if len(fits) == len(lengths) + 1:  # after the first layer that is fitted again
            raise KeyboardInterrupt

    monkeypatch.setattr(FitState, "save", save)
    with contextlib.suppress(KeyboardInterrupt):
        convert(data, weights, resumed, "--full-layers", "1")
    assert not resumed.exists()
    monkeypatch.undo()
    assert convert(data, weights, resumed, "--full-layers", "1") == 0
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
