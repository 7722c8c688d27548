"""`linvit convert`, from options to a folder."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer

from linvit.bench.run import exact_float32
from linvit.conversion.compatibility import read_layout
from linvit.conversion.convert import convert_vit
from linvit.conversion.descent import Descent
from linvit.conversion.distil import Comparison, DistilOptions, Fidelity, distil
from linvit.conversion.fit import FitOptions, LayerFit, fit_layers
from linvit.conversion.options import ConvertOptions
from linvit.conversion.outcome import Outcome, show_fidelity, show_layers, show_speed
from linvit.conversion.planning import plan_lengths
from linvit.conversion.sample import Sample
from linvit.conversion.speed import Speed, at_size, measure_speed
from linvit.conversion.state import FitState, load_earlier
from linvit.conversion.streams import Streams, embed
from linvit.distributed import choose_device
from linvit.evaluation.inference import input_spec
from linvit.measure.provenance import provenance
from linvit.model.build import create_model
from linvit.model.vit import LinformerViT, ProjectedLength
from linvit.output.files import sha256_of, write_text
from linvit.output.terminal import page, progress_bar
from linvit.runs.folder import Classifier, load_classifier
from linvit.settings.fields import height_and_width
from linvit.settings.flags import UsageError, check_files

DEFAULT_SPEEDUP = 1.5
IMAGES_PLANNED_ON = 8
# What another fit would come out of; the other options may change while it is stopped.
_FITTED_BY = (
    *("source", "weights", "model_kwargs", "k", "speedup", "layers", "projection", "share", "img_size"),
    *("num_images", "steps", "max_error", "amp", "batch_size", "seed"),
)


def convert_command(options: ConvertOptions, *, command: str) -> int:
    """Convert, fit, measure and save; returns the exit status.

    `command` is recorded in the results. Raises UsageError or ValueError where model, options and images do not go
    together or fidelity is below the bound, and OSError where files cannot be written. Layers that are fitted are kept
    beside the output until it is written, and the same command goes on from them.
    """
    _check_paths(options)
    origin = provenance(command, seed=options.seed, n=options.rounds)
    with exact_float32():
        work = _Conversion(options)
        outcome = work.run()
    console = page()
    show_layers(console, outcome.fits)
    show_fidelity(console, outcome.fidelity)
    show_speed(console, outcome.speeds)
    sample = work.sample
    counts = {
        "num_images": len(sample.paths),
        "num_held_out": sample.num_held_out,
        "num_unseen": len(sample.unseen_paths),
    }
    results = {**origin, "options": options.model_dump(mode="json"), **counts, **outcome.to_dict()}
    if options.json_file is not None:
        write_text(options.json_file, json.dumps(results, indent=2) + "\n")
    outcome.check(options.min_cosine, options.output)
    outcome.save(options.output, results)
    work.state.remove()
    print(f'{options.output}: timm.create_model("local-dir:{options.output}", pretrained=True)')
    return 0


class _Conversion:
    """The stages of one conversion, which share model, images, state and progress bar."""

    def __init__(self, options: ConvertOptions) -> None:
        self.options = options
        device = torch.device(choose_device(options.device))
        self.classifier = _load(options)
        assert isinstance(self.classifier.model, VisionTransformer)
        self.original = self.classifier.model.to(device, torch.float32)
        start = options.start_from
        self.earlier = None if start is None else load_earlier(start, self.original)
        self.sample = Sample(
            options.images,
            input_spec(self.classifier, img_size=options.size),
            device,
            num_images=options.num_images,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        is_planned = options.k == "plan" and self.earlier is None
        if is_planned:
            _check_planned_size(options, self.sample.spec.size)
        weights = Path(self.classifier.weights)
        settings = {
            **options.model_dump(mode="json", include=set(_FITTED_BY)),
            "weights": sha256_of(weights) if weights.is_file() else self.classifier.weights,
            "images": self.sample.paths,
            "target_size": options.target_size[:1] if is_planned else (),
            "start_from": self.earlier and sha256_of(Path(self.earlier.weights)),
        }
        self.state = FitState(options.output, settings)
        self.bar = progress_bar()

    def run(self) -> Outcome:
        with self.bar:
            streams = self._embed()
            converted = self._convert(streams)
            for size in self.options.target_size:
                _check_target(converted, size)
            unseen = Comparison(self.original, self.sample.unseen(), batch_size=self.options.batch_size)
            beginning = "pooled" if self.earlier is None else "before"
            fidelity = {beginning: unseen.of(converted)}
            fits = self._fit(converted, streams)
            del streams
            fidelity["fitted"] = unseen.of(converted)
            if self.options.distill_steps is not None or self.options.distill_minutes is not None:
                fidelity["distilled"] = self._distil(converted, unseen)
            speeds = self._time(converted)
        return Outcome(converted, self.classifier, self.sample.spec, fits, fidelity, speeds)

    @torch.no_grad()
    def _embed(self) -> Streams:
        task = self.bar.add_task("reading images", total=len(self.sample.paths))
        tokens = []
        for images in self.sample.batches():
            tokens.append(embed(self.original, images))
            self.bar.advance(task, len(images))
        both = torch.cat(tokens)
        prefix = self.original.num_prefix_tokens
        return Streams(both, both, self.sample.num_held_out, prefix, self.options.batch_size, self.options.amp)

    def _convert(self, streams: Streams) -> LinformerViT:
        options = self.options
        if self.earlier is not None:
            assert isinstance(self.earlier.model, LinformerViT)
            return self.earlier.model.to(streams.original.device, torch.float32)
        k: ProjectedLength
        if options.k == "plan":
            k = self.state.plan(lambda: self._plan(streams))
        elif options.converted_layers is not None and isinstance(options.k, int):
            k = _only(options.converted_layers, options.k, depth=len(self.original.blocks))
        else:
            k = options.k
        torch.manual_seed(options.seed)
        return convert_vit(self.original, k=k, projection=options.projection, share=options.share)

    def _plan(self, streams: Streams) -> list[int | None]:
        task = self.bar.add_task("planning", total=None)
        sizes = self.options.target_size
        return plan_lengths(
            self.original,
            streams.original[:IMAGES_PLANNED_ON],
            speedup=self.options.speedup or DEFAULT_SPEEDUP,
            projection=self.options.projection,
            share=self.options.share,
            at=height_and_width(sizes[0]) if sizes else None,
            amp=self.options.amp,
            report=lambda done, total: self.bar.update(task, completed=done, total=total),
        )

    def _fit(self, converted: LinformerViT, streams: Streams) -> list[LayerFit]:
        task = self.bar.add_task("fitting layers", total=len(converted.blocks))
        done = self.state.load(converted)
        self.bar.advance(task, len(done))

        def report(fit: LayerFit) -> None:
            self.state.save(fit, converted)
            self.bar.advance(task)

        options = FitOptions(Descent(self.options.steps), max_error=self.options.max_error, seed=self.options.seed)
        return fit_layers(self.original, converted, streams, options, done=done, report=report)

    def _distil(self, converted: LinformerViT, unseen: Comparison) -> Fidelity:
        task = self.bar.add_task("distilling", total=100)
        given = self.options
        options = DistilOptions(given.distill_steps, given.distill_minutes, given.distill_rate, given.amp)
        return distil(
            self.original,
            converted,
            self.sample.endless(given.distill_batch_size),
            unseen,
            options,
            report=lambda share: self.bar.update(task, completed=100 * share),
        )

    def _time(self, converted: LinformerViT) -> list[Speed]:
        rounds = self.options.rounds
        if rounds == 0:
            return []
        sizes = [height_and_width(size) for size in self.options.target_size] or [self.sample.spec.size]
        task = self.bar.add_task("timing", total=len(sizes) * rounds)

        def report(index: int) -> None:
            self.bar.advance(task)

        # One image in single precision is what CPUs mostly see; a GPU would idle.
        on_gpu = self.sample.device.type == "cuda"
        batch_size, amp = (self.options.batch_size, self.options.amp) if on_gpu else (1, False)
        return [
            measure_speed(self.original, converted, size, rounds=rounds, batch_size=batch_size, amp=amp, report=report)
            for size in sizes
        ]


def _load(options: ConvertOptions) -> Classifier:
    """The original; ValueError where it is of another layout, before its weights are looked for."""
    arguments: dict[str, Any] = {"model_kwargs": options.model_kwargs, "img_size": options.size}
    if timm.is_model(options.source.partition(".")[0]):
        with torch.device("meta"):
            read_layout(create_model(options.source, img_size=arguments["img_size"], **options.model_kwargs))
    if options.weights is None:
        classifier = load_classifier(options.source, **arguments)
    elif not options.weights.exists():
        raise UsageError(f"--weights {options.weights}: there is no such file; leave it out for timm's own")
    else:
        classifier = load_classifier(str(options.weights), model_name=options.source, **arguments)
    read_layout(classifier.model)
    return classifier


def _only(layers: list[int], k: int, *, depth: int) -> list[int | None]:
    if layers[-1] >= depth:
        raise ValueError(f"--layers names layer {layers[-1]}, but the model has {depth}: 0 to {depth - 1}")
    return [k if layer in layers else None for layer in range(depth)]


def _check_target(converted: LinformerViT, size: int | tuple[int, int]) -> None:
    """Raise ValueError where the converted model cannot take images of this size, before it is fitted."""
    height, width = height_and_width(size)
    try:
        at_size(converted, (height, width))
    except ValueError as error:
        raise ValueError(f"--target-size {height}x{width}: {error}") from error


def _check_planned_size(options: ConvertOptions, size: tuple[int, int]) -> None:
    """Raise UsageError where the size to plan for is smaller than that of the conversion, (height, width)."""
    for planned in options.target_size[:1]:
        if any(side < own for side, own in zip(height_and_width(planned), size)):
            raise UsageError(
                f"--target-size begins with a smaller size than {size[0]}x{size[1]}, at which lengths are tried: put "
                "the size to plan for first, and convert at it or at a smaller --img-size"
            )


def _check_paths(options: ConvertOptions) -> None:
    """Raise UsageError where files are missing or could not be written, before minutes are spent on them."""
    if options.output.exists():
        raise UsageError(f"--output {options.output} exists already: choose another folder")
    if options.start_from is not None and not options.start_from.is_dir():
        raise UsageError(f"--start-from {options.start_from}: there is no such folder; name what a conversion wrote")
    check_files(("--output", options.output), ("--json", options.json_file))
