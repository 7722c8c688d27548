"""What LinformerViT keeps for the backward pass, and what it computes again."""

import pytest
import torch
from small_vits import images, make
from timm.layers import Mlp


def kept_elements(model, x):
    """What the backward pass keeps, beside parameters and inputs."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [x, *model.parameters()]}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(found.values())


@pytest.mark.parametrize("mode", [True, "full", "mlp"])
@pytest.mark.parametrize("share", ["kv", "layerwise"])
def test_checkpointing_recomputes_the_same(mode, share):
    model = make(share=share, drop_path_rate=0.2).train()
    x = images()
    expected = step_gradients(model, x)
    plain = kept_elements(model, x)
    model.set_grad_checkpointing(mode)
    for name, gradient in step_gradients(model, x).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6, msg=name)
    assert kept_elements(model, x) < (0.75 if mode == "mlp" else 0.5) * plain
    model.set_grad_checkpointing(False)
    assert kept_elements(model, x) == plain


def step_gradients(model, x):
    torch.manual_seed(5)
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_refused_checkpointing():
    with pytest.raises(ValueError, match="unknown gradient checkpointing 'mpl'"):
        make().set_grad_checkpointing("mpl")
    with pytest.raises(ValueError, match="choose 'full'"):
        make(mlp_layer=Mlp).set_grad_checkpointing("mlp")


def test_checkpointing_recomputes_on_the_right_grid():
    grads = []
    for checkpointing in (False, True):
        model = make(projection="linear", share="headwise", dynamic_img_size=True, dtype=torch.float64).train()
        model.set_grad_checkpointing(checkpointing)
        wide, tall = (model(images(size, dtype=torch.float64)).sum() for size in ((16, 36), (36, 16)))
        (wide + tall).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
