"""`linvit export`: write a trained model for another runtime, open it there and compare it.

Heavy imports are inside functions to keep `--help` fast.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linvit.export.options import SUFFIXES, ExportOptions
from linvit.settings.flags import UsageError, check_files, check_folder, check_inputs, parse_options

if TYPE_CHECKING:
    from torch import Tensor

    from linvit.data.augment.build import InputSpec
    from linvit.runs.folder import Classifier
    from linvit.runtimes.metadata import ExportMetadata

SUMMARY = "write a model for ONNX Runtime, OpenVINO or torch.export, and check it"
# Images of DATA or --images that the models are compared on.
_MOST_IMAGES = 64
_BATCH_SIZE = 16


def main(argv: Sequence[str]) -> int:
    """Export, and return the exit status."""
    options = parse_options(
        ExportOptions,
        argv,
        prog="linvit export",
        description="Write a trained model for another runtime, open the file there and compare it with the model.",
        positionals={"source": "SOURCE"},
        spellings={
            "output": ["-o", "--output"],
            "json_file": ["--json"],
            "model": ["-m", "--model"],
            "workers": ["-j", "--workers"],
        },
    )
    return export_command(options)


def export_command(options: ExportOptions) -> int:
    """Write the model to a hidden folder, check it there, and move it to its name; returns the exit status.

    Raises UsageError for an output that cannot be written, and ValueError, leaving nothing, for a model that the format
    does not take or that differs from the original by more than the tolerance.
    """
    from linvit.evaluation.inference import check_classifier, input_spec, open_source
    from linvit.output.files import scratch_of, target_of, write_json, writing
    from linvit.runs.folder import source_files
    from linvit.runtimes.model import is_exported

    kind, inputs = options.resolved_format, source_files(options.source)
    check_inputs(("--class-map", options.class_map), ("--images", options.images))
    check_files(("--json", options.json_file), inputs=inputs)
    _check_output(options, inputs)
    if is_exported(options.source):
        raise ValueError(f"{options.source} is an exported model already: export from the run that it came from")
    _check_packages(kind)
    _check_images(options)
    classifier = open_source(options)
    check_classifier(classifier)
    spec = input_spec(classifier, img_size=options.size)
    metadata = _describe(classifier, spec, options)
    target = target_of(options.output)
    scratch = scratch_of(target)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with writing(options.output):
            scratch.mkdir()
            results = _write_and_check(classifier, spec, metadata, options, scratch / target.name)
            results["bytes"] = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
            _move(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if options.json_file is not None:
        write_json(options.json_file, {"source": options.source, "output": str(options.output), **results})
    _show(options, results)
    return 0


def _check_output(options: ExportOptions, inputs: Sequence[Path]) -> None:
    if options.resolved_format in SUFFIXES:
        check_files(("--output", options.output), inputs=inputs)
        return
    if options.output.exists() and not options.output.is_dir():
        raise UsageError(f"--output {options.output} is a file; give a folder for {options.resolved_format}")
    if options.output.is_dir() and any(options.output.resolve() in file.resolve().parents for file in inputs):
        raise UsageError(f"--output {options.output} holds the files of {options.source}; choose another folder")
    check_folder("--output", options.output)
    options.output.parent.mkdir(parents=True, exist_ok=True)


def _check_packages(kind: str) -> None:
    from linvit.runtimes.metadata import need

    packages = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
    for package in packages.get(kind, ()):
        need(package, f"--format {kind}")


def _check_images(options: ExportOptions) -> None:
    """Raise ValueError, before minutes of exporting, for images that do not exist or cannot be read."""
    from linvit.data.decode import read_image
    from linvit.data.sources.open import open_images

    if options.data_dir is not None:
        for split in {options.split, options.calibration_split if options.int8 else options.split}:
            open_images(options.data_dir, split=split, missing_classes="allow")
    for path in _sample(options):
        read_image(path)


def _describe(classifier: Classifier, spec: InputSpec, options: ExportOptions) -> ExportMetadata:
    import timm
    import torch

    from linvit.evaluation.inference import source_digest
    from linvit.explanation.cam import check_class_maps, patch_grid
    from linvit.runtimes.metadata import describe
    from linvit.version import __version__

    heatmaps = None
    if options.with_heatmap:
        check_class_maps(classifier.model)
        heatmaps = patch_grid(classifier.model, spec.size)
    weights = source_digest(classifier.model)
    return describe(
        architecture=classifier.model.pretrained_cfg["architecture"],
        num_classes=classifier.model.num_classes,
        class_names=classifier.class_names,
        spec=spec,
        with_preprocessing=options.with_preprocessing,
        heatmaps=heatmaps,
        precision="int8" if options.int8 else options.half or "float32",
        # Sets of classes that were calibrated on the float model do not hold for its int8 version.
        weights=f"int8 of {weights}" if options.int8 else weights,
        versions={"linvit": __version__, "timm": timm.__version__, "torch": torch.__version__},
    )


def _write_and_check(
    classifier: Classifier, spec: InputSpec, metadata: ExportMetadata, options: ExportOptions, path: Path
) -> dict[str, Any]:
    """Write the model to `path`, whose folder is empty, and compare it; returns the results by name."""
    from functools import partial

    from linvit.explanation.cam import forward_with_maps
    from linvit.export.check import Forward, compare, compare_accuracy, random_images, require, time_models
    from linvit.export.write import open_written, write_model
    from linvit.runtimes.model import ExportedModel

    write_model(classifier, spec, metadata, options, path, _calibration_batches(options, spec))
    exported = open_written(path, options)
    model = classifier.model.cpu().eval()
    forwards: tuple[Forward, Forward] = (model, exported)
    if isinstance(exported, ExportedModel) and metadata.heatmaps is not None:
        forwards = (partial(forward_with_maps, model, grid_size=metadata.heatmaps), exported.class_maps)
    found = [compare(*forwards, random_images(spec, seed=options.seed), images="random")]
    for images, batches in _real_images(options, spec):
        found.append(compare(*forwards, batches, images=images))
    results: dict[str, Any] = {"format": options.resolved_format, "precision": metadata.precision}
    results["agreement"] = [asdict(each) for each in found]
    if options.int8:
        results["accuracy"] = compare_accuracy(options, str(path))
    for each in found:
        # Random images do not lie in the ranges that int8 was calibrated on.
        if options.tolerance is not None or not options.int8:
            require(each, precision=metadata.precision, tolerance=options.tolerance)
    if options.benchmark:
        results["seconds"] = time_models({"torch": model, options.resolved_format: exported}, spec, options)
    return results


def _calibration_batches(options: ExportOptions, spec: InputSpec) -> Iterator[Tensor]:
    """Normalised images to calibrate int8 on; empty without --int8. Images are read when they are asked for."""
    if options.int8:
        assert options.data_dir is not None
        yield from _labelled(options, spec, split=options.calibration_split, most=options.calibration_images)


def _real_images(options: ExportOptions, spec: InputSpec) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Names of the image sources, and their normalised images."""
    from linvit.data.sources.loose import load_batches

    if options.data_dir is not None:
        yield options.split, _labelled(options, spec, split=options.split, most=_MOST_IMAGES)
    if options.images is not None:
        yield options.images.name, load_batches(_sample(options), spec, batch_size=_BATCH_SIZE)


