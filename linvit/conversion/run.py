"""Run `linvit convert`: load, plan, convert, fit, distil, measure and save."""

from pathlib import Path
from typing import Any

import timm
import torch

from linvit.conversion.blocks import Vit, embed
from linvit.conversion.calibration import Activations, CalibrationImages
from linvit.conversion.comparison import Comparison, Fidelity, Speed, measure_speed, resized_copy
from linvit.conversion.convert import convert_vit, linformer_keywords
from linvit.conversion.distil import DistilOptions, distil
from linvit.conversion.fit import FitOptions, LayerFit, fit_layers
from linvit.conversion.options import ConvertOptions
from linvit.conversion.planning import plan_lengths
from linvit.conversion.restore import layer_to_restore, with_ordinary_layers
from linvit.conversion.results import ConversionResult
from linvit.conversion.solvers import DescentOptions
from linvit.conversion.state import FitState, load_converted
from linvit.device import choose_device
from linvit.evaluation.inference import input_spec
from linvit.measure.provenance import provenance
from linvit.measure.timing import exact_float32
from linvit.model.build import create_model
from linvit.model.sharing import ProjectedLength
from linvit.model.transformer import LinformerTransformer
from linvit.output.files import sha256_of, write_json
from linvit.output.terminal import page, progress_bar, show_line
from linvit.runs.folder import Classifier, load_classifier, source_files
from linvit.settings.fields import height_and_width
from linvit.settings.flags import UsageError, check_files

DEFAULT_SPEEDUP = 1.5
# Number of images on which --k plan tries lengths.
NUM_PLANNING_IMAGES = 8
# Options that change the fit. The others may differ when an interrupted conversion resumes.
_FIT_SETTINGS = (
    *("source", "weights", "model_kwargs", "k", "speedup", "plan_by", "layers", "projection", "share", "local"),
    *("full_layers", "img_size", "num_images", "steps", "max_error", "amp", "batch_size", "seed"),
)


def convert_command(options: ConvertOptions, *, command: str) -> int:
    """Convert, fit, measure and save a model; returns the exit status. `command` is recorded in the results.

    Fitted layers are saved beside the output folder until that is written, so the same command resumes after an
    interruption.

    Raises UsageError or ValueError if model, options and images do not fit together or fidelity is below the bound,
    and OSError if files cannot be written.
    """
    _check_paths(options)
    origin = provenance(command, seed=options.seed, n=options.rounds)
    with exact_float32():
        conversion = _Conversion(options)
        result = conversion.run()
    images = conversion.images
    counts = {
        "num_images": len(images.fit_paths),
        "num_held_out": images.num_held_out,
        "num_unseen": len(images.unseen_paths),
    }
    results = {**origin, "options": options.model_dump(mode="json"), **counts, **result.to_dict()}
    if options.json_file is not None:
        write_json(options.json_file, results)
    console = page(outputs=[options.json_file])
    result.show(console)
    result.check(options.min_cosine, options.output)
    result.save(options.output, results)
    conversion.state.remove()
    show_line(console, f'{options.output}: timm.create_model("local-dir:{options.output}", pretrained=True)')
    return 0


def _check_paths(options: ConvertOptions) -> None:
    """Raise UsageError if files are missing or cannot be written, before minutes of work."""
    if options.output.exists():
        raise UsageError(f"--output {options.output} exists already: choose another folder")
    if options.start_from is not None and not options.start_from.is_dir():
        raise UsageError(
            f"--start-from {options.start_from}: there is no such folder; give the output folder of a conversion"
        )
    inputs = [*source_files(options.source), *filter(None, [options.images, options.weights])]
    check_files(("--output", options.output), ("--json", options.json_file), inputs=inputs)


