"""`linvit predict` with a folder of parts: their rows, what is skipped, and what is refused."""

import csv
import json
import os
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from linvit.cli import main
from linvit.prediction.identity import Identity, Images, Model
from linvit.prediction.parts import Parts, default_part_size
from linvit.prediction.predictor import Predictor


def predict(*arguments: str | Path) -> int:
    return main(["predict", *map(str, arguments), "--workers", "0", "--device", "cpu"])


def rows_of(folder: Path) -> list[dict[str, str]]:
    files = sorted(folder.glob("part-*"))
    return list(chain.from_iterable(csv.DictReader(file.read_text().splitlines()) for file in files))


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "_manifest.json").read_text())


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is replaced, by name."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize("part_format", ["csv", "jsonl", "parquet"])
def test_parts_hold_the_rows_of_one_file(
    part_format: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if part_format == "parquet":
        dataset = pytest.importorskip("pyarrow.dataset")
    (tmp_path / "broken.png").write_bytes(b"no image")
    command = [run, data / "val/red", tmp_path / "broken.png", data / "val/blue", "-b", "2", "--tile", "32"]
    file = tmp_path / f"all.{part_format}"
    assert predict(*command, "-o", file, "--tile-output", tmp_path / f"tiles.{part_format}") == 0
    capsys.readouterr()
    folders = ["-o", tmp_path / "new/parts", "--tile-output", tmp_path / "tiles"]
    assert predict(*command, *folders, "--part-size", "4", "--part-format", part_format) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'new/parts'}: predictions on 10 of 11 images\n"
    assert captured.err == "1 of 11 images have no prediction; their rows give the reasons\n"

    for folder, whole in ((tmp_path / "new/parts", file), (tmp_path / "tiles", tmp_path / f"tiles.{part_format}")):
        parts = sorted(folder.glob("part-*"))
        assert [part.name for part in parts] == [f"part-0000{number}.{part_format}" for number in range(3)]
        found = manifest_of(folder)
        assert found["parts"] == [
            {"file": parts[0].name, "first": 0, "images": 4},
            {"file": parts[1].name, "first": 4, "images": 4},
            {"file": parts[2].name, "first": 8, "images": 3},
        ]
        assert (found["complete"], found["identity"]["images"]["count"]) == (True, 11)
        assert found["identity"]["model"]["weights"] == str(run / "best/model.safetensors")
        if part_format == "jsonl":
            assert b"".join(part.read_bytes() for part in parts) == whole.read_bytes()
        elif part_format == "csv":
            header, *lines = whole.read_text().splitlines()
            tables = [part.read_text().splitlines() for part in parts]
            assert [table[0] for table in tables] == [header] * 3
            assert [line for table in tables for line in table[1:]] == lines
        else:
            # The folder as it is: the manifest is passed over.
            assert dataset.dataset(folder, format="parquet").to_table().equals(dataset.dataset(whole).to_table())


