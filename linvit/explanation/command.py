"""`linvit explain`: heat maps of where a model looks in images, as pictures and files.

Heavy imports are inside functions to keep `--help` fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, model_validator

from linvit.data.tiling import create_tiling
from linvit.evaluation.options import SourceOptions
from linvit.settings.fields import ImageSize
from linvit.settings.flags import UsageError, check_files, check_inputs, created_folder, parse_options

if TYPE_CHECKING:
    import numpy as np

    from linvit.data.sources.loose import LooseImages
    from linvit.explanation.explain import Explainer
    from linvit.explanation.page import MapPage

SUMMARY = "show where a model looks in images, as heat maps"
# Orders of patches at random whose mean is the measure for the methods.
_RANDOM_ORDERS = 3


class ExplainOptions(SourceOptions):
    """Which predictions to explain, and how."""

    images: tuple[str, ...] = Field(min_length=1, description="images, folders (searched at any depth) or quoted globs")
    output: Path = Field(description="folder to write the maps to; created if missing")
    method: Literal["attention", "rollout", "relevance", "gradcam", "cam", "keys"] | None = Field(
        None,
        description="relevance: attention through all layers, weighted by gradients for the class; rollout: attention "
        "through all layers; attention: of each layer and head; gradcam: last tokens, weighted by gradients for the "
        "class; cam: what each patch adds to the logit of the class, if the model pools all patches; keys: what each "
        "projected key averages (default: relevance; exported models: cam)",
    )
    target: str | None = Field(
        None, description="class to explain, by name or index (default: the predicted class of each image)"
    )
    deletion: bool = Field(
        False,
        description="measure which method to trust: how fast the probability falls when the patches that a map marks "
        "are greyed out, and how fast it rises when they are revealed, against a random order",
    )
    page_size: int = Field(
        20,
        ge=0,
        description="largest size of index.html in MB, about: rows of single heads are left out first, then rows of "
        "later images; 0 writes no page",
    )
    json_file: Path | None = Field(
        None, description="also write predictions and the areas under the curves to this file"
    )

    tile: ImageSize | None = Field(
        None,
        description="cut larger images into tiles of this size in pixels, and merge their maps (default: no tiles)",
    )
    overlap: int | None = Field(
        None, ge=0, description="minimum number of pixels that neighbouring tiles share (default: an eighth of a tile)"
    )

    @model_validator(mode="after")
    def _check(self) -> ExplainOptions:
        if self.target is not None and self.method not in (None, "relevance", "gradcam", "cam"):
            raise ValueError(
                f"--class is for --method relevance, gradcam and cam; {self.method} does not explain a class"
            )
        if self.tile is None and self.overlap is not None:
            raise ValueError("--overlap needs --tile SIZE")
        if self.tile is not None and (self.deletion or self.method == "keys"):
            raise ValueError("--deletion and --method keys explain the model's own input: remove --tile")
        create_tiling(self.tile, overlap=self.overlap)
        return self


def main(argv: Sequence[str]) -> int:
    """Explain, and return the exit status."""
    options = parse_options(
        ExplainOptions,
        argv,
        prog="linvit explain",
        description="Write heat maps of where a model looks in images: a page index.html to click through, and for "
        "each image a picture NAME.png, the values of the patches NAME.npy, and the values at the image's size "
        "NAME.values.png.",
        positionals={"source": "SOURCE", "images": "IMAGE"},
        spellings={
            "output": ["-o", "--output"],
            "target": ["--class"],
            "json_file": ["--json"],
            "model": ["-m", "--model"],
        },
    )
    return explain_command(options)


def explain_command(options: ExplainOptions) -> int:
    """Write a map for every image; returns 1 if none of the images can be read.

    Raises UsageError, before anything is loaded, for a path that does not exist and a folder that cannot be written.
    """
    from linvit.data.sources.base import PackedStrings
    from linvit.data.sources.loose import LooseImages, expand
    from linvit.runtimes.model import is_exported

    check_inputs(("--class-map", options.class_map))
    try:
        images = LooseImages(
            PackedStrings.pack(path for image in options.images for path in expand(image, missing="refuse"))
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    if options.method is None:
        options = options.model_copy(update={"method": "cam" if is_exported(options.source) else "relevance"})
    with created_folder("--output", options.output):
        return _explain(images, options)


def _explain(images: LooseImages, options: ExplainOptions) -> int:
    """`explain_command` of images, into a folder that exists, by the method of the options."""
    from linvit.device import choose_device
    from linvit.explanation.naming import FileNames, check_maps
    from linvit.explanation.page import PAGE_METHODS
    from linvit.output.files import write_json, write_text
    from linvit.output.terminal import note, print_line, progress_bar
    from linvit.runs.folder import source_files

    page_file = options.output / "index.html" if options.page_size and options.method != "keys" else None
    # The JSON file may be in the folder that was just created.
    check_files(("--json", options.json_file), inputs=[*source_files(options.source), *options.images])
    check_files(("--output", page_file), ("--json", options.json_file))
    paths = map(images.path, range(len(images)))
    if options.method == "keys":
        check_files(
            ("--output", options.output / "keys.png"), inputs=(path for path in paths if path.name == "keys.png")
        )
    else:
        check_maps("--output", options.output, paths, extensions=(".png", ".values.png", ".heads.png"))
    explainer = _create_explainer(options, choose_device(options.device))
    assert options.method is not None
    explainer.check(options.method)
    if options.method == "keys":
        return _write_keys(explainer, options)
    if options.deletion and not explainer.class_names:
        raise UsageError(
            f"{options.source} is a model without a classifier, and --deletion explains a class: remove it"
        )
    target = None if options.target is None else explainer.class_index(options.target)
    names = FileNames()
    page = None if page_file is None else _create_page(explainer, options, num_images=len(images))
    rows: list[dict[str, Any]] = []
    noted: set[str] = set()
    with progress_bar() as bar:
        for index in bar.track(range(len(images)), description="explaining"):
            name = names.name(images.path(index))
            row, approximations = _explain_image(explainer, images, index, options, name=name, target=target, page=page)
            rows.append(row)
            if row["error"] is not None:
                note(f"{row['path']}: {row['error']}")
            for sentence in approximations:
                if sentence not in noted:
                    note(f"approximate: {sentence}")
                noted.add(sentence)
    if options.json_file is not None:
        write_json(options.json_file, {"source": options.source, "method": options.method, "images": rows})
    if page_file is not None and page is not None and page.has_images:
        write_text(page_file, page.html(explainer.approximations(explainer.possible(PAGE_METHODS))))
    if options.deletion:
        _print_areas(rows)
    num_explained = sum(row["error"] is None for row in rows)
    print_line(f"{options.output}: maps of {num_explained:,} of {len(rows):,} images")
    return 0 if num_explained else 1


def _create_explainer(options: ExplainOptions, device: str) -> Explainer:
    from dataclasses import replace

    from linvit.evaluation.inference import open_source
    from linvit.explanation.explain import Explainer

    classifier = open_source(options)
    classifier = replace(classifier, model=classifier.model.to(device))
    return Explainer(classifier, img_size=options.size, tiling=create_tiling(options.tile, overlap=options.overlap))


def _create_page(explainer: Explainer, options: ExplainOptions, *, num_images: int) -> MapPage:
    from linvit.explanation.page import MEGABYTE, PAGE_METHODS, MapPage

    assert options.method is not None
    return MapPage(
        options.source,
        method=options.method,
        methods=explainer.possible(PAGE_METHODS),
        class_names=explainer.class_names,
        num_images=num_images,
        budget=options.page_size * MEGABYTE,
    )


def _explain_image(
    explainer: Explainer,
    images: LooseImages,
    index: int,
    options: ExplainOptions,
    *,
    name: str,
    target: int | None,
    page: MapPage | None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Write the files of one image and add it to the page; returns its row of results, and why its map is not exact."""
    import numpy as np

    from linvit.data.decode import UnreadableImage
    from linvit.explanation import overlay
    from linvit.explanation.explain import one_map
    from linvit.explanation.page import PAGE_METHODS
    from linvit.output.files import write_file

    row: dict[str, Any] = {"path": images.name(index), "error": None}
    try:
        image = images.read(index, input_range=explainer.spec.input_range)
    except UnreadableImage as error:
        return row | {"error": str(error).removeprefix(f"{images.path(index)}: ")}, ()
    assert options.method is not None
    found = explainer.explain(image, method=options.method, target=target, more=() if page is None else PAGE_METHODS)
    if not (np.isfinite(found.probabilities).all() and np.isfinite(found.maps[options.method]).all()):
        return row | {"error": "the model's output for this image is NaN or infinite"}, ()
    title = overlay.title_of(found.label, found.probability, method=options.method, explained=found.explained)
    overlay.save_overlay(options.output / f"{name}.png", image, found.heat, title=title)
    overlay.save_values(options.output / f"{name}.values.png", found.heat)
    if found.plan is not None:
        patches = one_map(options.method, found.maps[options.method])
        write_file(options.output / f"{name}.npy", lambda file: np.save(file, patches))
        if options.method == "attention":
            overlay.save_heads(options.output / f"{name}.heads.png", found.maps["attention"], title=title)
    if page is not None:
        page.add(images.name(index) or name, image, found)
    row |= {"label": found.label, "probability": found.probability, "explained": found.explained}
    if options.deletion:
        row["areas"] = _areas(explainer, image, target)
    return row, found.approximations


