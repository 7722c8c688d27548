"""Weights in other layouts than timm's give the outputs of the model that they come from."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from linvit.cli import main
from linvit.runs.folder import load_classifier
from linvit.runs.weights import fit_weights, load_exactly, read_weights

NAME = "vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
D, PATCHES, CLASSES = 32, 16, 5


def vit(num_classes: int = CLASSES, **arguments: Any) -> Any:
    model = timm.create_model(NAME, **{**SHAPE, "num_classes": num_classes, **arguments}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def save(path: Path, weights: Any) -> Path:
    torch.save(weights, path)
    return path


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def features_of(path: Path, model: Any) -> Tensor:
    """Features of a model without classifier, with the weights at `path`."""
    assert fit_weights(model, read_weights(path)) == []
    return model.eval().forward_features(images())


# Published layouts, by their names and equations.


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def linear(name: str, out: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


def hugging_face(kind: str, *, prefix: str = "", registers: int = 0) -> dict[str, Tensor]:
    """Weights of transformers' ViTModel, DeiTModel or Dinov2Model."""
    is_dino = kind == "dinov2"
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, D),
        "embeddings.position_embeddings": (1, PATCHES + 1, D),
        "embeddings.patch_embeddings.projection.weight": (D, 3, 8, 8),
        "embeddings.patch_embeddings.projection.bias": (D,),
        **norm("layernorm"),
    }
    if is_dino:
        shapes["embeddings.mask_token"] = (1, D)
    if registers:
        shapes["embeddings.register_tokens"] = (1, registers, D)
    for layer in range(2):
        block = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            shapes |= linear(f"{block}.attention.attention.{part}", D, D)
        shapes |= linear(f"{block}.attention.output.dense", D, D)
        if is_dino:
            shapes |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
            shapes |= {f"{block}.layer_scale{number}.lambda1": (D,) for number in (1, 2)}
            shapes |= linear(f"{block}.mlp.fc1", 4 * D, D) | linear(f"{block}.mlp.fc2", D, 4 * D)
        else:
            shapes |= norm(f"{block}.layernorm_before") | norm(f"{block}.layernorm_after")
            shapes |= linear(f"{block}.intermediate.dense", 4 * D, D) | linear(f"{block}.output.dense", D, 4 * D)
    weights = prefixed(draw(shapes), prefix)
    return weights | draw(linear("classifier", CLASSES, D)) if prefix == "vit." else weights


