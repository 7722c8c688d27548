"""Classify images with an exported model by ONNX Runtime, NumPy and Pillow, without torch or linvit.

    pip install onnxruntime pillow
    linvit export output/RUN -o model.onnx                  # where linvit is installed
    python onnx_runtime.py model.onnx photo.jpg scan.png    # anywhere

Prints a line per image: path, then label and probability of the most probable classes, separated by tabs.
Results differ slightly from those of `linvit predict`, because Pillow decodes and resizes here: pixels by about one
grey level, and probabilities by less than 0.01. Colour images of 16 bits per channel are read with 8 bits.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FIELDS = ("num_classes", "input", "output", "img_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def open_model(path: str) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    """The model and its record of classes and input. Raises ValueError if the file is not one of `linvit export`."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    available = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    try:
        session = onnxruntime.InferenceSession(path, providers=providers)
    # ONNX Runtime's errors have no common class.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a model that ONNX Runtime can open: {reason}") from error
    try:
        record = json.loads(session.get_modelmeta().custom_metadata_map.get("linvit", "null"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or any(name not in record for name in FIELDS):
        raise ValueError(f"{path} has no record of its classes and input; export the model with `linvit export`")
    return session, record


def prepare(path: str, record: dict[str, Any]) -> np.ndarray:
    """An image file as the model sees it, (height, width, 3) uint8 RGB. Raises ValueError if it cannot be read."""
    size = record["img_size"]
    resample = Image.Resampling[record["interpolation"].upper()]
    try:
        with Image.open(path) as file:
            # In the upright image, height and width of a rotated one change places.
            is_rotated = file.getexif().get(0x0112, 1) >= 5
            resized = resized_size(file.size if is_rotated else file.size[::-1], record)
            # A large JPEG is decoded at a reduced size, but at least twice the size needed.
            if resample != Image.Resampling.NEAREST:
                height, width = (2 * length for length in resized)
                file.draft(None, (height, width) if is_rotated else (width, height))
            image = to_rgb(ImageOps.exif_transpose(file), record)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    # Resize only the part that is visible; where the model sees more than the image, fill the rest.
    offsets = [centre_offset(*lengths) for lengths in zip(resized, size)]
    top, left = (max(offset, 0) for offset in offsets)
    bottom, right = (min(offset + length, whole) for offset, length, whole in zip(offsets, size, resized))
    y_scale, x_scale = image.height / resized[0], image.width / resized[1]
    if resample == Image.Resampling.NEAREST:
        rows = nearest(image.height, resized[0])[top:bottom]
        columns = nearest(image.width, resized[1])[left:right]
        part = Image.fromarray(np.asarray(image)[rows[:, None], columns])
    else:
        box = (left * x_scale, top * y_scale, right * x_scale, bottom * y_scale)
        part = image.resize((right - left, bottom - top), resample, box=box)
    is_filled = record["crop_mode"] == "border"
    fill = tuple(min(255, round(255 * value)) if is_filled else 0 for value in record["mean"])
    canvas = Image.new("RGB", (size[1], size[0]), fill)
    canvas.paste(part, (left - offsets[1], top - offsets[0]))
    return np.asarray(canvas)


def nearest(old: int, new: int) -> np.ndarray:
    """The pixel that contains the centre of each resized pixel, in float32 as torch computes it."""
    centres = np.arange(new, dtype=np.float32) + np.float32(0.5)
    return np.minimum((centres * (np.float32(old) / np.float32(new))).astype(np.int64), old - 1)


def to_rgb(image: Image.Image, record: dict[str, Any]) -> Image.Image:
    """RGB of 8 bits; grey images of 16 bits are scaled by the model's `input_range`, or keep their upper 8 bits."""
    if image.mode == "F":
        raise ValueError("it has floating-point values; convert it to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.float64)
    if values.min() < 0 or values.max() >= 2**16:
        raise ValueError("it has more than 16 bits, or negative values; convert it to 8 or 16 bits")
    low, high = record.get("input_range") or (0, None)
    levels = values // 256 if high is None else np.rint((values - low) * (255 / (high - low))).clip(0, 255)
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def resized_size(shape: tuple[int, int], record: dict[str, Any]) -> tuple[int, int]:
    """(height, width) to which an image of this (height, width) is resized before the crop."""
    (height, width), mode = shape, record["crop_mode"]
    target = [math.floor(length / record["crop_pct"]) for length in record["img_size"]]
    if mode == "squash":
        return target[0], target[1]
    if mode == "center" and target[0] == target[1]:
        shorter = min(shape)
        return int(target[0] * height / shorter), int(target[0] * width / shorter)
    ratios = height / target[0], width / target[1]
    ratio = max(ratios) if mode == "border" else min(ratios)
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def centre_offset(length: int, target: int) -> int:
    """Where a crop of `target` pixels begins; negative if the side is shorter."""
    return round((length - target) / 2) if length >= target else -((target - length) // 2)


def predict(session: onnxruntime.InferenceSession, record: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """Probabilities (N, classes) of prepared images (N, height, width, 3) uint8."""
    if record["input"] == "normalized":
        mean, std = (np.array(record[name], np.float32) for name in ("mean", "std"))
        images = ((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    (output,) = session.run(["output"], {"images": np.ascontiguousarray(images)})
    if record["output"] == "probabilities":
        return output
    exponentials = np.exp(output - output.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="classify images with a model that `linvit export` wrote")
    parser.add_argument("model", help="the .onnx file")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--topk", type=int, default=5, help="classes per image (default 5)")
    args = parser.parse_args()
    try:
        session, record = open_model(args.model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    names = record.get("class_names") or [str(label) for label in range(record["num_classes"])]
    status = 0
    for path in args.images:
        try:
            (probabilities,) = predict(session, record, prepare(path, record)[None])
            if not np.isfinite(probabilities).all():
                raise ValueError(f"{path}: the model's output is NaN or infinite")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
            continue
        best = np.argsort(-probabilities)[: args.topk]
        print(path, *(f"{names[label]}\t{probabilities[label]:.4f}" for label in best), sep="\t")
    return status


if __name__ == "__main__":
    sys.exit(main())
