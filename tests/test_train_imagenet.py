"""Runs of train_imagenet.py: their files, and that stopping, resuming and repeating them is exact."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_runs import TIMING, assert_same, make_images, read_state, read_summary, train
from torch import nn

import train_imagenet
from linvit.cli import main
from linvit.training.step import TrainStep

# Everything that draws random numbers, keeps state between steps or ends an epoch with a short group.
EVERYTHING = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path": 0.2,
    "drop": 0.1,
    "model_ema": True,
    "model_ema_warmup": True,
    "grad_accum_steps": 2,
    "clip_grad": 1.0,
    "reprob": 0.3,
    "aa": "rand-m9-mstd0.5-inc1",
    "warmup_epochs": 1,
    "sched_on_updates": True,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def full_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    assert train(data, output, **EVERYTHING) == 0
    return output / "run"


def states_equal(a: Path, b: Path, name: str = "state-0002-000000") -> None:
    left, right = read_state(a, name), read_state(b, name)
    for state in (left, right):
        for row in state["progress"]["summary"]:
            for column in TIMING:
                del row[column]
        del state["settings"]
    assert_same(left, right)


def test_two_epochs_equal_one_and_one_resumed_to_the_bit(data: Path, full_run: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, stop_epoch=1, **EVERYTHING) == 0
    assert len(read_summary(tmp_path / "run")) == 1
    assert train(data, tmp_path, resume="auto", **EVERYTHING) == 0
    states_equal(tmp_path / "run", full_run)
    assert read_summary(tmp_path / "run") == read_summary(full_run)
    assert (tmp_path / "run/predictions.csv").read_bytes() == (full_run / "predictions.csv").read_bytes()
    for weights in ("best", "last"):
        assert (tmp_path / "run" / weights / "model.safetensors").read_bytes() == (
            full_run / weights / "model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_saves_within_the_epoch_and_resuming_is_exact(
    number: signal.Signals, status: int, data: Path, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = TrainStep.backward
    calls = 0

    def interrupted(self: TrainStep, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            signal.raise_signal(number)
        backward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "backward", interrupted)
        assert train(data, tmp_path, **EVERYTHING) == status
    # The epoch has three batches in groups of two. The run finishes the first group and does not start the second.
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["state-0000-000000", "state-0000-000002"]
    assert train(data, tmp_path, resume="auto", **EVERYTHING) == 0
    states_equal(tmp_path / "run", full_run)
    assert read_summary(tmp_path / "run") == read_summary(full_run)
    assert (tmp_path / "run/predictions.csv").read_bytes() == (full_run / "predictions.csv").read_bytes()


def test_args_yaml_alone_repeats_the_run(full_run: Path, tmp_path: Path) -> None:
    again = ["--config", str(full_run / "args.yaml"), "--output", str(tmp_path)]
    assert train_imagenet.main(again) == 0
    states_equal(tmp_path / "run", full_run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="results on a GPU are not reproducible to the bit by default")
@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_mixed_precision_resumes_to_the_bit(amp_dtype: str, data: Path, tmp_path: Path) -> None:
    settings = {"amp": True, "amp_dtype": amp_dtype, "device": "auto", "drop_path": 0.2}
    assert train(data, tmp_path, "full", **settings) == 0
    assert train(data, tmp_path, "halves", stop_epoch=1, **settings) == 0
    assert train(data, tmp_path, "halves", resume="auto", **settings) == 0
    states_equal(tmp_path / "halves", tmp_path / "full")


def test_another_seed_gives_other_weights(data: Path, full_run: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, seed=43, **EVERYTHING) == 0
    a, b = read_state(tmp_path / "run", "state-0002-000000"), read_state(full_run, "state-0002-000000")
    assert not torch.equal(a["state_dict"]["head.weight"], b["state_dict"]["head.weight"])


def test_workers_do_not_change_the_weights(data: Path, full_run: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, workers=2, **EVERYTHING) == 0
    states_equal(tmp_path / "run", full_run)


def test_a_run_writes_the_documented_files(full_run: Path) -> None:
    assert sorted(path.name for path in full_run.iterdir()) == [
        ".lock",
        "README.md",
        "args.yaml",
        "best",
        "checkpoints",
        "last",
        "predictions.csv",
        "summary.csv",
    ]
    rows = read_summary(full_run)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"train_loss", "eval_loss", "eval_top1", "eval_top5", "eval_ema_top1", "lr"} <= rows[0].keys()
    config = json.loads((full_run / "best/config.json").read_text())
    assert config["label_names"] == ["blue", "green", "red"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    best = max(float(row[column]) for row in rows for column in ("eval_top1", "eval_ema_top1"))
    assert config["linvit"]["metrics"]["top1"] == best
    column = {"raw": "eval_top1", "ema": "eval_ema_top1"}[config["linvit"]["weights"]]
    assert float(rows[config["linvit"]["epoch"]][column]) == best
    card = (full_run / "README.md").read_text()
    assert f"{best:.2f} %" in card
    assert "blue, green, red" in card


@pytest.mark.parametrize("share", ["none", "headwise", "kv", "layerwise"])
def test_timm_loads_the_weights(share: str, data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, share=share, epochs=1, channels_last=True) == 0
    for name in ("best", "last"):
        model = timm.create_model(f"local-dir:{tmp_path / 'run' / name}", pretrained=True)
        trained = read_state(tmp_path / "run", "state-0001-000000")["state_dict"]
        assert_same(dict(model.state_dict()), trained)
        assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
        assert model.share == share


def test_another_run_of_the_same_name_gets_a_number(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("run", "run-1"):
        assert train(data, tmp_path, epochs=1) == 0
        assert capsys.readouterr().out.startswith(f"run: {tmp_path / folder}\n")
        assert (tmp_path / folder / "best").is_dir()


def test_resuming_a_finished_run_changes_nothing_unless_it_is_longer(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path) == 0
    before = read_state(tmp_path / "run", "state-0002-000000")
    assert train(data, tmp_path, resume="auto") == 0
    assert_same(read_state(tmp_path / "run", "state-0002-000000"), before)
    # With more epochs, training continues.
    assert train(data, tmp_path, resume="auto", epochs=3) == 0
    assert [row["epoch"] for row in read_summary(tmp_path / "run")] == ["0", "1", "2"]


def test_checkpoints_are_pruned_except_milestones(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, epochs=4, checkpoint_hist=1, save_epochs=[1]) == 0
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["state-0002-000000", "state-0004-000000"]


def test_training_stops_early_without_improvement(data: Path, tmp_path: Path) -> None:
    # With a tiny learning rate the first evaluation stays the best.
    settings = {"epochs": 9, "lr": 1e-12, "min_lr": 0.0, "sched": "none", "eval_metric": "top1"}
    assert train(data, tmp_path, early_stop_patience=2, **settings) == 0
    assert [row["epoch"] for row in read_summary(tmp_path / "run")] == ["0", "1", "2"]


def test_evaluation_can_skip_epochs(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, epochs=3, val_interval=2) == 0
    assert [bool(row["eval_top1"]) for row in read_summary(tmp_path / "run")] == [False, True, True]
    # The checkpoints of all epochs and of the start are kept all the same.
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 4


def test_resuming_with_a_fresh_optimizer_keeps_the_schedule(data: Path, tmp_path: Path) -> None:
    for by_updates in (False, True):
        name = f"by-updates-{by_updates}"
        settings = {"sched_on_updates": by_updates, "epochs": 3, "experiment": name}
        assert train(data, tmp_path, stop_epoch=1, **settings) == 0
        before = read_state(tmp_path / name, "state-0001-000000")
        assert train(data, tmp_path, stop_epoch=2, resume="auto", no_resume_opt=True, **settings) == 0
        fresh = read_state(tmp_path / name, "state-0002-000000")
        assert fresh["num_updates"] == 2 * before["num_updates"]
        # The fresh optimizer counts only its own steps.
        assert fresh["optimizer"]["state"][0]["step"] == before["num_updates"]
        lr_before, lr_after = (float(row["lr"]) for row in read_summary(tmp_path / name))
        assert lr_after < lr_before


def test_only_frozen_weights_stay_the_same(data: Path, tmp_path: Path) -> None:
    for experiment, lr in (("slow", 1e-3), ("fast", 1e-2)):
        assert train(data, tmp_path, experiment, epochs=1, freeze=["blocks.0", "patch_embed"], lr=lr) == 0
    a, b = (read_state(tmp_path / name, "state-0001-000000")["state_dict"] for name in ("slow", "fast"))
    for name, weight in a.items():
        is_frozen = name.startswith(("blocks.0.", "patch_embed."))
        assert torch.equal(weight, b[name]) == is_frozen, name


def test_freezing_a_shared_projection_is_logged(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dry_run in (True, False):
        assert train(data, tmp_path, epochs=1, share="layerwise", freeze=["blocks.0"], dry_run=dry_run) == 0
        assert "--freeze also freezes blocks.1.attn.key_projection.weight_h, " in capsys.readouterr().out


def test_fine_tuning_lists_new_parameters(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_images(tmp_path / "other", classes=("cat", "dog"))
    assert train(data, tmp_path, epochs=1) == 0
    capsys.readouterr()
    settings = {"pretrained_path": str(tmp_path / "run"), "img_size": [48, 64], "epochs": 1}
    assert train(other, tmp_path, experiment="tuned", **settings) == 0
    assert "new parameters, not in the given weights: head.bias, head.weight\n" in capsys.readouterr().out


def test_a_non_finite_loss_ends_the_run_and_loses_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = nn.CrossEntropyLoss.forward
    calls = 0

    def poisoned(self: nn.CrossEntropyLoss, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = forward(self, *args)
        return loss * float("nan") if calls == 5 else loss

    with monkeypatch.context() as patch:
        patch.setattr(nn.CrossEntropyLoss, "forward", poisoned)
        assert train(data, tmp_path, smoothing=0.0, max_bad_steps=1) == 1
    assert "error: the loss became nan at epoch 1, batch 1" in capsys.readouterr().err
    assert train(data, tmp_path, smoothing=0.0, resume="auto") == 0
    assert train(data, tmp_path, experiment="unharmed", smoothing=0.0) == 0
    states_equal(tmp_path / "run", tmp_path / "unharmed")


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path, stop_epoch=1) == 0

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert train(data, tmp_path, resume="auto") == 1
    error = capsys.readouterr().err
    assert "error: cannot write" in error
    assert "no space left on device" in error
    assert train(data, tmp_path, resume="auto") == 0
    assert train(data, tmp_path, experiment="unharmed") == 0
    states_equal(tmp_path / "run", tmp_path / "unharmed")


@pytest.mark.parametrize(
    ("settings", "status", "sentence"),
    [
        (
            {"model": "linvit_mini_patch4_46"},
            2,
            "unknown model 'linvit_mini_patch4_46'; did you mean 'linvit_mini_patch4_64'?",
        ),
        ({"batch_size": 32}, 1, "batch_size 32 needs 32 training images, but there are 24"),
        ({"val_split": "holdout"}, 1, "no split 'holdout'"),
        ({"k": 16}, 2, "k=16 does not shorten a sequence of 16 patches"),
        ({"k": [4]}, 2, "k"),
        ({"img_size": [36, 32]}, 2, "image size 36×32 is not a multiple of the patch size 8×8"),
        ({"projection": "foo"}, 2, "unknown projection 'foo'"),
        ({"class_map": "nothing.txt"}, 2, "--class-map nothing.txt: there is no such file or folder"),
        ({"freeze": ["stem"]}, 2, "--freeze: unknown parameter or module 'stem'"),
        ({"pretrained_path": "nothing.safetensors"}, 2, "nothing.safetensors: there is no such file or folder"),
        ({"resume": "nowhere"}, 1, "--resume nowhere: there is no such file or folder"),
        ({"device": "cuda:99"}, 2, "--device cuda:99"),
    ],
)
def test_errors_are_one_sentence(
    settings: dict[str, Any], status: int, sentence: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path, **settings) == status
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_resuming_with_other_classes_or_another_model_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_images(tmp_path / "other", classes=("cat", "dog", "emu"))
    assert train(data, tmp_path, epochs=1) == 0
    assert train(other, tmp_path, epochs=1, resume="auto") == 1
    assert "the checkpoint's classes (blue, green, red) are not the data's (cat, dog, emu)" in capsys.readouterr().err
    deeper = {"model_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}}
    assert train(data, tmp_path, resume="auto", **deeper) == 1
    assert "--resume: model_kwargs was {'depth': 2," in capsys.readouterr().err


def test_a_run_and_its_evaluation_share_the_fraction_for_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "data", train=12)
    data = (tmp_path / "data/train").rename(tmp_path / "photos")
    assert train(data, tmp_path, epochs=1) == 1
    assert "--val-fraction 0.2" in capsys.readouterr().err
    assert train(data, tmp_path, epochs=1, val_fraction=0.4) == 0
    flags = ["-j", "0", "--val-fraction", "0.4", "--json", str(tmp_path / "eval.json")]
    assert main(["eval", str(tmp_path / "run"), str(data), *flags]) == 0
    found, row = json.loads((tmp_path / "eval.json").read_text()), read_summary(tmp_path / "run")[-1]
    assert (found["top1"], found["loss"]) == (float(row["eval_top1"]), float(row["eval_loss"]))
    assert f"{36 - found['num_images']} training images, {found['num_images']} val" in capsys.readouterr().out


def test_a_dry_run_checks_what_it_would_resume_and_the_optimizer(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linvit.training.dry_run.show_plan", lambda *arguments: None)
    assert train(data, tmp_path, dry_run=True, resume="nowhere") == 1
    assert "--resume nowhere: there is no such file or folder" in capsys.readouterr().err
    assert train(data, tmp_path, dry_run=True, opt_kwargs={"nosuch": 1}) == 1
    assert "nosuch" in capsys.readouterr().err
    assert train(data, tmp_path, epochs=1) == 0
    before = sorted(tmp_path.rglob("*"))
    assert train(data, tmp_path, dry_run=True, resume="auto") == 0
    assert train(data, tmp_path, dry_run=True, resume="auto", eval_metric="loss") == 1
    assert "--resume: eval_metric was top1 and is now loss" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