def _areas(explainer: Explainer, image: np.ndarray, target: int | None) -> dict[str, dict[str, float]]:
    """Areas under the deletion and insertion curves of each method, and the mean over random orders."""
    from statistics import fmean

    import torch

    from linvit.explanation.deletion import measure_curves, random_map
    from linvit.explanation.maps import METHODS

    pixels, _ = explainer.prepare(image)
    shown = int(explainer.probabilities(pixels)[0].argmax()) if target is None else target
    maps: dict[str, list[torch.Tensor]] = {
        method: [torch.from_numpy(explainer.patch_map(pixels, method, shown))]
        for method in explainer.possible(METHODS)
        if method != "keys"
    }
    height, width = next(iter(maps.values()))[0].shape
    maps["random"] = [random_map((height, width), seed=seed) for seed in range(_RANDOM_ORDERS)]
    areas: dict[str, dict[str, float]] = {}
    for method, drawn in maps.items():
        curves = [measure_curves(explainer.probabilities, pixels, each, target=shown) for each in drawn]
        areas[method] = {
            "deletion": fmean(each.deletion_area for each in curves),
            "insertion": fmean(each.insertion_area for each in curves),
        }
    return areas


def _print_areas(rows: Sequence[dict[str, Any]]) -> None:
    """Print the mean areas of each method over all images."""
    from statistics import fmean

    from linvit.output.terminal import page, table

    measured = [row["areas"] for row in rows if "areas" in row]
    if not measured:
        return
    made = table(("method", "deletion (lower is better)", "insertion (higher is better)"), text=("method",))
    for method in measured[0]:
        made.add_row(
            method, *(f"{fmean(areas[method][curve] for areas in measured):.4f}" for curve in ("deletion", "insertion"))
        )
    page().print(made)


def _write_keys(explainer: Explainer, options: ExplainOptions) -> int:
    """Write what each projected key averages, which is the same for all images."""
    import numpy as np

    from linvit.explanation import overlay
    from linvit.output.files import write_file
    from linvit.output.terminal import note, print_line

    found, approximations = explainer.keys()
    overlay.save_keys(options.output / "keys.png", found)
    write_file(options.output / "keys.npz", lambda file: np.savez(file, **cast("dict[str, Any]", found)))
    for sentence in approximations:
        note(f"approximate: {sentence}")
    print_line(f"{options.output}: what the keys of {len(found)} layers average")
    return 0
