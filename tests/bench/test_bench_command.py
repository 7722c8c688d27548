"""`linvit bench` from the command line to its files."""

import csv
import hashlib
import json
from dataclasses import fields

import pytest
import torch
from bench_groups import OURS, TIMM
from PIL import Image

from linvit import cli
from linvit.bench import run
from linvit.bench.output import DIGEST_KEY
from linvit.bench.plan import Row
from linvit.measure.memory import StepMemory

SELECTION = ["bench", "--device", "cpu", "--baseline", TIMM, "--models", OURS, "--img-size", "32", "--rounds", "2"]

pytestmark = pytest.mark.usefixtures("quick_gemm")


def steps_that(fail):
    """A `make_step` whose steps first call `fail` with the images and the number of steps before them."""
    honest, count = run.make_step, iter(range(1000))

    def make_step(model, images, **others):
        step = honest(model, images, **others)

        def failing():
            fail(images, next(count))
            return step()

        return failing

    return make_step


def test_numbers_go_to_the_terminal_and_three_files(tmp_path, capsys):
    files = {flag: tmp_path / f"out.{flag}" for flag in ("json", "csv", "plot")}
    flags = [part for flag, path in files.items() for part in (f"--{flag}", str(path))]
    assert cli.main([*SELECTION, "--dtype", "float32", "bfloat16", *flags]) == 0
    captured = capsys.readouterr()
    assert "32 px, train, batch 1, bfloat16: round 2 of 2" in captured.err
    assert max(map(len, captured.out.splitlines())) <= 100
    assert "32 px, train, batch 1, float32" in captured.out

    found = json.loads(files["json"].read_text())
    assert found["command"].startswith("linvit bench --device cpu --baseline vit_tiny")
    assert {"commit", "versions", "hardware", "threads"} < set(found)
    assert (found["seed"], found["n"], found["dtype"]) == (0, 2, ["bfloat16", "float32"])
    assert set(found["gemm_flops_per_second"]) == {"bfloat16", "float32"}
    assert [check["model"] for check in found["checks"]] == [OURS]
    assert [(row["dtype"], row["mode"], row["model"]) for row in found["rows"]] == [
        (dtype, mode, model)
        for dtype in ("float32", "bfloat16")
        for mode in ("forward", "train")
        for model in (TIMM, OURS)
    ]
    for row in found["rows"]:
        assert len(row["all_seconds"]) == 2
        assert row["seconds"] == pytest.approx(sum(row["all_seconds"]) / 2)
        assert row["ratio"] > 0
        assert row["step_bytes"] is None

    lines = list(csv.DictReader(files["csv"].open()))
    assert list(lines[0]) == [field.name for field in fields(Row)]
    assert [line["flops"] for line in lines] == [str(row["flops"]) for row in found["rows"]]
    with Image.open(files["plot"]) as image:
        assert image.info[DIGEST_KEY] == hashlib.sha256(files["json"].read_bytes()).hexdigest()


def test_out_of_memory_is_a_row_and_is_retried_at_half_the_batch(tmp_path, monkeypatch, capsys):
    def fail(images, step):
        # The second model's first step.
        if images.shape[0] == 2 and step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "make_step", steps_that(fail))
    path = tmp_path / "out.json"
    argv = [*SELECTION, "--modes", "forward", "--batch-size", "2", "--json", str(path), "--csv", str(tmp_path / "csv")]
    assert cli.main(argv) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["model"], row["batch_size"], row["status"]) for row in rows] == [
        (TIMM, 2, "ok"),
        (OURS, 2, "out of memory"),
        (TIMM, 1, "ok"),
        (OURS, 1, "ok"),
    ]
    captured = capsys.readouterr()
    assert "32 px, forward, batch 2, float32: out of memory; retrying at batch 1" in captured.err
    assert "out of memory" in captured.out


