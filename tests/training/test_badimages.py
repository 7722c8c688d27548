import math
import re
from pathlib import Path

import pytest
from tiny_runs import assert_same, make_images, read_state, read_summary, train

from linvit.training.faults import BadImages


def test_they_are_told_each_epoch_and_kept_sorted_each_once(tmp_path: Path) -> None:
    file, lines = tmp_path / "bad_images.txt", []
    for resumed in (False, True):
        bad_images = BadImages(file, is_primary=True, say=lines.append)
        bad_images.end_epoch()
        assert file.exists() == resumed
        bad_images.add([Path("c.png"), Path("a.png"), Path("c.png")])
        bad_images.end_epoch()
        bad_images.add([Path("b.png")])
        bad_images.end_epoch()
    assert file.read_text() == "a.png\nb.png\nc.png\n"
    assert lines[:2] == [
        f"left out 2 images that cannot be read: a.png, c.png ({file})",
        f"left out 1 image that cannot be read: b.png ({file})",
    ]


def test_many_are_not_all_told(tmp_path: Path) -> None:
    lines: list[str] = []
    bad_images = BadImages(tmp_path / "bad_images.txt", is_primary=True, say=lines.append)
    bad_images.add(Path(f"{number:02}.png") for number in range(20))
    bad_images.end_epoch()
    assert "07.png and 12 more" in lines[0]
    assert len((tmp_path / "bad_images.txt").read_text().splitlines()) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_leaves_them_out_and_lists_them(workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_images(tmp_path / "data")
    broken = sorted(data / name for name in ("train/blue/1.png", "train/red/7.png", "val/green/0.png"))
    for path in broken:
        path.write_bytes(b"")
    settings = {"mixup": 0.8, "grad_accum_steps": 2, "workers": workers}
    assert train(data, tmp_path, "stopped", **settings) == 1
    assert re.search(r"(blue/1|red/7)\.png: is empty; restore or remove the file", capsys.readouterr().err)
    assert train(data, tmp_path, on_bad_image="skip", **settings) == 0
    assert (tmp_path / "run/bad_images.txt").read_text().splitlines() == [str(path) for path in broken]
    assert capsys.readouterr().out.count("left out 3 images that cannot be read") == 2
    assert train(data, tmp_path, "halves", on_bad_image="skip", stop_epoch=1, **settings) == 0
    assert train(data, tmp_path, "halves", on_bad_image="skip", resume="auto", **settings) == 0
    whole, halves = (read_state(tmp_path / name, "state-0002-000000") for name in ("run", "halves"))
    assert_same(halves["state_dict"], whole["state_dict"])


def test_a_batch_without_any_image_is_passed_over(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", classes=("blue", "red"), train=4)
    for path in data.glob("train/*/[123].png"):
        path.write_bytes(b"")
    # Eight batches of one image an epoch, two of them with an image.
    assert train(data, tmp_path, on_bad_image="skip", batch_size=1) == 0
    state = read_state(tmp_path / "run", "state-0002-000000")
    assert state["num_updates"] == 4
    assert state["progress"]["num_bad"] == 0
    assert all(math.isfinite(float(row["train_loss"])) for row in read_summary(tmp_path / "run"))