class _Conversion:
    """The stages of one conversion, with the model, images, state and progress bar that they share."""

    def __init__(self, options: ConvertOptions) -> None:
        self.options = options
        device = torch.device(choose_device(options.device))
        self.classifier = _load_original(options)
        assert isinstance(self.classifier.model, Vit)
        self.original = self.classifier.model.to(device, torch.float32)
        for planned_size in options.target_size:
            _check_patches(self.classifier, height_and_width(planned_size))
        self.start = None if options.start_from is None else load_converted(options.start_from, self.original)
        if self.start is not None:
            self.start.model.to(device, torch.float32)
        self.images = CalibrationImages(
            options.images,
            input_spec(self.classifier, img_size=options.size),
            device,
            num_images=options.num_images,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        is_planned = options.k == "plan" and self.start is None
        if is_planned:
            _check_planned_size(options, self.images.spec.size)
        weights = Path(self.classifier.weights)
        settings = {
            **options.model_dump(mode="json", include=set(_FIT_SETTINGS)),
            "weights": sha256_of(weights) if weights.is_file() else self.classifier.weights,
            "images": self.images.fit_paths,
            "target_size": options.target_size[:1] if is_planned else (),
            "start_from": self.start and sha256_of(Path(self.start.weights)),
        }
        self.state = FitState(options.output, settings)
        self.bar = progress_bar()

    def run(self) -> ConversionResult:
        with self.bar:
            activations = self._embed()
            converted = self._convert(activations)
            for size in self.options.target_size:
                _check_target_size(converted, height_and_width(size))
            unseen = Comparison(self.original, self.images.unseen_images(), batch_size=self.options.batch_size)
            first_stage = "pooled" if self.start is None else "before"
            fidelity = {first_stage: unseen.fidelity(converted)}
            converted, fits = self._fit_and_restore(converted, activations)
            del activations
            fidelity["fitted"] = unseen.fidelity(converted)
            if self.options.distill_steps is not None or self.options.distill_minutes is not None:
                fidelity["distilled"] = self._distil(converted, unseen)
            speeds = self._measure_speed(converted)
        return ConversionResult(converted, self.classifier, self.images.spec, fits, fidelity, speeds)

    @torch.no_grad()
    def _embed(self) -> Activations:
        task = self.bar.add_task("reading images", total=len(self.images.fit_paths))
        # An earlier distillation has also trained the embedding of patches.
        models = [each.model for each in (self.classifier, self.start) if each is not None]
        batches = []
        for images in self.images.fit_batches():
            batches.append([embed(model, images) for model in models])
            self.bar.advance(task, len(images))
        tokens = [torch.cat(each) for each in zip(*batches)]
        return Activations(
            original=tokens[0],
            converted=tokens[-1],
            num_held_out=self.images.num_held_out,
            num_prefix_tokens=self.original.num_prefix_tokens,
            batch_size=self.options.batch_size,
            amp=self.options.amp,
        )

    def _convert(self, activations: Activations) -> LinformerTransformer:
        options = self.options
        if self.start is not None:
            assert isinstance(self.start.model, LinformerTransformer)
            return self.start.model
        k: ProjectedLength
        if options.k == "plan":
            k = self.state.plan(lambda: self._plan(activations))
        elif options.converted_layers is not None and isinstance(options.k, int):
            k = _lengths_by_layer(options.converted_layers, options.k, depth=len(self.original.blocks))
        else:
            k = options.k
        torch.manual_seed(options.seed)
        return convert_vit(self.original, k=k, projection=options.projection, share=options.share, local=options.local)

    def _plan(self, activations: Activations) -> list[int | None]:
        task = self.bar.add_task("planning", total=None)
        sizes = self.options.target_size
        return plan_lengths(
            self.original,
            activations.original[:NUM_PLANNING_IMAGES],
            speedup=self.options.speedup or DEFAULT_SPEEDUP,
            projection=self.options.projection,
            share=self.options.share,
            local=self.options.local,
            by=self.options.plan_by,
            batch_size=self._batch_size,
            target_size=height_and_width(sizes[0]) if sizes else None,
            amp=self.options.amp,
            times_in_bfloat16=self._times_in_bfloat16,
            report=lambda done, total: self.bar.update(task, completed=done, total=total),
        )

    def _fit_and_restore(
        self, initial: LinformerTransformer, activations: Activations
    ) -> tuple[LinformerTransformer, list[LayerFit]]:
        """Fit all layers, give some their ordinary attention back, and fit again from there."""
        if self.options.full_layers == 0:
            return initial, self._fit(initial, activations)
        while True:
            restored = self.state.restored
            converted = with_ordinary_layers(self.original, initial, restored)
            fits = self._fit(converted, activations)
            if len(restored) >= self.options.full_layers:
                return converted, fits
            activations = self._embed()
            layer = layer_to_restore(self.original, converted, activations)
            if layer is None:
                return converted, fits
            self.state.restore(layer)

    def _fit(self, converted: LinformerTransformer, activations: Activations) -> list[LayerFit]:
        task = self.bar.add_task("fitting layers", total=len(converted.blocks))
        done = self.state.load(converted)
        self.bar.advance(task, len(done))

        def report(fit: LayerFit) -> None:
            self.state.save(fit, converted)
            self.bar.advance(task)

        descent = DescentOptions(self.options.steps)
        options = FitOptions(descent, max_error=self.options.max_error, seed=self.options.seed)
        return fit_layers(self.original, converted, activations, options, done=done, report=report)

    def _distil(self, converted: LinformerTransformer, unseen: Comparison) -> Fidelity:
        task = self.bar.add_task("distilling", total=100)
        options = self.options
        return distil(
            self.original,
            converted,
            self.images.training_batches(options.distill_batch_size),
            unseen,
            DistilOptions(
                options.distill_steps,
                options.distill_minutes,
                options.distill_rate,
                options.amp,
                options.distill_loss,
                options.distill_accumulate,
            ),
            report=lambda progress: self.bar.update(task, completed=100 * progress),
        )

    def _measure_speed(self, converted: LinformerTransformer) -> list[Speed]:
        rounds = self.options.rounds
        if rounds == 0:
            return []
        sizes = [height_and_width(size) for size in self.options.target_size] or [self.images.spec.size]
        task = self.bar.add_task("timing", total=len(sizes) * rounds)

        def report(index: int) -> None:
            self.bar.advance(task)

        arguments: dict[str, Any] = {"rounds": rounds, "batch_size": self._batch_size, "amp": self._times_in_bfloat16}
        return [measure_speed(self.original, converted, size, report=report, **arguments) for size in sizes]

    @property
    def _batch_size(self) -> int:
        """Images per timed pass: CPUs mostly process single images, on which a GPU would idle."""
        return self.options.batch_size if self.images.device.type == "cuda" else 1

    @property
    def _times_in_bfloat16(self) -> bool:
        return self.options.amp and self.images.device.type == "cuda"


def _load_original(options: ConvertOptions) -> Classifier:
    """Load the original; raises ValueError for an unsupported model, if possible before its weights are loaded."""
    arguments: dict[str, Any] = {"model_kwargs": options.model_kwargs, "img_size": options.size}
    if timm.is_model(options.source.partition(".")[0]):
        with torch.device("meta"):
            linformer_keywords(create_model(options.source, img_size=options.size, **options.model_kwargs))
    if options.weights is None:
        classifier = load_classifier(options.source, **arguments)
    elif not options.weights.exists():
        raise UsageError(f"--weights {options.weights}: there is no such file; leave it out for timm's own weights")
    else:
        classifier = load_classifier(str(options.weights), model_name=options.source, **arguments)
    linformer_keywords(classifier.model)
    return classifier


def _lengths_by_layer(layers: list[int], k: int, *, depth: int) -> list[int | None]:
    """`k` in the given layers, None in the others."""
    if layers[-1] >= depth:
        raise ValueError(f"--layers names layer {layers[-1]}, but the model has {depth} layers: 0 to {depth - 1}")
    return [k if layer in layers else None for layer in range(depth)]


def _check_patches(classifier: Classifier, size: tuple[int, int]) -> None:
    """Raise ValueError if the model would cut off the edge of images of this size, (height, width)."""
    try:
        input_spec(classifier, img_size=size)
    except ValueError as error:
        raise ValueError(f"--target-size {size[0]}x{size[1]}: {error}") from error


def _check_target_size(converted: LinformerTransformer, size: tuple[int, int]) -> None:
    """Raise ValueError if the converted model does not support images of this size, before it is fitted."""
    try:
        resized_copy(converted, size)
    except ValueError as error:
        raise ValueError(f"--target-size {size[0]}x{size[1]}: {error}") from error


def _check_planned_size(options: ConvertOptions, size: tuple[int, int]) -> None:
    """Raise UsageError if the size to plan for is smaller than that of the conversion, (height, width)."""
    for planned in options.target_size[:1]:
        if any(side < own for side, own in zip(height_and_width(planned), size)):
            raise UsageError(
                f"--target-size starts with a size below {size[0]}x{size[1]}, at which lengths are tried: put the size "
                "to plan for first, and convert at this size or a smaller --img-size"
            )
