"""A training step on a tiny model, for the tests of the step and its parts."""

from typing import Any

import timm
import torch
from torch import Tensor

from linvit.distributed import Ranks, StopRequest
from linvit.training.config import TrainConfig
from linvit.training.loss import create_loss, create_mixup
from linvit.training.optim import create_ema, create_optimizer, create_schedule
from linvit.training.step import TrainStep

CLASSES = 3


def build_step(*, updates_per_epoch: int = 4, **settings: Any) -> TrainStep:
    config = TrainConfig.model_validate(
        {"data_dir": "data", "lr": 1e-2, "opt": "momentum", "momentum": 0.0, "weight_decay": 0.0, "smoothing": 0.0}
        | {"epochs": 2, "warmup_epochs": 0, "batch_size": 4}
        | settings
    )
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_classes=CLASSES,
    )
    optimizer = create_optimizer(model, config, lr=1e-2)
    scheduler, _ = create_schedule(optimizer, config, updates_per_epoch=updates_per_epoch)
    step = TrainStep(
        model,
        model,
        optimizer=optimizer,
        scheduler=scheduler,
        ema=create_ema(model, config),
        mixup=create_mixup(config, num_classes=CLASSES),
        loss_fn=create_loss(config),
        config=config,
        ranks=Ranks(torch.device("cpu")),
        stop=StopRequest(),
    )
    step.start_epoch(0)
    return step


def random_batch(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 16, 16), torch.randint(0, CLASSES, (size,))


def weights_of(step: TrainStep) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in step.plain_model.state_dict().items()}
