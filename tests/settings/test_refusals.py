"""Mistakes are refused in one sentence that names what the user wrote, before a model is built."""

import threading

import numpy as np
import pytest
import timm
import torch
from tiny_runs import make_images, read_summary, train

from linvit import LinformerViT, cli, convert_vit
from linvit.device import choose_device
from linvit.evaluation.options import EvalOptions
from linvit.model.attention import LinformerAttention
from linvit.model.projections import build_projection
from linvit.settings.yaml import read_settings
from linvit.training.config import TrainConfig, parse
from linvit.training.options import ScheduleOptions

TINY = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
# Commands that check their options before they read images or weights.
COMMANDS = {
    "train": ["train", "DATA"],
    "lr-find": ["lr-find", "DATA"],
    "eval": ["eval", "vit_tiny_patch16_224", "DATA"],
    "predict": ["predict", "vit_tiny_patch16_224", "IMAGES"],
    "spectrum": ["spectrum", "vit_tiny_patch16_224", "--images", "IMAGES"],
    "convert": ["convert", "vit_tiny_patch16_224", "--images", "IMAGES", "-o", "OUT"],
    "bench": ["bench"],
}
TRAINING, INPUT = ("train", "lr-find"), ("train", "lr-find", "eval", "predict")
WRONG = [
    (INPUT, ["--interpolation", "lanczos"], "--interpolation takes one of 'nearest', 'bilinear', 'bicubic'"),
    (INPUT, ["--mean", ".5", ".5"], "--mean takes one number or three (R G B), not 2"),
    (INPUT, ["--std", ".5", ".5"], "--std takes one number or three (R G B), not 2"),
    (INPUT, ["--std", "-.5"], "--std must be above 0 because pixels are divided by it, not -0.5"),
    (INPUT, ["--crop-pct", "5"], "--crop-pct takes a number greater than 0 and at most 2, or none, not 5"),
    (INPUT, ["--crop-pct", "-inf"], "--crop-pct takes a number greater than 0 and at most 2, or none, not -inf"),
    (INPUT, ["--crop-mode", "centre"], "not 'centre' (did you mean 'center'?)"),
    (INPUT, ["--amp-dtype", "float8"], "--amp-dtype takes one of 'bfloat16', 'float16', not 'float8'"),
    (TRAINING, ["--opt", "adamv"], "--opt 'adamv' is not an optimizer of timm; did you mean 'adam'?"),
    (TRAINING, ["--opt", "some_adamw"], "--opt 'some_adamw' is not an optimizer of timm"),
    (TRAINING, ["--opt", "adahessian"], "--opt adahessian needs second derivatives"),
    (TRAINING, ["--opt-betas", "0.9"], "--opt-betas takes 2 numbers for adamw, not 1"),
    (
        TRAINING,
        ["--opt", "sgd", "--opt-betas", "0.9", "0.9"],
        "--opt-betas does not apply to sgd, which has no betas: remove it",
    ),
    (TRAINING, ["--aa", "nosuch"], "--aa 'nosuch' is unknown: choose one of 'rand-m9-mstd0.5-inc1', "),
    (TRAINING, ["--seed", str(2**63)], f"--seed takes a whole number of at least 0 and less than {2**63}"),
    (TRAINING, ["--model", "nosuch"], "unknown model 'nosuch'"),
    (("train",), ["--sched", "cosin"], "not 'cosin' (did you mean 'cosine'?)"),
    (TRAINING, ["--share", "foo"], "--share takes one of 'none', 'headwise', 'kv', 'layerwise', not 'foo'"),
    (("spectrum", "convert"), ["--share", "foo"], "--share takes one of 'none', 'headwise', 'kv', 'layerwise', not"),
    (("train", "convert"), ["--k", "16.0"], "--k takes a length of at least 1"),
    (("train", "convert"), ["--k", "true"], "--k takes a length of at least 1"),
]


