"""What is said of a conversion that came out poorly."""

from pathlib import Path
from typing import Any

import pytest

from linvit.conversion.distil import Fidelity
from linvit.conversion.outcome import Outcome


def outcome(*cosines: float) -> Outcome:
    nothing: Any = None
    stages = {str(number): Fidelity(2, cosine, cosine, cosine, None) for number, cosine in enumerate(cosines)}
    return Outcome(nothing, nothing, nothing, [], stages, [])


@pytest.mark.parametrize(
    ("cosines", "words"),
    [
        ((0.99, 0.95), "farther from the original's, from a cosine of 0.990 to 0.950, as one to too few images does"),
        ((0.99, 0.95, 0.97), "from a cosine of 0.990 to 0.970"),
        ((0.5, 0.8), "the lowest cosine of the features to the original's is 0.800"),
    ],
)
def test_a_poor_one_is_warned_of(cosines: tuple[float, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcome(*cosines).check(None, Path("out"))
    said = capsys.readouterr().err
    assert words in said
    assert said.count("warning:") == 1


@pytest.mark.parametrize("cosines", [(0.95, 0.99), (0.99, 0.9895), (0.99, 0.95, 0.995)])
def test_a_good_one_is_not(cosines: tuple[float, ...], capsys: pytest.CaptureFixture[str]) -> None:
    outcome(*cosines).check(0.9, Path("out"))
    assert capsys.readouterr().err == ""
