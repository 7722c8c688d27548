"""Rows are read back as they were written, and a file is complete or absent."""

import csv
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from linvit.prediction.writers import IMAGE_COLUMNS, TILE_COLUMNS, check_format, open_rows

ROWS: list[dict[str, Any]] = [
    {"path": 'a, "b"\n.png', "labels": ("é", "x"), "probabilities": (0.9, 1e-9), "error": None},
    {"path": "b.png", "labels": (), "probabilities": (), "error": "is empty"},
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    with open_rows(path, IMAGE_COLUMNS, topk=2) as write_row:
        for row in rows:
            write_row(row)


def test_csv_spreads_lists_over_columns(tmp_path: Path) -> None:
    write(tmp_path / "p.CSV")
    with (tmp_path / "p.CSV").open(newline="", encoding="utf-8") as file:
        header, first, second = csv.reader(file)
    assert header == ["path", "label_1", "label_2", "probability_1", "probability_2", "error"]
    assert first == ['a, "b"\n.png', "é", "x", "0.9", "1e-09", ""]
    assert second == ["b.png", "", "", "", "", "is empty"]


def test_csv_holds_no_formulas(tmp_path: Path) -> None:
    write(tmp_path / "p.csv", [{**ROWS[0], "path": "-a.png", "labels": ("=cmd|x", "-1"), "error": "@b"}])
    assert (tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()[1] == "'-a.png,'=cmd|x,-1,0.9,1e-09,'@b"


def test_json_lines_have_every_column(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{**row, "labels": [*row["labels"]], "probabilities": [*row["probabilities"]]} for row in ROWS]


def test_parquet_has_typed_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("linvit.prediction.writers._GROUP_SIZE", 2)
    tile = {"path": "c.png", "top": 1, "left": 2, "height": 3, "width": 4, "labels": ["x"], "probabilities": [0.5]}
    with open_rows(tmp_path / "t.parquet", TILE_COLUMNS, topk=1) as write_row:
        for _ in range(3):
            write_row(tile)
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == [tile] * 3
    write(tmp_path / "p.parquet", [{**ROWS[1], "path": os.fsdecode(b"\xff.png")}])
    (row,) = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert row == {"path": "\ufffd.png", "labels": [], "probabilities": [], "error": "is empty"}


def test_a_path_that_is_not_utf8_is_kept(tmp_path: Path) -> None:
    path = os.fsdecode(b"\xff.png")
    for name in ("p.csv", "p.jsonl"):
        write(tmp_path / name, [{**ROWS[1], "path": path}])
    assert b"\xff.png" in (tmp_path / "p.csv").read_bytes()
    assert json.loads((tmp_path / "p.jsonl").read_bytes())["path"] == path


def test_a_probability_that_is_not_finite_is_null(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", [{**ROWS[0], "probabilities": (float("nan"), 1.0)}])
    assert json.loads((tmp_path / "p.jsonl").read_bytes())["probabilities"] == [None, 1.0]


def fail_after_a_row(path: Path) -> None:
    with open_rows(path, IMAGE_COLUMNS, topk=2) as write_row:
        write_row(ROWS[0])
        raise OSError("the camera is gone")


def test_a_failure_leaves_the_old_table(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("old")
    with pytest.raises(OSError, match=r"^the camera is gone$"):
        fail_after_a_row(tmp_path / "p.csv")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("p.csv", "old")]


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl"])
def test_two_processes_do_not_mix_their_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with open_rows(path, IMAGE_COLUMNS, topk=2) as write_row:
        write_row(ROWS[0])
        child = os.fork()
        if child == 0:
            try:
                write(path, [ROWS[1]])
            except OSError as error:
                os._exit(2 if "another process is writing it" in str(error) else 3)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (2 if name == "p.jsonl" else 0)
        write_row(ROWS[0])
    lines = path.read_text(encoding="utf-8").replace("\n.png", "").splitlines()
    assert lines[-1] == lines[-2]
    assert len(lines) == (2 if name == "p.jsonl" else 3)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_json_lines_keep_finished_rows(tmp_path: Path) -> None:
    with open_rows(tmp_path / "p.jsonl", IMAGE_COLUMNS, topk=2) as write_row:
        write_row(ROWS[0])
        # While the file is still open, too.
        assert json.loads((tmp_path / "p.jsonl").read_bytes())["path"] == ROWS[0]["path"]
    with pytest.raises(OSError, match="camera"):
        fail_after_a_row(tmp_path / "p.jsonl")
    assert json.loads((tmp_path / "p.jsonl").read_bytes())["path"] == ROWS[0]["path"]


def fill_the_disk(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("name", "moment"),
    [("p.jsonl", "os.fsync"), ("p.csv", "os.fsync"), ("p.jsonl", "_JsonLines.write"), ("p.csv", "_Csv.write")],
)
def test_a_full_disk_names_the_file(name: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"linvit.prediction.writers.{moment}", fill_the_disk)
    with pytest.raises(OSError, match=rf"^cannot write {tmp_path / name}: no space left on device; make room"):
        write(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} <= {"p.jsonl"}


def test_a_missing_package_is_reported_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_format(tmp_path / "p.csv")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"p.parquet: Parquet needs pyarrow; pip install pyarrow"):
        check_format(tmp_path / "p.parquet")


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.parquet"])
def test_names_of_classes_that_are_not_utf8(name: str, tmp_path: Path) -> None:
    if name == "p.parquet":
        pytest.importorskip("pyarrow")
    write(
        tmp_path / name, [{"path": "caf\udce9/a.png", "labels": ("caf\udce9",), "probabilities": (1.0,), "error": None}]
    )
    if name == "p.parquet":
        (row,) = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / name).to_pylist()
        assert (row["path"], row["labels"]) == ("caf�/a.png", ["caf�"])
