"""`linvit spectrum`: its options, and the command from them to its files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linvit.settings.fields import ImageSize, ModelKeywords, height_and_width
from linvit.settings.flags import check_files, parse_options

if TYPE_CHECKING:
    from rich.progress import Progress

    from linvit.spectrum.plan import Plan
    from linvit.spectrum.result import Spectrum

SUMMARY = "measure the ranks of attention, and plan k per layer"
BUDGETS = ("speedup", "flops", "energy")
# Flags that differ from their field's name.
_FLAGS = {"img_size": "img-size", "json_file": "json"}

HeightWidth = tuple[int, int]


class SpectrumOptions(BaseModel):
    """Which model is measured on which images, what is planned, and which files are written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        description="a timm model name, a run's folder, a folder with config.json and weights, or a file written by "
        "--json, from which to plan and draw without measuring again"
    )
    images: Path | None = Field(None, description="folder of images, at any depth")
    weights: Path | None = Field(None, description="weights file for a timm model name")
    model_kwargs: ModelKeywords = Field(default_factory=dict, description="extra arguments of the model")

    img_size: tuple[ImageSize, ...] = Field(
        (), description="one or more image sizes in pixels, such as 518 or 768x512 (default: the model's own)"
    )
    num_images: int = Field(16, gt=0, description="number of images to average over, drawn from the folder")
    seed: int = Field(0, ge=0, description="seed for drawing images and for random projections")
    method: Literal["auto", "exact", "randomized"] = Field(
        "auto",
        description="find all singular values (exact), or the largest by random projection (randomized); auto is exact "
        "up to 3000 tokens",
    )
    rank: int = Field(512, gt=0, description="number of singular values that random projection finds")
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto uses a GPU if there is one")

    speedup: float | None = Field(
        None, gt=1, description="plan to divide the model's operations by this; 2 halves them"
    )
    flops: float | None = Field(
        None, gt=0, lt=1, description="plan to use this share of the model's operations; 0.5 halves them"
    )
    energy: float | None = Field(
        None, gt=0, le=1, description="plan to keep this share of attention's energy in every layer"
    )
    projection: str = Field("separable", description="kind of projection to plan for")
    share: Literal["none", "headwise", "kv", "layerwise"] = Field("kv", description="sharing of E and F to plan for")
    min_k: int = Field(16, gt=0, description="smallest projected length in the plan")

    index: int | None = Field(
        None, gt=0, description="number of singular values that the heat map sums (default: a quarter of the tokens)"
    )
    json_file: Path | None = Field(None, description="write all numbers to this file, from which to plan again")
    csv_file: Path | None = Field(None, description="write a table with one row per size, layer and head to this file")
    plot_file: Path | None = Field(None, description="write curves, heat map, ranks and growth to this PNG file")
    plan_file: Path | None = Field(
        None,
        description="write the plan to this YAML or .json file, as keywords of the model: img_size, k, projection, "
        "share",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        budgets = [f"--{name}" for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"a plan has one budget: give {budgets[0]} or {budgets[1]}")
        if self.plan_file is not None and not budgets:
            raise ValueError("--plan needs a budget: give --speedup, --flops or --energy")
        if self.reads_results:
            given = [name for name in ("images", "weights", "img_size", "json_file") if name in self.model_fields_set]
            if given:
                flag = _FLAGS.get(given[0], given[0])
                raise ValueError(f"{self.source} holds measured spectra: leave out --{flag}")
        elif self.images is None:
            raise ValueError("--images is missing: give a folder of images")
        return self

    @property
    def reads_results(self) -> bool:
        """Whether `source` is a file of measured spectra."""
        return self.source.endswith(".json")

    @property
    def files(self) -> list[tuple[str, Path | None]]:
        """The files to write, with their flags."""
        return [
            ("--json", self.json_file),
            ("--csv", self.csv_file),
            ("--plot", self.plot_file),
            ("--plan", self.plan_file),
        ]

    @property
    def budget(self) -> dict[str, float]:
        """The plan's budget by its name; empty if no plan is requested."""
        return {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}


def main(argv: Sequence[str]) -> int:
    """Run `linvit spectrum` with these arguments and return the exit status."""
    options = parse_options(
        SpectrumOptions,
        argv,
        prog="linvit spectrum",
        description="Measure the ranks of a Vision Transformer's attention, and plan k per layer from them.",
        positionals={"source": "MODEL"},
        spellings={"json_file": ["--json"], "csv_file": ["--csv"], "plot_file": ["--plot"], "plan_file": ["--plan"]},
    )
    return spectrum_command(options, command=shlex.join(["linvit", "spectrum", *argv]))


def spectrum_command(options: SpectrumOptions, *, command: str) -> int:
    """Measure or read spectra, plan, write the files and print tables; returns the exit status.

    `command` is recorded in the results. Raises UsageError if a file could not be written, and ValueError if model,
    weights, images and options do not fit together.
    """
    from linvit.measure.provenance import provenance
    from linvit.output.files import write_json, write_text
    from linvit.runs.folder import source_files
    from linvit.settings.yaml import write_settings
    from linvit.spectrum.plan import make_plan, model_kwargs
    from linvit.spectrum.result import read_spectra
    from linvit.spectrum.show import save_plot, to_csv

    check_files(
        *options.files, inputs=[*source_files(options.source), *filter(None, [options.images, options.weights])]
    )
    origin = provenance(command, seed=options.seed, n=options.num_images)
    spectra = read_spectra(Path(options.source)) if options.reads_results else _measure(options, origin)
    largest = max(spectra, key=lambda spectrum: spectrum.num_tokens)
    settings: dict[str, Any] = {"projection": options.projection, "share": options.share}
    plan = make_plan(largest, options.budget, **settings, min_k=options.min_k) if options.budget else None
    keywords = model_kwargs(largest, plan, **settings) if plan else None
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
    _show(options, spectra, plan, keywords)
    return 0


def _measure(options: SpectrumOptions, origin: dict[str, Any]) -> list[Spectrum]:
    """A spectrum for each size, on the same images; the JSON file is written after each."""
    from linvit.data.sources.loose import sample_paths
    from linvit.device import choose_device
    from linvit.output.streams import is_stream
    from linvit.output.terminal import progress_bar

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
            if options.json_file is not None and not is_stream(options.json_file):
                _write_json(options.json_file, {**origin, "plan": None}, spectra)
    return spectra


def _measure_at(size: HeightWidth | None, paths: list[str], options: SpectrumOptions, bar: Progress) -> Spectrum:
    import torch

    from linvit.data.sources.loose import load_images
    from linvit.device import choose_device
    from linvit.evaluation.inference import input_spec
    from linvit.runs.folder import load_classifier
    from linvit.spectrum.measure import attention_spectrum

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


def _show(
    options: SpectrumOptions, spectra: list[Spectrum], plan: Plan | None, keywords: dict[str, Any] | None
) -> None:
    from linvit.output.terminal import page
    from linvit.spectrum.show import show_growth, show_plan, show_spectrum

    console = page(outputs=(path for _, path in options.files))
    for spectrum in spectra:
        show_spectrum(console, spectrum, options.index)
    if len(spectra) > 1:
        show_growth(console, spectra)
    if plan is not None and keywords is not None:
        show_plan(console, plan, keywords)


def _write_json(path: Path | None, facts: dict[str, Any], spectra: list[Spectrum]) -> None:
    from linvit.output.files import write_json

    if path is not None:
        results = {**facts, "n": spectra[0].num_images, "spectra": [spectrum.to_dict() for spectrum in spectra]}
        write_json(path, results, indent=None)
