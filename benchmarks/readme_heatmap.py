"""The heat maps of the README: images side by side with their maps, and the defects that a list of boxes gives.

    python benchmarks/readme_heatmap.py RUN DATA/test/short/a.png DATA/test/open/b.png --boxes DATA/boxes.csv \
        -o docs/heatmap.png

The boxes are drawn on the images only. The format of the list is that of pointing_game.py.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pointing_game import read_boxes

from linvit.data.decode import decode_image
from linvit.explanation.explain import Explainer
from linvit.explanation.maps import METHODS
from linvit.explanation.overlay import normalise
from linvit.output.plots import RED, save_figure
from linvit.runs.folder import load_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("images", type=Path, nargs="+", help="images in class folders")
    parser.add_argument("--boxes", type=Path, required=True)
    parser.add_argument("--method", choices=METHODS, default="relevance")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    classifier = load_classifier(options.run)
    classifier.model.eval()
    explainer = Explainer(classifier)
    figure = Figure(figsize=(1.75 * 2 * len(options.images), 2.0), layout="constrained")
    panels = figure.subplots(1, 2 * len(options.images))
    for number, path in enumerate(options.images):
        image = decode_image(path.read_bytes(), name=path)
        found = explainer.explain(image, method=options.method)
        plain, mapped = panels[2 * number : 2 * number + 2]
        plain.imshow(image)
        plain.set_title(f"{path.parent.name}: the defect", fontsize=9)
        for left, top, right, bottom in read_boxes(options.boxes, path.parent.parent.name)[path.parent.name, path.name]:
            plain.add_patch(
                Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=RED, linewidth=1.5)
            )
        # Pale, so that the map shows on images of two colours.
        mapped.imshow(255 - (255 - image) // 3)
        heat = normalise(found.heat)
        mapped.imshow(heat, cmap="autumn_r", alpha=np.clip(1.5 * heat, 0, 1))
        mapped.set_title(f"linvit: {found.label}, {100 * found.probability:.0f} %", fontsize=9)
        for axes in (plain, mapped):
            axes.axis("off")
    save_figure(options.output, figure, dpi=150)


if __name__ == "__main__":
    main()
