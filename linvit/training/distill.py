"""Knowledge distillation: the model also learns to match a trained teacher on the same images.

Logits: Kullback-Leibler divergence from the teacher's softened distribution, times T² (Hinton et al. 2015, section 2).
Features: one minus the cosine similarity of the teacher's last tokens and the model's, which a learned projection maps
to the teacher's width and resampling maps to its grid (after Romero et al. 2015, FitNets).

B images, T tokens, P prefix tokens, D width of the model, C width of the teacher.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import VisionTransformer
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.data.augment.build import InputSpec
from linvit.data.sources.classes import order_conflict
from linvit.device import autocast, autocast_dtype
from linvit.evaluation.inference import input_spec
from linvit.model.build import TimmModel
from linvit.runs.folder import load_classifier
from linvit.settings.fields import listed
from linvit.training.config import TrainConfig
from linvit.training.fsdp import load_full


class Distillation:
    """A teacher, and the loss that makes the model match it.

    Attributes:
        trained: the module to train: the model, or for features the model with its projection. The latter returns
            logits and projected tokens in training mode, and only logits in evaluation mode.

    Raises ValueError if teacher and model do not fit together.
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
        teacher_spec = input_spec(classifier)
        if teacher_spec.input_range not in (None, spec.input_range):
            low, high = teacher_spec.input_range
            raise ValueError(
                f"--kd-model-name {config.kd_model_name} was trained with --input-range {low} {high}: set the same here"
            )
        self.teacher_input = _TeacherInput(spec, teacher_spec, device)
        self.projected: _ProjectedTokens | None = None
        if config.kd_distill_type == "feature":
            if not isinstance(model, VisionTransformer | Eva):
                raise ValueError(f"--kd-distill-type feature needs a Vision Transformer, not {config.model}: use logit")
            if not hasattr(self.teacher, "forward_intermediates"):
                raise ValueError(f"--kd-distill-type feature: {config.kd_model_name} has no tokens; use logit")
            width = self._teacher_tokens(torch.zeros(1, 3, *spec.size, device=device)).shape[1]
            self.projected = _ProjectedTokens(model, width)
        else:
            _check_classes(config.kd_model_name, self.teacher, classifier.class_names, class_names)
            if classifier.class_names is None and config.class_map is None:
                _check_order(config.kd_model_name, class_names)
        self.trained = self.projected or model

    def parameters(self) -> list[nn.Parameter]:
        """Parameters to train that are not the model's: those of the projection."""
        return [] if self.projected is None else list(self.projected.projection.parameters())

    def state_dict(self) -> dict[str, Any]:
        """State that resuming needs in addition to the model's."""
        return {} if self.projected is None else self.projected.projection.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.projected is not None:
            load_full(self.projected.projection, state)

    def loss(self, outputs: Any, images: Tensor, labels: Tensor, loss_fn: nn.Module) -> Tensor:
        """Weighted sum of the labels' loss and the teacher's; `outputs` are those of `trained` for `images`."""
        if self.projected is None:
            logits, teacher_loss = outputs, self._logits_loss(outputs, images)
        else:
            logits, tokens = outputs
            teacher_loss = self._tokens_loss(tokens, images)
        return self.label_weight * loss_fn(logits.float(), labels) + self.teacher_weight * teacher_loss

    def _logits_loss(self, logits: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.device, self.amp_dtype):
            target = self.teacher(self.teacher_input(images))
        logits, target = (F.log_softmax(each.float() / self.temperature, dim=1) for each in (logits, target))
        return F.kl_div(logits, target, log_target=True, reduction="batchmean") * self.temperature**2

    def _tokens_loss(self, tokens: Tensor, images: Tensor) -> Tensor:
        target = self._teacher_tokens(images).float()
        resampled = F.interpolate(tokens.float(), target.shape[-2:], mode="bilinear", antialias=True)
        return (1 - F.cosine_similarity(resampled, target, dim=1)).mean()

    def _teacher_tokens(self, images: Tensor) -> Tensor:
        """The teacher's last tokens as a grid (B, C, h, w)."""
        with torch.no_grad(), autocast(self.device, self.amp_dtype):
            maps = self.teacher.forward_intermediates(
                self.teacher_input(images), indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )
        return maps[-1]


def create_distillation(
    model: TimmModel, config: TrainConfig, *, spec: InputSpec, class_names: Sequence[str], device: torch.device
) -> Distillation | None:
    """The distillation of a run; None without a teacher (`kd_model_name`)."""
    if config.kd_model_name is None:
        return None
    return Distillation(model, config, spec=spec, class_names=class_names, device=device)


def _weights(config: TrainConfig) -> tuple[float, float]:
    """Weights of the labels' loss and of the teacher's, by timm's rule.

    Both are 1 by default. If only the labels' weight is set, the teacher's is 1 minus it.
    """
    task, teacher = config.task_loss_weight, config.distill_loss_weight
    if teacher is None:
        teacher = 1.0 if task is None else 1.0 - task
    return 1.0 if task is None else task, teacher


class _ProjectedTokens(nn.Module):
    """A Vision Transformer that also returns its last patch tokens, projected to the teacher's width.

    It is one module, so that torch.compile and DistributedDataParallel include the projection.
    """

    def __init__(self, model: VisionTransformer | Eva, width: int) -> None:
        super().__init__()
        self.model = model
        self.projection = nn.Linear(model.embed_dim, width).to(next(model.parameters()).device)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits and a grid of projected tokens (B, C, h, w); only logits in evaluation mode."""
        if not self.training:
            logits: Tensor = self.model(images)
            return logits
        tokens = self.model.forward_features(images)  # (B, P + T, D)
        grid = self.model.patch_embed.dynamic_feat_size(images.shape[-2:])
        patches = self.projection(tokens[:, self.model.num_prefix_tokens :])  # (B, T, C)
        return self.model.forward_head(tokens), patches.transpose(1, 2).unflatten(2, grid)


class _TeacherInput:
    """Converts images that are normalised for the model to the size and normalisation of the teacher."""

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


def _check_order(source: str, class_names: Sequence[str]) -> None:
    """Raise ValueError if the labels of a teacher without class names may stand for other classes."""
    conflict = order_conflict(class_names)
    if conflict is not None:
        raise ValueError(
            f"--kd-model-name {source} has no class names, and {conflict}: use --class-map timm if timm trained the "
            "teacher, or --class-map torchvision if its labels are in sorted order"
        )


def _check_classes(source: str, teacher: TimmModel, names: Sequence[str] | None, class_names: Sequence[str]) -> None:
    if teacher.num_classes == len(class_names) and names in (None, list(class_names)):
        return
    theirs = f" ({listed(names)})" if names is not None else ""
    raise ValueError(
        f"--kd-model-name {source} has {teacher.num_classes} classes{theirs}, the data has {len(class_names)} "
        f"({listed(class_names)}): choose a teacher with the same classes, or --kd-distill-type feature"
    )
