"""Run `linvit spectrum`: measure or read spectra, plan, print tables and write the files."""

from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from linvit.data.sources.loose import load_images, sample_paths
from linvit.device import choose_device
from linvit.evaluation.inference import input_spec
from linvit.measure.provenance import provenance
from linvit.output.files import write_json, write_text
from linvit.output.terminal import page, progress_bar
from linvit.runs.folder import load_classifier
from linvit.settings.fields import height_and_width
from linvit.settings.flags import check_files
from linvit.settings.yaml import write_settings
from linvit.spectrum.measure import attention_spectrum
from linvit.spectrum.options import SpectrumOptions
from linvit.spectrum.plan import Plan, make_plan, model_kwargs
from linvit.spectrum.plot import save_plot
from linvit.spectrum.result import Spectrum, read_spectra
from linvit.spectrum.show import show_growth, show_plan, show_spectrum, to_csv

HeightWidth = tuple[int, int]


def spectrum_command(options: SpectrumOptions, *, command: str) -> int:
    """Measure or read spectra, plan, print tables and write the files; returns the exit status.

    `command` is recorded in the results. Raises UsageError if a file could not be written, and ValueError if model,
    weights, images and options do not fit together.
    """
    check_files(("--json", options.json_file), ("--csv", options.csv_file))
    check_files(("--plot", options.plot_file), ("--plan", options.plan_file))
    origin = provenance(command, seed=options.seed, n=options.num_images)
    spectra = read_spectra(Path(options.source)) if options.reads_results else _measure(options, origin)
    largest = max(spectra, key=lambda spectrum: spectrum.num_tokens)
    settings: dict[str, Any] = {"projection": options.projection, "share": options.share}
    plan = make_plan(largest, options.budget, **settings, min_k=options.min_k) if options.budget else None
    keywords = model_kwargs(largest, plan, **settings) if plan else None
    _show(spectra, options.index, plan, keywords)
    planned = {"budget": options.budget, "model_kwargs": keywords, **plan.to_dict()} if plan else None
    _write_json(options.json_file, {**origin, "plan": planned}, spectra)
    if options.csv_file is not None:
        write_text(options.csv_file, to_csv(spectra, options.index))
    if options.plot_file is not None:
        save_plot(spectra, options.plot_file, index=options.index, plan=plan, **settings, min_k=options.min_k)
    if options.plan_file is not None and keywords is not None:
        if options.plan_file.suffix == ".json":
            write_json(options.plan_file, keywords, indent=None)
        else:
            write_settings(options.plan_file, keywords)
    return 0


def _measure(options: SpectrumOptions, origin: dict[str, Any]) -> list[Spectrum]:
    """A spectrum for each size, on the same images; the JSON file is written after each."""
    assert options.images is not None
    if options.weights is not None and not options.weights.exists():
        raise ValueError(f"--weights {options.weights}: there is no such file")
    paths = sample_paths(options.images, count=options.num_images, seed=options.seed)
    sizes: list[HeightWidth | None] = [height_and_width(size) for size in options.img_size]
    # Refuse a device that is not there before the progress bar starts.
    choose_device(options.device)
    spectra = []
    with progress_bar() as bar:
        for size in sizes or [None]:
            spectra.append(_measure_at(size, paths, options, bar))
            # Minutes of work must survive an interruption, and a budget that cannot be reached.
            _write_json(options.json_file, {**origin, "plan": None}, spectra)
    return spectra


def _measure_at(size: HeightWidth | None, paths: list[str], options: SpectrumOptions, bar: Progress) -> Spectrum:
    classifier = load_classifier(
        str(options.weights or options.source),
        model_name=options.source if options.weights is not None else None,
        model_kwargs=options.model_kwargs,
        img_size=size,
    )
    device = torch.device(choose_device(options.device))
    spec = input_spec(classifier, img_size=size)
    task = bar.add_task(f"{spec.size[0]}×{spec.size[1]} px, attention matrices", total=None)
    return attention_spectrum(
        classifier.model.to(device),
        load_images(paths, spec).to(device),
        method=options.method,
        rank=options.rank,
        seed=options.seed,
        progress=lambda done, total: bar.update(task, completed=done, total=total),
    )


def _show(spectra: list[Spectrum], index: int | None, plan: Plan | None, keywords: dict[str, Any] | None) -> None:
    console = page()
    for spectrum in spectra:
        show_spectrum(console, spectrum, index)
    if len(spectra) > 1:
        show_growth(console, spectra)
    if plan is not None and keywords is not None:
        show_plan(console, plan, keywords)


def _write_json(path: Path | None, facts: dict[str, Any], spectra: list[Spectrum]) -> None:
    if path is not None:
        results = {**facts, "n": spectra[0].num_images, "spectra": [spectrum.to_dict() for spectrum in spectra]}
        write_json(path, results, indent=None)