def _sample(options: ExportOptions) -> list[str]:
    """The files of --images to compare on; none without the option."""
    from linvit.data.sources.loose import sample_paths

    if options.images is None:
        return []
    return sample_paths(options.images, count=_MOST_IMAGES, seed=options.seed)


def _labelled(options: ExportOptions, spec: InputSpec, *, split: str, most: int) -> Iterator[Tensor]:
    """At most `most` images of a split, evenly spaced, in batches (B, 3, H, W)."""
    import numpy as np

    from linvit.data.loader import create_eval_loader
    from linvit.data.sources.base import ImageSubset
    from linvit.data.sources.open import open_images

    assert options.data_dir is not None
    images = open_images(options.data_dir, split=split, missing_classes="allow")
    chosen = np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).astype(int))
    loader = create_eval_loader(
        ImageSubset(images, chosen, split=split),
        spec,
        batch_size=_BATCH_SIZE,
        workers=options.workers,
        device="cpu",
        on_bad_image="skip",
    )
    yield from (batch.images for batch in loader if len(batch.images))


def _move(scratch: Path, target: Path) -> None:
    """Move what was written to its name: the folder `scratch/NAME`, or files beside each other."""
    from linvit.output.files import replace_files

    inner = scratch / target.name
    if inner.is_dir():
        replace_files(inner, target)
    else:
        replace_files(scratch, target.parent)


def _show(options: ExportOptions, results: dict[str, Any]) -> None:
    from linvit.output.terminal import format_bytes, page, print_line, table

    has_maps = results["agreement"][0]["heatmap"] is not None
    columns = ("images", "number", "largest difference", "same top-1", *(("of heat maps",) if has_maps else ()))
    made = table(columns, text=("images",))
    for each in results["agreement"]:
        cells = [each["images"], f"{each['num_images']}", f"{each['difference']:.1e}", f"{100 * each['top1']:.1f} %"]
        made.add_row(*cells, *([f"{100 * each['heatmap']:.2g} %"] if has_maps else []))
    page().print(made)
    if "accuracy" in results:
        found = results["accuracy"]
        print_line(
            f"top-1 on {found['num_images']:,} images of {options.split}: {found['float']:.2f} % in float, "
            f"{found['int8']:.2f} % in int8"
        )
    for name, seconds in results.get("seconds", {}).items():
        print_line(f"{name}: {1000 * seconds['median']:.1f} ms (n = {seconds['n']})")
    print_line(f"{options.output}: {results['format']}, {results['precision']}, {format_bytes(results['bytes'])}")
