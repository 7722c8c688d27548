"""The language of `--aa`: timm's strings for RandAugment, AutoAugment and 3-Augment, and TrivialAugment.

Grammar as in timm 1.0.31 (`timm.data.auto_augment`), read strictly: timm passes over sections it cannot read.
"""

import math
import re
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
