"""Heat maps over the patches of an image: `linvit.attention_maps`.

The attention matrix A_h of a head weights the values of all tokens (T × T). In a Linformer layer it is P̄_h F_h, where
P̄_h (T × K) is the softmax over the projected keys. A row of a product of such matrices is built from the left, as
(vᵀ P̄_h) F_h, so maps take O(N k) memory, and no T × T matrix is formed. In ordinary layers blocks of rows are.

v (T) weights the tokens that the classifier reads: 1 for the class token, or 1/N for each patch under average pooling.

T tokens, N = h·w patches, K keys, L layers, H heads, M maps of a projection, k projected length, B images.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from linvit.explanation.cam import check_class_maps, class_maps
from linvit.measure.attention import LayerAttention, Vit, as_vit, capture_attention, spread
from linvit.model.projected import ProjectedAttention
from linvit.model.projections import MatrixProjection, Projection
from linvit.settings.fields import unknown_choice

Method = Literal["attention", "rollout", "relevance", "gradcam", "cam", "keys"]
METHODS: tuple[Method, ...] = get_args(Method)
# Methods that explain one class, and those that need gradients.
OF_A_CLASS: tuple[Method, ...] = ("relevance", "gradcam", "cam")
BY_GRADIENTS: tuple[Method, ...] = ("relevance", "gradcam")


@dataclass(frozen=True)
class AttentionMaps:
    """Maps of one method over the patches of B images.

    Attributes:
        maps: (B, h, w); for "attention" (B, L, H, h, w); for "keys" a list with one tensor (M, k, h, w) per layer, or
            None for an ordinary layer, the same for all images.
        method: the method.
        classes: the class that each image's map explains, (B,); None for methods that do not explain a class.
        logits: the model's outputs, (B, C).
        approximations: why a map is not exact, as full sentences; empty if it is.
    """

    maps: Any
    method: Method
    classes: Tensor | None
    logits: Tensor
    approximations: tuple[str, ...] = ()


@torch.inference_mode(False)
def attention_maps(
    model: nn.Module, images: Tensor, *, method: Method = "relevance", classes: Sequence[int] | int | None = None
) -> AttentionMaps:
    """Where a Vision Transformer (timm's or linvit's) looks in images, as maps over its patches.

    - "attention": how much the tokens that the classifier reads attend to each patch, for each layer and head: exactly
      their row of the layer's T × T attention matrix.
    - "rollout": attention through all layers, averaged over heads, with half of each layer's weight on the skip
      connection (Abnar and Zuidema 2020, arXiv 2005.00928).
    - "relevance": attention through all layers, each entry weighted by its gradient for a class if that is positive
      (Chefer et al. 2021, arXiv 2103.15679, eq. 5 and 6). On a Linformer layer the gradients are those of P̄. Where the
      classifier reads an average over patches, v weights each patch by its contribution to the class's logit, to first
      order and where that is positive.
    - "gradcam": the last tokens that the classifier mixes, weighted by their mean gradient for a class (Selvaraju et
      al. 2017, arXiv 1610.02391).
    - "cam": the exact contribution of each patch to the logit of a class, where the classifier pools all patches;
      negative for evidence against the class (Zhou et al. 2016, arXiv 1512.04150, see `linvit.explanation.cam`).
    - "keys": the patches that each projected key averages, the rows of E. They do not depend on the images.

    Args:
        model: may be in any mode, and is restored afterwards; no gradient is left in its parameters.
        images: (B, 3, height, width), normalised, of a size that the model takes, on its device.
        method: see above.
        classes: the class to explain, one for all images or one per image; None explains the predicted class.

    Raises ValueError if the model's attention is not one matrix per layer and head, for an unknown method or class, for
    "keys" without a Linformer layer, for "cam" of a model that reads its class token, and if there are no images.
    """
    if method not in METHODS:
        raise ValueError(unknown_choice("method", method, METHODS))
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must be (B, 3, height, width) with at least one image, not {tuple(images.shape)}")
    vit = as_vit(model)
    chosen = _chosen_classes(classes, len(images), method)
    found, logits, explained = [], [], []
    # Tensors that were made in inference mode have no gradients, but their copies do.
    for number, image in enumerate(images.clone() if images.is_inference() else images):
        explanation = Explanation(vit, image[None], chosen[number], with_gradients=method in BY_GRADIENTS)
        found.append(explanation.map(method))
        logits.append(explanation.logits)
        explained.append(explanation.target)
    return AttentionMaps(
        maps=found[0] if method == "keys" else torch.stack(found),
        method=method,
        classes=torch.tensor(explained) if method in OF_A_CLASS else None,
        logits=torch.stack(logits),
        approximations=tuple(approximations(vit, method)),
    )


class Explanation:
    """One image's forward pass, and the maps that can be made from it.

    Args:
        image: (1, 3, height, width).
        target: the class to explain; None for the predicted one.
        with_gradients: keep what the methods of a class need.

    Raises ValueError as `attention_maps` does.

    Attributes:
        layers: attention of each layer.
        logits: the model's output, (C).
        target: index of the class to explain.
    """

    def __init__(self, vit: Vit, image: Tensor, target: int | None, *, with_gradients: bool) -> None:
        self._vit = vit
        seen: list[Tensor] = []
        block = vit.blocks[-1]
        # Patches reach the class token through the last layer's attention, and a mean over patches through its output.
        if _reads_class_token(vit):
            handle = block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        else:
            handle = block.register_forward_hook(lambda _, arguments, output: seen.append(output))
        try:
            with torch.set_grad_enabled(with_gradients), _frozen(vit):
                # The graph begins at the image.
                self.layers, output = capture_attention(vit, image.detach().requires_grad_(with_gradients))
                if output.ndim != 2:
                    raise ValueError(f"the model returns {tuple(output.shape)}, not a number per class: give it a pool")
                if target is not None and not 0 <= target < output.shape[1]:
                    raise ValueError(f"class {target} does not exist: the model has {output.shape[1]} classes, from 0")
                self.target = int(output[0].argmax()) if target is None else target
                self._logit = output[0, self.target]
        finally:
            handle.remove()
        self._tokens = seen[0]
        self.logits = output[0].detach()

    def map(self, method: Method) -> Any:
        """The map of one image in `AttentionMaps.maps`, in single precision at least."""
        with torch.autocast(self.logits.device.type, enabled=False):
            return getattr(self, f"_{method}")()

    @property
    def start(self) -> Tensor:
        """The weights v (T) of the tokens that the classifier reads."""
        layer = self.layers[-1]
        num_tokens, num_patches = layer.queries.shape[2], layer.grid_size[0] * layer.grid_size[1]
        dtype = torch.promote_types(layer.queries.dtype, torch.float32)
        weights = torch.zeros(num_tokens, dtype=dtype, device=layer.queries.device)
        if _reads_class_token(self._vit):
            # A distilled model reads two tokens, and averages their logits.
            read = slice(2 if hasattr(self._vit, "head_dist") else 1)
        else:
            read = slice(0 if getattr(self._vit, "pool_include_prefix", False) else num_tokens - num_patches, None)
        weights[read] = 1
        return weights / weights.sum()

    def _attention(self) -> Tensor:
        start = self.start
        return torch.stack([self._on_grid(layer.to_tokens(weighted_rows(layer, start))) for layer in self.layers])

    def _rollout(self) -> Tensor:
        row = self.start
        for layer in reversed(self.layers):
            row = (row + layer.to_tokens(weighted_rows(layer, row)).mean(dim=0)) / 2
        return self._on_grid(row)

    def _relevance(self) -> Tensor:
        outputs = [part for layer in self.layers for part in layer.outputs]
        *by_output, of_tokens = torch.autograd.grad(
            self._logit, [*outputs, self._tokens], allow_unused=True, retain_graph=True
        )
        gradients = iter(by_output)
        by_layer = [[next(gradients) for _ in layer.outputs] for layer in self.layers]
        row = self.start if _reads_class_token(self._vit) else self._contributions(of_tokens)
        for layer, parts in zip(reversed(self.layers), reversed(by_layer)):
            # The classifier does not read what the last layer gives to most tokens.
            given = [torch.zeros_like(output) if part is None else part for output, part in zip(layer.outputs, parts)]
            weighted = weighted_rows(layer, row, gradient=torch.cat(given, dim=2))
            row = row + layer.to_tokens(weighted).mean(dim=0)
        return self._on_grid(row)

    def _contributions(self, gradient: Tensor) -> Tensor:
        """What each patch adds to the logit, to first order and where it is positive: (T). Tiles can be compared."""
        dtype = self.start.dtype
        given = (gradient.to(dtype) * self._tokens.detach().to(dtype))[0].sum(dim=1)
        return given.clamp(min=0) * (self.start > 0)

    def _gradcam(self) -> Tensor:
        (gradient,) = torch.autograd.grad(self._logit, self._tokens, retain_graph=True)
        num_patches = self.layers[-1].grid_size[0] * self.layers[-1].grid_size[1]
        tokens, gradient = (each[0, -num_patches:].detach().to(self.start.dtype) for each in (self._tokens, gradient))
        return self._on_grid((tokens @ gradient.mean(dim=0)).clamp(min=0))

    def _cam(self) -> Tensor:
        check_class_maps(self._vit)
        norm: Any = self._vit.norm
        tokens = self._tokens.detach()
        tokens = norm(tokens.to(next(norm.parameters(), tokens).dtype))
        return class_maps(self._vit, tokens, self.layers[-1].grid_size)[0, self.target].detach()

    @property
    def reads_class_token(self) -> bool:
        """Whether the classifier reads the class token; else it reads an average over patches."""
        return _reads_class_token(self._vit)

    @property
    def projections(self) -> list[tuple[Projection, Projection] | None]:
        """E and F of each layer; None for ordinary attention."""
        attentions = map(_linformer_attention, self._vit.blocks)
        return [None if attention is None else attention.projections() for attention in attentions]

    def _keys(self) -> list[Tensor | None]:
        pairs = self.projections
        if not any(pairs):
            raise ValueError("this model has only ordinary attention, so it has no projected keys to show")
        return [
            None if pair is None else self._on_grid(dense_rows(pair[0], layer.grid_size, like=self.start))
            for pair, layer in zip(pairs, self.layers)
        ]

    def _on_grid(self, tokens: Tensor) -> Tensor:
        """The patches of (…, T) as (…, h, w)."""
        height, width = self.layers[-1].grid_size
        return tokens[..., tokens.shape[-1] - height * width :].unflatten(-1, (height, width)).detach()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """A context in which no parameter takes part in the graph: gradients of weights are a third of a backward pass."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def dense_rows(projection: Projection, grid_size: tuple[int, int], *, like: Tensor) -> Tensor:
    """E on a grid, (M, k, N), with the dtype and device of `like`; see `spread` for kinds that reduce tokens."""
    one_each = torch.eye(projection.k, dtype=like.dtype, device=like.device)
    by_key = spread(projection, one_each[:, None].expand(-1, projection.num_maps, -1), grid_size)
    return by_key.transpose(0, 1).detach()


