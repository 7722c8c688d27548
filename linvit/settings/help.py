"""Contents of `--help`: an example of each command, and options under headings.

An option has the same heading in every command; a test checks that each example parses with its command's options.
"""

import argparse
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_TRAIN = "data --model linvit_small_patch16_512 --epochs 50 -b 64 --amp --aa rand-m9-mstd0.5-inc1"
# A command line to copy for each program.
EXAMPLES = {
    "train_imagenet.py": f"python train_imagenet.py {_TRAIN}",
    "linvit train": f"linvit train {_TRAIN}",
    "linvit probe": "linvit probe converted data --img-size 518 -o output/PROBE",
    "linvit lr-find": "linvit lr-find data --model linvit_small_patch16_512 -b 64 --plot lr-find.png",
    "linvit average": "linvit average output/RUN --newest 5 -o averaged",
    "linvit check": "linvit check data --html check.html",
    "linvit data": "linvit data elpv data/elpv",
    "linvit eval": "linvit eval output/RUN data --compare output/OTHER --html eval.html",
    "linvit predict": "linvit predict output/RUN photo.jpg scans/ --topk 3 -o predictions.csv",
    "linvit report": "linvit report output/RUN output/OTHER -o report.html",
    "linvit models": "linvit models 'linvit_small*'",
    "linvit convert": "linvit convert vit_small_patch14_dinov2 --images photos --img-size 518 -o converted",
    "linvit export": "linvit export output/RUN -o model.onnx",
    "linvit push": "linvit push output/RUN OWNER/NAME --license apache-2.0 --upload",
    "linvit explain": "linvit explain output/RUN data/val -o maps --deletion",
    "linvit bench": "linvit bench --models linvit_small_patch16_224:k=64 --img-size 512 1024 --plot bench.png",
    "linvit spectrum": "linvit spectrum output/RUN --images data/val --speedup 1.8 --plan plan.yaml",
}

# Headings of the options of commands that have many, in the order of `--help`; other options come first.
HEADINGS = {
    "classes": ("class_map", "allow_subset", "real_labels", "label_type"),
    "calibration and sets of classes": (
        "temperature",
        "temperature_split",
        "conformal",
        "conformal_method",
        "conformal_split",
        "conformal_file",
    ),
    "views and intervals": ("tta", "tta_scales", "bootstrap"),
    "tiles": ("tile", "overlap", "merge", "tile_output"),
    "heat maps": ("heatmap", "heatmap_method", "with_heatmap"),
    "distillation": (
        "distill_steps",
        "distill_minutes",
        "distill_rate",
        "distill_batch_size",
        "distill_accumulate",
        "distill_loss",
    ),
    "plan": ("plan_by", "speedup", "flops", "energy", "min_k", "plan_file"),
    "int8": ("int8", "calibration_split", "calibration_images", "max_drop"),
    "comparison": ("baseline", "min_cosine", "target_size", "tolerance", "benchmark", "rounds"),
    "reading and computing": ("batch_size", "workers", "on_bad_image", "seed", "device", "amp", "amp_dtype"),
    "output": (
        "output",
        "part_format",
        "part_size",
        "features_dir",
        "json_file",
        "csv_file",
        "markdown_file",
        "html_file",
        "confusion",
        "plot_file",
        "page_size",
    ),
}
# Headings of options that commands share, by the class that declares them without "Options".
_SHARED = {"Classifier": "model and preprocessing", "Source": "options", "Predictor": "options"}
# A command with no more options than this has no headings.
_FEW = 8


class HelpFormatter(argparse.HelpFormatter):
    """Fills the paragraphs of a description, except those of several lines, which are examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if "\n" in part else textwrap.fill(part, width, initial_indent=indent, subsequent_indent=indent)
            for part in text.split("\n\n")
        )


def describe(prog: str, description: str) -> str:
    """The description of a program, followed by its example."""
    return f"{description}\n\nexample:\n  {EXAMPLES[prog]}" if prog in EXAMPLES else description


def sections(options: type[BaseModel]) -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """The fields under their headings; those under "options" need none of their own.

    Options of a training run are grouped by the class that declares them, those of other commands by `HEADINGS`.
    """
    fields: dict[str, type] = {}
    for declaring in options.__mro__:
        for name in inspect.get_annotations(declaring):
            if name in options.model_fields:
                fields.setdefault(name, declaring)
    is_divided = options in fields.values() and len(fields) > _FEW
    found: dict[str, dict[str, FieldInfo]] = {}
    for name, declaring in fields.items():
        heading = _heading(name, declaring, options, is_divided=is_divided)
        found.setdefault(heading, {})[name] = options.model_fields[name]
    order = ["options", *(HEADINGS if is_divided else ()), *found]
    return ((heading, found[heading]) for heading in dict.fromkeys(order) if heading in found)


def _heading(name: str, declaring: type, options: type, *, is_divided: bool) -> str:
    if is_divided:
        for heading, names in HEADINGS.items():
            if name in names:
                return heading
    base = declaring.__name__.removesuffix("Options")
    return "options" if declaring is options else _SHARED.get(base, f"{base.lower()} options")


def help_of(field: FieldInfo) -> str:
    """The description of an option and its default, if it has one, or that it is required."""
    text = field.description or ""
    if field.is_required():
        text += " (required)"
    elif "default" not in text:
        default = _show_default(field.get_default(call_default_factory=True))
        text += f" (default: {default})" if default else ""
    return text.replace("%", "%%")


def _show_default(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None or default == () or default == {}:
        return ""
    return (
        " ".join(map(str, default)) if isinstance(default, Sequence) and not isinstance(default, str) else str(default)
    )
