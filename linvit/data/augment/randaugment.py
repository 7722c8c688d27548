"""RandAugment, AutoAugment and 3-Augment as timm defines them, and TrivialAugmentWide, as one transform.

Sources: RandAugment, Cubuk et al. 2020 (arXiv 1909.13719); AutoAugment, Cubuk et al. 2019 (1805.09501); 3-Augment,
Touvron et al. 2022 (2204.07118); TrivialAugmentWide, Müller and Hutter 2021 (2103.10158). The sets of operations and
the sub-policies are read from timm's own tables.
"""

import math
from typing import Any

import albumentations as A
import numpy as np
from albumentations.core.transforms_interface import BaseTransformInitSchema
from timm.data.auto_augment import auto_augment_policy, rand_augment_choices

from linvit.data.augment.operations import GEOMETRIC, OPERATIONS, Color
from linvit.data.augment.policy import TIMM_ARGUMENTS, TRIVIAL_ARGUMENTS, TRIVIAL_STEPS, parse_policy
from linvit.data.geometry import draw_interpolation

# Name and drawn arguments of an operation.
Step = tuple[str, tuple[Any, ...]]


class PolicyAugment(A.ImageOnlyTransform):
    """Applies the operations that a policy draws.

    Args:
        policy: a string for `linvit.data.augment.policy.parse_policy`.
        interpolation: interpolation of geometric operations; "random" draws bilinear or bicubic for each of them.
        fill: colour of the pixels that a geometric operation moves in from outside the image.

    Raises:
        ValueError: for a policy that cannot be parsed, or with more weighted operations than there are.
    """

    class InitSchema(BaseTransformInitSchema):
        policy: str
        interpolation: str
        fill: tuple[int, int, int]

    def __init__(
        self, policy: str, interpolation: str = "random", fill: Color = (128, 128, 128), p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        self.policy = policy
        self.interpolation = interpolation
        self.fill = fill
        self._parsed = parse_policy(policy)
        self._names: list[str] = []
        self._weights: np.ndarray | None = None
        self._sub_policies: list[list[tuple[str, float, float]]] = []
        if self._parsed.kind == "rand":
            self._load_operations()
        elif self._parsed.kind == "auto":
            self._sub_policies = [
                [(operation.name, operation.prob, operation.magnitude) for operation in sub_policy]
                for sub_policy in auto_augment_policy(self._parsed.table)
            ]

    def _load_operations(self) -> None:
        choices = rand_augment_choices(self._parsed.table, increasing=self._parsed.increasing)
        self._names = list(choices)
        if isinstance(choices, dict):
            weights = np.array(list(choices.values()))
            self._weights = weights / weights.sum()
            if self._parsed.num_ops > len(choices):
                raise ValueError(
                    f"aa '{self.policy}': n must be at most {len(choices)}, the number of weighted operations"
                )

    def get_params(self) -> dict[str, Any]:
        draw = {"rand": self._draw_rand, "auto": self._draw_auto, "trivial": self._draw_trivial}
        return {"steps": draw[self._parsed.kind]()}

    def apply(self, img: np.ndarray, steps: list[Step], **params: Any) -> np.ndarray:
        for name, arguments in steps:
            img = OPERATIONS[name](img, *arguments)
        return img

    def _draw_rand(self) -> list[Step]:
        # As in timm, operations are drawn with replacement unless they have weights.
        names = self.random_generator.choice(
            self._names, self._parsed.num_ops, replace=self._weights is None, p=self._weights
        )
        return self._draw_steps([(str(name), self._parsed.prob, self._parsed.magnitude) for name in names])

    def _draw_auto(self) -> list[Step]:
        return self._draw_steps(self.py_random.choice(self._sub_policies))

    def _draw_steps(self, operations: list[tuple[str, float, float]]) -> list[Step]:
        steps = []
        for name, prob, magnitude in operations:
            if self.py_random.random() >= prob:
                continue
            strength = self._draw_magnitude(magnitude) / 10.0
            argument = TIMM_ARGUMENTS.get(name)
            steps.append(self._step(name, () if argument is None else (argument(strength, self.py_random),)))
        return steps

    def _draw_magnitude(self, magnitude: float) -> float:
        if math.isinf(self._parsed.magnitude_std):
            magnitude = self.py_random.uniform(0.0, magnitude)
        elif self._parsed.magnitude_std > 0:
            magnitude = self.py_random.gauss(magnitude, self._parsed.magnitude_std)
        return max(0.0, min(magnitude, self._parsed.magnitude_max))

    def _draw_trivial(self) -> list[Step]:
        name = self.py_random.choice(list(TRIVIAL_ARGUMENTS))
        if name == "Identity":
            return []
        strength = self.py_random.randrange(TRIVIAL_STEPS) / (TRIVIAL_STEPS - 1)
        argument = TRIVIAL_ARGUMENTS[name]
        return [self._step(name, () if argument is None else (argument(strength, self.py_random),))]

    def _step(self, name: str, arguments: tuple[Any, ...]) -> Step:
        if name in GEOMETRIC:
            arguments = (*arguments, draw_interpolation(self.interpolation, self.py_random), self.fill)
        return name, arguments
