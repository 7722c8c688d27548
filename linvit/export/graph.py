"""The graph of a model for exporters: preprocessing and precision around it, and a batch of any size.

B batch, C classes.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from linvit.explanation.cam import forward_with_maps
from linvit.model.build import TimmModel
from linvit.output.files import reason
from linvit.output.terminal import printable
from linvit.runtimes.metadata import ExportMetadata

DTYPES = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}


class Graph(nn.Module):
    """Computes in the precision of `metadata`, with its input and outputs; weights are a copy of the model's.

    Normalised images (B, 3, H, W) float32 to logits (B, C) float32, or pixels (B, H, W, 3) uint8 to probabilities; if
    `metadata` has heat maps, also to these, (B, C, h, w) float32.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: TimmModel, metadata: ExportMetadata) -> None:
        super().__init__()
        self.dtype = DTYPES[metadata.precision]
        self.model = copy.deepcopy(model).cpu().eval().to(self.dtype)
        self.takes_pixels = metadata.input == "uint8"
        self.grid_size = metadata.heatmaps
        # The ONNX exporter names folded constants after operations, such as `mean`, and refuses a second one.
        self.register_buffer("pixel_mean", torch.tensor(metadata.mean).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(metadata.std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.takes_pixels:
            images = (images.permute(0, 3, 1, 2).float() / 255 - self.pixel_mean) / self.pixel_std
        if self.grid_size is None:
            return self._output(self.model(images.to(self.dtype)))
        logits, maps = forward_with_maps(self.model, images.to(self.dtype), self.grid_size)
        return self._output(logits), maps

    def _output(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(1) if self.takes_pixels else logits.float()


def trace(model: TimmModel, metadata: ExportMetadata) -> torch.export.ExportedProgram:
    """The program of `Graph` for batches of any size. Raises ValueError, naming the model, if it cannot be traced."""
    height, width = metadata.img_size
    shape = (2, height, width, 3) if metadata.input == "uint8" else (2, 3, height, width)
    example = torch.zeros(shape, dtype=torch.uint8 if metadata.input == "uint8" else torch.float32)
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(
                Graph(model, metadata).eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
    # What torch raises depends on the operation.
    except Exception as error:
        raise refusal("torch.export", metadata, error) from error


def refusal(exporter: str, metadata: ExportMetadata, error: Exception) -> ValueError:
    """A sentence on a model that an exporter cannot take, with the innermost cause, which names the operation."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return ValueError(f"{exporter} cannot take {metadata.architecture}: {printable(reason(error))}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters from printing their progress and warnings."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
