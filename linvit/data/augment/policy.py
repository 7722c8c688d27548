"""The notation of `--aa`: timm's strings for RandAugment, AutoAugment and 3-Augment, plus TrivialAugmentWide.

The grammar is that of timm 1.0.31 (`timm.data.auto_augment`), except that unknown sections are errors; timm ignores
them. The tables below turn a magnitude into the argument of an operation.
"""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

AUTO_POLICIES = ("original", "originalr", "v0", "v0r", "3a")
TRIVIAL_NAMES = ("ta_wide", "trivialaugment")
OPERATION_SETS = ("weights", "3a", "3aw")

_RAND_SECTION = re.compile(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d+)?)")
_INTEGER_KEYS = ("mmax", "inc", "m", "n")


@dataclass(frozen=True)
class AugmentPolicy:
    """A parsed `--aa` string.

    Magnitudes range from 0 to 10, as in timm, or to `magnitude_max`. If `magnitude_std` is positive, the magnitude is
    drawn from a normal distribution around `magnitude`; if it is infinite, uniformly from 0 to `magnitude`.
    """

    kind: Literal["rand", "auto", "trivial"]
    # For "auto" the table of sub-policies, for "rand" the set of operations ("" is the default set).
    table: str = ""
    num_ops: int = 2
    prob: float = 0.5
    magnitude: float = 10.0
    magnitude_std: float = 0.0
    magnitude_max: float = 10.0
    increasing: bool = False


def parse_policy(text: str) -> AugmentPolicy:
    """Parse an `--aa` string such as `rand-m9-mstd0.5-inc1`, `3a`, `original-mstd0.5` or `ta_wide`.

    Raises:
        ValueError: for an unknown policy or section; the message lists the known ones.
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
            f"aa '{text}': AugMix is not supported, because it needs the JSD loss over several views of an image; "
            "use rand-m9-mstd0.5-inc1, 3a or ta_wide"
        )
    raise ValueError(
        f"aa '{text}' is unknown: choose one of {_quoted('rand-m9-mstd0.5-inc1', *AUTO_POLICIES, *TRIVIAL_NAMES)}"
    )


def _parse_rand(text: str, sections: list[str]) -> AugmentPolicy:
    values: dict[str, float] = {}
    table = ""
    for section in sections:
        if section.startswith("t"):
            table = section[1:]
            if table not in OPERATION_SETS:
                choices = _quoted(*("t" + name for name in OPERATION_SETS))
                raise ValueError(f"aa '{text}': unknown set of operations '{section}': choose one of {choices}")
            continue
        match = _RAND_SECTION.fullmatch(section)
        if match is None or (match[1] in _INTEGER_KEYS and "." in match[2]):
            raise ValueError(
                f"aa '{text}': cannot read '{section}'; use m, n, inc or mmax with an integer, mstd or p with a number "
                "and t with a name, as in rand-m9-n2-mstd0.5-inc1"
            )
        values[match[1]] = float(match[2])
    if values.get("n") == 0:
        raise ValueError(f"aa '{text}': n0 applies no operation; remove aa instead")
    if values.get("p", 0.5) > 1:
        raise ValueError(f"aa '{text}': p is a probability and must be at most 1")
    std = values.get("mstd", 0.0)
    return AugmentPolicy(
        kind="rand",
        table=table,
        num_ops=int(values.get("n", 2)),
        prob=values.get("p", 0.5),
        magnitude=values.get("m", 10.0),
        magnitude_std=math.inf if std > 100 else std,
        # As in timm, mmax0 means the default maximum.
        magnitude_max=values.get("mmax", 0.0) or 10.0,
        increasing=bool(values.get("inc", 0)),
    )


def _parse_auto(text: str, name: str, sections: list[str]) -> AugmentPolicy:
    std = 0.0
    for section in sections:
        match = re.fullmatch(r"mstd(\d+(?:\.\d+)?)", section)
        if match is None:
            raise ValueError(f"aa '{text}': cannot read '{section}'; '{name}' takes only mstd, as in {name}-mstd0.5")
        std = float(match[1])
    return AugmentPolicy(kind="auto", table=name, magnitude_std=std)


def _quoted(*names: str) -> str:
    return ", ".join(f"'{name}'" for name in names)


# Draws the argument of an operation of this strength. Strength is magnitude / 10, so mostly from 0 to 1.
DrawArgument = Callable[[float, random.Random], float]


def _random_sign(value: float, draw: random.Random) -> float:
    return -value if draw.random() < 0.5 else value


def _signed(largest: float) -> DrawArgument:
    return lambda strength, draw: _random_sign(strength * largest, draw)


def _unsigned(argument: Callable[[float], float]) -> DrawArgument:
    return lambda strength, draw: argument(strength)


_enhanced = _unsigned(lambda strength: strength * 1.8 + 0.1)


def _enhanced_increasing(strength: float, draw: random.Random) -> float:
    return max(0.1, 1.0 + _random_sign(strength * 0.9, draw))


# Equal to `timm.data.auto_augment.LEVEL_TO_ARG`, whose functions draw from Python's global generator instead.
TIMM_ARGUMENTS: dict[str, DrawArgument] = {
    "Rotate": _signed(30.0),
    "Posterize": _unsigned(lambda strength: int(strength * 4)),
    "PosterizeIncreasing": _unsigned(lambda strength: 4 - int(strength * 4)),
    "PosterizeOriginal": _unsigned(lambda strength: 4 + int(strength * 4)),
    "Solarize": _unsigned(lambda strength: min(256, int(strength * 256))),
    "SolarizeIncreasing": _unsigned(lambda strength: 256 - min(256, int(strength * 256))),
    "SolarizeAdd": _unsigned(lambda strength: min(128, int(strength * 110))),
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
    "Desaturate": _unsigned(lambda strength: 0.5 + 0.5 * min(strength, 1.0)),
    "GaussianBlur": _unsigned(lambda strength: 0.1 + 1.9 * min(strength, 1.0)),
    "GaussianBlurRand": lambda strength, draw: draw.uniform(0.1, 2.0 * min(strength, 1.0)),
}


def _trivially_enhanced(strength: float, draw: random.Random) -> float:
    return 1.0 + _random_sign(0.99 * strength, draw)


# The wide space of Müller and Hutter 2021, table 1. The strength is one of 31 values from 0 to 1. An operation with
# None takes no argument.
TRIVIAL_STEPS = 31
TRIVIAL_ARGUMENTS: dict[str, DrawArgument | None] = {
    "Identity": None,
    "AutoContrast": None,
    "Equalize": None,
    "Rotate": _signed(135.0),
    "Solarize": _unsigned(lambda strength: 255.0 * (1.0 - strength)),
    "Color": _trivially_enhanced,
    "Posterize": _unsigned(lambda strength: 8 - round(6 * strength)),
    "Contrast": _trivially_enhanced,
    "Brightness": _trivially_enhanced,
    "Sharpness": _trivially_enhanced,
    "ShearX": _signed(0.99),
    "ShearY": _signed(0.99),
    "TranslateX": _signed(32.0),
    "TranslateY": _signed(32.0),
}
