"""`linvit models`."""

import json
import re

import pytest

from linvit import cli
from linvit.model.catalog import list_entries


def test_lists_the_registered_models_with_their_sizes(tmp_path, capsys):
    assert cli.main(["models", "linvit_mini_*", "--json", str(tmp_path / "models.json")]) == 0
    entries = json.loads((tmp_path / "models.json").read_text())
    assert [(entry["name"], entry["img_size"], entry["num_tokens"]) for entry in entries] == [
        ("linvit_mini_patch4_rope_64", 64, 256),
        ("linvit_mini_patch4_64", 64, 256),
        ("linvit_mini_patch8_288", 288, 1296),
    ]
    assert {(entry["projection"], entry["share"]) for entry in entries} == {("separable", "kv")}
    heading, _, *rows = (line for line in capsys.readouterr().out.splitlines() if line.strip())
    assert heading.split() == ["model", "size", "tokens", "parameters", "k", "projection", "share"]
    assert [row.split()[:4] for row in rows] == [
        [entry["name"], str(entry["img_size"]), f"{entry['num_tokens']:,}", f"{entry['num_parameters']:,}"]
        for entry in entries
    ]


def test_a_piped_table_has_one_line_per_model_in_100_columns(capsys):
    assert cli.main(["models"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 2 + len(list_entries("*"))
    assert max(map(len, lines)) <= 100


def test_an_unknown_pattern_is_refused():
    with pytest.raises(ValueError, match=r"unknown model 'linvit_smal_\*'; did you mean"):
        list_entries("linvit_smal_*")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("mini", "no model matches 'mini'; did you mean '*mini*'?"),
        ("LINVIT_mini*", "no model matches 'LINVIT_mini*'; did you mean 'linvit_mini*'?"),
        ("zzz", "no model of linvit matches 'zzz': `linvit models` lists all of them"),
    ],
)
def test_a_pattern_that_matches_nothing_is_answered_with_one_that_does(pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        list_entries(pattern)
