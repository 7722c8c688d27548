"""The language of `--aa`: timm's strings for RandAugment, AutoAugment and 3-Augment, and TrivialAugment.

Grammar as in timm 1.0.31 (`timm.data.auto_augment`), read strictly: timm passes over sections it cannot read.

How a magnitude becomes an operation's argument: in timm's automatic augmentations, and in TrivialAugmentWide.
"""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

AUTO_POLICIES = ("original", "originalr", "v0", "v0r", "3a")
TRIVIAL_NAMES = ("ta_wide", "trivialaugment")
CHOICE_NAMES = ("weights", "3a", "3aw")


@dataclass(frozen=True)
class AugmentPolicy:
    """A parsed `--aa` string.

    Magnitudes run from 0 to 10 as in timm, or up to `magnitude_max`. A `magnitude_std` above 0 draws the
    magnitude from a normal distribution around `magnitude`, an infinite one uniformly from 0 to `magnitude`.
    """

    kind: Literal["rand", "auto", "trivial"]
    # The table of sub-policies for "auto", the set of operations for "rand" ("" is the usual one).
    table: str = ""
    num_ops: int = 2
    prob: float = 0.5
    magnitude: float = 10.0
    magnitude_std: float = 0.0
    magnitude_max: float = 10.0
    increasing: bool = False


_RAND_SECTION = re.compile(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d+)?)")
_INTEGER_KEYS = ("mmax", "inc", "m", "n")


def _parse_rand(text: str, sections: list[str]) -> AugmentPolicy:
    values: dict[str, float] = {}
    table = ""
    for section in sections:
        if section.startswith("t"):
            table = section[1:]
            if table not in CHOICE_NAMES:
                names = ", ".join("t" + name for name in CHOICE_NAMES)
                raise ValueError(f"aa '{text}': '{section}' names no set of operations; choose from {names}")
            continue
        match = _RAND_SECTION.fullmatch(section)
        if match is None or (match[1] in _INTEGER_KEYS and "." in match[2]):
            raise ValueError(
                f"aa '{text}': cannot read '{section}'; "
                "sections are m, n, inc, mmax with an integer, mstd, p with a number and t with a name, "
                "as in rand-m9-n2-mstd0.5-inc1"
            )
        values[match[1]] = float(match[2])
    if values.get("n") == 0:
        raise ValueError(f"aa '{text}': n0 applies no operation; leave aa out instead")
    if values.get("p", 0.5) > 1:
        raise ValueError(f"aa '{text}': p is a probability, at most 1")
    std = values.get("mstd", 0.0)
    return AugmentPolicy(
        kind="rand",
        table=table,
        num_ops=int(values.get("n", 2)),
        prob=values.get("p", 0.5),
        magnitude=values.get("m", 10.0),
        magnitude_std=math.inf if std > 100 else std,
        # As in timm, mmax0 means the default bound.
        magnitude_max=values.get("mmax", 0.0) or 10.0,
        increasing=bool(values.get("inc", 0)),
    )


def _parse_auto(text: str, name: str, sections: list[str]) -> AugmentPolicy:
    std = 0.0
    for section in sections:
        match = re.fullmatch(r"mstd(\d+(?:\.\d+)?)", section)
        if match is None:
            raise ValueError(f"aa '{text}': cannot read '{section}'; '{name}' takes mstd alone, as in {name}-mstd0.5")
        std = float(match[1])
    return AugmentPolicy(kind="auto", table=name, magnitude_std=std)