@pytest.fixture(autouse=True)
def no_model(monkeypatch, request, tmp_path):
    """Make building a model fail in the tests of commands."""
    if "command" not in request.fixturenames:
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IMAGES").mkdir()
    torch.save({}, tmp_path / "IMAGES/a.png")

    def build(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(timm, "create_model", build)


def refusal(argv, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("command", "flags", "message"), [(command, *rest) for commands, *rest in WRONG for command in commands]
)
def test_a_wrong_flag_is_refused_before_a_model_is_built(command, flags, message, capsys):
    assert message in refusal([*COMMANDS[command], *flags], capsys)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("device", ["mps", "meta", "xpu", "cuda:99", "cpu:3", "nonsense", "hpu", "xla"])
def test_an_absent_device_is_refused(command, device, capsys):
    message = refusal([*COMMANDS[command], "--device", device], capsys)
    assert "--device" in message
    assert device in message


def test_a_present_device_is_accepted():
    assert [choose_device(name) for name in ("cpu", "cpu:0")] == ["cpu", "cpu:0"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("opt: nosuch", "opt 'nosuch' is not an optimizer of timm"),
        ("interpolation: lanczos", "interpolation takes one of 'nearest', 'bilinear', 'bicubic', or none"),
        ("mean: [.5, .5]", "mean takes one number or three (R G B), not 2"),
        ("crop_pct: 5", "crop_pct takes a number greater than 0 and at most 2"),
        ("k: 16.0", "k takes a length of at least 1"),
        ("[a, b]: 1", "line 1: not valid YAML: a list cannot be a name"),
        ("lr: 1\n? {a: 1}\n: 2", "line 2: not valid YAML: a dictionary cannot be a name"),
        ("model_kwargs: {[a]: 1}", "line 1: not valid YAML: a list cannot be a name"),
        ("model_kwargs: !!set {[a]}", "line 1: not valid YAML: a list cannot be a name"),
        ("null: 1", "the file must consist of `name: value` lines"),
        ("model_kwargs: {3: 4}", "model_kwargs takes name-value pairs, not {3: 4}"),
        ("a:\n\tb: 1", "line 2: not valid YAML: found character '\\t'"),
        ("- 1", "the file must consist of `name: value` lines"),
        ("5", "the file must consist of `name: value` lines"),
        ("lr: 1\nlr: 2", "line 2: not valid YAML: 'lr' is set twice"),
        ("experiment: 2024-13-45", "not valid YAML: month must be in 1..12"),
        ("lr: \0", "not valid YAML"),
        (b"\xff\xfe\x00", "is not a text file"),
    ],
)
def test_a_wrong_yaml_file_is_refused_by_its_keys(tmp_path, settings, message, capsys):
    path = tmp_path / "config.yaml"
    path.write_bytes(settings if isinstance(settings, bytes) else settings.encode())
    refused = refusal(["train", "DATA", "--config", str(path)], capsys)
    assert refused.startswith(f"error: {path}: ")
    assert message in refused


@pytest.mark.parametrize("text", ["-1e-2", "-.5", "-1.", "-5", "-1.5E+3", "-.5e1", "1e-2"])
def test_negative_numbers_are_values_in_every_form(tmp_path, text):
    alone, joined = (parse(["D", *argv]) for argv in (["--head-init-bias", text], [f"--head-init-bias={text}"]))
    assert alone.head_init_bias == joined.head_init_bias == float(text)
    assert parse(["D", "--lr-noise", text, "0.5"]).lr_noise == (float(text), 0.5)
    assert parse(["D", "--lr-noise", "0.5", text, "--seed", "3"]).lr_noise == (0.5, float(text))
    path = tmp_path / "settings.yaml"
    path.write_text(f"head_init_bias: {text}")
    assert read_settings(path)["head_init_bias"] == float(text)


@pytest.mark.parametrize("text", ["-inf", "-.inf", "-nan", "-Infinity"])
def test_non_finite_numbers_are_refused_as_values(text, capsys):
    assert "--head-init-bias takes a number, or none, not " in refusal(
        ["train", "DATA", "--head-init-bias", text], capsys
    )


def test_mean_and_deviation_may_be_one_number():
    assert EvalOptions(source="a", data_dir="b", mean=(0.5,), std=(0.2,)).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        ({"epochs": 1}, 0),
        ({"epochs": 2}, 1),
        ({"epochs": 5}, 2),
        ({"epochs": 6}, 5),
        ({"epochs": 300}, 5),
        ({}, 5),
        ({"epochs": 2, "warmup_prefix": True}, 5),
        ({"epochs": 5, "warmup_epochs": 5}, 5),
        ({"epochs": 2, "warmup_epochs": 2}, 2),
    ],
)
def test_the_default_warmup_fits_into_a_short_run(tmp_path, given, warmup):
    assert ScheduleOptions(**given).warmup_epochs == warmup
    config = TrainConfig(**given)
    config.save(tmp_path / "args.yaml")
    assert read_settings(tmp_path / "args.yaml")["warmup_epochs"] == warmup
    assert TrainConfig.load(tmp_path / "args.yaml") == config


def test_an_explicit_warmup_is_not_shortened(capsys):
    message = (
        "--warmup-epochs 5 is longer than --epochs 2: set it lower (0 disables the warm-up) or set --warmup-prefix"
    )
    assert message in refusal(["train", "DATA", "--epochs", "2", "--warmup-epochs", "5"], capsys)


def create(k, **kwargs):
    return timm.create_model("linvit_mini_patch4_64", img_size=64, **TINY, k=k, **kwargs)


