"""Shares and ranks that follow from a spectrum, and its JSON form."""

import json

import numpy as np
import pytest
from spectra import make_spectrum

from linvit import Spectrum
from linvit.spectrum.result import LISTED_SINGLY, read_spectra


def by_hand(**changes):
    """Singular values 4, 2, 1, 1 of a 4 × 4 matrix: energies 16, 4, 1, 1."""
    values = np.array([[[4.0, 2.0, 1.0, 1.0]]])
    energies = values**2
    settings = {"singular_values": values, "energies": energies, "total_energies": energies.sum(-1), **changes}
    return make_spectrum([[1.0]], grid_size=(1, 3), **settings)


def test_shares_and_ranks_by_hand():
    spectrum = by_hand()
    np.testing.assert_allclose(spectrum.cumulative[0, 0], [4 / 8, 6 / 8, 7 / 8, 1])
    np.testing.assert_allclose(spectrum.cumulative_energy[0, 0], [16 / 22, 20 / 22, 21 / 22, 1])
    assert [int(spectrum.rank(energy)[0, 0]) for energy in (0.5, 16 / 22, 0.9, 0.95, 0.96, 1)] == [1, 1, 2, 3, 4, 4]
    assert spectrum.missing_energy[0, 0] == 0


def test_missing_values_count_against_the_shares():
    full = by_hand()
    part = by_hand(singular_values=full.singular_values[..., :2], energies=full.energies[..., :2], method="randomized")
    np.testing.assert_allclose(part.missing_energy, 2 / 22)
    np.testing.assert_allclose(part.cumulative_energy[0, 0], [16 / 22, 20 / 22])
    # Two missing values with an energy of two add up to at most two, as these do.
    np.testing.assert_allclose(part.cumulative[0, 0], [4 / 8, 6 / 8])
    assert [int(part.rank(energy)[0, 0]) for energy in (0.7, 0.9, 0.95)] == [1, 2, 4]


def test_a_file_keeps_shares_at_the_end_of_every_run():
    spectrum = make_spectrum([[3.0, 40.0, 900.0], [10.0, 200.0, 2.0]], grid_size=(30, 30))
    again = Spectrum.from_json(spectrum.to_json())
    assert again.singular_values.shape == spectrum.singular_values.shape
    np.testing.assert_allclose(
        again.singular_values[..., :LISTED_SINGLY], spectrum.singular_values[..., :64], rtol=1e-4
    )
    ends = np.cumsum(spectrum.to_dict()["run_lengths"]) - 1
    for name in ("cumulative", "cumulative_energy"):
        expected, found = getattr(spectrum, name), getattr(again, name)
        np.testing.assert_allclose(found[..., ends], expected[..., ends], atol=1e-4)
        # Between these ends the shares are slightly too small.
        assert (found <= expected + 1e-4).all()
        np.testing.assert_allclose(found, expected, atol=2e-3)
    assert Spectrum.from_json(again.to_json()).to_json() == again.to_json()
    for name in ("model", "img_size", "grid_size", "num_prefix_tokens", "num_images", "method", "embed_dim"):
        assert getattr(again, name) == getattr(spectrum, name)
    assert again.flops_besides_attention == spectrum.flops_besides_attention


def test_a_file_stays_small():
    assert len(make_spectrum([[50.0] * 6] * 12, grid_size=(37, 37)).to_json()) < 400_000


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"spectra": [{"model": "vit"}]}', '{"rows": []}', '{"spectra": 3}'],
)
def test_other_files_are_refused_by_name(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: holds no spectrum of attention: give what `linvit spectrum"):
        read_spectra(path)
    with pytest.raises(ValueError, match=r"none\.json: cannot be read \(No such file"):
        read_spectra(tmp_path / "none.json")


def test_spectra_of_a_results_file_are_read(tmp_path):
    path = tmp_path / "results.json"
    spectra = [make_spectrum([[3.0, 40.0]], grid_size=grid) for grid in ((4, 4), (8, 8))]
    path.write_text(json.dumps({"command": "x", "spectra": [spectrum.to_dict() for spectrum in spectra]}))
    assert [spectrum.num_tokens for spectrum in read_spectra(path)] == [17, 65]
