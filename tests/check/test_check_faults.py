"""The check finds every fault and nothing else; code, docs/check.md and training agree on what happens to it."""

import re
from pathlib import Path

import numpy as np
import pytest
from checks import checked, paths_by_code
from corpus import FAULTY, build_clean, build_corpus, build_fault
from PIL import Image

from linvit.check.faults import FAULTS, Fault
from linvit.data.decode import UnreadableImage, read_image
from linvit.data.sources.folder import ImageFolder, open_folder
from linvit.data.sources.loose import find_images

DOCS = Path(__file__).parents[2] / "docs" / "check.md"


def test_a_clean_folder_has_no_finding(tmp_path: Path) -> None:
    report = checked(build_clean(tmp_path / "data"), tmp_path)
    assert (report["findings"], report["status"], report["training"]) == ({}, 0, "would start")


@pytest.mark.parametrize("code", FAULTY)
def test_a_fault_is_found_and_nothing_else(code: str, tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    expected = build_fault(data, code)
    report = checked(data, tmp_path)
    assert paths_by_code(report) == {code: sorted(expected)}
    assert report["status"] == (1 if FAULTS[code].severity == "fault" else 0)


def test_all_faults_at_once(tmp_path: Path) -> None:
    expected = build_corpus(tmp_path / "data")
    found = paths_by_code(checked(tmp_path / "data", tmp_path))
    for code, paths in expected.items():
        assert set(paths) <= set(found[code]), code


def opened(data: Path) -> tuple[ImageFolder, ImageFolder]:
    """Both splits, as training opens them and evaluation with the classes of a run."""
    train = open_folder(data, split="train")
    return train, open_folder(data, split="val", class_names=train.class_names)


@pytest.mark.parametrize("code", FAULTY)
def test_training_evaluation_and_prediction_do_what_the_table_says(code: str, tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    found = {data / path for path in build_fault(data, code)}
    effect = FAULTS[code].effect
    if effect == "refused":
        with pytest.raises((ValueError, OSError)):
            opened(data)
        return
    splits = [*opened(data), find_images([str(data)])]
    listed = [{path.absolute() for path in images.paths} for images in splits]
    if effect == "passed over":
        assert not found & (listed[0] | listed[1])
        assert found <= listed[2] if code == "loose_image" else not found & listed[2]
    elif effect == "unread":
        assert found <= (listed[0] | listed[1]) & listed[2]
        for images in splits:
            for index, path in enumerate(images.paths):
                if path.absolute() in found:
                    with pytest.raises(UnreadableImage, match=re.escape(str(path))):
                        images.read(index)
    else:
        # Some findings are about folders.
        files = {path for path in found if path.is_file()}
        assert files <= (listed[0] | listed[1]) & listed[2]
        for path in files if code != "decompression_bomb" else ():
            assert read_image(path).shape[2] == 3


def test_the_error_of_training_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = build_clean(tmp_path / "data")
    build_fault(data, "empty_class")
    report = checked(data, tmp_path)
    with pytest.raises(ValueError) as caught:
        open_folder(data, split="train")
    assert report["training"] == str(caught.value)
    assert f"training would not start: {caught.value}" in capsys.readouterr().out


def test_images_are_converted_as_notes_say(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    assert all(read_image(data / path).shape == (64, 48, 3) for path in build_fault(data, "exif_rotated"))
    for path in build_fault(data, "animated"):
        first = np.asarray(Image.open(data / path).convert("RGB")).astype(int)
        assert np.abs(read_image(data / path) - first).mean() < 3


def test_every_kind_of_fault_can_be_built() -> None:
    # A folder that cannot be listed has a test of its own, which patches the system call. So have 16-bit images of few
    # values, which are notes as well.
    assert {*FAULTY, "unreadable_folder", "narrow_range"} == FAULTS.keys()


def test_12_bit_data_in_16_bit_files_is_found_with_the_option_to_set(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    values = np.random.default_rng(0).integers(3, 601, (48, 64), dtype=np.uint16)
    Image.fromarray(values).save(data / "train/ant/dark.png")
    # Hot pixels of a sensor do not make the range.
    values[7, 9] = 65535
    Image.fromarray(values[::-1].copy()).save(data / "train/bee/hot.tif")
    report = checked(data, tmp_path)
    (case,) = report["findings"]["narrow_range"]["cases"]
    assert case["detail"] == (
        "2 images of 16 bits use the values 3 to 600: 3 of 256 grey levels are left; --input-range 3 600"
    )
    assert report["status"] == 1
    ranged = checked(data, tmp_path, input_range=(3, 600))
    assert (list(ranged["findings"]), ranged["status"]) == (["sixteen_bit"], 0)
    values[0, :] = 40_000
    Image.fromarray(values).save(data / "train/ant/bright.png")
    assert "narrow_range" not in checked(data, tmp_path)["findings"]


def uses(fault: Fault) -> str:
    """What training does, and what evaluation and prediction do if they differ."""
    parts = [fault.training]
    if fault.evaluation != fault.training:
        parts.append(f"evaluation {fault.evaluation}")
    if fault.prediction not in (fault.training, fault.evaluation):
        parts.append(f"prediction {fault.prediction}")
    return "; ".join(parts)


def table(severity: str) -> str:
    lines = ["| finding | what it is | what training does | fix |", "|---|---|---|---|"]
    lines += [
        f"| `{code}` | {fault.what} | {uses(fault)} | {fault.fix} |"
        for code, fault in FAULTS.items()
        if fault.severity == severity
    ]
    return "\n".join(lines)


def test_the_tables_in_the_docs_match_the_code() -> None:
    found = re.findall(r"<!-- begin (\w+) -->\n(.*?)\n<!-- end -->", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert dict(found) == {f"{severity}s": table(severity) for severity in ("fault", "note")}