@pytest.mark.parametrize(
    ("k", "share"),
    [
        (np.int64(4), "kv"),
        (torch.tensor(4), "kv"),
        ([np.int64(4), None], "kv"),
        (np.array([4, 4]), "layerwise"),
        (torch.tensor([4, 4]), "kv"),
        (np.array([[4, 4], [2, 4]]), "none"),
        ([(np.int32(2), 4), 4], "none"),
    ],
)
def test_integers_of_any_type_are_lengths(k, share, tmp_path):
    model = create(k, share=share)
    for block in model.blocks:
        if block.attn.key_projection is not None:
            assert {type(length) for length in block.attn.key_projection.lengths} == {int}
    plain = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=16, depth=2, num_heads=2)
    converted = convert_vit(plain, k=k, projection="linear", share=share)
    timm.models.save_for_hf(converted, tmp_path / "saved", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert again(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("wrong", [16.0, "16", b"16", True, np.True_, np.float32(4), torch.tensor(True), 4j, {}])
def test_other_types_of_lengths_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=r"k=.*: a projected length is a whole number"):
        create(wrong)
    for each in ([4, wrong], [[4, wrong], [4, 4]]):
        with pytest.raises(ValueError, match=r"k=.*: a projected length is a whole number"):
            create(each, share="none")
    for each in (wrong, [4, wrong]):
        with pytest.raises(ValueError, match=r"k=.*: a projected length is a whole number"):
            build_projection("linear", k=each, grid_size=(4, 4), num_maps=2)


def test_an_empty_list_of_lengths_is_refused():
    with pytest.raises(ValueError, match=r"k names 0 layers, but the model has \d+; give one k, or one per layer"):
        LinformerViT(img_size=64, **TINY, k=[])


def test_a_missing_length_is_refused():
    with pytest.raises(ValueError, match=r"ordinary attention in all layers is projection='identity'"):
        LinformerViT(img_size=64, **TINY, k=None)


def project(kind="linear", k=4, grid_size=(4, 4), num_maps=1):
    return build_projection(kind, k=k, grid_size=grid_size, num_maps=num_maps, dim=16)


@pytest.mark.parametrize(
    ("E", "F", "message"),
    [
        (None, project(), r"value_projection \(F\) needs a key_projection"),
        (project(num_maps=3), None, "key_projection has 3 maps for 4 heads"),
        (project(), project(num_maps=2), "value_projection has 2 maps for 4 heads"),
        (project(k=4), project(k=5), "key_projection has k=4, value_projection k=5"),
        (project(k=[4, 3, 4, 4], num_maps=4), project(k=4), r"key_projection has k=\[4, 3, 4, 4\], value"),
        (project(), project(grid_size=(2, 8)), r"for a grid \(4, 4\), value_projection for \(2, 8\)"),
        (project(), project("maxpool"), "'linear' and value_projection 'maxpool' do not go together"),
        (project("conv"), project(), "'conv' and value_projection 'linear' do not go together"),
        (project("conv"), project("maxpool"), "do not go together"),
        (project("identity"), project(), "do not go together"),
    ],
)
def test_incompatible_projections_are_refused(E, F, message):
    with pytest.raises(ValueError, match=message):
        LinformerAttention(16, num_heads=4, key_projection=E, value_projection=F)
    attention = LinformerAttention(16, num_heads=4)
    with pytest.raises(ValueError, match=message):
        attention.set_projections(E, F)
    assert attention.projections() is None


@pytest.mark.parametrize(
    ("E", "F"),
    [
        (project(), project("separable")),
        (project(num_maps=4), project()),
        (project(k=[4] * 4, num_maps=4), project("dct")),
        (project(k=[4, 3, 4, 4], num_maps=4), project(k=[4, 3, 4, 4], num_maps=4)),
        (project("conv"), project("conv")),
    ],
)
@pytest.mark.parametrize("order", ["per_head", "associative", "folded"])
def test_compatible_projections_agree_in_every_order(E, F, order):
    if E.kind == "conv" and order == "per_head":
        order = "associative"
    attention = LinformerAttention(16, num_heads=4, key_projection=E, value_projection=F).double()
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    expected = attention(x)
    attention.order = order
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"share": "foo"}, "unknown share 'foo': choose one of 'none', 'headwise', 'kv', 'layerwise'$"),
        ({"share": "layrwise"}, r"'kv', 'layerwise' \(did you mean 'layerwise'\?\)$"),
        ({"share": ["kv"]}, r"unknown share \['kv'\]: choose one of 'none'"),
        ({"projection": "dtc"}, r"unknown projection 'dtc': choose one of 'avgpool', .* \(did you mean 'dct'\?\)$"),
        ({"projection": ["dct"]}, r"unknown projection \['dct'\]: choose one of 'avgpool'"),
        ({"projection_init": "x"}, "unknown projection_init 'x': choose one of 'pool', 'average', 'jl'$"),
        ({"mlp_layer": "gelu"}, "unknown mlp_layer 'gelu': choose one of 'mlp', 'swiglu', 'swiglu_packed'"),
    ],
)
def test_choices_are_listed_in_quotes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create(4, **kwargs)


def test_the_choices_of_gradient_checkpointing_are_listed():
    with pytest.raises(ValueError, match=r"unknown gradient checkpointing 'half': choose one of 'mlp', 'full'$"):
        create(4).set_grad_checkpointing("half")


def test_a_run_works_outside_the_main_thread(tmp_path):
    data = make_images(tmp_path / "data", train=4)
    done = []
    thread = threading.Thread(target=lambda: done.append(train(data, tmp_path / "output", epochs=1)))
    thread.start()
    thread.join()
    assert done == [0]
    assert len(read_summary(tmp_path / "output/run")) == 1