def hugging_face_features(weights: dict[str, Tensor], *, prefix: str = "", eps: float = 1e-6) -> Tensor:
    """Last tokens, normalised (B, T, D)."""
    w = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (2, D // 2)).transpose(1, 2)

    def attention(name: str, x: Tensor) -> Tensor:
        q, k, v = (heads(linear(f"{name}.attention.{part}", x)) for part in ("query", "key", "value"))
        scores = (q @ k.transpose(2, 3) / (D // 2) ** 0.5).softmax(-1)
        return linear(f"{name}.output.dense", (scores @ v).transpose(1, 2).flatten(2))

    embeddings = "embeddings.patch_embeddings.projection"
    x = F.conv2d(images(), w[f"{embeddings}.weight"], w[f"{embeddings}.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["embeddings.cls_token"].expand(3, -1, -1), x], 1) + w["embeddings.position_embeddings"]
    if "embeddings.register_tokens" in w:
        x = torch.cat([x[:, :1], w["embeddings.register_tokens"].expand(3, -1, -1), x[:, 1:]], 1)
    for layer in range(2):
        block = f"encoder.layer.{layer}"
        if f"{block}.norm1.weight" in w:
            x = x + w[f"{block}.layer_scale1.lambda1"] * attention(f"{block}.attention", norm(f"{block}.norm1", x))
            hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
            x = x + w[f"{block}.layer_scale2.lambda1"] * linear(f"{block}.mlp.fc2", hidden)
        else:
            x = x + attention(f"{block}.attention", norm(f"{block}.layernorm_before", x))
            hidden = F.gelu(linear(f"{block}.intermediate.dense", norm(f"{block}.layernorm_after", x)))
            x = x + linear(f"{block}.output.dense", hidden)
    return norm("layernorm", x)


def test_hugging_face_vit(tmp_path: Path) -> None:
    weights = hugging_face("vit", prefix="vit.")
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"], "image_size": 32}')
    save_file(weights, tmp_path / "model.safetensors")
    tokens = hugging_face_features(weights, prefix="vit.")
    logits = F.linear(tokens[:, 0], weights["classifier.weight"], weights["classifier.bias"])
    kwargs = {name: value for name, value in SHAPE.items() if name != "img_size"}
    found = load_classifier(str(tmp_path), model_name=NAME, model_kwargs=kwargs, img_size=(32, 32))
    assert_same(found.model(images()), logits)
    linformer = load_classifier(
        str(tmp_path),
        model_name="linvit_tiny_patch16_224",
        model_kwargs={**kwargs, "projection": "identity"},
        img_size=(32, 32),
    )
    assert_same(linformer.model(images()), logits)
    with pytest.raises(ValueError, match="does not name its model: give --model NAME"):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize("prefix", ["", "dinov2."])
@pytest.mark.parametrize("registers", [0, 4])
def test_hugging_face_dinov2(prefix: str, registers: int, tmp_path: Path) -> None:
    weights = hugging_face("dinov2", prefix=prefix, registers=registers)
    model = vit(0, init_values=1.0, reg_tokens=registers, no_embed_class=registers > 0)
    found = features_of(save(tmp_path / "dinov2.bin", weights), model)
    assert_same(found, hugging_face_features(weights, prefix=prefix))


def test_torchvision(tmp_path: Path) -> None:
    source = VisionTransformer(
        32, 8, num_layers=2, num_heads=2, hidden_dim=D, mlp_dim=4 * D, num_classes=CLASSES
    ).eval()
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.3)
    new = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    old = source.state_dict()
    for before, after in new.items():
        old = {name.replace(before, after): tensor for name, tensor in old.items()}
    for weights in (source.state_dict(), old):
        model = vit()
        assert fit_weights(model, read_weights(save(tmp_path / "vit_b_16.pth", weights))) == []
        assert_same(model(images()), source(images()))


@pytest.mark.parametrize("prefix", ["model.", "net.", "model.backbone.", "model._orig_mod.", "module.model."])
def test_lightning(prefix: str, tmp_path: Path) -> None:
    source = vit()
    beside = {"criterion.pos_weight": torch.ones(5), "metric.count": torch.tensor(3)}
    checkpoint = {"pytorch-lightning_version": "2.5", "state_dict": prefixed(source.state_dict(), prefix) | beside}
    model = vit()
    assert fit_weights(model, read_weights(save(tmp_path / "last.ckpt", checkpoint))) == []
    assert torch.equal(model(images()), source(images()))


@pytest.mark.parametrize(("outer", "name"), [("", "head"), ("", "fc"), ("model.", "classifier")])
def test_a_classifier_beside_the_model_is_kept(outer: str, name: str, tmp_path: Path) -> None:
    source, model = vit(0), vit()
    head = nn.Linear(D, CLASSES)
    weights = prefixed(source.state_dict(), f"{outer}backbone.") | prefixed(head.state_dict(), f"{outer}{name}.")
    assert fit_weights(model, read_weights(save(tmp_path / "last.ckpt", {"state_dict": weights}))) == []
    assert_same(model(images()), head(source(images())))


def test_a_moving_average_beside_the_model_is_taken_on_request(tmp_path: Path) -> None:
    raw, averaged = vit(), vit()
    weights = prefixed(raw.state_dict(), "model.") | prefixed(averaged.state_dict(), "ema_model.module.")
    path = save(tmp_path / "last.ckpt", {"state_dict": weights})
    for use_ema, expected in ((True, averaged), (False, raw)):
        assert torch.equal(read_weights(path, use_ema=use_ema).state_dict["head.weight"], expected.head.weight)


@pytest.mark.parametrize("name", ["model", "net", "module.model", "model.net.x", "model."])
def test_a_wrapper_without_a_model_is_read_as_it_is(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "weights.pth", {"state_dict": {name: torch.ones(2)}})
    (found,) = read_weights(path).state_dict
    assert name.endswith(found)


def test_a_wrapped_cnn(tmp_path: Path) -> None:
    source, model = (timm.create_model("resnet10t", num_classes=5).eval() for _ in range(2))
    fit_weights(model, read_weights(save(tmp_path / "last.ckpt", prefixed(source.state_dict(), "model."))))
    assert torch.equal(model(images()), source(images()))


def test_a_wrapper_of_the_model_itself_is_kept(tmp_path: Path) -> None:
    """All names of this model of timm begin with "encoder."."""
    small = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "pos_embed_grid_size": 2}
    source, model = (timm.create_model("qwen3_vit_88m", **small) for _ in range(2))
    path = save(tmp_path / "weights.pth", source.state_dict())
    assert fit_weights(model, read_weights(path)) == []
    load_exactly(model, read_weights(path).state_dict, path=path)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_dino_takes_the_teacher(tmp_path: Path) -> None:
    teacher, student = vit(0), vit(0)
    head = {"mlp.0.weight": torch.randn(64, D), "last_layer.weight_v": torch.randn(9, 64)}
    checkpoint = {
        "student": prefixed(student.state_dict(), "module.backbone.") | prefixed(head, "module.head."),
        "teacher": prefixed(teacher.state_dict(), "backbone.") | prefixed(head, "head."),
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small"),
    }
    found = features_of(save(tmp_path / "checkpoint.pth", checkpoint), vit(0))
    assert_same(found, teacher.forward_features(images()))
    both = prefixed(student.state_dict(), "student.backbone.") | prefixed(teacher.state_dict(), "teacher.backbone.")
    found = features_of(save(tmp_path / "last.ckpt", {"state_dict": both}), vit(0))
    assert_same(found, teacher.forward_features(images()))


def test_ijepa_takes_the_encoder(tmp_path: Path) -> None:
    source = vit(num_classes=0, class_token=False, global_pool="avg")
    encoder = prefixed(source.state_dict(), "module.")
    path = save(tmp_path / "jepa.pth", {"encoder": encoder, "predictor": {}, "opt": {"state": {}}, "epoch": 3})
    model = vit(num_classes=0, class_token=False, global_pool="avg")
    assert fit_weights(model, read_weights(path)) == []
    assert_same(model(images()), source(images()))


def test_mae_leaves_out_the_decoder(tmp_path: Path) -> None:
    source = vit(0)
    decoder = draw({"mask_token": (1, 1, 16), "decoder_pos_embed": (1, 17, 16), **linear("decoder_embed", 16, D)})
    decoder |= draw({**linear("decoder_blocks.0.attn.qkv", 48, 16), **linear("decoder_pred", 192, 16)})
    path = save(tmp_path / "mae.pth", {"model": source.state_dict() | decoder, "epoch": 3})
    assert_same(features_of(path, vit(0)), source.forward_features(images()))


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_equals_timms_own_conversion(registers: int, tmp_path: Path) -> None:
    source = dict(vit(0, init_values=1.0).state_dict())
    source |= draw({"mask_token": (1, D), **({"register_tokens": (1, registers, D)} if registers else {})})
    arguments = {"init_values": 1.0, "reg_tokens": registers, "no_embed_class": registers > 0}
    by_timm = vit(0, **arguments)
    by_timm.load_state_dict(checkpoint_filter_fn(dict(source), by_timm))
    chunked = {name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): value
               for name, value in source.items()}  # fmt: skip
    for weights in (source, {"teacher": prefixed(chunked, "backbone.") | draw({"dino_head.mlp.0.weight": (3, D)})}):
        found = features_of(save(tmp_path / "dinov2.pth", weights), vit(0, **arguments))
        assert torch.equal(found, by_timm.forward_features(images()))


def test_several_models_in_a_file_are_refused(tmp_path: Path) -> None:
    both = [prefixed(vit().state_dict(), f"module.{name}.") for name in ("base_encoder", "momentum_encoder")]
    path = save(tmp_path / "moco.pth", {"state_dict": both[0] | both[1]})
    with pytest.raises(ValueError, match=r"moco\.pth holds several models \(base_encoder\., momentum_encoder\.\)"):
        read_weights(path)


def test_unknown_layouts_are_refused_in_a_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {f"trunk.layer_{layer}.part_{part}.w": torch.ones(3) for layer in range(40) for part in range(30)}
    halves = {name.replace("attn.qkv", "attention.in"): tensor for name, tensor in vit().state_dict().items()}
    halves |= {f"blocks.0.extra_{number}.weight": torch.ones(2) for number in range(99)}
    for weights, words in (
        (unknown, "its layout is unknown, with parameters such as trunk.layer_0.part_0.w, "),
        (halves, "it has unexpected parameters blocks.0-1.attention.in.bias, "),
    ):
        path = save(tmp_path / "weights.pth", weights)
        kwargs = [f"{name}={value}" for name, value in SHAPE.items() if name != "img_size"]
        argv = ["eval", str(path), str(tmp_path), "--model", NAME, "--img-size", "32", "--model-kwargs", *kwargs]
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path} does not fit {NAME}: ")
        assert words in error
        assert len(error) < 600 + len(str(path))
        assert error.count("\n") == 1
