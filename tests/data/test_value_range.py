"""16-bit images: the range that becomes black and white, the range that data use, and arrays in place of files."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import train

from linvit.cli import main
from linvit.data.augment.build import InputSpec
from linvit.data.decode import decode_image, read_image
from linvit.data.loader import create_eval_loader
from linvit.data.options import CacheOptions
from linvit.data.sources.loose import find_images
from linvit.data.value_range import value_range
from linvit.distributed import Ranks
from linvit.prediction.predictor import Predictor
from linvit.runs.folder import load_classifier
from linvit.training.config import TrainConfig
from linvit.training.input_range import resolve_input_range

# Values of 12-bit data, of which the upper 8 of 16 bits leave 3.
VALUES = np.random.default_rng(0).integers(0, 601, (36, 40, 3), dtype=np.uint16)


def stored(image: np.ndarray, extension: str) -> bytes:
    return bytes(cv2.imencode(extension, image[..., ::-1] if image.ndim == 3 else image)[1])


@pytest.mark.parametrize("extension", [".png", ".tif", ".ppm"])
def test_a_range_of_16_bits_becomes_black_to_white(extension: str) -> None:
    data = stored(VALUES, extension)
    # OpenCV rounds the upper 8 bits of a TIFF.
    default = decode_image(data, name="a")
    assert np.array_equal(default, np.rint(VALUES / 257) if extension == ".tif" else VALUES // 256)
    assert np.array_equal(decode_image(data, name="a", input_range=(0, 65535)), default)
    ranged = decode_image(data, name="a", input_range=(100, 500))
    assert np.abs(ranged - (VALUES.clip(100, 500) - 100.0) * 255 / 400).max() <= 0.5 + 1e-9


def test_8_bit_images_keep_their_values_and_floats_stay_unsupported() -> None:
    image = (VALUES % 256).astype(np.uint8)
    for extension in (".png", ".tif", ".jpg"):
        data = stored(image, extension)
        expected = decode_image(data, name="a")
        assert np.array_equal(decode_image(data, name="a", input_range=(0, 600)), expected)


def test_the_range_of_data_leaves_out_hot_pixels() -> None:
    values = VALUES.copy()
    values[0, 0, 0] = 65535
    values[0, 0, 1] = 0
    assert value_range(stored(VALUES, ".png")) == (0, 600)
    low, high = value_range(stored(values, ".png")) or (0, 0)
    assert (low, high > 590, high <= 600) == (0, True, True)
    assert value_range(stored(values.astype(np.uint8), ".png")) is None
    assert value_range(b"no image") is None
    assert value_range(stored(np.full((4, 4), 700, np.uint16), ".png")) == (700, 700)


def signed_tiff(values: np.ndarray, samples: int) -> bytes:
    """A TIFF of signed 16-bit values (H, W, samples), which OpenCV does not write."""
    height, width = values.shape[:2]
    data = values.astype("<i2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (259, 3, 1, 1), (262, 3, 1, 1 if samples == 1 else 2)]
    rest = struct.pack(f"<{2 * samples}H", *[16] * samples, *[2] * samples)
    at = 8 + 2 + 12 * 9 + 4
    elsewhere = samples > 2
    tags += [(258, 3, samples, at if elsewhere else 16), (339, 3, samples, at + 2 * samples if elsewhere else 2)]
    tags += [(273, 4, 1, at + len(rest)), (277, 3, 1, samples), (279, 4, 1, len(data))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + rest + data


@pytest.mark.parametrize("samples", [1, 3])
def test_signed_values_keep_their_order_and_have_a_range(samples: int) -> None:
    values = np.linspace(-1000, 500, 8 * 9 * samples).reshape(8, 9, samples).astype(np.int16)
    data = signed_tiff(values, samples)
    default = decode_image(data, name="a")
    assert np.abs(default - (values + 32768.0) * 255 / 65535).max() <= 0.5 + 1e-9
    assert value_range(data) == (-1000, 500)
    assert np.abs(decode_image(data, name="a", input_range=(-1000, 500)) - (values + 1000.0) * 255 / 1500).max() <= 0.51


FORMS: dict[str, Callable[[np.ndarray], object]] = {
    "array": lambda grey: grey,
    "RGB array": lambda grey: np.repeat(grey[..., None], 3, axis=2),
    "big-endian array": lambda grey: grey.astype(">u2"),
    "I;16": Image.fromarray,
    "I": lambda grey: Image.fromarray(grey.astype(np.int32)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("input_range", [None, (0, 600)])
def test_arrays_and_pillow_images_are_read_like_their_file(
    form: str, input_range: tuple[int, int] | None, tmp_path: Path
) -> None:
    grey = VALUES[..., 0] * (1 if input_range else 100)
    (tmp_path / "a.png").write_bytes(stored(grey, ".png"))
    expected = read_image(tmp_path / "a.png", input_range=input_range)
    opened = [FORMS[form](grey), Image.open(tmp_path / "a.png")]
    for index in range(2):
        assert np.array_equal(find_images(opened).read(index, input_range=input_range), expected)


def test_values_beyond_16_bits_are_refused() -> None:
    for image in (Image.fromarray(np.float32(VALUES[..., 0])), Image.fromarray(np.int32(VALUES[..., 0]) * 1000)):
        with pytest.raises(ValueError, match=r"a Pillow image of mode [FI] with these values is not supported"):
            find_images([image])


def test_auto_is_decided_once_and_used_by_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("dark", "light")):
        for split, count in (("train", 8), ("val", 2)):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                values = VALUES[..., 0] // 2 + 300 * number
                (tmp_path / f"{split}/{name}/{index}.png").write_bytes(stored(np.roll(values, index), ".png"))
    assert train(tmp_path, tmp_path / "out", input_range="auto", epochs=2, lr=3e-3) == 0
    run = tmp_path / "out/run"
    assert yaml.safe_load((run / "args.yaml").read_text())["input_range"] == [0, 600]
    assert json.loads((run / "best/config.json").read_text())["linvit"]["input_range"] == [0, 600]
    for source in (run, run / "best"):
        assert load_classifier(str(source)).settings["input_range"] == [0, 600]
    image = tmp_path / "val/light/0.png"
    saved = Predictor(run / "best")
    plain = Predictor(replace(load_classifier(str(run / "best")), settings={}))
    (by_run,), (black,) = saved(image), plain(image)
    assert by_run.probabilities != black.probabilities
    assert next(saved(Image.open(image))).probabilities == by_run.probabilities
    assert next(saved(read_values(image))).probabilities == by_run.probabilities
    tiled = Predictor(run, tile=64)(image)
    assert next(tiled).probabilities == by_run.probabilities
    rows = {}
    for options in ([], ["--input-range", "0", "600"], ["--input-range", "0", "65535"], ["--input-range", "0", "6000"]):
        assert main(["predict", str(run), str(image), "-o", str(tmp_path / "p.jsonl"), "-j", "0", *options]) == 0
        rows[tuple(options[1:])] = json.loads((tmp_path / "p.jsonl").read_text())["probabilities"]
        (tmp_path / "p.jsonl").unlink()
    assert rows[()] == rows["0", "600"] == list(by_run.probabilities)
    assert rows["0", "65535"] == list(black.probabilities)
    assert rows["0", "6000"] != rows[()]
    for options in ([], ["--input-range", "0", "6000"]):
        arguments = [str(run), str(tmp_path), "--json", str(tmp_path / "e.json"), "-j", "0", "--bootstrap", "0"]
        assert main(["eval", *arguments, *options]) == 0
    capsys.readouterr()
    assert train(tmp_path, tmp_path / "out", "student", kd_model_name=str(run)) == 1
    assert "was trained with --input-range 0 600: set the same here" in capsys.readouterr().err
    assert train(tmp_path, tmp_path / "out", "tuned", pretrained_path=str(run), epochs=1) == 0
    assert "was trained with --input-range 0 600, but this run has no --input-range" in capsys.readouterr().out


def read_values(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.uint16)


def test_a_resumed_run_keeps_its_range(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.yaml").write_text("input_range: [5, 77]\n")
    settings = {"input_range": "auto", "output": tmp_path, "experiment": "run", "resume": "auto"}
    config = TrainConfig.model_validate(settings)
    images = find_images([VALUES])
    ranks = Ranks(torch.device("cpu"))
    assert resolve_input_range(config, images, ranks).input_range == (5, 77)
    assert resolve_input_range(config.model_copy(update={"resume": None}), images, ranks).input_range == (0, 600)
    plain = find_images([VALUES.astype(np.uint8)])
    assert resolve_input_range(config.model_copy(update={"resume": None}), plain, ranks).input_range is None


def test_a_cache_holds_the_pixels_of_one_range(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(stored(VALUES, ".png"))
    images = find_images([str(tmp_path / "a.png")])
    caching = CacheOptions(cache="disk", cache_dir=tmp_path / "cache")
    batches = []
    for input_range in ((0, 600), (0, 6000)):
        spec = InputSpec((16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center", input_range)
        for cached in (caching, caching, None):
            loader = create_eval_loader(images, spec, batch_size=1, workers=0, device="cpu", caching=cached)
            batches.append(next(iter(loader)).images)
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])
    assert torch.equal(batches[3], batches[5])
    assert not torch.equal(batches[0], batches[3])
