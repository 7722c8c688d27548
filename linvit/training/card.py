"""README.md of a run: a short model card."""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch

import linvit
from linvit.files import write_text
from linvit.training.config import TrainConfig
from linvit.training.metrics import Metrics

_MOST_CLASSES = 50


def write_card(
    path: Path,
    *,
    config: TrainConfig,
    class_names: Sequence[str],
    img_size: tuple[int, int],
    epoch: int,
    weights: str,
    metrics: Metrics,
) -> None:
    """Say what the run's best weights are, how they were made and how to load them.

    `epoch` and `weights` ("raw" or "ema") are those of the best, `metrics` what they reached.
    """
    assert config.data_dir is not None
    data = config.data_dir.resolve().name
    shown = ", ".join(class_names[:_MOST_CLASSES])
    more = f" and {len(class_names) - _MOST_CLASSES} more" if len(class_names) > _MOST_CLASSES else ""
    averaged = " (moving average)" if weights == "ema" else ""
    text = f"""\
---
library_name: timm
pipeline_tag: image-classification
---
# {config.model}, trained on {data}

| | |
|---|---|
| top-1 | {metrics.top1:.2f} % |
| top-5 | {metrics.top5:.2f} % |
| loss | {metrics.loss:.4f} |
| evaluated on | {metrics.num_images:,} images of `{config.val_split}` |
| weights | epoch {epoch}{averaged}, the best by {config.eval_metric} |

The weights were chosen on the same images that they are evaluated on here.

## Use

```python
import linvit, timm

model = timm.create_model("local-dir:{path.parent.name}/best", pretrained=True).eval()
class_names = model.pretrained_cfg["label_names"]
```

    linvit eval {path.parent.name} DATA

## Classes

{len(class_names)}: {shown}{more}

## Training

Images of `{data}/{config.train_split}` at {img_size[0]}×{img_size[1]} px, seed {config.seed}; \
{config.epochs} epochs planned with {config.opt}, batches of {config.batch_size}. `args.yaml` holds every \
option; training from it alone repeats the run:

    python train_imagenet.py --config args.yaml

linvit {linvit.__version__}, timm {timm.__version__}, torch {torch.__version__}
"""
    write_text(path, text)