def parse_policy(text: str) -> AugmentPolicy:
    """Reads an `--aa` string such as `rand-m9-mstd0.5-inc1`, `3a`, `original-mstd0.5` or `ta_wide`.

    Raises:
        ValueError: for an unknown policy or section, saying what is known.
    """
    name, *sections = text.split("-")
    if name == "rand":
        return _parse_rand(text, sections)
    if name in AUTO_POLICIES:
        return _parse_auto(text, name, sections)
    if text in TRIVIAL_NAMES:
        return AugmentPolicy(kind="trivial", num_ops=1, prob=1.0)
    if name == "augmix":
        raise ValueError(
            f"aa '{text}': AugMix is not built: it needs the JSD loss over several views of an image, "
            "which is not built either; use rand-m9-mstd0.5-inc1, 3a or ta_wide"
        )
    known = ", ".join(("rand-m9-mstd0.5-inc1", *AUTO_POLICIES, *TRIVIAL_NAMES))
    raise ValueError(f"aa '{text}' is not known; choose from {known}")


# Draws an argument at a level, which is a magnitude / 10.
DrawArgument = Callable[[float, random.Random], float]


def _negated_or_not(value: float, draw: random.Random) -> float:
    return -value if draw.random() < 0.5 else value


def _signed(largest: float) -> DrawArgument:
    return lambda level, draw: _negated_or_not(level * largest, draw)


def _unsigned(argument: Callable[[float], float]) -> DrawArgument:
    return lambda level, draw: argument(level)


_enhanced = _unsigned(lambda level: level * 1.8 + 0.1)


def _enhanced_increasing(level: float, draw: random.Random) -> float:
    return max(0.1, 1.0 + _negated_or_not(level * 0.9, draw))


# As `timm.data.auto_augment.LEVEL_TO_ARG`, whose functions draw from Python's global generator.
TIMM_ARGUMENTS: dict[str, DrawArgument] = {
    "Rotate": _signed(30.0),
    "Posterize": _unsigned(lambda level: int(level * 4)),
    "PosterizeIncreasing": _unsigned(lambda level: 4 - int(level * 4)),
    "PosterizeOriginal": _unsigned(lambda level: 4 + int(level * 4)),
    "Solarize": _unsigned(lambda level: min(256, int(level * 256))),
    "SolarizeIncreasing": _unsigned(lambda level: 256 - min(256, int(level * 256))),
    "SolarizeAdd": _unsigned(lambda level: min(128, int(level * 110))),
    "Color": _enhanced,
    "ColorIncreasing": _enhanced_increasing,
    "Contrast": _enhanced,
    "ContrastIncreasing": _enhanced_increasing,
    "Brightness": _enhanced,
    "BrightnessIncreasing": _enhanced_increasing,
    "Sharpness": _enhanced,
    "SharpnessIncreasing": _enhanced_increasing,
    "ShearX": _signed(0.3),
    "ShearY": _signed(0.3),
    "TranslateXRel": _signed(0.45),
    "TranslateYRel": _signed(0.45),
    "Desaturate": _unsigned(lambda level: 0.5 + 0.5 * min(level, 1.0)),
    "GaussianBlur": _unsigned(lambda level: 0.1 + 1.9 * min(level, 1.0)),
    "GaussianBlurRand": lambda level, draw: draw.uniform(0.1, 2.0 * min(level, 1.0)),
}


def _trivially_enhanced(level: float, draw: random.Random) -> float:
    return 1.0 + _negated_or_not(0.99 * level, draw)


# The wide space of Müller and Hutter 2021, table 1; a level is one of 31 steps from 0 to 1. No operation for None.
TRIVIAL_STEPS = 31
TRIVIAL_ARGUMENTS: dict[str, DrawArgument | None] = {
    "Identity": None,
    "AutoContrast": None,
    "Equalize": None,
    "Rotate": _signed(135.0),
    "Solarize": _unsigned(lambda level: 255.0 * (1.0 - level)),
    "Color": _trivially_enhanced,
    "Posterize": _unsigned(lambda level: 8 - round(6 * level)),
    "Contrast": _trivially_enhanced,
    "Brightness": _trivially_enhanced,
    "Sharpness": _trivially_enhanced,
    "ShearX": _signed(0.99),
    "ShearY": _signed(0.99),
    "TranslateX": _signed(32.0),
    "TranslateY": _signed(32.0),
}
