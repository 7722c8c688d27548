"""Distillation: the model learns from a trained teacher beside the labels, on the same images.

Logits: the Kullback-Leibler divergence from the teacher's softened distribution, times T² (Hinton et al. 2015,
section 2). Features: one minus the cosine between the teacher's last tokens and the model's, brought to the teacher's
width by a learned projection and to its grid by resampling (after Romero et al. 2015, FitNets).

B images, T tokens, P prefix tokens, D width of the model, C width of the teacher.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.data.augment.build import InputSpec, resolve_input
from linvit.data.options import InputOptions
from linvit.device import autocast, autocast_dtype
from linvit.model.build import TimmModel
from linvit.runs.folder import load_classifier
from linvit.settings.fields import listed
from linvit.training.config import TrainConfig
from linvit.training.fsdp import load_full


class Distillation:
    """A teacher, what of it is learnt, and the loss of that.

    Attributes:
        trained: what is called and trained: the model itself, or with its projection (then it returns both the logits
            and the projected tokens, in evaluation mode the logits alone).

    Raises ValueError where teacher and model do not go together.
    """

    trained: nn.Module

    def __init__(
        self,
        model: TimmModel,
        config: TrainConfig,
        *,
        spec: InputSpec,
        class_names: Sequence[str],
        device: torch.device,
    ) -> None:
        assert config.kd_model_name is not None
        self.temperature = config.kd_temperature
        self.label_weight, self.teacher_weight = _weights(config)
        self.amp_dtype, self.device = autocast_dtype(config.amp, config.amp_dtype), device
        classifier = load_classifier(config.kd_model_name)
        self.teacher = classifier.model.to(device).eval().requires_grad_(False)
        self.view = _View(spec, resolve_input(self.teacher, InputOptions.model_validate({})), device)
        self.projected: _ProjectedTokens | None = None
        if config.kd_distill_type == "feature":
            if not isinstance(model, VisionTransformer):
                raise ValueError(f"--kd-distill-type feature needs a Vision Transformer, not {config.model}: use logit")
            if not hasattr(self.teacher, "forward_intermediates"):
                raise ValueError(f"--kd-distill-type feature: {config.kd_model_name} gives no tokens; use logit")
            width = self._teacher_tokens(torch.zeros(1, 3, *spec.size, device=device)).shape[1]
            self.projected = _ProjectedTokens(model, width)
        else:
            _check_classes(config.kd_model_name, self.teacher, classifier.class_names, class_names)
        self.trained = self.projected or model

    def parameters(self) -> list[nn.Parameter]:
        """What is trained besides the model: the projection of features."""
        return [] if self.projected is None else list(self.projected.projection.parameters())

    def state_dict(self) -> dict[str, Any]:
        """What going on from here needs besides the model."""
        return {} if self.projected is None else self.projected.projection.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.projected is not None:
            load_full(self.projected.projection, state)

    def loss(self, outputs: Any, images: Tensor, labels: Tensor, loss_fn: nn.Module) -> Tensor:
        """The labels' loss and the teacher's, each by its weight; `outputs` are what `trained` gave for `images`."""
        if self.projected is None:
            logits, part = outputs, self._logits_loss(outputs, images)
        else:
            logits, tokens = outputs
            part = self._tokens_loss(tokens, images)
        return self.label_weight * loss_fn(logits.float(), labels) + self.teacher_weight * part

    def _logits_loss(self, logits: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.device, self.amp_dtype):
            wanted = self.teacher(self.view(images))
        given, wanted = (F.log_softmax(each.float() / self.temperature, dim=1) for each in (logits, wanted))
        return F.kl_div(given, wanted, log_target=True, reduction="batchmean") * self.temperature**2

    def _tokens_loss(self, tokens: Tensor, images: Tensor) -> Tensor:
        wanted = self._teacher_tokens(images).float()
        given = F.interpolate(tokens.float(), wanted.shape[-2:], mode="bilinear", antialias=True)
        return (1 - F.cosine_similarity(given, wanted, dim=1)).mean()

    def _teacher_tokens(self, images: Tensor) -> Tensor:
        """The teacher's last tokens as a grid (B, C, h, w)."""
        with torch.no_grad(), autocast(self.device, self.amp_dtype):
            maps = self.teacher.forward_intermediates(
                self.view(images), indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )
        return maps[-1]


def create_distillation(
    model: TimmModel, config: TrainConfig, *, spec: InputSpec, class_names: Sequence[str], device: torch.device
) -> Distillation | None:
    """What `kd_model_name` asks for; None where there is no teacher."""
    if config.kd_model_name is None:
        return None
    return Distillation(model, config, spec=spec, class_names=class_names, device=device)


def _weights(config: TrainConfig) -> tuple[float, float]:
    """Of the labels' loss and of the teacher's, by timm's rule: 1 unless set, but the rest of 1 to a task's alone."""
    task, teacher = config.task_loss_weight, config.distill_loss_weight
    if teacher is None:
        teacher = 1.0 if task is None else 1.0 - task
    return 1.0 if task is None else task, teacher


class _ProjectedTokens(nn.Module):
    """A Vision Transformer that also returns its last patch tokens, at the teacher's width.

    One module, so that compiling it and averaging gradients over processes take in the projection.
    """

    def __init__(self, model: VisionTransformer, width: int) -> None:
        super().__init__()
        self.model = model
        self.projection = nn.Linear(model.embed_dim, width).to(next(model.parameters()).device)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits and a grid of projected tokens (B, C, h, w); in evaluation mode the logits alone."""
        if not self.training:
            logits: Tensor = self.model(images)
            return logits
        tokens = self.model.forward_features(images)  # (B, P + T, D)
        grid = self.model.patch_embed.dynamic_feat_size(images.shape[-2:])
        patches = self.projection(tokens[:, self.model.num_prefix_tokens :])  # (B, T, C)
        return self.model.forward_head(tokens), patches.transpose(1, 2).unflatten(2, grid)


class _View:
    """Images normalised for the model, as the teacher wants them: its own size and normalisation."""

    def __init__(self, model: InputSpec, teacher: InputSpec, device: torch.device) -> None:
        self.size = teacher.size
        self.is_same = (model.mean, model.std) == (teacher.mean, teacher.std)
        self.mean, self.std, self.teacher_mean, self.teacher_std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (model.mean, model.std, teacher.mean, teacher.std)
        )

    def __call__(self, images: Tensor) -> Tensor:
        if self.is_same and tuple(images.shape[-2:]) == self.size:
            return images
        pixels = images * self.std + self.mean
        if tuple(images.shape[-2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return (pixels - self.teacher_mean) / self.teacher_std


def _check_classes(source: str, teacher: TimmModel, names: Sequence[str] | None, class_names: Sequence[str]) -> None:
    if teacher.num_classes == len(class_names) and names in (None, list(class_names)):
        return
    theirs = f" ({listed(names)})" if names is not None else ""
    raise ValueError(
        f"--kd-model-name {source} has {teacher.num_classes} classes{theirs}, the data has {len(class_names)} "
        f"({listed(class_names)}): choose a teacher of the same classes, or --kd-distill-type feature"
    )
