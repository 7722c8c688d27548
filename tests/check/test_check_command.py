"""The command line of `linvit check`: exit statuses, errors, and DATA left unchanged."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from checks import checked
from corpus import build_clean, build_corpus, build_fault

from linvit.cli import main


def state_of(folder: Path) -> list[tuple[object, ...]]:
    """The names, sizes, times and contents of everything below a folder."""
    found: list[tuple[object, ...]] = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        plain = path.is_file() and not path.is_symlink()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if plain else ""
        found.append((str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode, digest))
    return found


def test_exit_statuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = build_clean(tmp_path / "data")
    assert main(["check", str(data), "-j", "0"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("no faults, no notes\n")
    assert "checked 12 images in" in shown
    build_fault(data, "alpha")
    assert main(["check", str(data), "-j", "0"]) == 0
    capsys.readouterr()
    build_fault(data, "tiny")
    assert main(["check", str(data), "-j", "0"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("1 kind of fault (1 case), 1 kind of note (1 case)\n")
    assert "train/ant/tiny.png (40×5)" in shown
    assert main(["check", str(data), "-j", "0", "--allow", "tiny"]) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["nowhere"], 3, "nowhere: no such folder"),
        (["empty"], 3, "empty: contains no images (looked for .avif .bmp"),
        (["data", "--allow", "tiney"], 2, "unknown fault 'tiney'; did you mean 'tiny'?"),
        (
            ["data", "--json", "none/check.json"],
            2,
            "--json none/check.json: folder none does not exist; create it first",
        ),
        (["data", "--workers", "-1"], 2, "--workers takes a whole number of at least 0"),
        ([], 2, "required: DATA"),
    ],
)
def test_wrong_usage_is_reported_in_one_sentence(
    arguments: list[str],
    status: int,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    build_clean(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    assert main(["check", *arguments]) == status
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_the_verdict_comes_first_and_counts_kinds_and_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = build_clean(tmp_path / "data")
    codes = ("empty_class", "truncated", "duplicate_across_splits", "tiny", "alpha")
    empty, cut, copies, tiny, _ = (len(build_fault(data, code)) for code in codes)
    assert main(["check", str(data), "-j", "0", "--json", "-"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["verdict"] == {
        "stops_training": ["truncated", "empty_class"],
        "leaks": ["duplicate_across_splits"],
        "distorts": ["tiny"],
    }
    assert report["num_faults"] == empty + cut + copies + tiny
    first, training, stops, leaks, distorts, contents, *_ = err.splitlines()
    assert first == f"4 kinds of fault ({empty + cut + copies + tiny} cases), 1 kind of note (1 case)"
    assert training.startswith("training would not start: ")
    assert stops == f"stops training: truncated ({cut}), empty_class ({empty})"
    assert leaks == f"leaks into evaluation: duplicate_across_splits ({copies})"
    assert distorts == f"distorts training or evaluation: tiny ({tiny})"
    assert contents.startswith(f"{data}: train ")


def test_the_check_does_not_load_torch(tmp_path: Path) -> None:
    data = build_clean(tmp_path / "data")
    program = f"""
import sys
sys.argv = ["linvit", "check", {str(data)!r}, "-j", "0"]
from linvit_command import main
assert main() == 0
sys.exit(str([name for name in ("torch", "timm", "albumentations", "matplotlib", "scipy") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == "[]\n"


def test_nothing_is_modified_and_the_report_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    build_corpus(tmp_path / "data")
    before = state_of(tmp_path)
    (tmp_path / "out").mkdir()
    settings = {"html_file": tmp_path / "out/check.html"}
    reports = [checked(tmp_path / "data", tmp_path / "out", workers=workers, **settings) for workers in (0, 2)]
    for report in reports:
        for name in ("seconds", "images_per_second", "workers"):
            del report[name]
    assert reports[0] == reports[1]
    for file in ("check.json", "check.html"):
        (tmp_path / "out" / file).unlink()
    (tmp_path / "out").rmdir()
    assert [row for row in state_of(tmp_path) if row[0] != str(tmp_path)] == before
