"""How near a converted model is to the original, on images that no weight was fitted to."""

from dataclasses import dataclass

import torch
from timm.models import VisionTransformer
from torch import Tensor


@dataclass(frozen=True)
class Fidelity:
    """Means over images: cosines of the class token and the patch tokens behind the last norm, and of what the
    classifier reads; share of images with the same first class. None where a model has no such thing."""

    num_images: int
    class_cosine: float | None
    patch_cosine: float
    feature_cosine: float | None
    top1_agreement: float | None

    @property
    def cosines(self) -> list[float]:
        """Those of the cosines that there are."""
        return [each for each in (self.class_cosine, self.patch_cosine, self.feature_cosine) if each is not None]

    @property
    def mean_cosine(self) -> float:
        return sum(self.cosines) / len(self.cosines)


class Comparison:
    """Images, and what the original makes of them, in single precision.

    Args:
        original: in evaluation mode.
        images: (n, 3, H, W).
        batch_size: of them at once.
    """

    def __init__(self, original: VisionTransformer, images: Tensor, *, batch_size: int) -> None:
        self.original, self.batches = original, images.split(batch_size)
        with torch.no_grad():
            self.theirs = [_features(original, batch) for batch in self.batches]

    @torch.no_grad()
    def of(self, converted: VisionTransformer, *, amp: bool = False) -> Fidelity:
        """How near a model is, in evaluation mode; with `amp` it computes in bfloat16, in which it is a bit farther."""
        original, rows = self.original, []
        for batch, (tokens, pooled, logits) in zip(self.batches, self.theirs):
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=amp):
                own = [each.float() for each in _features(converted, batch)]
            cosines = torch.cosine_similarity(tokens, own[0], dim=-1)
            row = [cosines[:, 0], cosines[:, original.num_prefix_tokens :].mean(1)]
            row.append(torch.cosine_similarity(pooled, own[1]))
            row.append((logits.argmax(1) == own[2].argmax(1)).float())
            rows.append(torch.stack(row))
        class_cosine, patch_cosine, feature_cosine, agreement = torch.cat(rows, dim=1).mean(1).tolist()
        return Fidelity(
            num_images=sum(map(len, self.batches)),
            class_cosine=class_cosine if original.has_class_token else None,
            patch_cosine=patch_cosine,
            feature_cosine=feature_cosine if original.global_pool else None,
            top1_agreement=agreement if original.num_classes > 0 else None,
        )


def _features(model: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens behind the last norm (B, T, D), what the classifier reads and what it says, both (B, ·)."""
    tokens = model.forward_features(images)
    pooled = model.forward_head(tokens, pre_logits=True)
    return tokens, pooled.flatten(1), model.head(pooled).flatten(1)
