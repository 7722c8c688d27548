"""A small generated image folder without faults, and every fault of `linvit check` to add to it."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

CLASSES = ("ant", "bee")
COUNTS = {"train": 4, "val": 2}


def build_clean(folder: Path) -> Path:
    """Write DATA/SPLIT/CLASS/*.jpg: different images of 64 x 48 without any fault."""
    seed = 0
    for split, count in COUNTS.items():
        for name in CLASSES:
            for number in range(count):
                write(folder / split / name / f"{number}.jpg", encoded(random_image(seed)))
                seed += 1
    return folder


def build_fault(folder: Path, code: str) -> list[str]:
    """Add one fault to a clean folder; returns the paths, relative to the folder, that the check should report."""
    return FAULTY[code](folder)


def build_corpus(folder: Path) -> dict[str, list[str]]:
    """Write a folder with every fault at once; returns the paths by the code of the fault."""
    build_clean(folder)
    return {code: build_fault(folder, code) for code in FAULTY}


def random_image(seed: int, *, height: int = 48, width: int = 64) -> Image.Image:
    """An image unlike any other: blurred noise, coarse and fine."""
    rng = np.random.default_rng(seed)
    values = np.zeros((height, width, 3), np.float32)
    for sigma, weight in ((12.0, 700.0), (4.0, 250.0), (1.0, 40.0)):
        noise = rng.normal(size=values.shape).astype(np.float32)
        values += weight * cv2.GaussianBlur(noise, (0, 0), sigma)
    return Image.fromarray(np.clip(values + 128, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **{"quality": 92, **settings})
    return buffer.getvalue()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _files(files: dict[str, bytes], *, found: list[str] | None = None) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        for path, data in files.items():
            write(folder / path, data)
        return list(files) if found is None else found

    return build


def _folder(folder: Path) -> list[str]:
    for split in COUNTS:
        (folder / split / "empty").mkdir()
    return [f"{split}/empty" for split in COUNTS]


def _turned(seed: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(random_image(seed), form, exif=exif)


def _damaged() -> bytes:
    """A JPEG whose data ends in the middle, but that has its end marker."""
    data = encoded(random_image(101, height=96, width=128))
    return data[: len(data) // 2] + b"\xff\xd9"


def _overwritten() -> bytes:
    """A JPEG with a piece of another JPEG in the middle, which leaves extra bytes at its end."""
    data = encoded(random_image(99, height=96, width=128))
    middle = len(data) // 2
    return data[:middle] + encoded(random_image(98))[-402:-2] + data[middle + 40 :]


def _frames(seed: int, form: str) -> bytes:
    return encoded(random_image(seed), form, save_all=True, append_images=[random_image(103), random_image(104)])


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def _bomb() -> bytes:
    # 200 million pixels in 25 kB, which only a decoder without a limit unpacks.
    return encoded(Image.new("1", (20_000, 10_000)), "PNG")


def _sixteen_bits(seed: int, form: str) -> bytes:
    grey = np.asarray(random_image(seed).convert("L")).astype(np.uint16)
    return encoded(Image.fromarray(grey * 257), form)


def _sixteen_bit_colours() -> bytes:
    pixels = np.asarray(random_image(105)).astype(np.uint16) * 257
    return cv2.imencode(".png", pixels)[1].tobytes()


def _copy(source: str, target: str) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        write(folder / target, (folder / source).read_bytes())
        return sorted([source, target])[:1]

    return build


def _near_copy(source: str, target: str, **settings: Any) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        image = Image.open(folder / source)
        write(folder / target, encoded(image, target.rpartition(".")[2].upper().replace("JPG", "JPEG"), **settings))
        return sorted([source, target])[:1]

    return build


def _unreadable(folder: Path) -> list[str]:
    # Root can read any file, but not a broken link.
    os.symlink("nowhere.jpg", folder / "train/ant/lost.jpg")
    return ["train/ant/lost.jpg"]


def _link_outside(folder: Path) -> list[str]:
    outside = folder.with_name(f"{folder.name}-outside")
    write(outside / "far.jpg", encoded(random_image(106)))
    os.symlink(outside / "far.jpg", folder / "train/ant/far.jpg")
    return ["train/ant/far.jpg"]


def _link_loop(folder: Path) -> list[str]:
    os.symlink("..", folder / "train/bee/loop")
    os.symlink("itself.jpg", folder / "val/ant/itself.jpg")
    return ["train/bee/loop", "val/ant/itself.jpg"]


def _repeated_folder(folder: Path) -> list[str]:
    (folder / "train/bee/empty").mkdir()
    os.symlink("empty", folder / "train/bee/same")
    return ["train/bee/same"]


def _one_split(folder: Path) -> list[str]:
    write(folder / "train/cat/0.jpg", encoded(random_image(107)))
    return ["train/cat"]


def _class_case(folder: Path) -> list[str]:
    for number, split in enumerate(COUNTS):
        write(folder / split / "Bee/0.jpg", encoded(random_image(108 + number)))
    return ["train/Bee"]


def _imbalance(folder: Path) -> list[str]:
    for number in range(60):
        write(folder / f"train/ant/many{number}.jpg", encoded(random_image(1000 + number, height=20, width=24)))
    return ["train"]


def _palette() -> Image.Image:
    return random_image(110).convert("P", palette=Image.Palette.ADAPTIVE)


def _with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


# `unreadable_folder` is missing: a folder that root cannot list cannot be built.
FAULTY: dict[str, Callable[[Path], list[str]]] = {
    "empty_file": _files({"train/ant/empty.jpg": b"", "val/bee/empty.png": b""}),
    "truncated": _files(
        {
            f"train/ant/cut.{form.lower()}": encoded(random_image(120 + number), form)[:-400]
            for number, form in enumerate(("JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP"))
        }
    ),
    "undecodable": _files({"train/ant/flipped.png": _flipped(encoded(random_image(130), "PNG"))}),
    "unsupported": _files({"train/ant/floats.tif": encoded(Image.new("F", (64, 48), 0.5), "TIFF")}),
    "not_an_image": _files({"train/ant/text.jpg": b"This is not an image.\n" * 20, "val/bee/zeros.png": bytes(2000)}),
    "unreadable_file": _unreadable,
    "damaged": _files({"train/ant/damaged.jpg": _damaged(), "val/ant/overwritten.jpg": _overwritten()}),
    "decompression_bomb": _files({"train/ant/bomb.png": _bomb()}),
    "tiny": _files({"train/ant/tiny.png": encoded(random_image(131, height=5, width=40), "PNG")}),
    "extreme_aspect": _files({"train/ant/strip.jpg": encoded(random_image(132, height=20, width=320))}),
    "ignored_image": _files(
        {"train/ant/photo.jpe": encoded(random_image(133)), "train/bee/photo.bak": encoded(random_image(134), "GIF")}
    ),
    "loose_image": _files({"train/loose.jpg": encoded(random_image(135)), "loose.jpg": encoded(random_image(136))}),
    "empty_class": _folder,
    "class_in_one_split": _one_split,
    "class_case": _class_case,
    "link_loop": _link_loop,
    "duplicate_two_labels": _copy("train/ant/0.jpg", "train/bee/as_ant_0.jpg"),
    "duplicate_across_splits": _copy("train/ant/1.jpg", "val/ant/train_1.jpg"),
    "near_duplicate_two_labels": _near_copy("train/ant/2.jpg", "train/bee/as_ant_2.png"),
    "near_duplicate_across_splits": _near_copy("train/bee/0.jpg", "val/bee/train_0.jpg", quality=70),
    "duplicate": _copy("train/bee/1.jpg", "train/bee/copy_of_1.jpg"),
    "near_duplicate": _near_copy("train/bee/2.jpg", "train/bee/like_2.webp", quality=80),
    "wrong_extension": _files({"train/ant/really_png.jpg": encoded(random_image(140), "PNG")}),
    "cmyk": _files({"train/ant/cmyk.jpg": encoded(random_image(141).convert("CMYK"))}),
    "sixteen_bit": _files(
        {
            "train/ant/deep.png": _sixteen_bits(139, "PNG"),
            "train/bee/deep.tif": _sixteen_bits(138, "TIFF"),
            "train/bee/deep_colours.png": _sixteen_bit_colours(),
        }
    ),
    "alpha": _files({"train/ant/alpha.png": encoded(_with_alpha(random_image(142)), "PNG")}),
    "palette": _files({"train/ant/palette.png": encoded(_palette(), "PNG")}),
    "animated": _files(
        {
            f"train/ant/frames.{form.lower()}": _frames(170 + number, form)
            for number, form in enumerate(("TIFF", "WEBP", "PNG"))
        }
    ),
    "exif_rotated": _files(
        {
            f"train/ant/turned.{form.lower()}": _turned(160 + number, form)
            for number, form in enumerate(("JPEG", "PNG", "TIFF", "WEBP"))
        }
    ),
    "blank": _files({"train/ant/black.png": encoded(Image.new("RGB", (64, 48)), "PNG")}),
    "hidden": _files(
        {
            "train/.ipynb_checkpoints/0.jpg": encoded(random_image(150)),
            "train/ant/.thumbs/0.jpg": encoded(random_image(151)),
            "val/bee/._0.jpg": b"a resource fork",
        },
        found=["train/.ipynb_checkpoints", "train/ant/.thumbs", "val/bee/._0.jpg"],
    ),
    "nested_folder": _files({"train/ant/more/deep.jpg": encoded(random_image(152))}, found=["train/ant/more"]),
    "repeated_folder": _repeated_folder,
    "other_file": _files({"train/ant/notes.txt": b"not an image"}),
    "link_outside": _link_outside,
    "file_case": _files(
        {"train/ant/Same.jpg": encoded(random_image(153)), "train/ant/same.jpg": encoded(random_image(154))},
        found=["train/ant/Same.jpg"],
    ),
    "class_imbalance": _imbalance,
}
