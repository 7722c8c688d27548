"""Warnings about a conversion with low fidelity, and its tables."""

from pathlib import Path
from typing import Any

import pytest

from linvit.conversion.comparison import Fidelity, Speed
from linvit.conversion.fit import LayerFit
from linvit.conversion.results import ConversionResult
from linvit.output.terminal import page


def result(*cosines: float) -> ConversionResult:
    unused: Any = None
    stages = {str(number): Fidelity(2, cosine, cosine, cosine, None) for number, cosine in enumerate(cosines)}
    return ConversionResult(unused, unused, unused, [], stages, [])


@pytest.mark.parametrize(
    ("cosines", "words"),
    [
        (
            (0.99, 0.95),
            "the features to the original's from 0.990 to 0.950, probably because of too few images",
        ),
        ((0.99, 0.95, 0.97), "from 0.990 to 0.970"),
        ((0.5, 0.8), "the lowest cosine of the features to the original's is 0.800; use a larger --k"),
    ],
)
def test_low_fidelity_causes_a_warning(
    cosines: tuple[float, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result(*cosines).check(None, Path("out"))
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("warning:") == 1


@pytest.mark.parametrize("cosines", [(0.95, 0.99), (0.99, 0.9895), (0.99, 0.95, 0.995)])
def test_good_fidelity_causes_none(cosines: tuple[float, ...], capsys: pytest.CaptureFixture[str]) -> None:
    result(*cosines).check(0.9, Path("out"))
    assert capsys.readouterr().err == ""


def test_tables_fit_a_pipe_and_have_all_values(capsys: pytest.CaptureFixture[str]) -> None:
    unused: Any = None
    fits = [LayerFit(0, None, 0, 0, 0, 1), LayerFit(1, [4, 9], 0.1234, 0.05, 0.06, 0.99)]
    stages = {"pooled": Fidelity(2, None, 0.9, None, None), "fitted": Fidelity(2, 0.5, 0.9, 0.8, 0.75)}
    speed = Speed((1022, 768), 3942, 8, "bfloat16", 5, 4.149, 1.791, 2.32, (2.31, 2.38), 3 * 2**30, None)
    ConversionResult(unused, unused, unused, fits, stages, [speed]).show(page())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (
        "0 – 0.000 0.000 0.000 1.0000",
        "1 4…9 0.123 0.050 0.060 0.9900",
        "pooled – 0.9000 – –",
        "fitted 0.5000 0.9000 0.8000 75.0%",
        "1022×768 3,942 4.15 s 1.79 s 2.32 (2.31–2.38) 3.00 GiB –",
    ):
        assert row.split() in lines
