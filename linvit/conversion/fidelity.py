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


@torch.no_grad()
def compare(original: VisionTransformer, converted: VisionTransformer, images: Tensor, *, batch_size: int) -> Fidelity:
    """Both models on images (B, 3, H, W), in evaluation mode."""
    rows = []
    for batch in images.split(batch_size):
        theirs, own = original.forward_features(batch), converted.forward_features(batch)
        prefix = original.num_prefix_tokens
        cosines = torch.cosine_similarity(theirs, own, dim=-1)
        row = [cosines[:, 0], cosines[:, prefix:].mean(1)]
        pooled = [
            model.forward_head(tokens, pre_logits=True) for model, tokens in ((original, theirs), (converted, own))
        ]
        row.append(torch.cosine_similarity(*(each.flatten(1) for each in pooled)))
        logits = [model.head(each) for model, each in zip((original, converted), pooled)]
        row.append((logits[0].flatten(1).argmax(1) == logits[1].flatten(1).argmax(1)).float())
        rows.append(torch.stack(row))
    class_cosine, patch_cosine, feature_cosine, agreement = torch.cat(rows, dim=1).mean(1).tolist()
    return Fidelity(
        num_images=len(images),
        class_cosine=class_cosine if original.has_class_token else None,
        patch_cosine=patch_cosine,
        feature_cosine=feature_cosine if original.global_pool else None,
        top1_agreement=agreement if original.num_classes > 0 else None,
    )