@torch.no_grad()
def weighted_rows(layer: LayerAttention, weights: Tensor, *, gradient: Tensor | None = None) -> Tensor:
    """vᵀ P̄ for weights v (T): (H, K). With the gradient of the outputs (1, H, T, d), P̄ is max(∂y/∂P̄ ⊙ P̄, 0)."""
    # For a class token, one row is enough.
    needed = weights.nonzero().squeeze(1)
    own = weights[needed]
    rows = []
    for head in range(layer.num_heads):
        total = weights.new_zeros(layer.keys.shape[2])
        for part, block in layer.matrix(head, rows=needed).row_blocks():
            if gradient is not None:
                of_rows = gradient[0, head, needed[part]].to(total.dtype)
                block = (block * (of_rows @ layer.values[0, head].to(total.dtype).mT)).clamp(min=0)
            total += own[part] @ block
        rows.append(total)
    return torch.stack(rows)


def _chosen_classes(classes: Sequence[int] | int | None, count: int, method: Method) -> list[int | None]:
    if classes is None:
        return [None] * count
    if method not in OF_A_CLASS:
        raise ValueError(f"method {method!r} does not explain a class: leave `classes` out, or take 'relevance'")
    chosen = [classes] * count if isinstance(classes, int) else [int(each) for each in classes]
    if len(chosen) != count:
        raise ValueError(f"there are {len(chosen)} classes for {count} images: give one, or one for each image")
    return list(chosen)


def _reads_class_token(vit: Vit) -> bool:
    return getattr(vit, "global_pool", "avg") == "token"


def _linformer_attention(block: nn.Module) -> ProjectedAttention | None:
    return next((module for module in block.modules() if isinstance(module, ProjectedAttention)), None)


def approximations(vit: Vit, method: Method) -> list[str]:
    notes = []
    attentions = [attention for attention in map(_linformer_attention, vit.blocks) if attention is not None]
    reducing = {
        projection.kind
        for attention in attentions
        for projection in (attention.projections() or ())[1:]
        if not isinstance(projection, MatrixProjection)
    }
    if reducing and method not in ("gradcam", "cam"):
        kinds = " and ".join(sorted(reducing))
        notes.append(f"{kinds} does not weight patches linearly: each key counts as the mean of its cell")
    if method not in ("gradcam", "cam", "keys"):
        pool = getattr(vit, "global_pool", "avg")
        if pool not in ("token", "avg"):
            notes.append(f"pooling {pool!r} is treated as an average over the patches")
        if any(attention.local is not None for attention in attentions):
            notes.append("the convolutions of --local are left out")
    return notes
