"""`linvit predict`: inputs, outputs and exit statuses."""

import csv
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from linvit.cli import main
from linvit.data.sources.loose import LooseImages
from linvit.prediction.predictor import Predictor


def predict(*arguments: str | Path) -> int:
    return main(["predict", *map(str, arguments), "--workers", "0"])


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_table_of_a_folder_in_natural_order(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(data / "val/red/0.png", data / "val/red/10.png")
    try:
        assert predict(run, data / "val/red", "--topk", "2", "--output", tmp_path / "p.csv") == 0
        expected = list(Predictor(run)(data / "val/red"))
    finally:
        (data / "val/red/10.png").unlink()
    rows = read_rows(tmp_path / "p.csv")
    assert [Path(row["path"]).name for row in rows] == ["0.png", "1.png", "2.png", "3.png", "4.png", "10.png"]
    assert [(row["label_1"], row["label_2"]) for row in rows] == [each.labels[:2] for each in expected]
    assert [float(row["probability_2"]) for row in rows] == [each.probabilities[1] for each in expected]
    assert "label_3" not in rows[0]
    assert capsys.readouterr().out == f"{tmp_path / 'p.csv'}: predictions on 6 of 6 images\n"


def test_lines_on_a_terminal_and_a_count_of_unreadable_images(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    (tmp_path / "empty.png").touch()
    (tmp_path / "a\x1b[2J\nb.png").touch()
    assert predict(run, data / "val/red/0.png", tmp_path / "empty.png", tmp_path / "a*.png", "--topk", "1") == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert third == f"{tmp_path / 'a�[2J�b.png'}: is empty; restore or remove the file"
    assert first.startswith(f"{data / 'val/red/0.png'}: ")
    assert first.endswith(" %")
    assert second == f"{tmp_path / 'empty.png'}: is empty; restore or remove the file"
    assert predict(run, tmp_path / "empty.png") == 1
    assert capsys.readouterr().err == "1 of 1 images have no prediction; their rows give the reasons\n"


def test_a_pipe_gets_the_columns_of_a_table_between_tabs(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tab\tin name.png").touch()
    images = [data / "val/red/0.png", tmp_path / "tab\tin name.png"]
    assert predict(run, *images, "--topk", "2") == 0
    good, bad = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert bad == [str(tmp_path / "tab�in name.png"), "", "", "", "", "is empty; restore or remove the file"]
    (expected,) = Predictor(run)(images[0])
    assert good == [str(images[0]), *expected.labels[:2], *map(str, expected.probabilities[:2]), ""]


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1"])
def test_csv_on_stdout_has_no_other_lines(
    name: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(run, data / "val/red", "-o", tmp_path / "p.csv") == 0
    capsys.readouterr()
    assert predict(run, data / "val/red", "-o", name) == 0
    out, err = capsys.readouterr()
    assert out == (tmp_path / "p.csv").read_text()
    assert err == f"{name}: predictions on 5 of 5 images\n"


def test_outputs_that_are_one_file_or_an_input_are_refused(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "p.csv")
    (tmp_path / "runs").symlink_to(run)
    tiles = ["--tile", "32", "--tile-output"]
    for output, more, words in (
        ("p.csv", [*tiles, tmp_path / "." / "p.csv"], "are both"),
        ("p.csv", [*tiles, tmp_path / "link.csv"], "are both"),
        ("runs/summary.csv", [], "would replace a file that is read"),
    ):
        assert predict(run, data / "val/red", "-o", tmp_path / output, *more) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()
    listed = tmp_path / "list.csv"
    listed.touch()
    assert predict(run, listed, "-o", listed) == 2
    # A table in the folder of the images is no image.
    shutil.copy(data / "val/red/0.png", tmp_path / "0.png")
    for _ in range(2):
        assert predict(run, tmp_path, "-o", tmp_path / "p.csv") == 0


def test_stdin_gives_image_files_and_their_order(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"{data / 'val/red/1.png'}\r\n\n{tmp_path / 'gone.png'}\n{data / 'val/blue/0.png'}".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert predict(run, data / "val/red/3.png", "-", "-o", tmp_path / "p.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["3.png", "1.png", "gone.png", "0.png"]
    assert [row["error"] is None for row in rows] == [True, True, False, True]
    assert [len(row["labels"]) for row in rows] == [3, 3, 0, 3]


def test_a_list_with_nul_bytes_and_a_closed_stdin_are_one_sentence(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a.png\nb.png\0c.png\0")))
    assert predict(run, "-") == 2
    words = "line 2 of the list contains a NUL byte: write one path per line (find -print)"
    assert capsys.readouterr().err == f"error: {words}\n"
    monkeypatch.setattr(sys, "stdin", None)
    assert predict(run, "-") == 2
    assert capsys.readouterr().err == "error: - reads paths from stdin, which is closed; pipe a list into it\n"


def test_what_never_ends_in_a_list_is_a_row_and_the_rest_goes_on(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(2**40)
    (tmp_path / "number.ppm").write_bytes(b"P6\n" + b"9" * 5000 + b" 1 255\n")
    image = data / "val/blue/0.png"
    lines = b"/dev/zero\n%b" % "\n".join(map(str, [*tmp_path.iterdir(), image])).encode()
    for options in ([], ["--tile", "32"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        assert predict(run, tmp_path / "pipe.jpg", "-", image, *options, "-o", tmp_path / "p.jsonl") == 0
        rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
        (tmp_path / "p.jsonl").unlink()
        errors = {Path(row["path"]).name: row["error"] for row in rows}
        assert errors.pop("0.png") is None
        assert errors["pipe.jpg"] == "is a pipe, not an image file; remove it"
        assert errors["huge.jpg"] is not None
        assert all(errors.values())
        assert len(rows) == 7


@pytest.mark.parametrize("options", [[], ["--tile", "32"]])
def test_a_killed_worker_is_one_sentence(
    options: list[str], run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Workers are forked, and so die where they would read.
    monkeypatch.setattr(LooseImages, "read_bytes", lambda images, index: os.kill(os.getpid(), signal.SIGKILL))
    assert main(["predict", str(run), str(data / "val/red"), "--workers", "1", *options]) == 1
    assert capsys.readouterr().err == (
        "error: the system ended a process that reads images, probably because memory ran out: lower --workers or "
        "--batch-size\n"
    )


def test_an_image_of_too_many_tiles_is_a_row(run: Path, data: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((2000, 2000, 3), np.uint8))
    options = ["--tile", "1", "--overlap", "0", "-o", tmp_path / "p.jsonl"]
    assert predict(run, tmp_path / "a.png", *options) == 1
    (row,) = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert row["error"] == "would be cut into 4,000,000 tiles, more than fit in memory; set a larger --tile"


def test_an_empty_list_gives_an_empty_table(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert predict(run, "-", "-o", tmp_path / "p.csv") == 0
    assert (tmp_path / "p.csv").read_text().startswith("path,label_1")
    assert read_rows(tmp_path / "p.csv") == []


def test_tiles_have_rows_with_their_places(run: Path, data: Path, tmp_path: Path) -> None:
    files = ["-o", tmp_path / "p.csv", "--tile-output", tmp_path / "t.csv"]
    assert predict(run, data / "val/red", "--tile", "32", "--overlap", "0", "--merge", "max", *files) == 0
    images, tiles = read_rows(tmp_path / "p.csv"), read_rows(tmp_path / "t.csv")
    places = [(tile["top"], tile["left"], tile["height"], tile["width"]) for tile in tiles]
    assert places[:4] == [
        ("0", "0", "32", "32"),
        ("0", "8", "32", "32"),
        ("4", "0", "32", "32"),
        ("4", "8", "32", "32"),
    ]
    assert [tile["path"] for tile in tiles] == [image["path"] for image in images for _ in range(4)]
    for image in images:
        own = [tile for tile in tiles if tile["path"] == image["path"]]
        assert float(image["probability_1"]) == max(float(tile["probability_1"]) for tile in own)


def test_a_folder_with_weights_and_config_is_enough(run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "last", tmp_path / "copy")
    assert predict(tmp_path / "copy", data / "val", "-o", tmp_path / "copy.csv") == 0
    assert predict(run, data / "val", "-o", tmp_path / "run.csv", "--weights", "last") == 0
    assert (tmp_path / "copy.csv").read_text() == (tmp_path / "run.csv").read_text()


def test_options_override_the_runs_settings(run: Path, data: Path, tmp_path: Path) -> None:
    for name, options in {
        "plain": [],
        "crop": ["--crop-pct", "1.0"],
        "amp": ["--amp"],
        "size": ["--img-size", "64"],
    }.items():
        assert predict(run, data / "val/red", "-o", tmp_path / f"{name}.csv", *options) == 0
    assert len({(tmp_path / f"{name}.csv").read_text() for name in ("plain", "crop", "amp", "size")}) == 4


def test_precision_is_the_runs_by_default(run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "amp")
    settings = (run / "args.yaml").read_text()
    (tmp_path / "amp/args.yaml").write_text(settings.replace("\namp: false\n", "\namp: true\n"))
    assert predict(tmp_path / "amp", data / "val", "-o", tmp_path / "run.csv") == 0
    assert predict(run, data / "val", "-o", tmp_path / "given.csv", "--amp") == 0
    assert predict(run, data / "val", "-o", tmp_path / "off.csv") == 0
    assert (tmp_path / "run.csv").read_text() == (tmp_path / "given.csv").read_text()
    assert (tmp_path / "run.csv").read_text() != (tmp_path / "off.csv").read_text()


def test_descriptions_of_wordnet_ids(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(run, data / "val/red/0.png", "--label-type", "description") == 1
    assert "--label-type description: the classes of" in capsys.readouterr().err
    shutil.copytree(run / "best", tmp_path / "best")
    config = json.loads((tmp_path / "best/config.json").read_text())
    config["label_names"] = ["n01440764", "n03888257", "n02102040"]
    (tmp_path / "best/config.json").write_text(json.dumps(config))
    assert predict(tmp_path / "best", data / "val/red/0.png", "--label-type", "description") == 0
    assert "tench, Tinca tinca" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpyo.png"], "tpyo.png: there is no such file or folder, and nothing matches it; correct the path"),
        (["here.png", "*.gif"], "*.gif: there is no such file or folder, and nothing matches it; correct the path"),
        (["empty"], "empty: holds no images"),
        (["here.png", "-o", "p.xlsx"], "--output p.xlsx: the name must end in .csv, .jsonl or .parquet"),
        (["here.png", "-o", "nowhere/p.csv"], "--output nowhere/p.csv: folder nowhere does not exist; create it first"),
        (["here.png", "--tile-output", "t.csv"], "--tile-output needs --tile"),
        (["here.png", "--tile", "32", "--overlap", "32"], "an overlap of 32 px does not fit tiles of 32×32 px"),
        (["here.png", "-o", "a.csv", "--tile-output", "a.csv", "--tile", "9"], "are both a.csv; choose two files"),
        (["here.png", "--topk", "0"], "--topk takes a whole number of at least 1, not 0"),
        (["here.png", "--merge", "median"], "--merge takes one of 'mean', 'max', not 'median'"),
        ([], "the following arguments are required: IMAGE"),
    ],
)
def test_wrong_usage_is_reported_before_the_model_is_loaded(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.png").touch()
    (tmp_path / "empty").mkdir()
    # Loading would report that there is no model.
    assert main(["predict", "no-run", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_an_invalid_source_has_exit_status_1(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict("runs/nothing", data / "val") == 1
    assert "runs/nothing: there is no such file or folder, and it is not a timm model name" in capsys.readouterr().err


def test_an_error_while_predicting_leaves_the_old_table(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> Any:
        raise ValueError("out of luck")

    (tmp_path / "p.csv").write_text("old")
    monkeypatch.setattr(Predictor, "_logits", fail)
    assert predict(run, data / "val", "-o", tmp_path / "p.csv") == 1
    assert capsys.readouterr().err == "error: out of luck\n"
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("p.csv", "old")]


def test_tiles_on_stdout_are_alone_there(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(run, data / "val/red", "--tile", "32", "--tile-output", "-", "--topk", "1") == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert {row["path"] for row in rows} == {line.split("\t")[0] for line in err.splitlines()}