def test_an_interruption_keeps_the_measurements(tmp_path, monkeypatch, capsys):
    def fail(images, step):
        # After both warm-ups, one round, and the baseline's second step.
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "make_step", steps_that(fail))
    path = tmp_path / "out.json"
    assert cli.main([*SELECTION, "--json", str(path), "--csv", str(tmp_path / "out.csv")]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["model"], row["n"]) for row in rows] == [(TIMM, 2), (OURS, 1)]
    assert len(list(csv.DictReader((tmp_path / "out.csv").open()))) == 2


def test_a_model_that_fails_is_named_and_the_rest_is_kept(tmp_path, monkeypatch, capsys):
    def fail(images, step):
        # The first group takes six steps.
        if step == 6:
            raise RuntimeError("no kernel")

    monkeypatch.setattr(run, "make_step", steps_that(fail))
    path = tmp_path / "out.json"
    assert cli.main([*SELECTION, "--json", str(path)]) == 1
    assert capsys.readouterr().err.endswith(f"error: {TIMM} fails: no kernel\n")
    assert len(json.loads(path.read_text())["rows"]) == 2


def test_memory_is_measured_for_each_model(tmp_path, monkeypatch):
    requested = []

    def step_memory(model, img_size, **others):
        requested.append((model, img_size, others["mode"]))
        return StepMemory(10 * len(requested), 100)

    monkeypatch.setattr(run, "step_memory_in_subprocess", step_memory)
    monkeypatch.setattr(run, "can_read_peaks", lambda: True)
    path = tmp_path / "out.json"
    assert cli.main([*SELECTION, "--modes", "train", "--memory", "--json", str(path)]) == 0
    assert requested == [(TIMM, (32, 32), "train"), (OURS, (32, 32), "train")]
    rows = json.loads(path.read_text())["rows"]
    assert [(row["step_bytes"], row["process_bytes"]) for row in rows] == [(10, 100), (20, 100)]


def test_models_that_differ_in_recomputation_are_checked_once(tmp_path):
    path = tmp_path / "out.json"
    more = ["--models", OURS, f"{OURS},grad_checkpointing=full", "--modes", "train", "--json", str(path)]
    assert cli.main([*SELECTION, *more]) == 0
    found = json.loads(path.read_text())
    assert [check["model"] for check in found["checks"]] == [OURS]
    assert [row["model"] for row in found["rows"]] == [TIMM, OURS, f"{OURS},grad_checkpointing=full"]


def test_memory_that_cannot_be_measured_is_noted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "can_read_peaks", lambda: False)
    path = tmp_path / "out.json"
    assert cli.main([*SELECTION, "--memory", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    (note,) = found["notes"]
    assert capsys.readouterr().err.count(note) == 1
    assert {row["step_bytes"] for row in found["rows"]} == {None}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--preset", "readme", "--rounds", "3"], "--preset readme decides what is measured: leave out --rounds"),
        (["--preset", "reame"], "--preset takes one of 'readme', 'gpu', or none, not 'reame'"),
        (["--modes", "backward"], "--modes takes a list of choices from 'forward', 'train', not ['backward']"),
        (["--rounds", "0"], "--rounds takes a whole number greater than 0, not 0"),
        (["--img-size", "2y3"], "image size '2y3' is neither a number nor HEIGHTxWIDTH"),
        (["--models", "linvit_smal_patch16_224"], "did you mean 'linvit_small_patch16_224'?"),
        (["--baseline", "vit_small_patch16_224:kay=3"], "unknown keyword 'kay'"),
        (["--img-size", "32"], "k=64 does not shorten"),
        (["--json", "no/such/out.json"], "--json no/such/out.json: folder no/such does not exist; create it first"),
        (["--plot", "."], "--plot . is a folder; give a file name"),
        (["--plots", "x.png"], "unknown option '--plots'; did you mean '--plot'?"),
    ],
)
def test_wrong_usage_is_one_sentence_and_nothing_is_timed(argv, words, monkeypatch, capsys):
    monkeypatch.setattr(run.Bench, "measure", lambda *_: pytest.fail("measured"))
    assert cli.main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
