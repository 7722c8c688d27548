"""How a magnitude becomes an operation's argument: in timm's automatic augmentations, and in TrivialAugmentWide."""

import random
from collections.abc import Callable

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
