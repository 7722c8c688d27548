"""An earlier conversion to go on from."""

from pathlib import Path

import pytest
import torch
from timm.models import save_for_hf
from vits import make_images, make_vit

from linvit.conversion.convert import convert_vit, projected_lengths
from linvit.conversion.state import load_earlier


def test_it_is_what_was_saved_at_the_size_asked_for(tmp_path: Path) -> None:
    converted = convert_vit(make_vit(), k=[9, None, 16])
    save_for_hf(converted, tmp_path)
    same, larger = (load_earlier(tmp_path, make_vit(img_size=size)).model for size in (64, 96))
    images = make_images(2)
    torch.testing.assert_close(same(images), converted(images))
    assert projected_lengths(larger) == [9, None, 16]
    assert larger.patch_embed.img_size == (96, 96)
    assert torch.equal(larger.blocks[2].attn.proj.weight, converted.blocks[2].attn.proj.weight)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    save_for_hf(convert_vit(make_vit(), k=9), tmp_path / "converted")
    with pytest.raises(ValueError, match=r"converted is of another model: its .* differ from this one's"):
        load_earlier(tmp_path / "converted", make_vit(depth=2))
    with pytest.raises(ValueError, match="k=9 does not shorten a sequence of 9 patches"):
        load_earlier(tmp_path / "converted", make_vit(img_size=24))
    save_for_hf(make_vit(), tmp_path / "plain")
    with pytest.raises(ValueError, match="plain is no converted model: give the folder that a conversion wrote"):
        load_earlier(tmp_path / "plain", make_vit())
