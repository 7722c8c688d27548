"""A model that another runtime executes, as a module that evaluation and prediction use like any other.

B batch, C classes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linvit.device import choose_device
from linvit.model.build import TimmModel
from linvit.runs.folder import Classifier
from linvit.runs.weights import EXPORTED
from linvit.runtimes.metadata import ExportMetadata
from linvit.runtimes.onnx import open_onnx
from linvit.runtimes.openvino import find_xml, open_openvino
from linvit.runtimes.torch_export import open_torch_export

# Maps a batch in the file's own input format to its outputs; all are on the CPU or the module's device.
Execute = Callable[[Tensor], list[Tensor]]


class ExportedModel(TimmModel):
    """Maps normalised images (B, 3, H, W) in float32 to logits (B, C), whatever the input and output of the file.

    It has no weights and no gradients. Moving it has no effect: the device is chosen when the file is opened.
    """

    def __init__(self, execute: Execute, metadata: ExportMetadata) -> None:
        super().__init__()
        self._execute = execute
        self.metadata = metadata
        self.num_classes = metadata.num_classes
        self.pretrained_cfg = {
            **metadata.preparation,
            "architecture": metadata.architecture,
            "input_size": (3, *metadata.img_size),
            "fixed_input_size": True,
            "num_classes": metadata.num_classes,
            "label_names": metadata.class_names,
        }

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images)[0]

    def class_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C), and what each patch adds to each of them, (B, C, h, w), of a file exported with heat maps."""
        logits, maps = self._run(images)
        return logits, maps

    @torch.no_grad()
    def _run(self, images: Tensor) -> list[Tensor]:
        """Logits, and the file's other outputs, on the images' device."""
        batch = images.float()
        if self.metadata.input == "uint8":
            batch = to_pixels(batch, self.metadata)
        output, *others = (each.float().to(images.device) for each in self._execute(batch))
        if self.metadata.output == "probabilities":
            # Their softmax is the probabilities again.
            output = output.clamp_min(torch.finfo(torch.float32).tiny).log()
        return [output, *others]


def to_pixels(images: Tensor, metadata: ExportMetadata) -> Tensor:
    """Normalised images (B, 3, H, W) as the pixels (B, H, W, 3) uint8 that they were."""
    mean, std = (torch.tensor(each, device=images.device).view(3, 1, 1) for each in (metadata.mean, metadata.std))
    pixels = (images * std + mean).mul_(255).round_().clamp_(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def is_exported(source: str) -> bool:
    """Whether a source is a model that another runtime executes, by its name or by what the folder contains."""
    path = Path(source)
    return find_xml(path) is not None if path.is_dir() else path.suffix.lower() in EXPORTED


def open_exported(
    source: str, *, img_size: tuple[int, int] | None = None, device: str = "auto", trust_code: bool = False
) -> Classifier:
    """Open a model that `linvit export` wrote, in the runtime of its format.

    Args:
        source: an `.onnx` or `.pt2` file, or a folder with OpenVINO's `openvino_model.xml`, or that file.
        img_size: (height, width) that the caller needs; the file has one size only.
        device: as for `choose_device`. ONNX Runtime needs its GPU package for a GPU, OpenVINO runs on the CPU.
        trust_code: allow formats whose files can run code when they are opened (`.pt2`).

    Raises ValueError if the file is missing, damaged, of another origin or another size, or needs a package that is
    not installed.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{source}: there is no such file or folder")
    target = choose_device(device)
    if path.suffix.lower() == ".onnx":
        execute, metadata = open_onnx(path, device=target, is_required=device != "auto")
    elif path.suffix.lower() == ".pt2":
        execute, metadata = open_torch_export(path, device=target, trust_code=trust_code)
    else:
        if device not in ("auto", "cpu"):
            raise ValueError(f"--device {device}: OpenVINO runs {source} on the CPU; remove --device")
        execute, metadata = open_openvino(path)
    if img_size not in (None, metadata.img_size):
        height, width = metadata.img_size
        raise ValueError(f"{source} takes images of {height}×{width} px only; export the model again with --img-size")
    settings: dict[str, Any] = dict(metadata.preparation)
    return Classifier(ExportedModel(execute, metadata).eval(), metadata.class_names, weights=source, settings=settings)
