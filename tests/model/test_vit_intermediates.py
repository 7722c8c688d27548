"""forward_intermediates of LinformerViT, and the layout that blocks pass to attention."""

import itertools
import re
import threading
from functools import partial

import pytest
import torch
from small_vits import PREFIXES, TINY, images, kept_elements, make
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import nn

FLAGS = ("return_prefix_tokens", "norm", "stop_early", "intermediates_only", "output_dict")


class Intermediates(nn.Module):
    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x):
        return torch.cat([each.flatten() for each in self.model.forward_intermediates(x, **self.options)[1]])


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("indices", [None, 2, [0], [1, -3], (2, 0)], ids=str)
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
def test_equals_timms(prefix, indices, output_fmt):
    ours = make(projection="identity", dynamic_img_size=True, **prefix)
    theirs = VisionTransformer(**{**TINY, **prefix}, dynamic_img_size=True).eval()
    theirs.load_state_dict(ours.state_dict())
    sizes = itertools.cycle([(28, 20), (16, 36), (16, 36)])
    for size, values in zip(sizes, itertools.product([False, True], repeat=len(FLAGS))):
        options = dict(zip(FLAGS, values), indices=indices, output_fmt=output_fmt)
        mine, wanted = (model.forward_intermediates(images(size), **options) for model in (ours, theirs))
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5)


def test_stop_early_runs_no_later_block():
    model = make()
    ran = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.forward_intermediates(images(), indices=[0, 1], stop_early=True)
    assert ran == [0, 1]
    model.forward_intermediates(images(), indices=[0, 1])
    assert ran == [0, 1, 0, 1, 2]


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="unknown output_fmt 'NHWC': choose 'NCHW' or 'NLC'"):
        make().forward_intermediates(images(), output_fmt="NHWC")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_checkpointing_holds_for_intermediates(dynamic, masked):
    model = make(dynamic_img_size=dynamic, drop_path_rate=0.2).train()
    x = images((16, 36) if dynamic else (28, 20))
    mask = torch.rand(2, 1, 1, 37 if dynamic else 36) > 0.3 if masked else None
    run = Intermediates(model, indices=[2], attn_mask=mask)
    plain, expected = kept_elements(run, x), gradients(run, x)
    model.set_grad_checkpointing()
    for name, gradient in gradients(run, x).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6, msg=name)
    assert kept_elements(run, x) < 0.5 * plain


def gradients(run, x):
    torch.manual_seed(5)
    run.zero_grad()
    run(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in run.named_parameters() if parameter.grad is not None}


def test_intermediates_of_two_sizes_recompute_on_their_own_grids():
    grads = []
    for checkpointing in (False, True):
        model = make(projection="linear", share="headwise", dynamic_img_size=True, dtype=torch.float64).train()
        model.set_grad_checkpointing(checkpointing)
        run = Intermediates(model)
        wide, tall = (run(images(size, dtype=torch.float64)).square().sum() for size in ((16, 36), (36, 16)))
        (wide + tall).backward()
        grads.append([parameter.grad for parameter in model.blocks.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_patch_dropout_gives_the_kept_tokens(dynamic):
    model = make(patch_drop_rate=0.4, dynamic_img_size=dynamic).train()
    torch.manual_seed(4)
    final, (first, *_, last) = model.forward_intermediates(images(), output_fmt="NLC")
    torch.manual_seed(4)
    torch.testing.assert_close(final, model.forward_features(images()), rtol=0, atol=0)
    assert first.shape == last.shape == (2, 21, 24)
    torch.testing.assert_close(model.norm(last), final[:, 1:], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="no NCHW features: pass output_fmt='NLC', or call eval"):
        model.forward_intermediates(images())
    assert model.eval().forward_intermediates(images(), intermediates_only=True)[0].shape == (2, 24, 7, 5)


def test_patch_dropout_takes_key_padding_masks_alone():
    model = make(projection="identity", patch_drop_rate=0.4).train()
    model(images(), attn_mask=torch.ones(1, 1, 1, 36, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"key-padding mask of shape \(2, 1, 1, 36\)"):
        model(images(), attn_mask=torch.ones(36, 36, dtype=torch.bool))


class PlainBlock(Block):
    """A block without a `layout` keyword."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)


@pytest.mark.parametrize("block_fn", [Block, ResPostBlock, partial(ResPostBlock, init_values=0.5)], ids=str)
def test_blocks_of_timm_take_any_size(block_fn):
    options = dict(projection="linear", share="headwise", block_fn=block_fn, pos_embed="none")
    model, resized = make(**options, dynamic_img_size=True), make(**options)
    theirs = block_fn.func if isinstance(block_fn, partial) else block_fn
    assert all(isinstance(block, theirs) for block in model.blocks)
    resized.set_input_size(img_size=(16, 36))
    torch.testing.assert_close(model(images((16, 36))), resized(images((16, 36))), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.jit.script(make(**options))(images()), make(**options)(images()))


@pytest.mark.parametrize("block_fn", [PlainBlock, partial(ParallelThingsBlock, num_parallel=1)])
def test_other_blocks_need_a_layout_where_there_is_one(block_fn):
    model = make(block_fn=block_fn)
    mask = torch.ones(2, 1, 1, 36, dtype=torch.bool)
    torch.testing.assert_close(model(images(), attn_mask=mask), model(images()), rtol=0, atol=1e-5)
    for options in (dict(dynamic_img_size=True), dict(patch_drop_rate=0.4)):
        with pytest.raises(ValueError, match="takes no `layout`, which dynamic_img_size and patch_drop_rate need"):
            make(block_fn=block_fn, **options)


@pytest.mark.parametrize("options", [dict(dynamic_img_size=True), dict(patch_drop_rate=0.4)], ids=str)
def test_compiled_and_exported_with_a_layout(options):
    torch.compiler.reset()
    model = make(projection="separable", depth=1, **options).train("patch_drop_rate" in options)
    x = images((16, 36) if "dynamic_img_size" in options else (28, 20))
    run = Intermediates(model, output_fmt="NLC")
    torch.manual_seed(2)
    expected = run(x)
    torch.manual_seed(2)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)
    if not model.training:
        torch.testing.assert_close(torch.export.export(run, (x,)).module()(x), expected, rtol=0, atol=1e-5)
    model.set_grad_checkpointing()
    torch.manual_seed(2)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)


def test_threads_share_a_model_at_several_sizes():
    model = make(dynamic_img_size=True)
    sizes = [(28, 20), (16, 36), (36, 16), (20, 28)]
    expected = [model(images(size)) for size in sizes]
    failures = []

    def serve(index):
        for _ in range(20):
            if not torch.equal(model(images(sizes[index])), expected[index]):
                failures.append(sizes[index])

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("wanted", [[], (), [9], [-9], 0, -1, 99, ["a"], "a"], ids=str)
def test_indices_that_are_no_blocks_are_named(wanted):
    model = make(depth=2)
    with pytest.raises(ValueError, match=re.escape(f"indices={wanted!r}: give a list of blocks, 0 to 1 ")):
        model.forward_intermediates(images(), indices=wanted)