def test_complete_parts_are_skipped_and_a_killed_run_is_completed(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [data / "val/red", data / "val/blue"]
    predict_batch, calls = Predictor._logits, 0

    def killed(predictor: Predictor, batch: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            # Ends the process as a kill does: nothing is cleaned up.
            monkeypatch.setattr(Path, "unlink", lambda *arguments, **settings: None)
            raise KeyboardInterrupt
        return predict_batch(predictor, batch)

    monkeypatch.setattr(Predictor, "_logits", killed)
    # A run that was killed before it had written its manifest.
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/._manifest.json.part").touch()
    options = ["-o", tmp_path / "parts", "--part-size", "3", "--part-format", "jsonl"]
    assert predict(run, *images, "-b", "1", *options) == 130
    monkeypatch.undo()
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    (scratch,) = {name for name in names if name.endswith(".part")}
    assert names - {scratch} == {"_manifest.json", ".lock", "part-00000.jsonl"}
    assert not manifest_of(tmp_path / "parts")["complete"]
    # That of a process which no longer runs.
    scratch = (tmp_path / "parts" / scratch).rename(tmp_path / "parts" / scratch.replace(str(os.getpid()), str(2**22)))

    first = files_of(tmp_path / "parts")["part-00000.jsonl"]
    # The size and the format of the parts are those of the folder, whatever the batch size.
    assert predict(run, *images, "-b", "2", "-o", tmp_path / "parts") == 0
    out = capsys.readouterr().out
    assert out == f"{tmp_path / 'parts'}: predictions on 7 of 7 images; already complete: 1 of 4 parts\n"
    assert not scratch.exists()
    assert files_of(tmp_path / "parts")["part-00000.jsonl"] == first
    paths = [json.loads(line)["path"] for part in sorted((tmp_path / "parts").glob("part-*")) for line in part.open()]
    assert [Path(path).parent.name for path in paths] == ["red"] * 5 + ["blue"] * 5
    assert manifest_of(tmp_path / "parts")["complete"]

    # As if it had been killed after its last part.
    manifest = tmp_path / "parts/_manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    monkeypatch.setattr(Predictor, "_logits", killed)
    assert predict(run, *images, "-o", tmp_path / "parts") == 0
    out = capsys.readouterr().out
    assert out == f"{tmp_path / 'parts'}: predictions on 0 of 0 images; already complete: 4 of 4 parts\n"
    assert manifest_of(tmp_path / "parts")["complete"]


def test_parts_of_another_run_are_refused(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, folder = [data / "val/red"], tmp_path / "parts"
    assert predict(run, *images, "-o", folder, "--part-size", "3", "--topk", "2") == 0
    before = files_of(folder)
    capsys.readouterr()
    same = [run, *images, "-o", folder, "--topk", "2"]
    options = ["--topk", "3", "--crop-pct", "0.9", "--amp", "--tile", "32", "--overlap", "0"]
    changed_options = "amp None, now bfloat16; crop_pct 0.7, now 0.9; tile None, now {'size': [32, 32], 'overlap': 0, "
    for command, change in (
        ([run, data / "val/blue", *same[2:], "--weights", "last"], "other images; other weights"),
        ([run, data / "val", *same[2:], "--part-size", "4"], "5 images, now 15; part size 3, now 4"),
        ([*same, *options], changed_options + "'merge': 'mean'}; topk 2, now 3"),
        ([*same, "--part-format", "jsonl"], "format csv, now jsonl"),
    ):
        assert predict(*command) == 2, change
        fix = "choose another folder, or delete it to start over"
        assert capsys.readouterr().err == f"error: {folder} holds parts of another run ({change}); {fix}\n"
    assert files_of(folder) == before
    # What changes nothing is accepted.
    assert predict(*same, "--crop-pct", "0.7", "-b", "1") == 0
    (folder / "_manifest.json").write_text("{}")
    assert predict(*same) == 2
    assert "_manifest.json cannot be read (it is not a manifest of parts); restore it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "p.v2"], "--output p.v2: the name must end in .csv, .jsonl or .parquet, or have no extension to be a"),
        (["-o", "full"], "--output full holds other files than predictions; choose a new or empty folder"),
        (["-o", "file"], "--output file is a file without an extension; give a folder"),
        (["-o", "p", "--heatmap", "maps"], "--heatmap is not available with parts"),
        (["-o", "p.csv", "--part-size", "9"], "--part-size and --part-format need --output FOLDER"),
        (["-o", "p", "--tile", "9", "--tile-output", "t.csv"], "must both be files, or both folders of parts"),
        (
            ["-o", "p", "--tile", "9", "--tile-output", "./p"],
            "--output and --tile-output are both p; choose two folders",
        ),
    ],
)
def test_wrong_usage_is_reported_before_the_model_is_loaded(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for name in ("here.png", "file", "full/a.png"):
        (tmp_path / name).touch()
    assert predict("no-run", "here.png", *arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "here.png"]


def test_two_runs_do_not_write_the_same_parts(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def locked(file: Any) -> None:
        raise OSError("another process is writing it")

    monkeypatch.setattr("linvit.prediction.parts.lock", locked)
    assert predict(run, data / "val/red", "-o", tmp_path / "parts") == 2
    assert "parts: another process is writing parts in it; wait for it or stop it" in capsys.readouterr().err


def test_a_part_that_the_first_process_does_not_see_is_an_error(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As if another machine had written it on a disk of its own.
    monkeypatch.setattr(Parts, "share", lambda parts, rank, world_size: parts.missing[::2])
    assert predict(run, data / "val/red", "-o", tmp_path / "parts", "--part-size", "2") == 1
    assert "part-00001.csv is missing, although it was written: all machines must see" in capsys.readouterr().err
    assert not manifest_of(tmp_path / "parts")["complete"]


def test_unreadable_images_alone_fail_and_no_images_leave_the_columns(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.png").touch()
    assert predict(run, tmp_path / "empty.png", "-o", tmp_path / "parts") == 1
    assert [row["error"] for row in rows_of(tmp_path / "parts")] == ["is empty; restore or remove the file"]
    with open(os.devnull) as nothing, pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stdin", nothing)
        assert predict(run, "-", "-o", tmp_path / "none") == 0
    assert (tmp_path / "none/part-00000.csv").read_text().startswith("path,label_1,")


@pytest.mark.parametrize(
    ("num_images", "world_size", "batch_size"), [(15, 2, 1), (10**6, 8, 256), (10**6, 8, 96), (3, 8, 32), (0, 1, 4)]
)
def test_each_image_is_in_one_part_of_one_process(
    num_images: int, world_size: int, batch_size: int, tmp_path: Path
) -> None:
    size = default_part_size(num_images, world_size=world_size, batch_size=batch_size)
    assert size % batch_size == 0
    assert size <= max(1024, batch_size)
    identity = Identity(images=Images(count=num_images, sha256=""), model=Model(weights="", sha256=""), options={})
    parts = Parts((tmp_path,), identity, "csv", size)
    parts = replace(parts, missing=tuple(range(len(parts))))
    shares = [parts.share(rank, world_size) for rank in range(world_size)]
    assert sorted(chain.from_iterable(shares)) == list(range(len(parts)))
    assert list(chain.from_iterable(map(parts.images, range(len(parts))))) == list(range(num_images))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_need_a_folder(
    variable: str, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv(variable, "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert predict(run, data / "val/red", "-o", tmp_path / "p.csv") == 2
        assert capsys.readouterr().err.count("give predict --output FOLDER, a name without an extension") == lines
    assert not (tmp_path / "p.csv").exists()
