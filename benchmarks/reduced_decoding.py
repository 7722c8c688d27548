"""Measure how decoding JPEGs at a reduced size changes pixels and the accuracy of a trained classifier.

    python benchmarks/reduced_decoding.py RUN DATA --num-images 2000 --json benchmarks/results/reduced_decoding.json

Photographs are enlarged to the smallest size at which they are decoded at 1/2, 1/4 and 1/8. This is the worst case: the
decoded sides are no more than twice those of the input. Differences are means over pixels, in grey levels. For
comparison, the difference between bilinear and bicubic resizing of the full image is listed too.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from linvit.data.augment.build import build_eval_pipeline
from linvit.data.decode import decode_image
from linvit.data.loader import normalize
from linvit.data.sources.open import open_images
from linvit.evaluation.inference import input_spec
from linvit.measure.provenance import provenance, script_command
from linvit.output.files import write_json
from linvit.runs.folder import load_classifier


def enlarged(image: np.ndarray, shorter: int) -> bytes:
    """A JPEG of the image, resized so that its shorter side has `shorter` pixels, rounded up to whole blocks."""
    height, width = image.shape[:2]
    scale = shorter / min(height, width)
    size = [-(-round(length * scale) // 8) * 8 for length in (width, height)]
    bgr = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("data", type=Path)
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    classifier = load_classifier(args.run)
    spec = input_spec(classifier)
    images = open_images(args.data, split="val", class_names=classifier.class_names)
    drawn = np.random.default_rng(0).permutation(len(images))[: args.num_images].tolist()
    pipeline = build_eval_pipeline(spec)
    other = build_eval_pipeline(
        replace(spec, interpolation="bilinear" if spec.interpolation == "bicubic" else "bicubic")
    )

    @torch.inference_mode()
    def is_right(pixels: np.ndarray, label: int) -> bool:
        logits = classifier.model(normalize(torch.from_numpy(pixels)[None], spec))
        return bool(logits.argmax() == label)

    rows: list[dict[str, Any]] = []
    for reduction in (2, 4, 8):
        shorter = int(2 * reduction * min(spec.size) / spec.crop_pct) + 8
        sums = np.zeros(4)
        changed = 0
        for index in drawn:
            data, label = enlarged(images.read(index), shorter), images.label(index)
            decoded = decode_image(data, name="")
            full, resized = (each(image=decoded)["image"] for each in (pipeline, other))
            reduced = pipeline.read(data, name="")
            hits = is_right(full, label), is_right(reduced, label)
            changed += hits[0] != hits[1]
            differences = (np.abs(each.astype(int) - full).mean() for each in (reduced, resized))
            sums += [*differences, *hits]
        difference, between_filters, *top1 = (sums / len(drawn)).tolist()
        rows.append(
            {
                "decoded_at": f"1/{reduction}",
                "difference": round(difference, 3),
                "bilinear_to_bicubic": round(between_filters, 3),
                "top1_whole": round(100 * top1[0], 2),
                "top1_reduced": round(100 * top1[1], 2),
                "images_right_in_one_only": changed,
            }
        )
        print(rows[-1], flush=True)
    if args.json is not None:
        about = provenance(script_command(), seed=0, n=1) | {"num_images": len(drawn), "img_size": list(spec.size)}
        write_json(args.json, about | {"rows": rows})


if __name__ == "__main__":
    main()
